"""How an answer is sampled: checked on the client for quick errors, and again on the server, which trusts nobody."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from engine.answer_schema import checked_schema
from engine.errors import InvalidInput, shortened

MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 256
# vLLM takes a lower temperature for this one.
MIN_TEMPERATURE = 0.01
# The scores of repeated tokens are divided by it: by a tiny one they leave the range of floats.
MIN_REPETITION_PENALTY = 0.01
MAX_LOGPROBS = 20  # what vLLM gives at most
MAX_CHOICES = 64
MAX_CHOICE_CHARACTERS = 256
MAX_NAMED = 5  # unknown settings in a message


@dataclass(frozen=True)
class Sampling:
    """Sampling settings; the defaults are greedy, as the exactness tests use them.

    max_new_tokens: 1 or more; the server also refuses what does not fit the context beside the prompt.
    temperature: 0 (greedy), or from 0.01 to 2. top_p: above 0 to 1. top_k: 0 (off) or more.
    stop: texts that end the answer (at most 16, not part of it). seed: 0 to 2**63-1, or None.
    repetition_penalty: from 0.01 to 2; 1 is off.
    logprobs: how many of the likeliest tokens `Answer.logprobs` names for each token of the answer, 0 to 20; None for
    no log-probabilities.
    choices: texts with which the answer may begin (at most 64): `Answer.choices` has the log-probability of each.
    only_choices: the answer is one of the choices, without the space that a model may put before it. One that
    max_new_tokens cuts is not complete.
    json_schema: the answer is JSON of this schema: an object or its text, see `engine.answer_schema`; kept as text. An
    answer that max_new_tokens cuts is not complete.

    Log-probabilities are the model's own: temperature, top_p, top_k and repetition_penalty do not change them.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    repetition_penalty: float = 1.0
    logprobs: int | None = None
    choices: tuple[str, ...] = ()
    only_choices: bool = False
    json_schema: str | None = None

    def __post_init__(self):
        for name, value in vars(self).items():
            if isinstance(value, np.generic):
                object.__setattr__(self, name, value.item())
        self._texts("stop")
        self._texts("choices")
        self._integer("max_new_tokens", 1, 1 << 20)
        self._number("temperature", MIN_TEMPERATURE, 2.0, or_zero=True)
        self._number("top_p", 0.0, 1.0, exclusive=True)
        self._integer("top_k", 0, 1 << 30)
        if self.seed is not None:
            self._integer("seed", 0, (1 << 63) - 1)
        self._number("repetition_penalty", MIN_REPETITION_PENALTY, 2.0)
        self._check_texts("stop", MAX_STOP_STRINGS, MAX_STOP_CHARACTERS)
        if self.logprobs is not None:
            self._integer("logprobs", 0, MAX_LOGPROBS)
        self._check_texts("choices", MAX_CHOICES, MAX_CHOICE_CHARACTERS)
        self._check_constraints()

    def _check_constraints(self):
        for text in self.choices:
            if text != text.strip():
                raise InvalidInput(
                    f"choices: {shortened(text)} begins or ends with a space: leave it out, the model's family says "
                    "what stands before an answer"
                )
        if len(set(self.choices)) < len(self.choices):
            raise InvalidInput("choices: a text is given twice: give each once")
        if not isinstance(self.only_choices, bool):
            raise InvalidInput(f"only_choices must be true or false, not {shortened(self.only_choices)}")
        if self.only_choices and not self.choices:
            raise InvalidInput("only_choices is true, but there are no choices: give some")
        if self.json_schema is not None:
            object.__setattr__(self, "json_schema", checked_schema(self.json_schema))
        given = {"json_schema": self.json_schema is not None, "only_choices": self.only_choices, "stop": self.stop}
        if len(exclusive := [name for name, is_given in given.items() if is_given]) > 1:
            raise InvalidInput(f"{' and '.join(exclusive)} are given, which exclude each other: leave one out")

    def _texts(self, name):
        """One text, or some, as a tuple."""
        value = getattr(self, name) or ()
        if not isinstance(value, (str, list, tuple)):
            raise InvalidInput(f"{name} must be a text or a list of texts, not {shortened(value)}")
        object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))

    def _check_texts(self, name, most, characters):
        texts = getattr(self, name)
        if len(texts) > most:
            raise InvalidInput(f"{name}: {len(texts)} strings given, at most {most} are allowed")
        for text in texts:
            if not isinstance(text, str) or not 0 < len(text) <= characters:
                raise InvalidInput(f"{name}: every string must have 1 to {characters} characters")
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise InvalidInput(f"{name}: a string is not valid Unicode text")

    def _integer(self, name, low, high):
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise InvalidInput(f"{name} must be a whole number from {low} to {high}, not {shortened(value)}")

    def _number(self, name, low, high, exclusive=False, or_zero=False):
        value = getattr(self, name)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if number and or_zero and value == 0:
            return
        # NaN is in no range; a whole number too long for a float still compares.
        if not number or not low <= value <= high or exclusive and value == low:
            edge = ("0 or " if or_zero else "") + ("a number above" if exclusive else "a number from")
            raise InvalidInput(f"{name} must be {edge} {low:g} to {high:g}, not {shortened(value)}")

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Sampling:
        known = [f.name for f in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            named = ", ".join(shortened(name, 20) for name in unknown[:MAX_NAMED])
            more = f" and {len(unknown) - MAX_NAMED} more" if len(unknown) > MAX_NAMED else ""
            raise InvalidInput(f"unknown sampling setting {named}{more}; known are {', '.join(known)}")
        return cls(**values)

    @classmethod
    def from_json(cls, text: str | bytes) -> Sampling:
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InvalidInput(f"SAMPLING is not JSON: {error}") from None
        if not isinstance(values, dict):
            raise InvalidInput(f"SAMPLING must be a JSON object, not {type(values).__name__}")
        return cls.from_dict(values)
