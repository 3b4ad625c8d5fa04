"""The tensors that cross a model boundary: names, dtypes, shapes, ranges, axis order.

This is the only place that says so: the configurations in model_repository/ are written from it
(`python -m engine.server.repository`), export and runtime take the names from here. CONTRIBUTING.md says how to add a
tensor.

Legend of the dimensions: D H W axes of the model volume (slices, rows, columns), N visual tokens, H_llm width of the
language model, E width of the segmentation encoder, K number of `[SEG]` tokens in an answer, S of its masks, T texts. A
dimension that depends on the checkpoint is -1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from engine.errors import InvalidInput

# NumPy's types of tensors that are no texts, as they cross the wire.
DTYPES = {"BOOL": "?", "UINT8": "u1", "INT32": "<i4", "INT64": "<i8", "FP32": "<f4", "FP64": "<f8"}

MAX_PART_BYTES = 16 << 20  # of a scan in one request: taken in within some milliseconds, while other requests wait


@dataclass(frozen=True, eq=False)
class Tensor(str):
    """One tensor of a model: Triton's dtype name, dims without the batch axis, and what it means.

    It is its own name, a text, so that inputs and outputs are mappings by tensor: `outputs[TEXT]`.

    max_bytes: of an input's text, encoded; 0 where the models that read it have a limit.
    """

    name: str
    dtype: str
    dims: tuple[int, ...]
    doc: str
    optional: bool = False
    max_bytes: int = 0

    def __new__(cls, name: str, *_: Any, **__: Any) -> Tensor:
        return super().__new__(cls, name)

    def too_long(self, size: int) -> InvalidInput | None:
        """The error for a text of more bytes than are taken."""
        if not self.max_bytes or size <= self.max_bytes:
            return None
        return InvalidInput(
            f"the {self.name.lower()} has {size:,} bytes, at most {self.max_bytes:,} are taken: shorten it"
        )


@dataclass(frozen=True)
class Model:
    """One model of the repository. `max_batch_size` 0 means that there is no batch axis.

    steps: of an ensemble, the models that it runs, in this order; a step's input comes from the step before it that
    writes a tensor of this name, else from the ensemble's input. public: clients may call it.
    """

    name: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    doc: str
    max_batch_size: int = 0
    decoupled: bool = False
    steps: tuple[str, ...] = ()
    public: bool = False

    @property
    def ensemble(self) -> bool:
        return bool(self.steps)

    @property
    def input_names(self) -> tuple[str, ...]:
        return tuple(t.name for t in self.inputs)

    @property
    def output_names(self) -> tuple[str, ...]:
        return tuple(t.name for t in self.outputs)


def encoded_texts(tensor: Tensor, value: Any) -> list[bytes]:
    """The texts of a BYTES input, given as one or as a sequence."""
    texts = [value] if isinstance(value, (str, bytes)) else list(value)
    try:
        encoded = [text.encode() if isinstance(text, str) else text for text in texts]
    except UnicodeEncodeError:
        raise InvalidInput(f"the {tensor.name.lower()} is not valid Unicode text") from None
    if error := tensor.too_long(sum(map(len, encoded))):
        raise error
    return encoded


# --- a scan and its study --------------------------------------------------------------------------------------------
VOLUME = Tensor(
    "VOLUME",
    "UINT8",
    (-1,),
    "bytes of a scan file: NIfTI, NRRD, MetaImage, MGH, npy or a zipped DICOM series",
    optional=True,
)
AFFINE_IN = Tensor(
    "AFFINE", "FP64", (4, 4), "voxel-to-world of an npy scan, mm, RAS+ as in NIfTI; files bring theirs", optional=True
)
PRESET = Tensor(
    "PRESET", "BYTES", (1,), "preprocessing preset, one of engine.volume.PRESETS; default auto", optional=True
)
CROP = Tensor(
    "CROP",
    "FP64",
    (6,),
    "region of the scan that the model sees, in the order of BOXES: voxels of the scan's array axes "
    "(i0,j0,k0,i1,j1,k1), half-open, or mm (RAS+), see CROP_UNIT; default the whole scan",
    optional=True,
)
CROP_UNIT = Tensor("CROP_UNIT", "BYTES", (1,), "of CROP: voxels or mm; default voxels", optional=True)
STUDY_IN = Tensor("STUDY", "BYTES", (1,), "handle of a scan that the server holds, instead of VOLUME", optional=True)
UPLOAD = Tensor(
    "UPLOAD",
    "BYTES",
    (1,),
    "name of a scan that comes in several requests, of which VOLUME is the next part, "
    "at most 16 MiB; 1 to 64 characters, random, so that no other client has it; all parts come over one connection, "
    "the other inputs with the last part",
    optional=True,
)
UPLOAD_RANGE = Tensor(
    "UPLOAD_RANGE", "INT64", (2,), "of a part: where it begins in the file, and the file's size, bytes", optional=True
)
FORGET = Tensor("FORGET", "BOOL", (1,), "drop the study that STUDY names, with all that was computed", optional=True)
DESCRIBE = Tensor("DESCRIBE", "BOOL", (1,), "only tell what answers, in MODEL_INFO; no scan is named", optional=True)
SEGMENT_HINT = Tensor("SEGMENT_HINT", "BOOL", (1,), "encode for segmentation early, beside decoding", optional=True)
STUDY = Tensor(
    "STUDY",
    "BYTES",
    (1,),
    "study handle: 64 hex digits, BLAKE3 of content, affine, preset, crop and model with a key of this server's; empty "
    "after a part of an upload that is not the last, and after FORGET and DESCRIBE",
)
# An ensemble's tensors share one name space, so its output cannot be called as its input.
STUDY_HANDLE = Tensor("STUDY_HANDLE", "BYTES", (1,), "STUDY as an ensemble returns it")
STUDY_INFO = Tensor(
    "STUDY_INFO",
    "BYTES",
    (1,),
    "JSON, see engine.api.StudyInfo; empty as STUDY is",
)
MODEL_INFO = Tensor("MODEL_INFO", "BYTES", (1,), "JSON, see engine.api.EngineInfo; empty unless DESCRIBE is true")

# --- a question and its answer ---------------------------------------------------------------------------------------
QUESTION = Tensor("QUESTION", "BYTES", (1,), "UTF-8 text that follows the image tokens")
HISTORY = Tensor(
    "HISTORY",
    "BYTES",
    (1,),
    "the turns before QUESTION: JSON, a list of [role, text], see engine.prompt.turns; default none",
    optional=True,
    max_bytes=1 << 20,
)
SAMPLING = Tensor(
    "SAMPLING",
    "BYTES",
    (1,),
    "JSON, see engine.sampling.Sampling; default greedy",
    optional=True,
    max_bytes=1 << 18,
)
STREAM = Tensor("STREAM", "BOOL", (1,), "true: one response per step; default: one response in all", optional=True)
TEXT = Tensor("TEXT", "BYTES", (1,), "UTF-8 text since the last response")
TOKEN_IDS = Tensor("TOKEN_IDS", "INT32", (-1,), "token ids since the last response, with a final EOS if there is one")
FINISH_REASON = Tensor("FINISH_REASON", "BYTES", (1,), "empty until the last response, then stop or length")
BOXES = Tensor(
    "BOXES",
    "FP64",
    (-1, 6),
    "last response: boxes of the answer, voxel indices of the scan's array axes (i0,j0,k0,i1,j1,k1)",
)
ANSWER_INFO = Tensor(
    "ANSWER_INFO",
    "BYTES",
    (1,),
    "last response: JSON, see engine.api.AnswerInfo, and, where there is something to say, under details "
    "engine.api.AnswerDetails; else empty",
)
SEG_STATES = Tensor(
    "SEG_STATES", "FP32", (-1, -1), "last response: K x H_llm states that predicted the [SEG] tokens; else 0 rows"
)
SEG_SPANS = Tensor(
    "SEG_SPANS",
    "INT64",
    (-1, 2),
    "last response: K x where each [SEG] stands in the answer's text, (start, end) in characters; else 0 rows",
)

# --- masks -----------------------------------------------------------------------------------------------------------
MERGE = Tensor(
    "MERGE",
    "BYTES",
    (1,),
    "reference (default): one mask of all [SEG] of an answer; each: one mask for each of them",
    optional=True,
)
RETURN_LOGITS = Tensor("RETURN_LOGITS", "BOOL", (1,), "also return the logits; default false", optional=True)
MASK = Tensor(
    "MASK",
    "UINT8",
    (-1,),
    "mask in the scan's own space: numpy.packbits of the C-ordered array; with MERGE each the union of all masks; "
    "empty without [SEG]",
)
MASK_SHAPE = Tensor("MASK_SHAPE", "INT64", (3,), "shape of the unpacked mask: the scan's own; 0 0 0 without [SEG]")
MASK_AFFINE = Tensor(
    "MASK_AFFINE", "FP64", (4, 4), "voxel-to-world of the mask: the scan's own, RAS+ mm; zeros without [SEG]"
)
MASK_HEADER = Tensor(
    "MASK_HEADER",
    "UINT8",
    (-1,),
    "the scan's NIfTI header without free text, for the mask's file; empty for other scans",
)
SEGMENT_MASKS = Tensor(
    "SEGMENT_MASKS",
    "UINT8",
    (-1, -1),
    "with MERGE each: S masks, each as MASK has it, in the order of SEG_STATES; else 0 x 0",
)
SEGMENT_SCORES = Tensor(
    "SEGMENT_SCORES",
    "FP32",
    (-1,),
    "S times the mean probability (sigmoid of the logits) of the model volume's voxels where it is above one half; NaN "
    "if there are none; S is 1 unless MERGE is each",
)
LOGITS = Tensor(
    "LOGITS",
    "FP32",
    (-1, -1, -1),
    "S*D x H x W logits in model space if asked for, one mask's behind the other's; else 0 x 0 x 0",
)

# --- retrieval -------------------------------------------------------------------------------------------------------
TEXTS = Tensor("TEXTS", "BYTES", (-1,), "T candidate texts, UTF-8")
SCORES = Tensor("SCORES", "FP32", (-1,), "T cosine similarities of scan and texts, in [-1, 1]")
TEXT_CUT = Tensor(
    "TEXT_CUT", "BOOL", (-1,), "T times whether a text has more tokens than TEXT_LIMIT; the rest is not read"
)
TEXT_LIMIT = Tensor("TEXT_LIMIT", "INT32", (1,), "most tokens of a text that M3D-CLIP reads, with [CLS] and [SEP]")
KNOWN_STUDY = replace(STUDY_IN, doc="handle of a scan that the server holds")
SOME_TEXTS = replace(TEXTS, optional=True)
SCAN_EMBEDDING = Tensor("SCAN_EMBEDDING", "FP32", (-1,), "E, L2-normalised; empty with TEXTS")
TEXT_EMBEDDINGS = Tensor("TEXT_EMBEDDINGS", "FP32", (-1, -1), "T x E, L2-normalised; empty with STUDY")

# --- compute models (static graphs) ----------------------------------------------------------------------------------
IMAGE = Tensor("IMAGE", "FP32", (1, -1, -1, -1), "1 x D x H x W model volume in [0, 1]")
VISUAL_TOKENS = Tensor("VISUAL_TOKENS", "FP32", (-1, -1), "N x H_llm, projected visual tokens")
FEATURES = Tensor("FEATURES", "FP32", (-1, -1, -1, -1), "E x D/p x H/p x W/p features of SegVol's encoder")
SEG_STATE = Tensor("SEG_STATE", "FP32", (-1,), "H_llm, a [SEG] state, or the mean of those of an answer")
MASK_LOGITS = Tensor("MASK_LOGITS", "FP32", (1, -1, -1, -1), "1 x D x H x W mask logits in model space")
IMAGE_EMBEDDING = Tensor("IMAGE_EMBEDDING", "FP32", (-1,), "L2-normalised CLS feature of the scan")
INPUT_IDS = Tensor("INPUT_IDS", "INT64", (-1,), "token ids, padded to the longest text of the batch")
ATTENTION_MASK = Tensor("ATTENTION_MASK", "INT64", (-1,), "1 for tokens, 0 for padding")
TEXT_EMBEDDING = Tensor("TEXT_EMBEDDING", "FP32", (-1,), "L2-normalised CLS feature of the text")

_SCAN = (VOLUME, AFFINE_IN, PRESET, CROP, CROP_UNIT, STUDY_IN)
_ANSWER = (TEXT, TOKEN_IDS, FINISH_REASON, BOXES, ANSWER_INFO)
_MASKS = (MASK, MASK_SHAPE, MASK_AFFINE, MASK_HEADER, SEGMENT_MASKS, SEGMENT_SCORES, LOGITS)
ENCODER_MAX_BATCH = 4  # `study` opens four scans at a time; a GPU is busy with four, and memory goes with the batch
HEAD_MAX_BATCH = 2  # `segmentation` draws two masks at a time
TEXT_MAX_BATCH = 16  # texts of 512 tokens by BERT-base on a CPU take 1.3 GB, 64 of them 4.8 GB

# Names of the models.
STUDY_MODEL = "study"
DECODER_MODEL = "decoder"
SEGMENTATION_MODEL = "segmentation"
RETRIEVAL_MODEL = "retrieval"
CHAT = "m3d_chat"
SEGMENT = "m3d_segment"
RETRIEVE = "m3d_retrieve"
VISION_ENCODER = "vision_encoder"
SEGMENTATION_ENCODER = "segmentation_encoder"
SEGMENTATION_HEAD = "segmentation_head"
CLIP_IMAGE_ENCODER = "clip_image_encoder"
CLIP_TEXT_ENCODER = "clip_text_encoder"

MODELS: dict[str, Model] = {
    m.name: m
    for m in (
        Model(
            STUDY_MODEL,
            (*_SCAN, UPLOAD, UPLOAD_RANGE, SEGMENT_HINT, FORGET, DESCRIBE),
            (STUDY, STUDY_INFO, MODEL_INFO),
            "decode, preprocess and encode a scan once; forget one; tell which model answers",
            public=True,
        ),
        Model(
            CHAT,
            (*_SCAN, QUESTION, HISTORY, SAMPLING, STREAM),
            (*_ANSWER, STUDY_HANDLE),
            "answer a question about a scan, streaming",
            decoupled=True,
            steps=(STUDY_MODEL, DECODER_MODEL),
            public=True,
        ),
        Model(
            SEGMENT,
            (*_SCAN, SEGMENT_HINT, QUESTION, HISTORY, SAMPLING, RETURN_LOGITS, MERGE),
            (*_ANSWER, SEG_SPANS, STUDY_HANDLE, *_MASKS),
            "answer a question and draw the masks it asks for",
            decoupled=True,
            steps=(STUDY_MODEL, DECODER_MODEL, SEGMENTATION_MODEL),
            public=True,
        ),
        Model(
            RETRIEVE,
            (*_SCAN, TEXTS),
            (SCORES, TEXT_CUT, TEXT_LIMIT, STUDY_HANDLE, STUDY_INFO),
            "rank texts against a scan",
            steps=(STUDY_MODEL, RETRIEVAL_MODEL),
            public=True,
        ),
        Model(VISION_ENCODER, (IMAGE,), (VISUAL_TOKENS,), "3D ViT and projector", ENCODER_MAX_BATCH),
        Model(SEGMENTATION_ENCODER, (IMAGE,), (FEATURES,), "SegVol's own 3D ViT", ENCODER_MAX_BATCH),
        # In Triton the step behind a decoupled model must get all inputs from it: STUDY, RETURN_LOGITS and MERGE pass
        # through.
        Model(
            DECODER_MODEL,
            (STUDY, QUESTION, HISTORY, SAMPLING, STREAM, RETURN_LOGITS, MERGE),
            (*_ANSWER, SEG_STATES, SEG_SPANS, STUDY, RETURN_LOGITS, MERGE),
            "the language model, vLLM",
            decoupled=True,
            public=True,
        ),
        Model(
            SEGMENTATION_MODEL,
            (STUDY, SEG_STATES, RETURN_LOGITS, MERGE),
            _MASKS,
            "nothing without a [SEG]; else head, then masks in the scan's own space",
            public=True,
        ),
        Model(
            SEGMENTATION_HEAD,
            (FEATURES, SEG_STATE),
            (MASK_LOGITS,),
            "seg projector and SegVol's mask decoder",
            HEAD_MAX_BATCH,
        ),
        Model(
            RETRIEVAL_MODEL,
            (KNOWN_STUDY, SOME_TEXTS),
            (SCORES, TEXT_CUT, TEXT_LIMIT, SCAN_EMBEDDING, TEXT_EMBEDDINGS),
            "cosine similarities of a scan and texts; given only one of them, its embeddings",
            public=True,
        ),
        Model(CLIP_IMAGE_ENCODER, (IMAGE,), (IMAGE_EMBEDDING,), "M3D-CLIP's 3D ViT, projected CLS", ENCODER_MAX_BATCH),
        Model(
            CLIP_TEXT_ENCODER,
            (INPUT_IDS, ATTENTION_MASK),
            (TEXT_EMBEDDING,),
            "M3D-CLIP's BERT, projected CLS",
            TEXT_MAX_BATCH,
        ),
    )
}

CHAT_MODELS = (STUDY_MODEL, VISION_ENCODER, DECODER_MODEL, CHAT)
SEGMENT_MODELS = (SEGMENTATION_ENCODER, SEGMENTATION_HEAD, SEGMENTATION_MODEL, SEGMENT)
DECODER_MODELS = (DECODER_MODEL, CHAT, SEGMENT)  # the language model, and what cannot work without it
CLIP_ENCODERS = (CLIP_IMAGE_ENCODER, CLIP_TEXT_ENCODER)
RETRIEVE_MODELS = (*CLIP_ENCODERS, RETRIEVAL_MODEL, RETRIEVE)
IMAGE_ENCODERS = (VISION_ENCODER, SEGMENTATION_ENCODER, CLIP_IMAGE_ENCODER)  # the graphs that take a volume
GRAPHS = (VISION_ENCODER, SEGMENTATION_ENCODER, SEGMENTATION_HEAD, CLIP_IMAGE_ENCODER, CLIP_TEXT_ENCODER)
