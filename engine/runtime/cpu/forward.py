"""LLaMA's layers on a CPU: vLLM's kernels, called without what lies between them in vLLM.

vLLM reaches each kernel through modules, registered operations and their dispatchers, which trace, compile and know
all kinds of hardware. On a CPU, uncompiled, a token of a small model takes longer there than in the kernels, and the
threads that wait for the next product fall asleep meanwhile. The pass below calls the same kernels in the same order,
and for RMSNorm one that vLLM builds for CPUs but uses on GPUs only.

In steps of few rows, which is decoding, a kernel of our own does all but the attention, where it fits and is there (see
`decode_kernel`).

Written against vLLM 0.32 (vllm/model_executor/models/llama.py, vllm/v1/attention/backends/cpu_attn.py). Models that it
does not fit keep vLLM's own pass, and `seg_state_check` compares the two at every start.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from engine.runtime.acceleration import Pass
from engine.runtime.cpu import decode_kernel
from engine.runtime.cpu.decode_kernel import DecodeKernel, LayerWeights

_ROW = 8  # the kernels of RMSNorm take rows of a multiple of this
_ROWS_AT_ONCE = 512
# Of a model's layers. Of a larger model's token the passes below save less than a tenth: at 12 GB/s it takes 250 ms or
# more to read the weights, and what vLLM does beside that took 25 ms (benchmarks/README.md).
_MOST_BYTES = 3 << 30
_UNSCALED = 1.0, 1.0, "auto"  # keys and values in the cache, and its type


def install_on(runner, furthest: Pass) -> Pass:
    """Give the model of vLLM's `runner` the furthest pass that fits, `furthest` at most, and say which."""
    if furthest is Pass.VLLM or runner.device.type != "cpu" or not runner.model_config.enforce_eager:
        return Pass.VLLM
    model: Any = getattr(runner.model, "model", None)
    if not _fits(model) or _layer_bytes(model, runner.model_config.dtype) > _MOST_BYTES:
        return Pass.VLLM
    norms = Norms.of_vllm()
    if not norms.round(runner.model_config.dtype):
        return Pass.VLLM
    kernel = _kernel_of(runner.model, runner.model_config.dtype) if furthest is Pass.DECODE_KERNEL else None
    model.forward = _forward_of(model, norms, kernel)
    if kernel is None:
        return Pass.DIRECT
    _use_on_head(runner.model.lm_head, kernel)
    return Pass.DECODE_KERNEL


@dataclass(frozen=True)
class Norms:
    """plain(out, x, weight, epsilon), and added(x, residual, weight, epsilon), which writes to both."""

    plain: Callable
    added: Callable

    @classmethod
    def of_vllm(cls) -> Norms:
        return cls(torch.ops._C.rms_norm.default, torch.ops._C.fused_add_rms_norm.default)

    def round(self, dtype: torch.dtype) -> bool:
        """Whether results are the nearest values of `dtype`: for processors without bf16, vLLM's kernels cut its digits
        off, and over a model's layers that adds up to five times the error of rounding."""
        x, other = torch.randn(2, 512, generator=torch.Generator().manual_seed(0)).to(dtype).split(1)
        ones, total = torch.ones_like(x[0]), x.float() + other.float()
        normed, added, residual = torch.empty_like(x), x.clone(), other.clone()
        self.plain(normed, x, ones, 0.0)
        self.added(added, residual, ones, 0.0)
        return all(
            torch.allclose(result.float(), exact, rtol=times * torch.finfo(dtype).eps + 1e-5, atol=1e-7)
            # Rounding is off by half of eps at most, cutting by all of it. `added` is rounded twice.
            for result, exact, times in (
                (normed, functional.rms_norm(x.float(), ones.shape), 0.6),
                (residual, total, 0.6),
                (added, functional.rms_norm(total, ones.shape), 1.2),
            )
        )


def _fits(model) -> bool:
    """Whether it consists of LLaMA's own layers (Phi-3 has them, too), without biases, whole in this process and not
    quantised. A family that vLLM has another class for keeps vLLM's own pass."""
    from vllm.model_executor.layers.attention.attention import Attention
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaMLP, LlamaModel
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

    def attends_plainly(impl) -> bool:
        return type(impl) is CPUAttentionBackendImpl and impl.sinks is None and impl.kv_cache_dtype == "auto"

    def fits(layer) -> bool:
        if type(layer) is not LlamaDecoderLayer:
            return False
        attention, mlp = layer.self_attn, layer.mlp
        products = (attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj)
        return (
            type(attention) is LlamaAttention
            and type(mlp) is LlamaMLP
            and type(attention.attn) is Attention
            and attends_plainly(attention.attn.impl)
            and layer.hidden_size % _ROW == 0
            and all(
                type(one.quant_method) is UnquantizedLinearMethod and one.tp_size == 1 and one.bias is None
                for one in products
            )
        )

    return type(model) is LlamaModel and all(map(fits, model.layers))


def _layer_bytes(model, dtype: torch.dtype) -> int:
    """Of the weights of all layers."""
    return dtype.itemsize * sum(
        one.input_size * one.output_size
        for layer in model.layers
        for one in (layer.self_attn.qkv_proj, layer.self_attn.o_proj, layer.mlp.gate_up_proj, layer.mlp.down_proj)
    )


def _kernel_of(whole, dtype: torch.dtype) -> DecodeKernel | None:
    """For steps of few rows of the `whole` model, output layer included; None where it is absent or does not fit."""
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    model, head = whole.model, whole.lm_head
    attention, mlp = model.layers[0].self_attn, model.layers[0].mlp
    rotary = attention.rotary_emb
    geometry = decode_kernel.KernelShape(
        model.layers[0].hidden_size,
        mlp.down_proj.input_size,
        attention.num_heads,
        attention.num_kv_heads,
        attention.head_dim,
        model.norm.variance_epsilon,
        dtype,
    )
    if not (
        decode_kernel.library()
        and geometry.fits()
        and _layer_bytes(model, dtype) <= decode_kernel.MOST_BYTES
        and getattr(type(rotary), "forward_cpu", None) is RotaryEmbedding.forward_cpu
        and rotary.is_neox_style
        and rotary.cos_sin_cache.shape[1] == attention.head_dim
        and type(head.quant_method) is UnquantizedEmbeddingMethod
        and head.weight.dtype is dtype
        and head.weight.is_contiguous()
        and len(head.weight) % decode_kernel.BLOCK == 0
    ):
        return None
    return DecodeKernel(
        geometry,
        [
            LayerWeights(
                layer.input_layernorm.weight.data,
                _weight(layer.self_attn.qkv_proj, dtype),
                _weight(layer.self_attn.o_proj, dtype),
                layer.post_attention_layernorm.weight.data,
                _weight(layer.mlp.gate_up_proj, dtype),
                _weight(layer.mlp.down_proj, dtype),
            )
            for layer in model.layers
        ],
        model.norm.weight.data,
        rotary.cos_sin_cache,
    )


def _use_on_head(head, kernel: DecodeKernel) -> None:
    """Give the output layer the kernel, too; its weight is whole, as prompts may be embedded with it."""
    own = head.cpu_linear

    def multiply(x, weight, bias):
        if len(x) > kernel.most_rows or bias is not None:
            return own(x, weight, bias)
        return kernel.product(x, weight)

    head.cpu_linear = multiply


def _weight(linear, dtype: torch.dtype) -> torch.Tensor:
    """[out, in]. vLLM keeps it as its kernel wants it only: the product with an identity matrix has it, exactly."""
    identity = torch.eye(linear.input_size, dtype=dtype)
    return torch.cat([_product(linear)(rows) for rows in identity.split(_ROWS_AT_ONCE)]).T.contiguous()


def _forward_of(model, norms: Norms, kernel: DecodeKernel | None) -> Callable:
    from vllm.forward_context import get_forward_context

    own = model.forward
    layers = list(map(_Layer, model.layers))
    last_norm = _of_norm(model.norm)

    def forward(input_ids, positions, intermediate_tensors, inputs_embeds=None):
        context = get_forward_context()
        if not isinstance(context.attn_metadata, dict):  # no requests: vLLM tries the model out
            return own(input_ids, positions, intermediate_tensors, inputs_embeds)
        embedded = model.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        if kernel is not None and len(embedded) <= kernel.most_rows:
            return kernel.run(embedded, positions, lambda number, *ends: layers[number].attend(context, *ends))
        residual = embedded.clone()  # the embeddings lie in a buffer of vLLM's, and the sums are made in place
        x = torch.empty_like(residual)
        norms.plain(x, residual, *layers[0].input_norm)
        for number, layer in enumerate(layers):
            if number:
                norms.added(x, residual, *layer.input_norm)
            x = layer.attention(x, positions, context)
            norms.added(x, residual, *layer.attention_norm)
            x = layer.mlp(x)
        norms.added(x, residual, *last_norm)
        return x

    return forward


class _Layer:
    """One decoder layer, its parts at hand. x: rows of the step's tokens, each as wide as the model."""

    def __init__(self, layer):
        attention, mlp = layer.self_attn, layer.mlp
        self.input_norm, self.attention_norm = map(_of_norm, (layer.input_layernorm, layer.post_attention_layernorm))
        self.qkv, self.out, self.gate_up, self.down = map(
            _product, (attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj)
        )
        self.rotary = attention.rotary_emb.forward
        self.sizes = [attention.q_size, attention.kv_size, attention.kv_size]
        self.attn, self.impl, self.name = attention.attn, attention.attn.impl, attention.attn.layer_name
        blocks, heads, rows, _ = self.attn.kv_cache.shape
        self.cache = self.attn.kv_cache.view(blocks, heads, 2 * rows, -1).chunk(2, 2)  # of keys and of values

    def attention(self, x: torch.Tensor, positions: torch.Tensor, context) -> torch.Tensor:
        attn = self.attn
        query, key, value = self.qkv(x).split(self.sizes, -1)
        query, key = self.rotary(positions, query, key)
        query = query.view(-1, attn.num_heads, attn.head_size)
        key, value = key.view(-1, attn.num_kv_heads, attn.head_size), value.view(-1, attn.num_kv_heads, attn.head_size)
        output = torch.empty_like(query, memory_format=torch.contiguous_format)
        self.attend(context, query, key, value, output)
        return self.out(output.view(len(output), -1))

    def attend(self, context, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor) -> None:
        """All [R, heads, head size]; keys and values go into the cache, the result into `out`."""
        kernels, impl, step = torch.ops._C, self.impl, context.attn_metadata[self.name]
        kernels.cpu_attn_reshape_and_cache.default(
            key, value, *self.cache, context.slot_mapping[self.name], self.attn.isa, *_UNSCALED
        )
        kernels.cpu_attention_with_kv_cache.default(
            query,
            *self.cache,
            out,
            step.query_start_loc,
            step.seq_lens,
            impl.scale,
            step.causal,
            impl.alibi_slopes,
            impl.sliding_window,
            step.block_table,
            impl.logits_soft_cap,
            step.scheduler_metadata,
            None,
            step.dynamic_causal,
            *_UNSCALED,
        )

    def mlp(self, x: torch.Tensor) -> torch.Tensor:
        gate, factor = self.gate_up(x).chunk(2, -1)
        return self.down(functional.silu(gate).mul_(factor))


def _of_norm(norm) -> tuple[torch.Tensor, float]:
    """What the kernels of RMSNorm take."""
    return norm.weight.data, norm.variance_epsilon


def _product(linear) -> Callable[[torch.Tensor], torch.Tensor]:
    """x @ weight.T by the kernel that vLLM has chosen for this weight."""
    multiply, weight = linear.cpu_linear, linear.weight
    return lambda x: multiply(x, weight, None)
