"""How questions and answers are worded, and what the data sets call their structures: data files beside this module.

templates.json: by task, in our own wording; {name}, {description} and {box} are filled in. `train` and `held_out` are
questions, `answer` and `absent` (the structure is not in the scan) answers. classes.json: the class names of M3D-Seg's
data sets by code, in the order of their class ids. terms.json: for each structure the names that the data sets use for
it, and descriptions that tell what it is without naming it.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np

from engine.errors import InvalidInput
from training.data.reading import read_json


@cache
def templates() -> dict:
    return _read("templates.json")


@cache
def class_names() -> dict[str, tuple[str, ...]]:
    """Class names by data set code; a class id is a position in them."""
    return {code: tuple(names) for code, names in _read("classes.json").items()}


@cache
def descriptions() -> dict[str, tuple[str, ...]]:
    """Descriptions by class name."""
    return {name: tuple(term["descriptions"]) for term in _read("terms.json") for name in term["names"]}


def read_descriptions(path: Path) -> dict[str, tuple[str, ...]]:
    """Descriptions by class name from M3D-Seg's `term_dictionary.json`: {name: [sentence, ...]}.

    Raises InvalidInput if the file is not like that.
    """
    terms = read_json(path)
    if not isinstance(terms, dict) or not all(
        isinstance(told, list) and told and all(isinstance(text, str) and text.strip() for text in told)
        for told in terms.values()
    ):
        raise InvalidInput(f'{path} must hold descriptions by class name: {{"liver": ["...", ...], ...}}')
    # They are filled into sentences that go on behind them.
    return {name: tuple(text.strip().removesuffix(".") for text in told) for name, told in terms.items()}


def choose(rng: np.random.Generator, texts: list[str] | tuple[str, ...]) -> str:
    return texts[int(rng.integers(len(texts)))]


def _read(name: str):
    return json.loads((Path(__file__).parent / name).read_text(encoding="utf-8"))
