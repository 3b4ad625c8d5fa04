"""Answers by transformers, the slow and obvious way: what every fast path is compared with, and what tools use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Answered:
    """ids: [B, T], token ids, padded behind each answer's end.

    states: [B, T, H], the state after the last norm that each token was sampled from; 0 of them if they were not asked
    for.
    """

    ids: Tensor
    states: Tensor


def answer(
    llm: Any, prompts: Sequence[Tensor] | Tensor, max_new_tokens: int, states: bool = True, **settings: Any
) -> Answered:
    """Answer prompts that are embedded already, greedily unless `settings` say otherwise.

    Args:
        llm: a causal language model of transformers.
        prompts: each [L, H], of any lengths, see `Lamed.prompt_embeddings`.
        max_new_tokens: tokens of an answer at most.
        states: whether to return the states; keeping them costs memory and time.
        **settings: of transformers' `generate`.
    """
    # Padding stands on the left, so that all answers begin at the same step.
    length = max(len(prompt) for prompt in prompts)
    embeddings = prompts[0].new_zeros(len(prompts), length, prompts[0].shape[1])
    mask = torch.zeros(embeddings.shape[:2], dtype=torch.long, device=embeddings.device)
    for row, prompt in enumerate(prompts):
        embeddings[row, length - len(prompt) :], mask[row, length - len(prompt) :] = prompt, 1
    out = llm.generate(
        inputs_embeds=embeddings,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        output_hidden_states=states,
        return_dict_in_generate=True,
        **{"do_sample": False, **settings},
    )
    if not states:
        return Answered(out.sequences, embeddings[:, :0])
    return Answered(out.sequences, torch.stack([step[-1][:, -1] for step in out.hidden_states], dim=1))
