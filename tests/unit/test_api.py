"""The protocol is what its implementations have, and importing a name of it brings no more than it needs."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

from engine import M3D, AsyncM3DClient, M3DClient, M3DEngine
from tests.conftest import ROOT

METHODS = ["upload", "ask", "stream", "segment", "rank", "embed", "embed_texts", "forget", "is_ready", "info", "close"]


def test_the_protocol_has_these_methods_each_with_a_docstring():
    assert [name for name in vars(M3D) if not name.startswith("_")] == METHODS
    assert all(inspect.getdoc(getattr(M3D, name)) for name in METHODS)


@pytest.mark.parametrize("kind", [M3DClient, M3DEngine, AsyncM3DClient])
@pytest.mark.parametrize("name", METHODS)
def test_a_method_takes_the_same_arguments_in_all_implementations(kind, name):
    promised, found = (inspect.signature(getattr(of, name)).parameters for of in (M3D, kind))
    assert list(found.values()) == list(promised.values())
    is_awaited = inspect.iscoroutinefunction(getattr(kind, name))
    assert is_awaited == (kind is AsyncM3DClient and name != "stream")


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        ("engine.runtime.study_step, engine.runtime.segmentation, engine.runtime.retrieval", ("grpc", "torch", "vllm")),
        ("engine.client", ("torch", "scipy", "nibabel", "matplotlib")),
        ("engine.local", ("grpc", "torch", "vllm")),
        ("engine.models.base", ("engine.models.checkpoint",)),
        ("engine.cli, engine.models.checkpoint, engine.server", ("m3d_demo",)),
    ],
)
def test_a_process_loads_nothing_of_the_others(modules, absent):
    script = f"import sys, {modules}; print(*sorted({set(absent)!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_a_name_that_the_package_has_not_is_an_attribute_error():
    import engine

    with pytest.raises(AttributeError, match="M4D"):
        _ = engine.M4D
