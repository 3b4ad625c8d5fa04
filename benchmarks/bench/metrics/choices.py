"""Closed questions: the reference's substring, the choice that an answer names, and the likeliest choice."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

LETTERS = ("A", "B", "C", "D")
# "A.", "(A)", "A:", or nothing but "A". "A mass" is an article.
_LETTER = re.compile(r"(?<![A-Za-z])\(?([A-D])(?:[.):](?!\w)|\s*$)")
_SAID = re.compile(r"\b(?:answer|choice|option)(?:\s+is)?\s*:?\s*\(?([A-D])\b", re.IGNORECASE)


def substring_right(prediction: str, choice: str) -> bool:
    """The reference's test: "A." stands somewhere in the answer. "A. B. C. D." is right, whatever was asked."""
    return f"{choice}." in prediction


def chosen(prediction: str, choices: Mapping[str, str]) -> str | None:
    """The letter of the choice that an answer names, by its letter or as its whole text; None if it names none, or
    more than one. choices: letter -> text."""
    letters = {*_LETTER.findall(prediction), *(letter.upper() for letter in _SAID.findall(prediction))}
    letters &= set(choices)
    if letters:
        return letters.pop() if len(letters) == 1 else None
    named = [letter for letter, text in choices.items() if _plain(text) == _plain(prediction)]
    return named[0] if len(named) == 1 else None


def likeliest(logprobs: Mapping[str, float]) -> str:
    """The choice with the greatest log-probability; the first of equal ones. logprobs: letter -> natural logarithm."""
    for letter, value in logprobs.items():
        if math.isnan(value):
            raise ValueError(f"the log-probability of choice {letter} is not a number")
    return max(sorted(logprobs), key=lambda letter: logprobs[letter])


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))
