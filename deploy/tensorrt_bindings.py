"""Print the requirement of TensorRT's Python bindings that match this machine's TensorRT library, for pip."""

from __future__ import annotations

import sys

from engine.gpu import tensorrt_version


def requirement(version: str | None) -> str:
    """The bindings of release `version`, such as "11.4.0"; they load the library that is there already."""
    if version is None:
        sys.exit("no TensorRT library (libnvinfer) is here: build on NVIDIA's Triton image")
    return f"tensorrt-cu13-bindings=={version}.*"


if __name__ == "__main__":
    print(requirement(tensorrt_version()))
