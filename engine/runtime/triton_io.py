"""What the Python models of the repository say to Triton: inputs, answers, errors, calls of other models.

Importable inside a Triton Python stub only.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from engine.contract import MODELS
from engine.errors import M3DError, Unavailable, from_wire
from engine.runtime.run_folder import PEER, RunFolder
from engine.runtime.step import Inputs, Outputs

_log = logging.getLogger(__name__)

# Names only: the stub completes `pb_utils` after it has imported the model's module.
_CODES = {
    "INVALID_ARGUMENT": "INVALID_ARG",
    "NOT_FOUND": "NOT_FOUND",
    "RESOURCE_EXHAUSTED": "UNAVAILABLE",  # Triton has no code of its own for it
    "UNAVAILABLE": "UNAVAILABLE",
    "CANCELLED": "CANCELLED",
}


# --- requests ---------------------------------------------------------------------------------------------------------
class Request(Inputs):
    """A request of Triton's. Its arrays lie in shared memory, and are valid as long as `triton` is."""

    def __init__(self, request):
        self.triton = request

    def array(self, name: str) -> np.ndarray | None:
        tensor = pb_utils.get_input_tensor_by_name(self.triton, name)
        return None if tensor is None else tensor.as_numpy()

    @property
    def id(self) -> str:
        """The front's name of the request, or the client's where there is no front; may be empty."""
        return self.triton.request_id()

    def peer(self) -> str:
        """As the front tells it, which adds it to the request's parameters; empty if there is none."""
        try:
            value = json.loads(self.triton.parameters()).get(PEER)
        except (AttributeError, TypeError, ValueError):  # Triton gives "" for none; clients name theirs as they like
            return ""
        return value if isinstance(value, str) else ""

    def response(self, outputs: Outputs) -> pb_utils.InferenceResponse:
        """A response of those outputs that are wanted."""
        return response(self.triton.requested_output_names(), outputs)


# --- answers ---------------------------------------------------------------------------------------------------------
def response(wanted: Iterable[str], outputs: Outputs) -> pb_utils.InferenceResponse:
    """A response of named outputs.

    wanted: the request's `requested_output_names()`; the others stay out. A response sender would drop them itself, but
    without Python's lock: every now and then the process died of it.
    """
    return pb_utils.InferenceResponse([_tensor(name, outputs[name]) for name in wanted])


def error_response(error: Exception) -> pb_utils.InferenceResponse:
    """Our own errors with their code and text; anything unexpected as a short INTERNAL, its traceback in the log."""
    if isinstance(error, M3DError):
        _log.info("refused: %s", error.code)
        _log.debug("because: %s", error)
    else:
        _log.error("unexpected error", exc_info=error)
        error = M3DError(f"unexpected {type(error).__name__}; the server's log has the details")
    code = getattr(pb_utils.TritonError, _CODES.get(error.code, "INTERNAL"))
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(error.to_wire(), code))


def answer(function, *arguments) -> pb_utils.InferenceResponse:
    """`function(*arguments)`, or the response that stands for the error it raised."""
    try:
        return function(*arguments)
    except Exception as error:
        return error_response(error)


def send(sender, answered: pb_utils.InferenceResponse) -> None:
    """The one and only response of a request that is answered through its sender."""
    sender.send(answered, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


class Cancellations:
    """Which requests nobody waits for any more.

    The front puts the ids that it gave them into the run folder. Where there is no front, Triton is asked.
    """

    def __init__(self) -> None:
        self._folder = RunFolder.of_server()

    def id_of(self, request) -> str:
        """What the front calls the request; empty if it did not come through a front."""
        return request.request_id() if self._folder else ""

    def look(self) -> Callable[[str, Any], bool]:
        """Whether a request is cancelled now, as a function of its `id_of` and of what Triton is asked by."""
        gone = self._folder.cancelled() if self._folder else set()
        return lambda id_, asked: id_ in gone if id_ else asked.is_cancelled()


# --- other models ----------------------------------------------------------------------------------------------------
def infer(model: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Call a compute model of the repository with a batch and wait; its errors are raised as typed ones."""
    request = pb_utils.InferenceRequest(
        model_name=model,
        requested_output_names=list(MODELS[model].output_names),
        inputs=[_tensor(str(name), value) for name, value in inputs.items()],
        preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU),
    )
    result = request.exec()
    if result.has_error():
        message = result.error().message()
        error = from_wire(message)
        # Triton's own words carry no kind: the model is not loaded, or its process died.
        raise error if error.to_wire() in message else Unavailable(f"{model} cannot be run: {message}")
    # A copy: the arrays lie in shared memory that Triton takes back with `result`.
    return {
        name: pb_utils.get_output_tensor_by_name(result, name).as_numpy().copy() for name in MODELS[model].output_names
    }


def _tensor(name: str, value) -> pb_utils.Tensor:
    if isinstance(value, str):
        value = np.array([value.encode()], np.object_)
    return pb_utils.Tensor(name, np.ascontiguousarray(value))
