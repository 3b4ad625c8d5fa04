/* What lies between two attentions of a LLaMA, for a few rows (tokens), on a CPU: output projection, RMSNorm, MLP,
 * RMSNorm, and the next layer's queries, keys and values with their rotary embedding.
 *
 * With so few rows a product is nothing but reading its weights, and a core's hardware prefetcher, which stops at the
 * end of every page and of every matrix, gets half of the memory's bandwidth at best. So weights are asked for ahead,
 * across rows and across products. Weights and what attention sees are bf16 or fp32, all in between is fp32.
 *
 * decode_kernel.py calls it and owns all memory. */
#include <math.h>
#include <omp.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* Tokens at most; rows of a weight that are multiplied together; floats of a vector; bytes that memory gives at once. */
enum { MOST_ROWS = 4, ROWS = 8, LANES = 8, LINE = 64 };

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));

typedef struct {
    int32_t hidden, intermediate, heads, kv_heads, head_size, is_bf16;
    float epsilon;
} Geometry;

typedef struct { /* weights [out, in], norms in fp32; without `down` nothing comes before, without `qkv` nothing after */
    const void *attention_out, *gate_up, *down, *qkv;
    const float *attention_norm, *next_norm;
} Layer;

typedef struct {
    int64_t rows, threads;    /* MOST_ROWS at most; as many as `scratch` has room for */
    const int64_t *positions; /* [rows] */
    const void *cos_sin;      /* [positions, head_size]: cosines, then sines */
    const void *attended;     /* [rows, heads * head_size] */
    float *residual;          /* [rows, hidden], read and written */
    float *activated;         /* [rows, intermediate] */
    void *projected;          /* [rows, (heads + 2 * kv_heads) * head_size], written: queries, keys, values */
    void *states;             /* [rows, hidden], written after the last layer */
    float *scratch;           /* [threads, rows, the wider one of hidden and heads * head_size] */
} Step;

typedef struct {
    int64_t first, end; /* blocks of ROWS rows of a weight */
} Part;

#define INLINE static inline __attribute__((always_inline))

INLINE float get(const void *values, size_t index, int is_bf16)
{
    if (!is_bf16)
        return ((const float *)values)[index];
    uint32_t bits = (uint32_t)((const uint16_t *)values)[index] << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE void set(void *values, size_t index, float value, int is_bf16)
{
    if (!is_bf16) {
        ((float *)values)[index] = value;
        return;
    }
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    /* The nearest, of two equally near ones the even one; NaN stays NaN. */
    ((uint16_t *)values)[index] = value != value ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

/* Where value i of a row lies in the order that `multiply` wants: of every 2 * LANES the even ones come first where
 * weights are bf16, because two of these in a word are two floats when the other one is shifted or masked away. */
INLINE int place(int i, int is_bf16)
{
    enum { GROUP = 2 * LANES };
    return is_bf16 ? i / GROUP * GROUP + i % 2 * LANES + i % GROUP / 2 : i;
}

/* sums[row][r] = weights[r] . x[row] for ROWS rows of weights that lie one behind the other, while `ahead`, which is
 * multiplied next, comes from memory. */
INLINE void multiply_by(const char *weights, int width, const float *x, int64_t rows, const char *ahead, int is_bf16,
                        float sums[][ROWS])
{
    const int bytes = is_bf16 ? 2 : 4;
    const size_t stride = (size_t)width * bytes;
    for (int64_t row = 0; row < rows; row++, x += width) {
        floats sum[ROWS] = {0};
        for (size_t at = 0; at < stride; at += sizeof(words)) {
            floats factor, other;
            memcpy(&factor, x + at / bytes, sizeof factor);
            if (is_bf16)
                memcpy(&other, x + at / bytes + LANES, sizeof other);
            if (row == 0)
                for (size_t next = 0; next < ROWS * sizeof(words); next += LINE)
                    __builtin_prefetch(ahead + at * ROWS + next, 0, 2);
            for (int r = 0; r < ROWS; r++) {
                words weight;
                memcpy(&weight, weights + r * stride + at, sizeof weight);
                sum[r] += (floats)(is_bf16 ? weight << 16 : weight) * factor;
                if (is_bf16)
                    sum[r] += (floats)(weight & 0xffff0000) * other;
            }
        }
        for (int r = 0; r < ROWS; r++) {
            float total = 0;
#pragma omp simd reduction(+ : total)
            for (int lane = 0; lane < LANES; lane++)
                total += sum[r][lane];
            sums[row][r] = total;
        }
    }
}

typedef void Multiply(const char *weights, int width, const float *x, int64_t rows, const char *ahead,
                      float sums[][ROWS]);

#define VARIANT(name, is_bf16)                                                                                    \
    static void name(const char *weights, int width, const float *x, int64_t rows, const char *ahead,             \
                     float sums[][ROWS])                                                                          \
    {                                                                                                             \
        multiply_by(weights, width, x, rows, ahead, is_bf16, sums);                                               \
    }

VARIANT(multiply_fp32, 0)
VARIANT(multiply_bf16, 1)
#if defined __x86_64__ /* vectors wider than AVX2's gain nothing: memory is no faster */
__attribute__((target("avx2,fma"))) VARIANT(multiply_fp32_avx2, 0)
__attribute__((target("avx2,fma"))) VARIANT(multiply_bf16_avx2, 1)
#define HAS_AVX2 (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
#else
#define multiply_fp32_avx2 multiply_fp32
#define multiply_bf16_avx2 multiply_bf16
#define HAS_AVX2 0
#endif

INLINE void multiply(const char *weights, int width, const float *x, int64_t rows, const char *ahead, int is_bf16,
                     float sums[][ROWS])
{
    Multiply *plain = is_bf16 ? multiply_bf16 : multiply_fp32, *avx2 = is_bf16 ? multiply_bf16_avx2 : multiply_fp32_avx2;
    (HAS_AVX2 ? avx2 : plain)(weights, width, x, rows, ahead, sums);
}

INLINE const char *block(const void *weights, int64_t number, int width, int is_bf16)
{
    return (const char *)weights + (size_t)number * ROWS * width * (is_bf16 ? 2 : 4);
}

INLINE Part part_of_thread(int64_t blocks)
{
    const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
    return (Part){blocks * thread / threads, blocks * (thread + 1) / threads};
}

/* sums[row][i] += weights[i] . x[row] for the rows i of `part`. after: what is multiplied next. */
static void add_product(float *sums, int sums_width, const void *weights, int width, const float *x, int64_t rows,
                        Part part, const char *after, int is_bf16)
{
    float products[MOST_ROWS][ROWS];
    for (int64_t n = part.first; n < part.end; n++) {
        multiply(block(weights, n, width, is_bf16), width, x, rows,
                 n + 1 < part.end ? block(weights, n + 1, width, is_bf16) : after, is_bf16, products);
        for (int64_t row = 0; row < rows; row++)
            for (int r = 0; r < ROWS; r++)
                sums[row * sums_width + n * ROWS + r] += products[row][r];
    }
}

/* These write rows in the order that `multiply` wants. */
static void to_floats(float *result, const void *values, int64_t rows, int width, int is_bf16)
{
    for (int64_t row = 0; row < rows; row++)
        for (int i = 0; i < width; i++)
            result[row * width + place(i, is_bf16)] = get(values, row * width + i, is_bf16);
}

static void normalise(float *result, const float *x, const float *weight, int64_t rows, const Geometry *g)
{
    for (int64_t row = 0; row < rows; row++, x += g->hidden, result += g->hidden) {
        float squares = 0;
#pragma omp simd reduction(+ : squares)
        for (int i = 0; i < g->hidden; i++)
            squares += x[i] * x[i];
        const float scale = 1 / sqrtf(squares / g->hidden + g->epsilon);
        for (int i = 0; i < g->hidden; i++)
            result[place(i, g->is_bf16)] = x[i] * scale * weight[i];
    }
}

/* silu(gates) * ups */
static void activate(const Geometry *g, const Layer *layer, const Step *step, const float *x, Part part,
                     const char *after)
{
    const int hidden = g->hidden, is_bf16 = g->is_bf16;
    float gates[MOST_ROWS][ROWS], ups[MOST_ROWS][ROWS];
    for (int64_t n = part.first; n < part.end; n++) {
        const char *gate = block(layer->gate_up, n, hidden, is_bf16);
        const char *up = block(layer->gate_up, g->intermediate / ROWS + n, hidden, is_bf16);
        multiply(gate, hidden, x, step->rows, up, is_bf16, gates);
        multiply(up, hidden, x, step->rows, n + 1 < part.end ? block(gate, 1, hidden, is_bf16) : after, is_bf16, ups);
        for (int64_t row = 0; row < step->rows; row++)
            for (int r = 0; r < ROWS; r++)
                step->activated[row * g->intermediate + place(n * ROWS + r, is_bf16)] =
                    gates[row][r] / (1 + expf(-gates[row][r])) * ups[row][r];
    }
}

/* Queries, keys and values. The rotary embedding turns each value of a head's first half with its partner in the second
 * one: the blocks of both are computed together. part: such pairs of blocks. */
static void project(const Geometry *g, const Layer *layer, const Step *step, const float *x, Part part)
{
    const int hidden = g->hidden, is_bf16 = g->is_bf16, half = g->head_size / 2, pairs = half / ROWS; /* of a head */
    float lows[MOST_ROWS][ROWS], highs[MOST_ROWS][ROWS];
    for (int64_t n = part.first; n < part.end; n++) {
        const int64_t head = n / pairs, at = n % pairs * ROWS, is_value = head >= g->heads + g->kv_heads;
        const char *low = block(layer->qkv, head * 2 * pairs + n % pairs, hidden, is_bf16);
        const char *high = block(low, pairs, hidden, is_bf16);
        multiply(low, hidden, x, step->rows, high, is_bf16, lows);
        multiply(high, hidden, x, step->rows, block((n + 1) % pairs ? low : high, 1, hidden, is_bf16), is_bf16, highs);
        for (int64_t row = 0; row < step->rows; row++)
            for (int r = 0; r < ROWS; r++) {
                const size_t angle = (size_t)step->positions[row] * g->head_size + at + r;
                const float cosine = is_value ? 1 : get(step->cos_sin, angle, is_bf16);
                const float sine = is_value ? 0 : get(step->cos_sin, angle + half, is_bf16);
                const size_t to = (row * (g->heads + 2 * g->kv_heads) + head) * g->head_size + at + r;
                set(step->projected, to, lows[row][r] * cosine - highs[row][r] * sine, is_bf16);
                set(step->projected, to + half, highs[row][r] * cosine + lows[row][r] * sine, is_bf16);
            }
    }
}

/* One thread's share. Each normalises for itself: to wait for another one would take longer. */
static void between(const Geometry *g, const Layer *layer, const Step *step)
{
    const int hidden = g->hidden, middle = g->intermediate, queries = g->heads * g->head_size, is_bf16 = g->is_bf16;
    const Part rows = part_of_thread(hidden / ROWS), ups = part_of_thread(middle / ROWS);
    const Part pairs = part_of_thread((int64_t)(g->heads + 2 * g->kv_heads) * g->head_size / (2 * ROWS));
    float *x = step->scratch + omp_get_thread_num() * step->rows * (hidden > queries ? hidden : queries);

    if (layer->down) {
        to_floats(x, step->attended, step->rows, queries, is_bf16);
        add_product(step->residual, hidden, layer->attention_out, queries, x, step->rows, rows,
                    block(layer->gate_up, ups.first, hidden, is_bf16), is_bf16);
#pragma omp barrier
        normalise(x, step->residual, layer->attention_norm, step->rows, g);
        activate(g, layer, step, x, ups, block(layer->down, rows.first, middle, is_bf16));
#pragma omp barrier
        add_product(step->residual, hidden, layer->down, middle, step->activated, step->rows, rows,
                    block(layer->qkv ? layer->qkv : layer->down, pairs.first, hidden, is_bf16), is_bf16);
#pragma omp barrier
    }
    normalise(x, step->residual, layer->next_norm, step->rows, g);
    if (layer->qkv)
        project(g, layer, step, x, pairs);
    else if (omp_get_thread_num() == 0)
        for (int64_t row = 0; row < step->rows; row++)
            for (int i = 0; i < hidden; i++)
                set(step->states, row * hidden + i, x[row * hidden + place(i, is_bf16)], is_bf16);
}

void m3d_between_attentions(const Geometry *g, const Layer *layer, const Step *step)
{
#pragma omp parallel num_threads(step->threads)
    between(g, layer, step);
}

int m3d_most_rows(void) { return MOST_ROWS; }

/* Bytes of all structures, by which a caller sees that it was written for this version. */
int m3d_structures(void) { return sizeof(Geometry) + sizeof(Layer) + sizeof(Step); }

/* result[row] = weights . x[row] for `blocks` blocks of weights, all in one type. scratch: [rows, width] */
void m3d_product(const void *weights, int32_t width, int64_t blocks, const void *x, int64_t rows, void *result,
                 int32_t is_bf16, float *scratch, int64_t threads)
{
    to_floats(scratch, x, rows, width, is_bf16);
#pragma omp parallel num_threads(threads)
    {
        const Part part = part_of_thread(blocks);
        float products[MOST_ROWS][ROWS];
        for (int64_t n = part.first; n < part.end; n++) {
            multiply(block(weights, n, width, is_bf16), width, scratch, rows, block(weights, n + 1, width, is_bf16),
                     is_bf16, products);
            for (int64_t row = 0; row < rows; row++)
                for (int r = 0; r < ROWS; r++)
                    set(result, (row * blocks + n) * ROWS + r, products[row][r], is_bf16);
        }
    }
}
