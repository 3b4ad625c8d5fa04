"""ONNX Runtime without its telemetry: from 1.32 on its wheels for Linux send events to Microsoft unless this variable
is there when they are imported, and write the id of a session into the folder for temporary files."""

from __future__ import annotations

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime

__all__ = ["onnxruntime"]
