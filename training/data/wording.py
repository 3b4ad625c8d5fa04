"""How questions and answers are worded, and what the data sets call their structures: data files beside this module.

templates.json: by task, in our own wording; {name}, {description} and {box} are filled in. `train` and `held_out` are
questions, `answer` and `absent` (the structure is not in the scan) answers. classes.json: the class names of M3D-Seg's
data sets by code, in the order of their class ids. terms.json: for each structure the names that the data sets use for
it, and descriptions that tell what it is without naming it.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

import numpy as np

from engine.errors import InvalidInput
from engine.prompt import SEG_TOKEN
from training.data.reading import read_json

_HERE = Path(__file__).parent
TEMPLATES, OWN_TERMS = _HERE / "templates.json", _HERE / "terms.json"


@cache
def templates() -> dict:
    return _read(TEMPLATES)


@cache
def class_names() -> dict[str, tuple[str, ...]]:
    """Class names by data set code; a class id is a position in them."""
    return {code: tuple(names) for code, names in _read(_HERE / "classes.json").items()}


@cache
def descriptions() -> dict[str, tuple[str, ...]]:
    """Descriptions by class name."""
    return {name: tuple(term["descriptions"]) for term in _read(OWN_TERMS) for name in term["names"]}


def read_templates(path: Path) -> dict:
    """Other questions and answers than our own, in the form of templates.json.

    Raises InvalidInput naming what is missing, or lacks a slot that is filled in.
    """
    found = read_json(path)
    places: list[tuple[tuple[str, ...], str | None]] = [(("caption", kind), None) for kind in ("train", "held_out")]
    for task, given in (("segmentation", SEG_TOKEN), ("rec", "{box}"), ("reg", "{name}")):
        for style, asked in (("by_name", "{name}"), ("by_description", "{description}")):
            asked = "{box}" if task == "reg" else asked
            places += [((task, style, kind), asked) for kind in ("train", "held_out")]
            places.append(((task, style, "answer"), given))
            if task != "reg":  # what is not there has no box to ask about
                places.append(((task, style, "absent"), "{name}"))
    for place, slot in places:
        texts = found
        for key in place:
            texts = texts.get(key) if isinstance(texts, dict) else None
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
            raise InvalidInput(f"{path} must have a list of texts as {'.'.join(place)}")
        if without := [text for text in texts if slot and slot not in text]:
            raise InvalidInput(f"{path}: {'.'.join(place)} lacks {slot}: {without[0]!r}")
        for text in texts:
            unknown = set(re.findall(r"{(.*?)}", text)) - {"name", "description", "box"}
            if unknown or place[0] == "caption" and "{" in text:
                raise InvalidInput(f"{path}: {'.'.join(place)} has a slot that is not filled in: {text!r}")
    return found


def read_descriptions(path: Path) -> dict[str, tuple[str, ...]]:
    """Descriptions by class name from M3D-Seg's `term_dictionary.json`: {name: [sentence, ...]}.

    Raises InvalidInput if the file is not like that.
    """
    terms = read_json(path)
    if not isinstance(terms, dict) or not all(
        isinstance(texts, list) and texts and all(isinstance(text, str) and text.strip() for text in texts)
        for texts in terms.values()
    ):
        raise InvalidInput(f'{path} must hold descriptions by class name: {{"liver": ["...", ...], ...}}')
    # They are filled into sentences that go on behind them.
    return {name: tuple(text.strip().removesuffix(".") for text in texts) for name, texts in terms.items()}


def choose(rng: np.random.Generator, texts: list[str] | tuple[str, ...]) -> str:
    return texts[int(rng.integers(len(texts)))]


def _read(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))
