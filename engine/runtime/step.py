"""A step of the chain: it takes the inputs of one request and gives its outputs, by the names of engine.contract.

Triton's Python models answer by the steps, see `RequestService`, and so does `M3DEngine`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import numpy as np

from engine.contract import DTYPES, Tensor, encoded_texts
from engine.errors import InvalidInput

Outputs = Mapping[str, "np.ndarray | str"]
"""Outputs by name: arrays, or a text for a BYTES output of one element."""

Deferred = Callable[[], Outputs]
"""What is left to do for the outputs of a request that takes time."""


class Inputs(ABC):
    """Optional inputs may be missing, and so may others in requests that do not come from our client."""

    @abstractmethod
    def array(self, name: str) -> np.ndarray | None:
        """An input as it lies in memory, or None if it was not given."""

    def peer(self) -> str:
        """The connection that the request came over; empty if that is not known."""
        return ""

    def needed_array(self, name: str) -> np.ndarray:
        """An input as it lies in memory. Raises InvalidInput if it was not given."""
        found = self.array(name)
        if found is None:
            raise InvalidInput(f"the request has no {name}, without which it cannot be answered: give one")
        return found

    def texts(self, name: str) -> list[str]:
        """A BYTES input as texts; empty if it was not given."""
        values = self.array(name)
        try:
            return [] if values is None else [value.decode() for value in values.ravel()]
        except UnicodeDecodeError:
            raise InvalidInput(f"{name} must be UTF-8 text") from None

    def text(self, name: str) -> str | None:
        """A BYTES input of one element, or None if it was not given or is empty."""
        return (self.texts(name) or [""])[0] or None

    def needed_text(self, name: str) -> str:
        """A BYTES input of one element. Raises InvalidInput if it was not given; it may be empty."""
        self.needed_array(name)
        return self.text(name) or ""

    def flag(self, name: str) -> bool:
        values = self.array(name)
        return values is not None and bool(values.any())


Step = Callable[[Inputs], "Outputs | Deferred"]
"""Answers a request: at once, or, if that takes time, with a function without arguments that does."""


class LocalInputs(Inputs):
    """Inputs of a request that was made in this process. Those whose value is None were not given."""

    def __init__(self, inputs: Mapping[Tensor, object]):
        self._arrays = {tensor.name: _array(tensor, value) for tensor, value in inputs.items() if value is not None}

    def array(self, name: str) -> np.ndarray | None:
        return self._arrays.get(name)


def _array(tensor: Tensor, value: object) -> np.ndarray:
    """An input as it would be after its way to a server."""
    if tensor.dtype == "BYTES":
        return np.array(encoded_texts(tensor, value), np.object_)
    return np.atleast_1d(np.asarray(value, DTYPES[tensor.dtype]))
