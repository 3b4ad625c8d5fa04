"""Many questions about one scan in one sequence, each as if it stood alone.

The prefix (BOS and visual tokens) is shared; every question sees the prefix and itself only, and its positions go on
from the prefix. The result equals that of separate sequences, for a fraction of the work.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from training.data.questions import Question


@dataclass(frozen=True)
class Sequence:
    """Token ids of one question with its answer. answer_start: index of the answer's first token."""

    ids: list[int]
    answer_start: int


@dataclass(frozen=True)
class Pack:
    """Questions about several scans, padded to one length L behind the prefix of P positions.

    ids: [B, L]. mask: [B, P + L, P + L], True where a row may attend to a column. positions: [B, P + L].
    answer_rows, answer_columns, answers: [T], where each answer token is predicted (index into B and P + L) and its id.
    answer_weights: [T], of each answer token in the loss: 1 / sqrt(length of its answer), so that the single words that
    need a look at the scan do not drown in boxes and reports.
    state_rows, state_columns: [K], where the `[SEG]` token of each segmenting question is predicted, in order.
    """

    ids: Tensor
    mask: Tensor
    positions: Tensor
    answer_rows: Tensor
    answer_columns: Tensor
    answers: Tensor
    answer_weights: Tensor
    state_rows: Tensor
    state_columns: Tensor


def sequence(tokenizer, question: Question, space: bool) -> Sequence:
    """question (behind a space or not: the reference's tasks differ), a space, answer, EOS."""
    asked = tokenizer((" " if space else "") + question.question, add_special_tokens=False)["input_ids"]
    answer = tokenizer(" " + question.answer, add_special_tokens=False)["input_ids"]
    return Sequence([*asked, *answer, tokenizer.eos_token_id], len(asked))


def pack(groups: list[list[Sequence]], prefix: int, seg_token_id: int, pad_token_id: int) -> Pack:
    """Pack one group of sequences for each scan behind `prefix` positions."""
    length = max(sum(len(s.ids) for s in group) for group in groups)
    total = prefix + length
    ids = torch.full((len(groups), length), pad_token_id)
    positions = torch.zeros(len(groups), total, dtype=torch.long)
    positions[:, :prefix] = torch.arange(prefix)
    # Padding attends to itself, since a row without anything to attend to is not a number.
    mask = torch.eye(total, dtype=torch.bool).repeat(len(groups), 1, 1)
    mask[:, :prefix, :prefix] = torch.ones(prefix, prefix).tril().bool()
    answers, weights, states = [], [], []
    for row, group in enumerate(groups):
        start = 0
        for s in group:
            n = len(s.ids)
            ids[row, start:start + n] = torch.tensor(s.ids)
            block = slice(prefix + start, prefix + start + n)
            positions[row, block] = torch.arange(prefix, prefix + n)
            mask[row, block, :prefix] = True
            mask[row, block, block] = torch.ones(n, n).tril().bool()
            for k in range(s.answer_start, n):
                before = (row, prefix + start + k - 1)
                answers.append((*before, s.ids[k]))
                weights.append((n - s.answer_start) ** -0.5)
                if s.ids[k] == seg_token_id:
                    states.append(before)
            start += n
    rows, columns, tokens = torch.tensor(answers).T
    state_rows, state_columns = torch.tensor(states, dtype=torch.long).reshape(-1, 2).T
    return Pack(ids, mask, positions, rows, columns, tokens, torch.tensor(weights), state_rows, state_columns)
