"""The `[SEG]` states of an answer as the prompt of its mask."""

from __future__ import annotations

from typing import Any


def merged(states: Any) -> Any:
    """The one prompt [H_llm] of an answer with K states [K, H_llm], K >= 1, NumPy's or PyTorch's: their mean.

    Source: M3D's `LamedMetaForCausalLM`, which averages the states of several [SEG].
    """
    return states.mean(0)
