"""On a CPU: 1/model.onnx by ONNX Runtime."""

from engine.runtime.graph_model import TritonPythonModel  # noqa: F401
