"""Closed questions: the reference's substring, the choice that an answer names, and the likeliest choice."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

LETTERS = ("A", "B", "C", "D")
# "A.", "(A)" or "A:" where a sentence or a part of one begins, or nothing but "A". "A mass" is an article, and the
# letter of "vitamin D" belongs to the word before it.
_LETTER = re.compile(
    r"(?:^|[.;:,!?(*\n]|\b(?i:and|or|it\s+is)\s)[\s(*]*([A-D])(?=[.):*](?!\w))|^\W*([A-D])\W*$", re.MULTILINE
)
# "The answer is B". Behind it an A must end the part of the sentence: "the answer is A mass".
_SAID = re.compile(
    r"\b(?i:answer|choice|option)(?i:\s+is)?[\s:(*]+"
    r"(A(?=\s*(?:[^\w\s]|$))|[B-D]\b)(?!['’-]\w)(?![\s,]*(?:and\b|or\b|[/&]|[A-D]\b))"
)


def substring_right(prediction: str, choice: str) -> bool:
    """The reference's test: "A." stands somewhere in the answer. "A. B. C. D." is right, whatever was asked."""
    return f"{choice}." in prediction


def chosen(prediction: str, choices: Mapping[str, str]) -> str | None:
    """The letter of the choice that an answer names: by its whole text, by letter and text, or by a letter that is said
    as one; None if it names none, or more than one. choices: letter -> text."""
    said = _plain(prediction)
    for whole in (dict(choices), {letter: f"{letter}. {text}" for letter, text in choices.items()}):
        named = [letter for letter, text in whole.items() if said and _plain(text) == said]
        if named:
            return named[0] if len(named) == 1 else None
    # A letter in the text of a choice names no other choice: "Stanford type B".
    for text in sorted(choices.values(), key=len, reverse=True):
        prediction = re.sub(rf"(?<!\w){re.escape(text)}(?!\w)", ";", prediction, flags=re.IGNORECASE)
    letters = {a or b for a, b in _LETTER.findall(prediction)} | set(_SAID.findall(prediction))
    letters &= set(choices)
    return letters.pop() if len(letters) == 1 else None


def likeliest(logprobs: Mapping[str, float | None]) -> tuple[str, bool]:
    """(the choice with the greatest log-probability, whether others have the same; then it is the first of them).

    logprobs: letter -> natural logarithm; None is -inf.
    """
    values = {letter: -math.inf if value is None else value for letter, value in logprobs.items()}
    for letter, value in values.items():
        if math.isnan(value):
            raise ValueError(f"the log-probability of choice {letter} is not a number")
    best = [letter for letter in sorted(values) if values[letter] == max(values.values())]
    return best[0], len(best) > 1


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))
