"""The way in: what `engine.runtime.acceleration` hands on. Nothing large is imported before it is needed."""

from __future__ import annotations

import os
from typing import Any

from engine.processor import has_bf16
from engine.runtime.cpu.compile_kernel import LIBRARY, MODULE

# How much nicer than the language model. Each of a token's hundreds of products ends when its last thread does, so an
# encoder with an equal share of the cores slows an answer down four times, not twice. With this share (a quarter, while
# both want a core) an answer is twice as fast, and a scan takes a quarter longer beside answers that never pause.
_NICE = 5
_VARIABLES = {
    # Threads that spin while they wait would take the cores from the encoders. But a token is hundreds of short
    # products, and with threads that sleep after each it takes a third longer to twice as long: waking one costs a
    # virtual machine up to 70 microseconds. So they spin first, for about as long as it is from one product to the
    # next; an encoder beside them takes up to a twelfth longer for it.
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "5000",
}


def variables() -> dict[str, str]:
    """Environment variables for the language model's process, to be set before PyTorch is imported."""
    return dict(_VARIABLES)


def give_way() -> None:
    """Let this thread, and those that it starts from here, give way to the language model."""
    os.nice(_NICE)


def multiplies_bf16() -> bool:
    """Whether graphs can be run with their products in bf16, and gain by it."""
    return has_bf16()


def open_bf16(path: str, threads: int) -> Any:
    """A session of an ONNX graph with its products in bf16."""
    from engine.runtime.cpu.openvino_session import OpenVinoSession

    return OpenVinoSession(path, threads)


def shorten_pass(runner: Any, furthest: int) -> int:
    """Inside vLLM's worker: see `forward.install_on`; passes as numbers, which vLLM can send."""
    from engine.runtime.acceleration import Pass
    from engine.runtime.cpu.forward import install_on

    return int(install_on(runner, Pass(furthest)))


def lacking() -> str | None:
    """What would make this machine faster, and how to get it."""
    if LIBRARY.is_file():
        return None
    return (
        "the decode kernel is not compiled: small language models take half as long again for a token, or longer. "
        f"apt-get install gcc, then `python -m {MODULE}`"
    )
