"""The language model with quantised weights, by llm-compressor: calibrated on visual prompts, and held to a bound.

Scans are asked the questions of calibration_questions.txt, and the model's own greedy answers complete the prompts.
Every other prompt is calibrated on; on the rest the quantised folder, read back, is compared with what it was.
"""

from __future__ import annotations

import functools
import gc
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from engine.errors import InvalidInput
from engine.models import answering
from engine.models.layout import TOKENIZER_FILES
from engine.prompt import Prompt
from export.graphs import ExportError

ANSWER_TOKENS = 48
QUESTIONS = Path(__file__).parent / "calibration_questions.txt"
# llm-compressor's environment, made by `make quantizing`, and in deploy/Dockerfile by the stage of that name.
PYTHON = Path(sys.prefix) / "quantizing" / "bin" / "python"


@dataclass(frozen=True)
class Bound:
    """What a scheme may cost: perplexity of the former answers against what it was, and the share of their tokens that
    are still the most likely ones."""

    perplexity_ratio: float
    agreement: float


BOUNDS = {"fp8": Bound(1.05, 0.97), "awq": Bound(1.15, 0.93), "gptq": Bound(1.15, 0.93)}


@dataclass(frozen=True)
class Answered:
    """A prompt with its greedy answer. rows: [T, H], their embeddings. ids: [A], the answer's, its last A rows."""

    rows: Tensor
    ids: Tensor


def check(scheme: str | None, scans: int) -> None:
    """Refuse, before anything is exported, what cannot be quantised."""
    if scheme is None:
        return
    if scheme not in BOUNDS:
        raise InvalidInput(f"--llm-quantization {scheme!r} is not known; known: {', '.join(BOUNDS)}")
    if not scans:
        raise InvalidInput(
            "--llm-quantization is calibrated on scans: give --calibration SCAN [SCAN ...], some of the "
            "kind that will be asked about"
        )
    if not PYTHON.is_file():
        raise InvalidInput(
            f"--llm-quantization needs llm-compressor in an environment of its own ({PYTHON.parents[1]}): run `make "
            "quantizing` in the checkout first; in a container, take the image that `docker build --target quantizing` "
            "makes (deploy/README.md)"
        )


def quantize(
    folder: Path, scheme: str, dtype: torch.dtype, prompt: Prompt, visual: list[Tensor], say: Callable[[str], None]
) -> dict:
    """Put the quantised language model in the place of the one in `folder`; what the manifest says about it.

    dtype: of the one in `folder`, and of what is not quantised. visual: visual tokens [N, H] of each scan. Raises
    ExportError beyond the scheme's bound, and leaves `folder` as it was.
    """
    answered = answer(folder, dtype, prompt, visual, say)
    measured, calibrated = answered[::2], answered[1::2]
    before, _ = compare(folder, dtype, measured)
    say(f"{scheme} by llm-compressor, calibrated on {len(calibrated)} prompts")
    target = folder.with_name(folder.name + ".quantized")
    try:
        compress(folder, scheme, calibrated, target)
        after, agreement = compare(target, dtype, measured)
        bound, ratio = BOUNDS[scheme], after / before
        tokens = sum(len(a.ids) for a in measured)
        say(f"perplexity {after:.3f}, before {before:.3f}; {agreement:.1%} of {tokens} greedy tokens stay")
        if not (ratio <= bound.perplexity_ratio and agreement >= bound.agreement):
            raise ExportError(
                f"the language model loses too much in {scheme}: perplexity of its own answers rises "
                f"{ratio:.3f}-fold ({bound.perplexity_ratio} allowed), {agreement:.1%} of their tokens stay "
                f"the likeliest ({bound.agreement:.0%} needed): export it without --llm-quantization"
            )
        for name in TOKENIZER_FILES:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, target / name)
        shutil.rmtree(folder)
        target.rename(folder)
    finally:
        shutil.rmtree(target, ignore_errors=True)
    return {
        "scheme": scheme,
        "perplexity": after,
        "perplexity_before": before,
        "agreement": agreement,
        "tokens": tokens,
        "bound": [bound.perplexity_ratio, bound.agreement],
    }


def _leaves_the_gpu_free(function: Callable) -> Callable:
    """The function, whose model has left the GPU when it returns.

    PyTorch keeps freed memory for itself: 13.5 GB of a 7B, which llm-compressor and TensorRT would lack.
    """

    @functools.wraps(function)
    def run(*arguments):
        try:
            return function(*arguments)
        finally:
            gc.collect()
            torch.cuda.empty_cache()

    return run


@_leaves_the_gpu_free
@torch.inference_mode()
def answer(
    folder: Path, dtype: torch.dtype, prompt: Prompt, visual: list[Tensor], say: Callable[[str], None]
) -> list[Answered]:
    """Every question about every scan, answered greedily."""
    model = _load(folder, dtype)
    embed, found = model.get_input_embeddings(), []
    questions = QUESTIONS.read_text().splitlines()
    for number, tokens in enumerate(visual, 1):
        say(f"asks scan {number} of {len(visual)} the {len(questions)} questions of {QUESTIONS.name}")
        for question in questions:
            head, tail = (embed(torch.tensor(ids, device=model.device)) for ids in prompt.split_ids(question))
            asked = torch.cat([head, tokens.to(model.device, model.dtype), tail])
            stops = list(prompt.stop_ids)
            said = answering.answer(model, [asked], ANSWER_TOKENS, states=False, eos_token_id=stops).ids[0]
            found.append(Answered(torch.cat([asked, embed(said)]).cpu(), said.cpu()))
    return found


@_leaves_the_gpu_free
@torch.inference_mode()
def compare(folder: Path, dtype: torch.dtype, answered: list[Answered]) -> tuple[float, float]:
    """(perplexity of the answers, share of their tokens that the model in `folder` finds likeliest)."""
    model = _load(folder, dtype)
    loss, same, count = 0.0, 0, 0
    for one in answered:
        rows, ids = one.rows.to(model.device), one.ids.to(model.device)
        # The whole model is called: compressed weights are unpacked before its first forward.
        logits = model(inputs_embeds=rows[None], logits_to_keep=len(ids) + 1).logits[0, :-1].float()
        loss += torch.nn.functional.cross_entropy(logits, ids, reduction="sum").item()
        same += int((logits.argmax(-1) == ids).sum())
        count += len(ids)
    return math.exp(loss / count), same / count


def compress(folder: Path, scheme: str, answered: list[Answered], target: Path) -> None:
    """Run llm-compressor on `folder`. Raises ExportError with its last words."""
    prompts = folder.with_name("prompts.safetensors")
    shutil.rmtree(target, ignore_errors=True)
    try:
        save_file({f"{number:05}": one.rows.contiguous() for number, one in enumerate(answered)}, prompts)
        done = subprocess.run(
            [PYTHON, "-I", Path(__file__).with_name("compress_llm.py"), scheme, folder, prompts, target],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    finally:
        prompts.unlink(missing_ok=True)
    if done.returncode:
        raise ExportError(f"llm-compressor failed:\n{done.stdout.strip()[-2000:]}")


def _load(folder: Path, dtype: torch.dtype):
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    return model.to("cuda") if torch.cuda.is_available() else model
