"""What a step is told, and how it fails."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


DEMO = "training/demo"


class Failed(Exception):
    """A step did not do what it should; the message says what."""


@dataclass(frozen=True)
class Context:
    """The same for every step of a run.

    device: cuda or cpu. tiny: small sizes, to try the steps themselves.
    work: folder for what is built. checkpoint: M3D-LaMed that is served. segment_question: one that it answers by a
    mask. rates: what the step roofline measured, by name, in FLOP/s and bytes/s; empty before it.
    """

    device: str
    tiny: bool
    work: str
    checkpoint: str
    segment_question: str
    rates: dict[str, float]

    @property
    def is_demo(self) -> bool:
        """Whether the demo's checkpoint is served, whose size the expected times are for."""
        return (ROOT / self.checkpoint).resolve() == ROOT / DEMO

    def to_json(self) -> str:
        """For the command line of a step's process."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Context:
        """The inverse of `to_json`."""
        return cls(**json.loads(text))
