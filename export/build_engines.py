"""Export a checkpoint into a Triton model repository.

    python export/build_engines.py --checkpoint CHECKPOINT --target cpu --repository model_repository
    python export/build_engines.py --checkpoint CHECKPOINT --target tensorrt --precision fp16    (on the GPU machine)
    python export/build_engines.py ... --target tensorrt --builder rtx --compute-capability 8.9  (anywhere, to check)

CHECKPOINT is a folder in the published layout or a Hugging Face id: owner/name or owner/name/subfolder, either with
@revision (a branch, a tag or a commit). The repository is this project's model_repository or a copy of its tracked
files. A second run with nothing changed does nothing.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import importlib.metadata
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

if __package__ in (None, ""):  # run as a script, from any folder, whose own modules must not hide packages
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from engine import contract, manifest
from engine.cli import console
from engine.errors import CheckpointError, InvalidInput, M3DError, RepositoryError
from engine.manifest import CLIP_TOKENIZER_FOLDER, LLM_FOLDER, TENSORRT_CONFIG, Manifest
from engine.models.hub_cache import size_text
from export.build_settings import BUILDERS, RTX_CAPABILITIES, BuildSettings

PRECISIONS = ("fp32", "bf16", "fp16", "fp8")
QUANTIZATIONS = ("fp8", "awq", "gptq")
VERSIONED = ("m3d-engine", "torch", "onnx", "onnxruntime", "transformers")


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    status = console.run(
        lambda: export(
            arguments.checkpoint,
            arguments.repository,
            clip_checkpoint=arguments.clip_checkpoint,
            target=arguments.target,
            precision=arguments.precision,
            settings=_settings(arguments),
            calibration=arguments.calibration,
            quantization=arguments.llm_quantization,
            force=arguments.force,
        )
    )
    if status:
        _note_left(arguments.repository)
    return status


def _note_left(repository: Path) -> None:
    """Say in which state an export that broke off leaves the repository."""
    if (repository / manifest.FILE_NAME).is_file():
        console.note(f"{repository} is as it was before")
    elif repository.is_dir() and _artifacts(repository):
        console.note(f"{repository} holds no whole export now and is not served: run the export again")


def export(
    checkpoint: str,
    repository: Path,
    *,
    clip_checkpoint: str | None = None,
    target: str = "cpu",
    precision: str = "fp32",
    settings: BuildSettings | None = None,
    calibration: Sequence[Path] = (),
    quantization: str | None = None,
    force: bool = False,
) -> Manifest:
    """Export into `repository` and return its manifest; the one that is there if nothing changed since.

    precision: on a CPU the language model's. For TensorRT the encoders', and the language model's, which has bf16
    beside fp8 encoders. settings: how plans are built, for target tensorrt alone. quantization: of the language model's
    weights, see `export.quantize`. calibration: scans that fp8 encoders and a quantised language model are calibrated
    on; every plan is compared with PyTorch on them.
    Raises CheckpointError (naming what does not fit), RepositoryError (no model repository there) or ExportError (a
    graph does not compute what PyTorch does). A repository whose export broke off has no manifest and is not served.
    """
    from engine.models import checkpoint as checkpoints
    from engine.models import hub
    from export import quantize

    repository = Path(repository)
    _check_repository(repository)
    quantize.check(quantization, len(calibration))
    plans = _check_target(target, precision, settings, calibration, quantization)
    named = {"checkpoint": checkpoint, "clip_checkpoint": clip_checkpoint}
    given = {name: source for name, source in named.items() if source is not None}
    if not force:
        _refuse_before_download(given, repository, target, precision)
    # Located once: a branch on the hub may move while this runs.
    sources = {name: hub.locate(source, lambda text, name=name: _say(name, text)) for name, source in given.items()}
    for name, located in sources.items():
        if located.commit is not None:
            _say(name, str(located))
    read = sum(checkpoints.bytes_read(located.folder) for located in sources.values())
    needed = _needs({name: located.folder for name, located in sources.items()}, read, target, precision)
    print(f"this export needs {needed}", flush=True)
    hashes = {f"{name}_sha256": checkpoints.sha256(located.folder) for name, located in sources.items()}
    commits = {f"{name}_commit": located.commit for name, located in sources.items()}
    llm_precision = "bf16" if precision == "fp8" else precision
    wanted = {**hashes, "target": target, "precision": llm_precision, "versions": _versions(), "plans": plans}
    quantized = {"scheme": quantization, "calibration": _hashes(calibration)} if quantization else {}
    if not force and (current := _current(repository, wanted, quantized)) is not None:
        print(f"{repository}: nothing changed since the last export, nothing to do")
        return current

    if not force:
        needed.refuse(repository, freed=sum(_artifacts(repository).values()))
    started = time.perf_counter()
    lamed = [_open_lamed(sources["checkpoint"].folder)]
    clip = [] if clip_checkpoint is None else [checkpoints.load_clip(sources["clip_checkpoint"].folder)]
    scans = _Calibration(calibration)
    scans.volumes(lamed[0][0].vision.image_size)
    # A checkpoint that does not load, or a scan that is none, has been refused by now. In that case what lies here is
    # still good.
    (repository / manifest.FILE_NAME).unlink(missing_ok=True)
    _remove_artifacts(repository)
    finish = _Planner(repository, precision, settings, scans).finish if settings is not None else None
    values, graphs = _export_lamed(lamed, repository, llm_precision, quantized, scans, finish)
    models = list(contract.CHAT_MODELS)
    if values["seg_token_id"] is not None:
        models += contract.SEGMENT_MODELS
    if clip_checkpoint is not None:
        clip_values, clip_graphs = _export_clip(clip, repository, finish)
        values, graphs = {**values, **clip_values, "clip_checkpoint": str(clip_checkpoint)}, {**graphs, **clip_graphs}
        models += contract.CLIP_ENCODERS if clip_values["clip_text_length"] is None else contract.RETRIEVE_MODELS
    result = Manifest(checkpoint=str(checkpoint), models=tuple(models), graphs=graphs, **commits, **wanted, **values)
    result = replace(result, files=_artifacts(repository))
    result.write(repository)
    size = sum(result.files.values()) / 1e6
    print(
        f"exported {len(result.files)} files, {size:,.0f} MB, to {repository} in {time.perf_counter() - started:.0f} s"
    )
    return result


def _needs(folders: dict[str, Path], read: int, target: str, precision: str):
    """What the export of checkpoints with their config.json in these folders needs; read: bytes of their files.

    Raises CheckpointError for a checkpoint of another kind.
    """
    from engine.models import checkpoint as checkpoints
    from engine.models.config import ClipConfig, LamedConfig
    from engine.models.needs import needs, parts_of

    configs = {name: checkpoints.read_config(folder) for name, folder in folders.items()}
    clip = configs.get("clip_checkpoint")
    parts = parts_of(LamedConfig.from_dict(configs["checkpoint"]), clip and ClipConfig.from_dict(clip))
    return needs(parts, read, target, precision)


def _refuse_before_download(given: dict[str, str], repository: Path, target: str, precision: str) -> None:
    """Refuse an export that does not fit before gigabytes are fetched for it. Raises ResourceExhausted."""
    from engine.models.survey import survey

    surveys = {name: survey(source) for name, source in given.items()}
    if not any(found.absent for found in surveys.values()):
        return  # nothing is fetched; whether anything is exported is not known yet
    read = sum(found.sizes.get(file, 0) for found in surveys.values() for file in found.read)
    needed = _needs({name: found.folder for name, found in surveys.items()}, read, target, precision)
    print(
        f"to fetch: {size_text(sum(size for found in surveys.values() for size in found.absent.values()))}", flush=True
    )
    needed.refuse(repository, freed=sum(_artifacts(repository).values()))


def _open_lamed(checkpoint: Path) -> tuple:
    """(config, weights, folder with the tokenizer, Prompt) of a checkpoint that has all that is exported."""
    from engine.models.checkpoint import checked_lamed, load_tokenizer, open_lamed

    config, weights, source = open_lamed(checkpoint)
    checked_lamed(config, weights)
    if unused := weights.never_run:
        print(f"{source}: {len(unused)} keys that later MONAI versions add are left out, such as {unused[0]}")
    tokenizer = load_tokenizer(source)
    try:
        return config, weights, source, config.prompt(tokenizer)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from None


def _export_lamed(
    lamed: list[tuple], repository: Path, precision: str, quantized: dict, calibration: _Calibration, finish=None
) -> tuple[dict, dict]:
    import torch

    from engine.models.checkpoint import build_lamed
    from export.graphs import lamed_graphs
    from export.llm import DTYPES, write_llm
    from export.quantize import quantize

    config, weights, source, prompt = lamed.pop()  # the last reference, so that weights can be freed
    _say("decoder", "language model for vLLM")
    write_llm(config, weights, source, repository / LLM_FOLDER, precision, lambda text: _say("decoder", text))
    model = build_lamed(config, weights, None, with_llm=False)
    del weights
    if quantized:
        model.vision_tower.float()
        model.mm_projector.float()
        with torch.inference_mode():
            visual = [
                model.encode_images(torch.tensor(volume)[None])[0]
                for volume in calibration.volumes(config.vision.image_size)
            ]
        quantized = {
            **quantized,
            **quantize(
                repository / LLM_FOLDER,
                quantized["scheme"],
                DTYPES[precision],
                prompt,
                visual,
                lambda text: _say("decoder", text),
            ),
        }
    pending = lamed_graphs(model)
    del model
    graphs = _built(pending, repository, finish)
    values = {
        "image_size": config.vision.image_size,
        "patch_size": config.vision.patch_size,
        "family": config.family,
        "num_visual_tokens": config.num_visual_tokens,
        "llm_width": config.llm_width,
        "vocab_size": config.llm["vocab_size"],
        "context_length": config.context_length,
        "image_token_id": prompt.image_token_id,
        "eos_token_ids": prompt.stop_ids,
        "seg_token_id": config.seg_token_id if config.segmentation is not None else None,
        "quantization": quantized,
    }
    return values, graphs


def _export_clip(clip: list, repository: Path, finish=None) -> tuple[dict, dict]:
    from engine.models.checkpoint import has_tokenizer, load_tokenizer
    from export.graphs import clip_graphs

    model, source = clip.pop()  # the last reference, so that weights can be freed
    values = {"clip_text_length": None, "clip_image_size": model.config.vision.image_size}
    if has_tokenizer(source):
        load_tokenizer(source).save_pretrained(repository / CLIP_TOKENIZER_FOLDER)
        values["clip_text_length"] = model.config.text_length
    else:
        _say("retrieval", f"left out, since {source} has no tokenizer; its encoders alone are served")
    pending = clip_graphs(model)
    del model
    return values, _built(pending, repository, finish)


def _built(pending: list, repository: Path, finish) -> dict:
    """Export the graphs `pending` one after another, and take each from the list, so that its weights are freed.

    They are made fp32 here, for the same reason.
    """
    from export.graphs import build

    entries = {}
    while pending:
        graph = pending.pop(0)
        graph.module.float()
        _say(graph.name, "ONNX graph")
        entry = build(graph, repository, fused=finish is None)
        _say(
            graph.name, f"off by {entry['max_error']:.1e} at most, {entry['bound']:.0e} allowed ({entry['seconds']} s)"
        )
        entries[graph.name] = entry if finish is None else {**entry, **finish(graph)}
        del graph
        gc.collect()
    return entries


class _Calibration:
    """Scans to calibrate on, prepared once for each size of volume."""

    def __init__(self, scans: Sequence[Path]):
        self.scans = scans
        self._volumes: dict[tuple, list] = {}

    def volumes(self, image_size: tuple[int, ...]) -> list:
        """[1, D, H, W] of each scan. Raises InvalidInput with the path of one that cannot be read."""
        from engine.scan import pack_scan, read_scan
        from engine.volume import prepare

        if image_size not in self._volumes:
            self._volumes[image_size] = []
            for path in self.scans:
                try:
                    data, affine = pack_scan(path)
                    self._volumes[image_size].append(prepare(read_scan(data, affine=affine), image_size).image)
                except M3DError as error:
                    raise InvalidInput(f"--calibration {path}: {error}") from None
        return self._volumes[image_size]


class _Planner:
    """What target tensorrt does with an exported ONNX graph."""

    def __init__(self, repository: Path, precision: str, settings: BuildSettings, calibration: _Calibration):
        self.repository = repository
        self.precision = precision
        self.settings = settings
        self.calibration = calibration

    def finish(self, graph) -> dict:
        """Build the plan, or fit the ONNX graph to Triton's ONNX Runtime backend; more of the manifest's entry."""
        import onnx

        from export import gpu_memory, plans, typed_graph

        path = self.repository / graph.name / "1" / "model.onnx"
        plans.write_config(
            graph.name, self.repository, dict(zip(contract.MODELS[graph.name].input_names, graph.input_shapes))
        )
        if not graph.is_image_encoder:  # TensorRT's are those; the others stay ONNX graphs
            onnx.save(typed_graph.free_shapes(onnx.load(path, load_external_data=False)), path)
            batch = contract.MODELS[graph.name].max_batch_size
            return {"gpu_memory": gpu_memory.of_graph(path, graph.input_shapes, batch)}
        volumes = self.calibration.volumes(graph.input_shapes[0][1:])
        return plans.build(
            graph, self.repository, self.precision, self.settings, volumes, lambda text: _say(graph.name, text)
        )


def _check_target(
    target: str, precision: str, settings: BuildSettings | None, calibration: Sequence[Path], quantization: str | None
) -> dict:
    """What the manifest says about how plans are built. Raises InvalidInput for what does not go together."""
    if target == "cpu":
        if precision == "fp8":
            raise InvalidInput("fp8 is for --target tensorrt; a CPU has fp32, bf16 and fp16")
        if settings is not None:
            raise InvalidInput("builder settings are for --target tensorrt")
        if calibration and not quantization:
            raise InvalidInput("--calibration is for --target tensorrt or --llm-quantization")
        return {}
    from export.tensorrt import bindings_module

    if settings is None:
        raise InvalidInput("target tensorrt needs build settings")
    settings.refuse(precision)
    if precision == "fp8" and not calibration:
        raise InvalidInput(
            "fp8 is calibrated on scans: give --calibration SCAN [SCAN ...], some of the kind that will be asked about"
        )
    described = {**asdict(settings), "timing_cache": None}
    described["batches"] = list(settings.batches)  # as JSON reads it
    return {
        **described,
        "precision": precision,
        "calibration": _hashes(calibration),
        "tensorrt": bindings_module(settings.builder).__version__,
    }


def _hashes(scans: Sequence[Path]) -> list[str]:
    """SHA-256 of each scan's bytes, sorted."""
    from engine.scan import pack_scan

    return sorted(hashlib.sha256(pack_scan(path)[0]).hexdigest() for path in scans)


def _say(name: str, text: str) -> None:
    print(f"{name:>21}  {text}", flush=True)


def _check_repository(repository: Path) -> None:
    missing = [name for name in contract.MODELS if not (repository / name / "config.pbtxt").is_file()]
    if missing:
        raise RepositoryError(
            f"{repository} is not the model repository or a copy of its tracked files: it lacks "
            f"config.pbtxt of {', '.join(missing)}"
        )


def _versions() -> dict[str, str]:
    versions = {}
    for name in VERSIONED:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "unknown"
    return versions


def _current(repository: Path, wanted: dict, quantized: dict) -> Manifest | None:
    """The manifest that is there, if it says what is wanted and its files are all there at their sizes.

    quantized: how the language model's weights are quantised; the manifest has what was measured of it, too.
    """
    try:
        found = Manifest.read(repository)
    except RepositoryError:
        return None
    same = all(getattr(found, name) == value for name, value in {"clip_checkpoint_sha256": None, **wanted}.items())
    same = same and bool(found.quantization) == bool(quantized) and quantized.items() <= found.quantization.items()
    return found if same and found.files == _artifacts(repository) else None


def _artifact_paths(repository: Path) -> list[Path]:
    """What an export writes: everything in the version folders except the Python models."""
    artifacts = (
        path
        for name in contract.MODELS
        for path in (repository / name / "1").glob("*")
        if path.name not in ("model.py", "__pycache__", ".gitkeep")
    )
    return sorted([*artifacts, *repository.glob(f"*/{TENSORRT_CONFIG}")])


def _artifacts(repository: Path) -> dict[str, int]:
    files = (file for path in _artifact_paths(repository) for file in ([path] if path.is_file() else path.rglob("*")))
    return {str(file.relative_to(repository)): file.stat().st_size for file in files if file.is_file()}


def _remove_artifacts(repository: Path) -> None:
    for path in _artifact_paths(repository):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _parser() -> argparse.ArgumentParser:
    parser = console.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="M3D-LaMed: a folder or a Hugging Face id, see above")
    parser.add_argument("--clip-checkpoint", help="M3D-CLIP, for retrieval: likewise")
    parser.add_argument(
        "--target",
        choices=("cpu", "tensorrt"),
        default="cpu",
        help="what the repository is served on (default: %(default)s)",
    )
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="fp32",
        help="cpu: of the language model (the ONNX graphs stay in fp32). tensorrt: of the encoders and "
        "the language model; with fp8 encoders it has bf16 (default: %(default)s)",
    )
    parser.add_argument(
        "--repository",
        type=Path,
        default=Path("model_repository"),
        help="the model repository, or a copy of its tracked files (default: %(default)s)",
    )
    parser.add_argument(
        "--llm-quantization",
        choices=QUANTIZATIONS,
        help="quantise the language model's weights by llm-compressor (needs `make quantizing` and "
        "--calibration): fp8, or 4 bits by awq or gptq (default: none)",
    )
    parser.add_argument(
        "--calibration",
        nargs="+",
        type=Path,
        default=(),
        metavar="SCAN",
        help="scans that fp8 encoders and a quantised language model are calibrated on, and that every "
        "plan is compared with PyTorch on",
    )
    parser.add_argument(
        "--force", action="store_true", help="export although nothing changed, or although it seems not to fit"
    )
    group = parser.add_argument_group("target tensorrt")
    group.add_argument(
        "--builder",
        choices=BUILDERS,
        default="tensorrt",
        help="tensorrt builds for this machine's GPU. rtx, TensorRT for RTX, needs no GPU: it proves that "
        "everything builds, but Triton does not load its plans (default: %(default)s)",
    )
    group.add_argument(
        "--compute-capability", metavar="X.Y", help="what rtx builds for: " + ", ".join(RTX_CAPABILITIES)
    )
    group.add_argument(
        "--workspace-gib",
        type=float,
        default=4.0,
        help="scratch memory that a kernel may use, GiB (default: %(default)s)",
    )
    group.add_argument(
        "--timing-cache",
        type=Path,
        metavar="FILE",
        help="measured kernel times, read and written: later builds on the same GPU are quicker",
    )
    group.add_argument(
        "--version-compatible",
        action="store_true",
        help="plans run on later TensorRT releases, too (m3d serve gives Triton the option it wants then)",
    )
    group.add_argument("--hardware-compatible", action="store_true", help="plans run on every GPU since Ampere, slower")
    group.add_argument(
        "--strip-weights",
        action="store_true",
        help="build without weights and refit them, so that a fine-tune needs no second build",
    )
    return parser


def _settings(arguments: argparse.Namespace) -> BuildSettings | None:
    names = (
        "builder",
        "compute_capability",
        "workspace_gib",
        "timing_cache",
        "version_compatible",
        "hardware_compatible",
        "strip_weights",
    )
    given = (
        BuildSettings(**{name: getattr(arguments, name) for name in names})
        if (arguments.target == "tensorrt")
        else None
    )
    if given is None and any(getattr(arguments, name) != _parser().get_default(name) for name in names):
        raise InvalidInput(f"{', '.join('--' + name.replace('_', '-') for name in names)} are for --target tensorrt")
    return given


if __name__ == "__main__":
    sys.exit(main())
