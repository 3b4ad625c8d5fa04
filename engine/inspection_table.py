"""An inspection as lines for people."""

from __future__ import annotations

from engine.inspection import Inspection, Keys, Need
from engine.models.config import ViTConfig
from engine.models.hub_cache import size_text
from engine.models.language_model import FAMILIES
from engine.models.weights import listed

_KINDS = {
    **{name: f"M3D-LaMed on {family.title}" for name, family in FAMILIES.items()},
    "m3d_clip": "M3D-CLIP",
}
_TOKENIZERS = {
    "tokenizer.model": "a sentencepiece model (tokenizer.model), read with the ids of the reference's slow tokenizer",
    "tokenizer.json": "tokenizer.json",
    "vocab.txt": "WordPiece (vocab.txt)",
}


def rows(found: Inspection) -> list[tuple[str, str, str]]:
    """(state, what, detail) of each line; state: ok, wrong, note, or nothing for a mere fact."""
    at = f", commit {found.commit}" if found.commit else ""
    llm, tokenizer = found.language_model, found.tokenizer
    is_clip = found.kind == "m3d_clip"
    lines = [
        ("", "checkpoint", f"{found.source}{at}: {_KINDS[found.kind]} ({found.kind})"),
        (
            "",
            "text encoder" if is_clip else "language model",
            f"{llm.family}: {llm.layers} layers, width {llm.width:,}, {llm.heads} heads, "
            f"vocabulary {llm.vocabulary:,}; "
            + (f"reads {llm.context:,} tokens of a text" if is_clip else f"context {llm.context:,} tokens"),
        ),
        ("", "vision", _vision(found)),
    ]
    if not is_clip:
        segmentation = f"SegVol, its encoder {_vit(found.segmentation)}" if found.segmentation else "none"
        lines.append(("", "segmentation", segmentation))
    lines += [
        ("", "parameters", ", ".join(f"{what} {_number(count)}" for what, count in found.parameters.items() if count)),
        ("", "weights", _weights(found)),
        ("" if tokenizer.file or is_clip else "wrong", "tokenizer", _TOKENIZERS.get(tokenizer.file or "", "none")),
    ]
    if tokenizer.ids:
        ids = ", ".join(f"{name} {'none' if token is None else token}" for name, token in tokenizer.ids.items())
        lines.append(("", "special tokens", ids))
    if tokenizer.ends:
        lines.append(("", "ends an answer", ", ".join(map(str, tokenizer.ends))))
    lines += _keys(found.keys)
    if found.unread:
        largest = sorted(found.unread.items(), key=lambda item: (-item[1], item[0]))
        names = listed([f"{name} ({size_text(size)})" for name, size in largest], 4)
        lines.append(("note", "not read", f"{names}; {size_text(sum(found.unread.values()))} together"))
    if code := [name for name in found.unread if name.endswith(".py")]:
        lines.append(("note", "code", f"{', '.join(code)}: never run"))
    lines += [("note", "", note) for note in found.notes]
    if found.commit is not None:
        here = sum(found.read.values()) - sum(found.to_fetch.values())
        lines.append(
            (
                "",
                "download",
                f"{size_text(sum(found.to_fetch.values()))} in {len(found.to_fetch)} of {len(found.read)} files; "
                f"{size_text(here)} are in the cache",
            )
        )
    lines += [_need(need) for need in found.needs]
    minutes = max(1, round(found.export_s / 60))
    lines.append(
        ("", "time of the export", f"about {minutes} min for target {found.target}, precision {found.precision}")
    )
    if found.target == "tensorrt":
        lines.append(
            ("note", "GPU", "`m3d doctor --target tensorrt` says after the export whether it fits the GPU's memory")
        )
    return lines


def verdict(found: Inspection) -> str:
    """The last line: whether it can be exported here, or all that is wrong."""
    if found.problems:
        return f"cannot be exported: {'; '.join(found.problems)}"
    if found.lacking:
        short = (f"{need.what} ({size_text(need.needed)}, {_free(need)})" for need in found.lacking)
        return f"cannot be exported here, not enough {', '.join(short)}"
    return "ready to export" + (f"; {found.keys.unchecked}" if found.keys.unchecked else "")


def _vision(found: Inspection) -> str:
    sizes = (" x ".join(map(str, size)) for size in (found.vision.image_size, found.vision.patch_size))
    tokens = f"; {found.visual_tokens} visual tokens" if found.visual_tokens else ""
    return "volumes of {} in patches of {}, {}{}".format(*sizes, _vit(found.vision), tokens)


def _vit(vit: ViTConfig) -> str:
    return f"a ViT of {vit.num_layers} layers, width {vit.hidden_size}, {vit.num_heads} heads"


def _weights(found: Inspection) -> str:
    stored = ", ".join(f"{size_text(size)} in {dtype}" for dtype, size in found.stored.items()) or "precision not known"
    files = [name for name in found.read if name.endswith((".safetensors", ".bin"))]
    return f"{stored}; {len(files)} file{'s' * (len(files) > 1)}: {listed(files, 1)}" if files else "none"


def _keys(keys: Keys) -> list[tuple[str, str, str]]:
    different = {"missing": keys.missing, "unexpected": keys.unexpected, "misshapen": keys.misshapen}
    lines = [("wrong", what, listed(list(names), 4)) for what, names in different.items() if names]
    if keys.unchecked:
        lines.append(("note", "keys", keys.unchecked))
    elif not lines:
        lines.append(("ok", "keys", f"all {keys.expected} that are needed, in their shapes, and no others"))
    if keys.never_run:
        some = listed(list(keys.never_run), 1)
        lines.append(("note", "left out", f"{len(keys.never_run)} keys that later MONAI versions add: {some}"))
    return lines


def _need(need: Need) -> tuple[str, str, str]:
    state = "ok" if need.ok else "wrong" if need.for_export else "note"
    words = "" if need.ok else ": not enough"
    return state, need.what, f"{size_text(need.needed)}, {_free(need)}{words}"


def _free(need: Need) -> str:
    return f"{size_text(need.available)} free" + (f" in {need.where}" if need.where else "")


def _number(count: int) -> str:
    return f"{count / 1e6:,.1f} M"
