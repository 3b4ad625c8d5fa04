"""Which precision may the encoders have? How long each takes on this CPU, and what each changes in answers and masks.

    python benchmarks/encoders.py --checkpoint DIR                     # exports the encoders, measures
    python benchmarks/encoders.py --repository DIR --checkpoint DIR    # takes the graphs of an exported repository
    python benchmarks/encoders.py --target tensorrt --checkpoint DIR   # what a GPU's precisions change, without one

On a CPU fp32 is ONNX Runtime's, bf16 OpenVINO's, int8 ONNX Runtime's with weights and activations quantised (weights by
channel, activations by tensor at run time). For target tensorrt the typed graphs of which plans are made are computed
in fp32 with the roundings that they have on a GPU (fp8 calibrated on the scans); their times mean nothing. Every pair
of a vision and a segmentation encoder answers the questions, greedily in fp32 PyTorch, and draws its mask; the fp32
pair is what the others are compared with, on the checkpoint and on the recorded fixture of tests/fixtures. Within
bounds: the same tokens, and a Dice of 0.999 or more, everywhere.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
if __package__ in (None, ""):  # run as a script, from any folder
    sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import onnx  # noqa: E402
import torch  # noqa: E402

from benchmarks import command, cpu_roofline, scans  # noqa: E402
from benchmarks.command import at_least, say, several  # noqa: E402
from benchmarks.report import table  # noqa: E402
from engine import contract  # noqa: E402
from engine.cli import console  # noqa: E402
from engine.errors import InvalidInput  # noqa: E402
from engine.models.answering import answer  # noqa: E402
from engine.models.checkpoint import load_lamed  # noqa: E402
from engine.models.lamed import Lamed  # noqa: E402
from engine.processor import has_bf16  # noqa: E402
from engine.runtime.onnx_session import OnnxGraph  # noqa: E402
from engine.scan import pack_scan, read_scan  # noqa: E402
from engine.seg_states import merged  # noqa: E402
from engine.volume import prepare  # noqa: E402

VISION, SEGMENTATION = "vision_encoder", "segmentation_encoder"
PRECISIONS = {"cpu": ("fp32", "bf16", "int8"), "tensorrt": ("fp32", "fp16", "bf16", "fp8")}
DICE_BOUND = 0.999
QUESTION = "Please segment the left lung: [SEG]"  # a checkpoint of make_checkpoint.py answers it with a mask
FIXTURE = ROOT / "tests" / "fixtures" / "dev_small"


@dataclass(frozen=True)
class Answered:
    """What greedy decoding said to a question. state: mean `[SEG]` state, 1 x H_llm, None without a `[SEG]`."""

    token_ids: tuple[int, ...]
    state: torch.Tensor | None


@dataclass(frozen=True)
class Exactness:
    """A pair of encoders against the fp32 pair. same_tokens: before the first that differs, None if none does.

    dice: the smallest of the masks, None if nothing was drawn.
    """

    case: str
    vision: str
    segmentation: str
    same_tokens: int | None
    dice: float | None

    @property
    def within_bounds(self) -> bool:
        return self.same_tokens is None and (self.dice is None or self.dice >= DICE_BOUND)


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    return console.run(lambda: _measure_and_tell(arguments), command.SIGNALS)


def _measure_and_tell(arguments: argparse.Namespace) -> int:
    result = measure(arguments)
    print("\n" + text(result))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def measure(arguments: argparse.Namespace) -> dict:
    """{"target", "precisions", "rates", "runs": {encoder: {precision: {...}}}, "exactness": [...]}, JSON-ready."""
    target = arguments.target
    precisions = [
        p for p in arguments.precisions or PRECISIONS[target] if p != "bf16" or target == "tensorrt" or has_bf16()
    ]
    if "fp32" not in precisions or set(precisions) - set(PRECISIONS[target]):
        raise InvalidInput(
            f"--precisions for target {target} are some of {', '.join(PRECISIONS[target])}; fp32 must be "
            "one, since the others are compared with it"
        )
    if arguments.repository and target == "tensorrt":
        raise InvalidInput(
            "--repository holds graphs for a CPU: for target tensorrt leave it out, they are exported anew"
        )
    rates = cpu_roofline.measure(seconds=arguments.floor_seconds)
    result = {"target": target, "precisions": precisions, "rates": asdict(rates), "exactness": []}
    with tempfile.TemporaryDirectory() as folder:
        say("the checkpoint")
        model, tokenizer = _open(arguments.checkpoint)
        images = {}
        for scan in map(scans.read, arguments.scan) if arguments.scan else [scans.phantom()]:
            data, affine = pack_scan(scan.array, scan.affine)
            images[f"scan {len(images) + 1}"] = prepare(
                read_scan(data, affine=affine), model.config.vision.image_size
            ).image
        encoders = Encoders(
            model,
            tokenizer,
            precisions,
            Path(folder) / "checkpoint",
            target,
            list(images.values()),
            arguments.repository,
        )
        result["runs"] = encoders.timed(next(iter(images.values())), arguments.runs if target == "cpu" else 0, rates)
        for name, image in images.items():
            result["exactness"] += encoders.exactness(name, image, arguments.question or [QUESTION], arguments.tokens)
        if arguments.fixture:
            say("the fixture")
            checkpoint, image, question, tokens = _fixture(Path(folder) / "fixture")
            encoders = Encoders(*_open(str(checkpoint)), precisions, Path(folder) / "fixture", target, [image])
            result["exactness"] += encoders.exactness("fixture", image, [question], tokens)
    result["exactness"] = [{**asdict(e), "within_bounds": e.within_bounds} for e in result["exactness"]]
    return result


class Encoders:
    """Both encoders of a checkpoint in several precisions. Their graphs are exported into `folder`, unless there is a
    `repository` that holds them. images: volumes [1, D, H, W] that fp8 is calibrated on."""

    def __init__(
        self,
        model: Lamed,
        tokenizer,
        precisions: list[str],
        folder: Path,
        target: str,
        images: list[np.ndarray],
        repository: Path | None = None,
    ):
        config = model.config
        self.model = model
        self.prompt = config.prompt(tokenizer)
        self.precisions = precisions
        self.graphs: dict[tuple[str, str], Callable] = {}
        self.load_s: dict[tuple[str, str], float] = {}
        if repository is None:
            _export(self.model, folder, fused=target == "cpu")
        for name in (VISION, SEGMENTATION):
            path = (repository or folder) / name / "1" / "model.onnx"
            for precision in precisions:
                say(f"{name}, {precision}")
                started = time.perf_counter()
                self.graphs[name, precision] = (
                    _typed(path, precision, images)
                    if target == "tensorrt"
                    else OnnxGraph(_quantised(path, folder / f"{name}.int8"), contract.MODELS[name])
                    if precision == "int8"
                    else OnnxGraph(path, contract.MODELS[name], precision=precision)
                )
                self.load_s[name, precision] = time.perf_counter() - started

    def encode(self, name: str, precision: str, image: np.ndarray) -> np.ndarray:
        (found,) = self.graphs[name, precision]({contract.IMAGE: image[None]}).values()
        return found

    def timed(self, image: np.ndarray, runs: int, rates: cpu_roofline.Rates) -> dict:
        """By encoder and precision: load_s, seconds (one precision after the other, `runs` times), floor_s; and error,
        root mean square against fp32 as a share of fp32's, max_error and mean_error as shares of its largest value.
        """
        found: dict = {}
        for name in (VISION, SEGMENTATION):
            say(f"{name}, {runs} runs of each")
            outputs = {precision: self.encode(name, precision, image) for precision in self.precisions}  # warm-up
            found[name] = {
                precision: {"load_s": self.load_s[name, precision], "seconds": []} for precision in self.precisions
            }
            for _, precision in itertools.product(range(runs), self.precisions):
                started = time.perf_counter()
                self.encode(name, precision, image)
                found[name][precision]["seconds"].append(time.perf_counter() - started)
            exact = outputs["fp32"]
            for precision, row in found[name].items():
                # There is no measured rate of int8 products: bf16's stands for it, which int8 may beat.
                rate = rates.matmul["fp32" if precision == "fp32" else "bf16"]
                row["floor_s"] = self._flops(name) / rate
                off = np.abs(outputs[precision] - exact)
                row["error"] = float(np.sqrt(np.square(off).mean() / np.square(exact).mean()))
                row["max_error"], row["mean_error"] = (float(n / np.abs(exact).max()) for n in (off.max(), off.mean()))
        return found

    @torch.inference_mode()
    def exactness(self, case: str, image: np.ndarray, questions: list[str], tokens: int) -> list[Exactness]:
        """Every pair of precisions against the fp32 pair."""
        say(f"answers and masks of the {case}")
        answers = {
            p: [self._answer(self.encode(VISION, p, image), question, tokens) for question in questions]
            for p in self.precisions
        }
        features = {p: torch.from_numpy(self.encode(SEGMENTATION, p, image)) for p in self.precisions}
        masks = {
            pair: [self._mask(features[pair[1]], answered.state) for answered in answers[pair[0]]]
            for pair in itertools.product(self.precisions, repeat=2)
        }
        exact = masks["fp32", "fp32"]
        if all(mask is None for mask in exact):
            say(f"the {case} draws no mask: give a --question whose answer has a [SEG]")
        found = []
        for pair, drawn in masks.items():
            same = [_same_tokens(a.token_ids, b.token_ids) for a, b in zip(answers["fp32"], answers[pair[0]])]
            dices = [dice(a, b) for a, b in zip(exact, drawn) if a is not None or b is not None]
            found.append(
                Exactness(case, *pair, min((n for n in same if n is not None), default=None), min(dices, default=None))
            )
        return found

    def _answer(self, visual_tokens: np.ndarray, question: str, tokens: int) -> Answered:
        embeds = self.model.prompt_embeddings(
            torch.tensor([self.prompt.input_ids(question)]),
            torch.from_numpy(visual_tokens),
            len(self.prompt.head),
        )
        found = answer(self.model.llm, embeds, tokens, eos_token_id=list(self.prompt.stop_ids))
        chosen = found.states[0][found.ids[0] == self.model.config.seg_token_id]
        return Answered(tuple(found.ids[0].tolist()), merged(chosen)[None] if len(chosen) else None)

    def _mask(self, features: torch.Tensor, state: torch.Tensor | None) -> np.ndarray | None:
        return None if state is None else self.model.segment(features, state)[0, 0].numpy() > 0

    def _flops(self, name: str) -> int:
        return cpu_roofline.stages(self.model.config, llm="bf16", graphs="fp32", question_tokens=1, answer_tokens=1)[
            name
        ].flops


def dice(a: np.ndarray | None, b: np.ndarray | None) -> float:
    """Of two masks; 0 if one of them was not drawn."""
    if a is None or b is None:
        return 0.0
    marked = int(a.sum()) + int(b.sum())
    return 2 * int((a & b).sum()) / marked if marked else 1.0


def text(result: dict) -> str:
    """Markdown tables, and which pair is the fastest within bounds."""
    rows = [(name, precision, r) for name, runs in result["runs"].items() for precision, r in runs.items()]
    off = [
        (name.replace("_", " "), precision, *(f"{r[error]:.1e}" for error in ("error", "max_error", "mean_error")))
        for name, precision, r in rows
    ]
    exactness = [
        (
            e["case"],
            e["vision"],
            e["segmentation"],
            "none" if e["same_tokens"] is None else f"after {e['same_tokens']}",
            "no mask" if e["dice"] is None else f"{e['dice']:.5f}",
            "yes" if e["within_bounds"] else "no",
        )
        for e in result["exactness"]
    ]
    columns = ("encoder", "precision", "error", "max error", "mean error")
    compared = table(
        ("on", "vision encoder", "segmentation encoder", "tokens differ", "Dice", "within bounds"), exactness
    )
    if result["target"] == "tensorrt":  # whose times are those of another device
        return "\n\n".join((table(columns, off), compared))
    taken = [
        (
            f"{median(r['seconds']):.2f} s",
            f"{min(r['seconds']):.2f} to {max(r['seconds']):.2f} s",
            f"{median(r['seconds']) / r['floor_s']:.1f}",
            f"{r['load_s']:.1f} s",
        )
        for _, _, r in rows
    ]
    best = fastest(result)
    return "\n\n".join(
        (
            table((*columns, "median", "spread", "÷ floor", "load"), [(*a, *b) for a, b in zip(off, taken)]),
            compared,
            f"Fastest within bounds: vision encoder in {best[0]}, segmentation encoder in {best[1]}.",
        )
    )


def fastest(result: dict) -> tuple[str, str]:
    """The pair of precisions (vision, segmentation) that takes the least time of those within bounds everywhere."""
    allowed = {(e["vision"], e["segmentation"]) for e in result["exactness"]}
    allowed -= {(e["vision"], e["segmentation"]) for e in result["exactness"] if not e["within_bounds"]}
    return min(
        allowed,
        key=lambda pair: sum(
            median(result["runs"][name][precision]["seconds"]) for name, precision in zip((VISION, SEGMENTATION), pair)
        ),
    )


# --- inside ----------------------------------------------------------------------------------------------------------
def _open(checkpoint: str) -> tuple[Lamed, object]:
    model, tokenizer = load_lamed(checkpoint)
    if model.seg_module is None:
        raise InvalidInput(f"{checkpoint} has no segmentation encoder to compare")
    return model, tokenizer


def _export(model: Lamed, folder: Path, fused: bool) -> None:
    from export.graphs import build, lamed_graphs

    for graph in lamed_graphs(model):
        if graph.name in (VISION, SEGMENTATION):
            say(f"{graph.name}: export")
            build(graph, folder, fused)


def _quantised(path: Path, target: Path) -> Path:
    """The graph with its matrix products in int8."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    target.parent.mkdir(parents=True, exist_ok=True)
    quantize_dynamic(
        path,
        target,
        op_types_to_quantize=["MatMul", "Gemm"],
        weight_type=QuantType.QInt8,
        per_channel=True,
        use_external_data_format=True,
    )
    return target


def _typed(path: Path, precision: str, images: list[np.ndarray]) -> Callable:
    """The graph that a plan is made of, computed here."""
    from export import plans, typed_graph

    amax = plans.calibrate(path, images) if precision == "fp8" else None
    return plans.on_cpu(typed_graph.typed(onnx.load(path), precision, amax))


def _fixture(folder: Path) -> tuple[Path, np.ndarray, str, int]:
    """(checkpoint, model volume 1 x D x H x W, question, tokens) of the recorded case."""
    sys.path.insert(0, str(FIXTURE.parent))
    import weights
    import write_checkpoint

    case = json.loads((FIXTURE / "case.json").read_text())
    checkpoint = write_checkpoint.write(FIXTURE / "case.json", folder / "checkpoint")
    image = weights.volume(tuple(case["volume_shape"]), case["volume_seed"])[0]
    return checkpoint, image, write_checkpoint.question(case), case["generate"]["max_new_tokens"]


def _same_tokens(exact: tuple[int, ...], other: tuple[int, ...]) -> int | None:
    """How many tokens are equal before the first that is not; None if all are."""
    if exact == other:
        return None
    return next((n for n, (a, b) in enumerate(zip(exact, other)) if a != b), min(len(exact), len(other)))


def _parser() -> argparse.ArgumentParser:
    parser = console.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="M3D-LaMed: a folder or a Hugging Face id")
    parser.add_argument("--repository", type=Path, help="an export of this checkpoint whose graphs are measured")
    parser.add_argument("--target", choices=tuple(PRECISIONS), default="cpu", help="whose precisions (default: cpu)")
    parser.add_argument("--scan", type=Path, nargs="+", help="scan files (default: a made CT)")
    parser.add_argument(
        "--question",
        action="append",
        help="asked about each scan; its answer should have a [SEG]. May "
        "be given several times (the default does it with checkpoints of make_checkpoint.py)",
    )
    parser.add_argument("--tokens", type=at_least(2), default=24, help="of an answer (default: %(default)s)")
    parser.add_argument(
        "--precisions",
        type=several(),
        help="default: fp32,bf16,int8 (bf16 is left out where the processor does not have it), for "
        "target tensorrt fp32,fp16,bf16,fp8",
    )
    parser.add_argument("--runs", type=at_least(0), default=5, help="of each encoder (default: %(default)s)")
    parser.add_argument(
        "--fixture",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also compare on the fixture of tests/fixtures (default: yes)",
    )
    parser.add_argument("--floor-seconds", type=at_least(0, float), default=2.0, help="for each of the machine's rates")
    parser.add_argument("--json", type=Path, help="file for everything")
    return parser


if __name__ == "__main__":
    sys.exit(main())
