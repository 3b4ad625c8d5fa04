"""Instruction tuning of M3D-LaMed: LoRA on the language model, everything around it trained, text and masks together.

    python training/finetune.py training/configs/paper/finetune.json
    torchrun --nproc-per-node 8 training/finetune.py training/configs/paper/finetune.json

`final` holds what was trained; `training/merge_lora.py` makes a whole checkpoint of it.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from safetensors.torch import load_file

from engine.errors import CheckpointError, InvalidInput
from training import trainer
from training.config import StageSettings
from training.data.selection import HeldOut, M3DQuestions, open_held_out, open_questions, shown
from training.data.views import ViewQuestions
from training.lamed import Lora, LossWeights, Start, TrainedLamed, image_size_of
from training.packing import Packer, count_too_long
from training.validation import AnswerValidation

_SHOWN = 4
MASK_GRIDS = ("volume", "decoder")


@dataclass(frozen=True, kw_only=True)
class Settings(StageSettings):
    """train: see `lamed.TRAINABLE`. max_length: tokens of the prompt, scan included, and answer. answer_weights: see
    `packing.pack`. mask_grid: where masks are compared, at the model's volume or at the decoder's own resolution.
    mask_limit: masks a batch. teacher: `final` of pretrain_segvol, whose prompts the `[SEG]` states are led to."""

    start: Start
    lora: Lora
    train: tuple[str, ...]
    max_length: int
    losses: LossWeights = LossWeights()
    answer_weights: str = "tokens"
    mask_grid: str = "volume"
    mask_limit: int | None = None
    teacher: str | None = None


def build(settings: Settings) -> tuple[TrainedLamed, Packer]:
    """The model before its first step, and its collator. Raises M3DError for what cannot be trained."""
    if settings.mask_grid not in MASK_GRIDS:
        raise InvalidInput(f"mask_grid {settings.mask_grid!r} is not known; known: {', '.join(MASK_GRIDS)}")
    model = TrainedLamed(settings.start, settings.train, settings.lora, settings.losses)
    config, names = model.lamed.config, ()
    if settings.teacher:
        names = learn_from(model, settings.teacher)
    packer = Packer(
        model.prompt,
        config.vision.image_size,
        model.config_json["seg_token_id"],
        settings.max_length,
        weighting=settings.answer_weights,
        grid=config.segmentation.grid if config.segmentation else None,
        at_decoder_grid=settings.mask_grid == "decoder",
        mask_limit=settings.mask_limit,
        taught=names,
    )
    if settings.max_length > model.config_json["max_position_embeddings"]:
        raise InvalidInput(
            f"max_length {settings.max_length} is more than the language model's context of "
            f"{model.config_json['max_position_embeddings']} tokens"
        )
    return model, packer


def check_precision(settings: StageSettings, start: Start, train: tuple[str, ...]) -> None:
    """Raise InvalidInput for what cannot be trained in these types, or in pieces."""
    if "added_tokens" in train and (settings.trainer.get("fsdp") or settings.trainer.get("deepspeed")):
        raise InvalidInput(
            "train: added_tokens works in processes that each have the whole model: leave out trainer.fsdp and "
            "trainer.deepspeed, or train embeddings"
        )
    if start.dtype == "bfloat16" and not settings.trainer.get("bf16"):
        raise InvalidInput("start.dtype bfloat16 needs trainer.bf16: the trained parts stay in float32 beside it")


def learn_from(model: TrainedLamed, teacher: str) -> tuple[str, ...]:
    """Give the model the prompts that SegVol learned for structures; returns their names."""
    folder = Path(teacher)
    try:
        names = tuple(json.loads((folder / "prompts.json").read_text()))
        table = load_file(folder / "model.safetensors")["prompts.weight"]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"teacher {teacher} is no `final` of pretrain_segvol: {error}") from None
    width = model.lamed.config.segmentation.hidden_size if model.lamed.config.segmentation else None
    if table.shape != (len(names), width):
        raise CheckpointError(f"teacher {teacher} has prompts {list(table.shape)}, wanted are {[len(names), width]}")
    model.teacher = torch.nn.Embedding.from_pretrained(table)
    return names


def train(settings: Settings) -> Path:
    check_precision(settings, settings.start, settings.train)
    size = image_size_of(settings.start)
    questions, held_out = open_questions(settings, size), open_held_out(settings, size)
    trainer.check_amount(len(questions), settings)
    model, packer = build(settings)
    return fit_questions(model, settings, questions, packer, held_out)


def fit_questions(
    model: TrainedLamed,
    settings: StageSettings,
    questions: M3DQuestions | ViewQuestions,
    packer: Packer,
    held_out: HeldOut | None,
) -> Path:
    """Train a model that answers; `held_out` is measured and shown meanwhile, if there is any."""
    count_too_long(questions, packer)
    if settings.sample_every:
        model.shown = held_out.shown() if held_out else shown(questions, _SHOWN)
    return trainer.fit(model, settings, questions, packer, held_out and AnswerValidation(held_out, packer))


if __name__ == "__main__":
    trainer.main(__doc__.splitlines()[0], Settings, train)
