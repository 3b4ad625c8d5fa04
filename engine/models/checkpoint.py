"""Reading and writing checkpoints in the published layout, strictly.

A checkpoint is a folder (or a Hugging Face id, see `hub`) with config.json, weights as .safetensors or .bin, sharded or
not, and a tokenizer; `layout` says which files are read. A folder whose config.json names a `base_model` holds only
what was trained on top of it: see `base`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Set
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from engine.errors import CheckpointError
from engine.models import hub, layout
from engine.models.base import compose, load_text_encoder, text_encoder_folder
from engine.models.clip import M3DClip
from engine.models.config import ClipConfig, LamedConfig
from engine.models.lamed import Lamed
from engine.models.weights import Weights, file_names, listed
from engine.prompt import SEG_TOKEN

# Published key prefix -> attribute of Lamed; every other key belongs to the language model.
PARTS = {f"model.{part}.": f"{part}." for part in ("vision_tower", "mm_projector", "seg_module", "seg_projector")}
TEXT_ENCODER = "language_encoder."
_Model = TypeVar("_Model", bound=nn.Module)


def resolve(source: str | Path) -> Path:
    """The local folder of a checkpoint; `hub.locate` says its commit, too."""
    return hub.locate(source).folder


def read_config(folder: Path) -> dict:
    """config.json of a checkpoint folder. Raises CheckpointError if it is not a JSON object."""
    return layout.read_object(folder / layout.CONFIG)


def bytes_read(folder: Path) -> int:
    """Size of the files of a checkpoint that are read."""
    files = (folder / name for name in layout.files_read(file_names(folder), folder.joinpath))
    return sum(file.stat().st_size for file in files if file.is_file())


def eos_token_ids(folder: Path, values: dict) -> list[int] | None:
    """What ends an answer: generation_config.json's `eos_token_id`, which `generate` reads, else config.json's.

    Phi-3's and Llama-3's generation_config.json has ends that config.json lacks.

    Args:
        folder: of the checkpoint. values: its config.json.

    Returns:
        Token ids; None where neither file says it (then the tokenizer does).

    Raises:
        CheckpointError: generation_config.json cannot be read, or an end is no token of the vocabulary.
    """
    generation = folder / layout.GENERATION_CONFIG
    configured = layout.read_object(generation).get("eos_token_id") if generation.is_file() else None
    found = values.get("eos_token_id") if configured is None else configured
    if found is None:
        return None
    ends, vocabulary = found if isinstance(found, list) else [found], values.get("vocab_size")
    if not isinstance(vocabulary, int):
        return None  # LamedConfig says so
    if not ends or any(type(token) is not int or not 0 <= token < vocabulary for token in ends):
        name = generation.name if configured is not None else layout.CONFIG
        raise CheckpointError(f"{folder / name}: eos_token_id {found!r} is no token of the {vocabulary} that there are")
    return ends


def sha256(folder: Path) -> str:
    """SHA-256 over names and contents of the files of a checkpoint that are read (`layout.files_read`)."""
    digest = hashlib.sha256()
    for name in sorted(layout.files_read(file_names(folder), folder.joinpath)):
        file = folder / name
        if file.is_file():  # Weights.open reports missing shards
            digest.update(f"{name}\0{file.stat().st_size}\0".encode())
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def open_lamed(source: str | Path) -> tuple[LamedConfig, Weights, Path]:
    """Configuration and (lazy) weights of an M3D-LaMed checkpoint, and the folder that has its tokenizer.

    `seg_token_id` is taken from the tokenizer where config.json does not name it.
    """
    folder = resolve(source)
    values = read_config(folder)
    weights = compose(folder, values) if "base_model" in values else Weights.open(folder)
    if (ends := eos_token_ids(folder, values)) is not None:
        values = {**values, "eos_token_id": ends[0] if len(ends) == 1 else ends}
    config = LamedConfig.from_dict(values)
    if config.segmentation is not None and config.seg_token_id is None:
        tokenizer = load_tokenizer(folder)
        token_id = tokenizer.convert_tokens_to_ids(SEG_TOKEN)
        if token_id is None or token_id == tokenizer.unk_token_id:
            raise CheckpointError(f"{folder}: neither config.json (seg_token_id) nor the tokenizer knows {SEG_TOKEN}")
        config = LamedConfig.from_dict({**values, "seg_token_id": token_id})
    return config, weights, folder


def tokenizer_file(folder: Path) -> str | None:
    """The file that a checkpoint folder's tokenizer is read from; None without a tokenizer."""
    return next(
        (name for name in ("tokenizer.model", "tokenizer.json", "vocab.txt") if (folder / name).is_file()), None
    )


def has_tokenizer(folder: Path) -> bool:
    """Whether a checkpoint folder holds a tokenizer."""
    return tokenizer_file(folder) is not None


def load_tokenizer(folder: Path):
    """The tokenizer of a checkpoint, with the ids of the reference's slow one; nothing in the folder is executed.

    Args:
        folder: a checkpoint, or the language model's folder of an export.

    Returns:
        A fast transformers tokenizer. Where the folder has a sentencepiece model, that is what is read, as the
        reference reads it (`engine.models.tokenizer`); else tokenizer.json or vocab.txt.

    Raises:
        CheckpointError: there is none, or it cannot be read exactly.
    """
    from transformers import AutoTokenizer
    from transformers.utils import logging

    from engine.models import tokenizer as exact

    if not has_tokenizer(folder):
        raise CheckpointError(f"{folder} has no tokenizer (tokenizer.json, tokenizer.model or vocab.txt)")
    if (folder / exact.MODEL).is_file():
        return exact.from_sentencepiece(folder)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it warns that `lamed_llama` and the like are no model types of its own
    try:
        found = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        needed = exact.tokenizer_class(found.backend_tokenizer)
        return found if isinstance(found, needed) else needed.from_pretrained(folder)
    except Exception as error:  # tokenizers raises bare Exception, transformers OSError, ValueError and others
        raise CheckpointError(f"the tokenizer in {folder} cannot be read: {error}") from None
    finally:
        logging.set_verbosity(verbosity)


def load_lamed(source: str | Path, dtype: torch.dtype = torch.float32, with_llm: bool = True) -> tuple[Lamed, object]:
    """The model (eval mode) and its tokenizer. Raises CheckpointError naming every key that does not fit."""
    config, weights, folder = open_lamed(source)
    return build_lamed(config, weights, dtype, with_llm), load_tokenizer(folder)


def checked_lamed(config: LamedConfig, weights: Weights) -> tuple[Lamed, dict[str, tuple[int, ...]]]:
    """An empty Lamed (on the device meta), and the published key -> shape of all that `weights` must hold, and does.

    Raises CheckpointError naming every key that does not fit.
    """
    with torch.device("meta"):
        model = Lamed(config)
    expected = lamed_shapes(model)
    check(weights, expected, optional={"lm_head.weight"} if config.llm.get("tie_word_embeddings") else set())
    return model, expected


def build_lamed(config: LamedConfig, weights: Weights, dtype: torch.dtype | None, with_llm: bool = True) -> Lamed:
    """A Lamed filled from `weights`, strictly.

    Args:
        config: of the checkpoint.
        weights: its tensors.
        dtype: of the parameters; None for that of the files, which stay mapped then and take no memory.
        with_llm: False skips (but still checks) the language model's keys.
    """
    model, expected = checked_lamed(config, weights)
    if not with_llm:
        model.llm = None
    names = {
        published: own for published, own in _own_names(expected).items() if with_llm or not own.startswith("llm.")
    }
    found = set(weights)
    return _fill(model, {own: weights[key] for key, own in names.items() if key in found}, dtype)


def load_clip(source: str | Path, dtype: torch.dtype = torch.float32) -> tuple[M3DClip, Path]:
    """M3D-CLIP (eval mode) and the folder that has its tokenizer."""
    folder = resolve(source)
    values = read_config(folder)
    config, weights, tokenizer_folder = ClipConfig.from_dict(values), Weights.open(folder), folder
    if "text_encoder" in values:
        tokenizer_folder = text_encoder_folder(values["text_encoder"])
        weights = weights.joined(
            {f"{TEXT_ENCODER}{key}": value for key, value in load_text_encoder(tokenizer_folder).items()}
        )
    with torch.device("meta"):
        model = M3DClip(config)
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    check(weights, expected)
    return _fill(model, {key: weights[key] for key in expected}, dtype), tokenizer_folder


def lamed_shapes(model: Lamed) -> dict[str, tuple[int, ...]]:
    """Published key -> shape of everything that a checkpoint of this model must hold."""
    back = {own: published for published, own in PARTS.items()}
    shapes = {}
    for own, value in model.state_dict().items():
        part = next((prefix for prefix in back if own.startswith(prefix)), None)
        key = back[part] + own[len(part) :] if part else own.removeprefix("llm.")
        shapes[key] = tuple(value.shape)
    return shapes


def differences(
    weights: Weights, expected: dict[str, tuple[int, ...]], optional: Set[str] = frozenset()
) -> dict[str, list[str]]:
    """The keys of `weights` that are missing, unexpected or misshapen, sorted, by these three words."""
    found = set(weights)
    misshapen = [
        f"{key}: {list(weights.shape(key))}, expected {list(expected[key])}"
        for key in expected
        if key in found and weights.shape(key) != expected[key]
    ]
    kinds = {
        "missing": set(expected) - found - optional,
        "unexpected": found - set(expected),
        "misshapen": misshapen,
    }
    return {what: sorted(keys) for what, keys in kinds.items()}


def check(weights: Weights, expected: dict[str, tuple[int, ...]], optional: Set[str] = frozenset()) -> None:
    """Raise CheckpointError unless `weights` has exactly the expected keys and shapes, naming those that differ."""
    different = differences(weights, expected, optional)
    if problems := [f"{len(keys)} {what} ({listed(keys)})" for what, keys in different.items() if keys]:
        raise CheckpointError("the weights do not fit config.json: " + "; ".join(problems))


def _own_names(published: dict) -> dict[str, str]:
    """Published key -> name in Lamed's state dict."""
    return {
        key: next((own + key[len(prefix) :] for prefix, own in PARTS.items() if key.startswith(prefix)), "llm." + key)
        for key in published
    }


def _fill(model: _Model, state: dict[str, Tensor], dtype: torch.dtype | None) -> _Model:
    """Assign `state` to a model built on the meta device; buffers that are computed, not stored, are made anew."""
    if dtype is not None:
        state = {key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()}
    model.load_state_dict(state, strict=False, assign=True)
    llm = getattr(model, "llm", None)
    if llm is not None:
        llm.tie_weights()
        llm.model.rotary_emb = type(llm.model.rotary_emb)(llm.config)
    bert = getattr(model, "language_encoder", None)
    if bert is not None:
        length = bert.config.max_position_embeddings
        bert.embeddings.position_ids = torch.arange(length)[None]
        bert.embeddings.token_type_ids = torch.zeros(1, length, dtype=torch.long)
    left = [name for name, value in (*model.named_parameters(), *model.named_buffers()) if value.is_meta]
    if left:
        raise CheckpointError(f"no value for {listed(left)}")
    return model.eval()
