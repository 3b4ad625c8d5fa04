"""Export a checkpoint into a Triton model repository.

    python export/build_engines.py --checkpoint CHECKPOINT --target cpu --repository model_repository

CHECKPOINT is a folder in the published layout or a Hugging Face id. The repository is this project's model_repository
or a copy of its tracked files. A second run with nothing changed does nothing.
"""
from __future__ import annotations

import argparse
import gc
import importlib.metadata
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

if __package__ in (None, ""):  # run as a script, from any folder
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine import contract, manifest  # noqa: E402
from engine.errors import CheckpointError, M3DError, RepositoryError  # noqa: E402
from engine.manifest import CLIP_TOKENIZER_FOLDER, LLM_FOLDER, Manifest  # noqa: E402
from engine.prompt import IMAGE_TOKEN, Prompt  # noqa: E402

PRECISIONS = ("fp32", "bf16", "fp16")
VERSIONED = ("m3d-engine", "torch", "onnx", "onnxruntime", "transformers")


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        export(arguments.checkpoint, arguments.repository, clip_checkpoint=arguments.clip_checkpoint,
               target=arguments.target, precision=arguments.precision, force=arguments.force)
    except M3DError as error:
        print(f"export failed: {error}", file=sys.stderr)
        return 1
    return 0


def export(checkpoint: str, repository: Path, *, clip_checkpoint: str | None = None, target: str = "cpu",
           precision: str = "fp32", force: bool = False) -> Manifest:
    """Export into `repository` and return its manifest; the one that is there if nothing changed since.

    Raises CheckpointError (naming what does not fit), RepositoryError (no model repository there) or ExportError (a
    graph does not compute what PyTorch does). A repository whose export broke off has no manifest and is not served.
    """
    from engine.models import checkpoint as checkpoints

    repository = Path(repository)
    _check_repository(repository)
    sources = {"checkpoint": checkpoints.resolve(checkpoint)}
    if clip_checkpoint is not None:
        sources["clip_checkpoint"] = checkpoints.resolve(clip_checkpoint)
    hashes = {f"{name}_sha256": checkpoints.sha256(folder) for name, folder in sources.items()}
    wanted = {**hashes, "target": target, "precision": precision, "versions": _versions()}
    if not force and (current := _current(repository, wanted)) is not None:
        print(f"{repository}: nothing changed since the last export, nothing to do")
        return current

    (repository / manifest.FILE_NAME).unlink(missing_ok=True)
    _remove_artifacts(repository)
    started = time.perf_counter()
    values, graphs = _export_lamed(checkpoint, repository, precision)
    models = list(contract.CHAT_MODELS)
    if values["seg_token_id"] is not None:
        models += contract.SEGMENT_MODELS
    if clip_checkpoint is not None:
        clip_values, clip_graphs = _export_clip(clip_checkpoint, repository)
        values, graphs = {**values, **clip_values, "clip_checkpoint": str(clip_checkpoint)}, {**graphs, **clip_graphs}
        models += contract.CLIP_ENCODERS if clip_values["clip_text_length"] is None else contract.RETRIEVE_MODELS
    result = Manifest(checkpoint=str(checkpoint), models=tuple(models), graphs=graphs, **wanted, **values)
    result = replace(result, files=_artifacts(repository))
    result.write(repository)
    size = sum(result.files.values()) / 1e6
    print(f"exported {len(result.files)} files, {size:,.0f} MB, to {repository} in {time.perf_counter() - started:.0f} s")
    return result


def _export_lamed(checkpoint: str, repository: Path, precision: str) -> tuple[dict, dict]:
    import torch

    from engine.models.checkpoint import build_lamed, load_tokenizer, open_lamed
    from export.graphs import build, lamed_graphs
    from export.llm import write_llm

    config, weights, source = open_lamed(checkpoint)
    tokenizer = load_tokenizer(source)
    context_length = config.llm.get("max_position_embeddings", 2048)
    if tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) in (None, tokenizer.unk_token_id):
        raise CheckpointError(f"{source}: the tokenizer does not know {IMAGE_TOKEN}")
    prompt = Prompt(tokenizer, config.num_visual_tokens, context_length)

    _say("decoder", "language model for vLLM")
    write_llm(config, weights, source, repository / LLM_FOLDER, precision, lambda text: _say("decoder", text))
    model = build_lamed(config, weights, torch.float32, with_llm=False)
    del weights
    graphs = {}
    pending = lamed_graphs(model)
    del model
    while pending:  # each graph's weights are freed before the next is exported
        graph = pending.pop(0)
        graphs[graph.name] = _built(build, graph, repository)
        del graph
        gc.collect()
    eos = config.llm.get("eos_token_id", tokenizer.eos_token_id)
    values = {
        "image_size": config.vision.image_size, "patch_size": config.vision.patch_size,
        "num_visual_tokens": config.num_visual_tokens, "llm_width": config.llm_width,
        "vocab_size": config.llm["vocab_size"], "context_length": context_length,
        "image_token_id": prompt.image_token_id, "eos_token_ids": tuple(eos if isinstance(eos, list) else [eos]),
        "seg_token_id": config.seg_token_id if config.segmentation is not None else None,
    }
    return values, graphs


def _export_clip(checkpoint: str, repository: Path) -> tuple[dict, dict]:
    from engine.models.checkpoint import has_tokenizer, load_clip, load_tokenizer
    from export.graphs import build, clip_graphs

    model, source = load_clip(checkpoint)
    values = {"clip_text_length": None, "clip_image_size": model.config.vision.image_size}
    if has_tokenizer(source):
        load_tokenizer(source).save_pretrained(repository / CLIP_TOKENIZER_FOLDER)
        values["clip_text_length"] = model.config.max_text_len
    else:
        _say("retrieval", f"left out, since {source} has no tokenizer; its encoders alone are served")
    return values, {graph.name: _built(build, graph, repository) for graph in clip_graphs(model)}


def _built(build, graph, repository: Path) -> dict:
    _say(graph.name, "ONNX graph")
    entry = build(graph, repository)
    _say(graph.name, f"off by {entry['max_error']:.1e} at most, {entry['bound']:.0e} allowed ({entry['seconds']} s)")
    return entry


def _say(name: str, text: str) -> None:
    print(f"{name:>21}  {text}", flush=True)


def _check_repository(repository: Path) -> None:
    missing = [name for name in contract.MODELS if not (repository / name / "config.pbtxt").is_file()]
    if missing:
        raise RepositoryError(f"{repository} is not the model repository or a copy of its tracked files: it lacks "
                              f"config.pbtxt of {', '.join(missing)}")


def _versions() -> dict[str, str]:
    versions = {}
    for name in VERSIONED:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "unknown"
    return versions


def _current(repository: Path, wanted: dict) -> Manifest | None:
    """The manifest that is there, if it says what is wanted and its files are all there at their sizes."""
    try:
        found = Manifest.read(repository)
    except RepositoryError:
        return None
    same = all(getattr(found, name) == value for name, value in {"clip_checkpoint_sha256": None, **wanted}.items())
    return found if same and found.files == _artifacts(repository) else None


def _artifact_paths(repository: Path) -> list[Path]:
    """What an export writes: everything in the version folders except the Python models."""
    return sorted(path for name in contract.MODELS for path in (repository / name / "1").glob("*")
                  if path.name not in ("model.py", "__pycache__", ".gitkeep"))


def _artifacts(repository: Path) -> dict[str, int]:
    files = (file for path in _artifact_paths(repository) for file in ([path] if path.is_file() else path.rglob("*")))
    return {str(file.relative_to(repository)): file.stat().st_size for file in files if file.is_file()}


def _remove_artifacts(repository: Path) -> None:
    for path in _artifact_paths(repository):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="M3D-LaMed: a folder or a Hugging Face id")
    parser.add_argument("--clip-checkpoint", help="M3D-CLIP, for retrieval: a folder or a Hugging Face id")
    parser.add_argument("--target", choices=("cpu",), default="cpu",
                        help="what the repository is served on (default: %(default)s; TensorRT is not built yet)")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32",
                        help="of the language model; the ONNX graphs stay in fp32 on a CPU (default: %(default)s)")
    parser.add_argument("--repository", type=Path, default=Path("model_repository"),
                        help="the model repository, or a copy of its tracked files (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="export again although nothing changed")
    return parser


if __name__ == "__main__":
    sys.exit(main())
