"""Does the engine hand out the right hidden states? Asked at every start, as they come from inside vLLM."""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from engine.errors import RepositoryError
from engine.runtime.decoder.embedding_table import EmbeddingTable

PROMPT_LENGTH, ANSWER_LENGTH = 24, 3
RUNS = 4  # until an answer has watched tokens only
SMALL_MODEL_BYTES = 1 << 30
# Largest difference, relative to the largest value: what rounding explains, far below what a wrong row gives (about 1).
TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 8e-2}

Generate = Callable[[torch.Tensor, int, str, list[int]], Awaitable[list[int]]]
"""generate(prompt rows, tokens to generate, key, watched token ids) -> greedy token ids."""
Take = Callable[[str, list[int]], Awaitable[np.ndarray]]
"""take(key, positions) -> fp32 states [K, H]."""


@dataclass(frozen=True)
class Checked:
    """A short answer of the engine to the prompt `rows` [T, H]: its tokens, their fp32 states [K, H], and how far these
    were off, relatively. head: the model's output layer, [V, H]."""

    rows: torch.Tensor
    head: torch.Tensor
    said: list[int]
    states: torch.Tensor
    difference: float


async def check_seg_states(folder: Path, dtype: torch.dtype, generate: Generate, take: Take) -> Checked:
    """Compare the states of a short answer with a computation of our own.

    A small model is run by transformers on the same rows. A large one, which memory holds once only, must give each
    state's own token the highest logit. Raises RepositoryError if the states are off: masks would be wrong silently.
    """
    table = EmbeddingTable(folder)
    rows = table.embed(torch.linspace(0, len(table.rows) - 1, PROMPT_LENGTH).long().tolist(), dtype)
    said, states = await _answer(rows, generate, take)
    head = table.head()
    difference = _check_predictions(said, states, head, dtype)
    if sum(file.stat().st_size for file in folder.glob("*.safetensors")) <= SMALL_MODEL_BYTES:
        wanted = _by_transformers(folder, dtype, torch.cat([rows, table.embed(said[:-1], dtype)]))
        difference = _difference(states, wanted, dtype, "transformers'")
    return Checked(rows, head, said, states, difference)


async def check_same_states(before: Checked, generate: Generate, take: Take) -> Checked:
    """Compare with what the engine answered `before` it computed in another way, as far as it says the same; all it
    says must be what its states predict.

    Raises RepositoryError if the states are off.
    """
    said, states = await _answer(before.rows, generate, take)
    same = 1  # the first state comes before any token
    while same < ANSWER_LENGTH and said[:same] == before.said[:same]:
        same += 1
    difference = _difference(states[:same], before.states[:same], before.rows.dtype, "those of vLLM's own pass")
    _check_predictions(said, states, before.head, before.rows.dtype)
    return replace(before, said=said, states=states, difference=difference)


async def _answer(rows: torch.Tensor, generate: Generate, take: Take) -> tuple[list[int], torch.Tensor]:
    """The tokens after the prompt `rows`, and the states they came from.

    The states of watched tokens are kept, so the answer must be known before. Another run may say another token of the
    same logit, as the cached prompt's is computed in other shapes: that is watched, too, in the next run.
    """
    said = await generate(rows, ANSWER_LENGTH, uuid.uuid4().hex, [])
    watched = set(said)
    for _ in range(RUNS):
        key = uuid.uuid4().hex
        said = await generate(rows, ANSWER_LENGTH, key, sorted(watched))
        if watched.issuperset(said):
            return said, torch.from_numpy(await take(key, list(range(ANSWER_LENGTH))))
        watched.update(said)
    raise _wrong(f"the same prompt gave another answer each time: tokens {sorted(watched)}")


def _check_predictions(said: list[int], states: torch.Tensor, head: torch.Tensor, dtype: torch.dtype) -> float:
    """How far below the highest logit the tokens said are at most, relatively. Raises RepositoryError if rounding does
    not explain it."""
    logits = states @ head.float().T
    shortfall = ((logits.amax(1) - logits[torch.arange(len(said)), said]) / logits.abs().amax(1)).max().item()
    if not shortfall <= TOLERANCE[dtype]:
        raise _wrong(f"the states of the tokens {said} predict {logits.argmax(1).tolist()}")
    return shortfall


def _difference(states: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype, whose: str) -> float:
    """The largest, relative to the largest value. Raises RepositoryError if rounding does not explain it."""
    difference = ((states - wanted).abs().max() / wanted.abs().max()).item()
    if not difference <= TOLERANCE[dtype]:
        raise _wrong(
            f"they differ from {whose} by {difference:.2g} of the largest value, allowed are {TOLERANCE[dtype]:.2g}"
        )
    return difference


@torch.inference_mode()
def _by_transformers(folder: Path, dtype: torch.dtype, rows: torch.Tensor) -> torch.Tensor:
    """The last ANSWER_LENGTH states of a plain forward over `rows` [T, H], fp32."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    # The whole model is called: quantised weights are unpacked before its first forward.
    out = model(inputs_embeds=rows[None], output_hidden_states=True, logits_to_keep=1)
    return out.hidden_states[-1][0, -ANSWER_LENGTH:].float()


def _wrong(what: str) -> RepositoryError:
    return RepositoryError(
        f"the decoder's [SEG] states failed the check at the start: {what}. Masks would be wrong; "
        "use the vLLM version that pyproject.toml pins, and export the repository again"
    )
