"""Train the embedded demonstration model from packaged scans: one command, reproducible by the recipe's seed.

    python training/finetune.py training/demo/recipe.json --out training/demo

Four stages: `segmentation` (SegVol with taught prompts), `alignment` (visual tokens brought to the language model's words),
`instruction` (language, boxes and masks together) and `refinement` (SegVol again, prompts fixed). An interrupted run goes on where it last saved itself;
`training/evaluate.py` measures the result.
"""
from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn  # noqa: E402

from engine.errors import M3DError  # noqa: E402
from training import alignment, instruction, segmentation, workers  # noqa: E402
from training.data.scans import load_scans  # noqa: E402
from training.lamed import TrainedLamed, lamed_config  # noqa: E402
from training.recipe import Recipe, Stage  # noqa: E402


class Report:
    """A progress bar on a terminal, and one JSON line every tenth step in `log` (first process only)."""

    def __init__(self, name: str, stage: Stage, log: Path):
        self.log, self.started, self.recent = log, time.monotonic(), []
        self.name, self.steps = name, stage.steps
        self.quiet = workers.rank() > 0
        self.bar = Progress(TextColumn(name), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                            TextColumn("{task.fields[losses]}"), console=Console(stderr=True), disable=self.quiet)
        self.task = self.bar.add_task(name, total=stage.steps, losses="")

    def __call__(self, step: int, losses: dict[str, float]) -> None:
        self.recent.append(losses)
        if self.quiet or step % 10 and step < self.steps:
            return
        means = {key: sum(entry[key] for entry in self.recent) / len(self.recent) for key in losses}
        self.recent.clear()
        # Not before: a stage that was finished earlier reports nothing.
        self.bar.start()
        self.bar.update(self.task, completed=step, losses="  ".join(f"{k} {v:.3f}" for k, v in means.items()))
        line = {"stage": self.name, "step": step, "seconds": round(time.monotonic() - self.started, 1)}
        with self.log.open("a") as file:
            file.write(json.dumps({**line, **{key: round(value, 4) for key, value in means.items()}}) + "\n")
        if step == self.steps:
            self.bar.stop()


def train(recipe: Recipe, out: Path, work: Path) -> None:
    """What each process does."""
    scans = load_scans(tuple(recipe.train), recipe.fine_grid)

    def report(stage: str) -> Report:
        return Report(stage, getattr(recipe, stage), work / "log.jsonl")

    taught = segmentation.train(recipe, lamed_config(recipe), scans, work, report("segmentation"))
    torch.manual_seed(recipe.seed)
    model = TrainedLamed(recipe)
    model.start_from(taught)
    alignment.train(recipe, model, scans, work, report("alignment"))
    instruction.train(recipe, model, scans, taught, out, work, report("instruction"))
    segmentation.refine(recipe, taught, scans, work, report("refinement"))
    model.lamed.seg_module.load_state_dict(taught.seg_module.state_dict())
    if workers.rank() == 0:
        model.write(out, recipe)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--work", type=Path, default=Path("out/training"), help="for the log and resumable states")
    arguments = parser.parse_args()
    try:
        recipe = Recipe.read(arguments.recipe)
        for folder in (arguments.out, arguments.work):
            folder.mkdir(parents=True, exist_ok=True)
        workers.run(recipe.processes, train, recipe, arguments.out, arguments.work)
    except M3DError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
