"""Questions and truthful answers about a view of a scan. The wordings and what each body part holds: words.json."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from engine.prompt import SEG_TOKEN, format_box
from training.data.augment import View

# How often each task is drawn in training unless settings say otherwise, where a view allows it.
SHARES = {
    "modality": 3,
    "modality_yes": 6,
    "part": 3,
    "part_yes": 6,
    "presence": 24,
    "tumour": 8,
    "side": 6,
    "side_yes": 6,
    "box_side": 6,
    "box": 5,
    "name_box": 3,
    "segment": 30,
    "segment_absent": 6,
    "describe": 4,
    "unknown": 2,
}
# Tasks with a small set of right answers: how to tell them apart, and how often guessing is right.
CLOSED = {
    "modality": 1 / 2,
    "modality_yes": 1 / 2,
    "part": 1 / 3,
    "part_yes": 1 / 2,
    "presence": 1 / 2,
    "tumour": 1 / 2,
    "side": 1 / 2,
    "side_yes": 1 / 2,
    "box_side": 1 / 2,
}
_NAMED_IN_CAPTION = 4


@dataclass(frozen=True)
class Question:
    """One question about a view. structure: what a mask, box or presence question is about, else None.

    about: of a closed question, what it tells by itself: the structure, modality, part or side it names, or the half of
    the volume that its box lies in. key: for closed tasks the word that the answer must begin with or contain, among
    `choices`.
    """

    task: str
    question: str
    answer: str
    structure: str | None = None
    key: str | None = None
    choices: tuple[str, ...] = ()
    about: str | None = None

    @property
    def segments(self) -> bool:
        return SEG_TOKEN in self.answer


@cache
def words() -> dict:
    return json.loads((Path(__file__).parent / "words.json").read_text())


def draw(view: View, rng: np.random.Generator, count: int, shares: dict[str, int] = SHARES) -> list[Question]:
    """`count` random questions about a view, none where it allows no task. shares: task -> how often it is drawn,
    relative to the others."""
    questions, left = [], {task: share for task, share in shares.items() if share}
    while left and len(questions) < count:
        task = str(rng.choice(list(left), p=np.array(list(left.values())) / sum(left.values())))
        if question := ask(task, view, rng):
            questions.append(question)
        else:
            del left[task]
    return questions


def ask(
    task: str,
    view: View,
    rng: np.random.Generator,
    wording: str = "train",
    structure: str | None = None,
) -> Question | None:
    """A question of one task, about `structure` if given (it must be visible); None if the view does not allow it."""
    facts, slots = view.facts, dict(view.facts)
    modality, part, side = facts["modality"], facts["part"], facts["tumour_side"]
    slots["a_modality"] = words()["modalities"][modality]
    slots["A_modality"] = slots["a_modality"].capitalize().replace("ct", "CT").replace("mr", "MR")
    slots["finding"] = facts["finding"].format(tumour_side=side)
    key, choices, kind, name = None, (), "answer", structure
    if task in ("side", "side_yes", "tumour", "describe") and facts["tumour"] and facts["tumour"] not in view.visible:
        return None
    if task in ("side", "side_yes") and not side:
        return None
    if task == "modality":
        key, choices = modality, ("CT", "MR")
    elif task == "part":
        key, choices = part, tuple(words()["parts"])
    elif task == "side":
        key, choices = side, ("left", "right")
    elif task in ("modality_yes", "part_yes", "side_yes", "presence", "tumour"):
        yes = bool(facts["tumour"]) if task == "tumour" else bool(rng.random() < 0.5)
        kind, key, choices = ("yes" if yes else "no"), ("Yes" if yes else "No"), ("Yes", "No")
        if task == "modality_yes":
            slots["asked_modality"] = words()["modalities"][modality if yes else {"CT": "MR", "MR": "CT"}[modality]]
        elif task == "part_yes":
            slots["asked_part"] = part if yes else str(rng.choice([p for p in words()["parts"] if p != part]))
        elif task == "side_yes":
            slots["asked_side"] = side if yes else {"left": "right", "right": "left"}[side]
        elif task == "presence":
            name = str(rng.choice(_present(view) if yes else _absent(view)))
    elif task == "segment_absent":
        name = str(rng.choice(_absent(view)))
    elif task in ("box", "name_box", "segment", "box_side"):
        candidates = [s for s in view.visible if task != "box_side" or s.startswith(("left ", "right "))]
        if structure is None:
            if not candidates:
                return None
            name = str(rng.choice(candidates))
        slots["box"] = format_box(view.box(name)) if task != "segment" else ""
        if task == "box_side":
            slots["box_side"] = key = name.split()[0]
            choices = ("left", "right")
            slots["asked_half"] = str(view.box(name)[[2, 5]].mean() < 0.5)
    if name is not None:
        slots |= _named(name, rng)
    template = words()["tasks"][task]
    question, answer = (str(rng.choice(template[which])).format(**slots) for which in (wording, kind))
    asked = ("asked_modality", "asked_part", "asked_side", "asked_half")
    about = next((slots[slot] for slot in asked if slot in slots), name)
    return Question(task, question, answer, name, key, choices, about)


def caption(view: View, rng: np.random.Generator) -> str:
    """A report of a view: what it is, the finding if it is in view, and a few of the structures that can be seen."""
    described = ask("describe", view, rng)
    modality = words()["modalities"][view.facts["modality"]]
    text = described.answer if described else f"This is {modality} scan of the {view.facts['part']}."
    seen = [str(name) for name in rng.permutation(view.visible)[:_NAMED_IN_CAPTION]]
    return f"{text} In view: {', '.join(seen)}." if seen else text


def is_right(question: Question, answer: str) -> bool:
    """Whether an answer to a closed question names the right choice, and no other."""
    said = " " + re.sub(r"\W+", " ", answer.lower()) + " "
    found = [choice for choice in question.choices if f" {choice.lower()} " in said]
    if question.choices == ("Yes", "No"):
        return said.startswith(f" {question.key.lower()} ")
    return found == [question.key]


def _present(view: View) -> list[str]:
    """What is visible for certain: the labelled structures in view and what the body part always holds."""
    always = [s for s in words()["parts"][view.facts["part"]]["present"] if s not in view.structures]
    unseen = [] if view.facts["tumour"] in view.visible else ["tumour"]
    return [*view.visible, *(s for s in always if s not in unseen)]


def _absent(view: View) -> list[str]:
    elsewhere = words()["parts"][view.facts["part"]]["elsewhere"]
    skull = {"skull", "brain tumour", "tumour"} if view.facts["tumour"] == "brain tumour" else set()
    return [*(s for s in elsewhere if s not in skull), *words()["absent_everywhere"]]


def _named(name: str, rng: np.random.Generator) -> dict[str, str]:
    """Slots for a structure: asked about by its name or, now and then, a synonym."""
    synonyms = words()["synonyms"].get(name, [])
    asked = str(rng.choice(synonyms)) if synonyms and rng.random() < 0.3 else name
    plural, asked_plural = (
        n in words()["plural"] or n in ("both lungs", "discs", "spinal discs", "disks") for n in (name, asked)
    )
    article = "" if asked_plural else "an " if asked[0] in "aeiou" else "a "
    return {
        "name": name,
        "is": "are" if plural else "is",
        "It_is": "They are" if plural else "It is",
        "asked": asked,
        "a_asked": article + asked,
        "Is": "Are" if asked_plural else "Is",
    }
