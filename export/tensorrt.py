"""TensorRT: a typed ONNX graph becomes a plan, with a report of what was built beside it.

The only module that speaks to TensorRT. `tensorrt` (10.x and 11.x) builds for the GPU it runs on, and Triton serves its
plans. `rtx`, TensorRT for RTX, builds ahead of time on any machine, without a GPU: it proves that the graphs parse,
type and compile for an architecture; Triton's TensorRT backend does not load its plans. Both are used through the same
calls.
"""

from __future__ import annotations

import hashlib
import importlib
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError

from engine.errors import InvalidInput, M3DError, Unavailable
from export.build_settings import BuildSettings
from export.typed_graph import module_of

if TYPE_CHECKING:  # read with tensorrt-stubs, whose Dims is no sequence and whose memory is no buffer
    import tensorrt as trt

PLAN = {"tensorrt": "model.plan", "rtx": "model.rtx.plan"}  # Triton looks for the first
STRIPPED_PLAN = "model.stripped.plan"
REPORT = "layers.txt"
_DTYPES = {
    "FLOAT": "FP32",
    "HALF": "FP16",
    "BF16": "BF16",
    "FP8": "FP8",
    "INT32": "INT32",
    "INT64": "INT64",
    "INT8": "INT8",
    "BOOL": "BOOL",
    "UINT8": "UINT8",
}
_MODULES = {"tensorrt": ("tensorrt", "tensorrt_bindings"), "rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings")}
_INSTALL = {
    "tensorrt": "run inside the image of deploy/, or install `tensorrt-cu13` on a machine with an NVIDIA GPU; "
    "without a GPU, check the graphs with --builder rtx",
    "rtx": "install the extra `m3d-engine[tensorrt-rtx]`",
}


class BuildError(M3DError):
    """TensorRT cannot parse or build a graph; the message names the ONNX node and the PyTorch module it came from."""


@dataclass(frozen=True)
class Binding:
    """An input or output of a plan: Triton's dtype name and the shape with the batch axis, -1 where it is free."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    is_input: bool


def bindings_module(builder: str) -> Any:
    """The Python module of `builder`. Raises Unavailable, with the way to get it, if there is none."""
    for name in _MODULES[builder]:
        try:
            if name == "tensorrt_rtx_bindings":
                importlib.import_module("tensorrt_rtx_libs")  # loads the libraries that the bindings need
            module = importlib.import_module(name)
        except ImportError:
            continue
        if hasattr(module, "Builder"):  # `tensorrt-stubs` leaves an empty `tensorrt` behind
            return module
    raise Unavailable(
        f"{'TensorRT' if builder == 'tensorrt' else 'TensorRT-RTX'} is not installed: {_INSTALL[builder]}"
    )


def build(graph: Path, plan: Path, settings: BuildSettings) -> dict:
    """Build the typed ONNX file `graph` into the file `plan`; write what was built into REPORT beside it.

    Args:
        graph: the typed ONNX file.
        plan: the file to write.
        settings: how it is built.

    Returns:
        The plan's part of a manifest entry. "context_bytes" is what an execution context of each profile takes of the
        GPU's memory, and "context_source" says where that is from: "engine", "build log", or None where neither tells.

    Raises:
        BuildError: TensorRT cannot parse or build the graph.
        Unavailable: there is no TensorRT, or no GPU for it.
    """
    started = time.perf_counter()
    api = bindings_module(settings.builder)
    log = _log(api)
    try:
        builder: trt.Builder = api.Builder(log)
    except TypeError as error:  # the constructor returned nothing
        raise Unavailable(
            f"TensorRT {api.__version__} does not start ({log.errors() or error}); builder tensorrt needs "
            "an NVIDIA GPU and its driver, --builder rtx does not"
        ) from None
    model = _read(graph)
    network = _parse(api, builder, log, graph, model)
    bindings = _bindings(network)
    config = _config(api, builder, network, bindings, settings)
    built = builder.build_serialized_network(network, config)
    if built is None:
        raise BuildError(
            f"{graph.parents[1].name}: {api.__name__} {api.__version__} cannot build this graph: "
            f"{_named(log.errors(), model)}"
        )
    plan.write_bytes(memoryview(built))  # type: ignore[arg-type]
    if settings.timing_cache is not None:
        settings.timing_cache.parent.mkdir(parents=True, exist_ok=True)
        settings.timing_cache.write_bytes(memoryview(config.get_timing_cache().serialize()))  # type: ignore[arg-type]
    # TensorRT for RTX needs a GPU to load what it has built, and has one only by chance.
    engine = _engine(api, log, plan) if settings.builder == "tensorrt" else None
    layers = log.layers() if engine is None else _layers(api, engine)
    plan.with_name(REPORT).write_text(layers or "this TensorRT reports no layers\n")
    contexts = log.context_bytes(len(settings.profiles)) if engine is None else _context_bytes(engine)
    return {
        "builder": settings.builder,
        "tensorrt": api.__version__,
        "compute_capability": _capability(settings),
        "profiles": settings.profiles,
        "version_compatible": settings.version_compatible,
        "hardware_compatible": settings.hardware_compatible,
        "bindings": {b.name: [b.dtype, *b.shape] for b in bindings},
        "fused_attentions": count_fused(layers),
        "bytes": plan.stat().st_size,
        "context_bytes": contexts,
        "context_source": None if contexts is None else "build log" if engine is None else "engine",
        "build_seconds": round(time.perf_counter() - started, 1),
    }


def refit(stripped: Path, graph: Path, plan: Path, builder: str) -> None:
    """Put the weights of the typed ONNX file `graph` into the plan `stripped`, and write it as `plan`. Needs a GPU."""
    api = bindings_module(builder)
    log = _log(api)
    engine = _engine(api, log, stripped)
    refitter: trt.Refitter = api.Refitter(engine, log)
    parser: trt.OnnxParserRefitter = api.OnnxParserRefitter(refitter, log)
    if not parser.refit_from_file(str(graph)) or not refitter.refit_cuda_engine():
        raise BuildError(f"{graph.parents[1].name}: the weights do not fit the stripped plan: {log.errors()}")
    config = engine.create_serialization_config()
    config.clear_flag(api.SerializationFlag.EXCLUDE_WEIGHTS)
    plan.write_bytes(memoryview(engine.serialize_with_config(config)))  # type: ignore[arg-type]


def run(plan: Path, builder: str, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Run a plan once on this machine's GPU, by the profile tuned for the least batch."""
    import torch

    api = bindings_module(builder)
    log = _log(api)
    engine = _engine(api, log, plan)
    context: trt.IExecutionContext = engine.create_execution_context()
    tensors = {name: torch.from_numpy(array).cuda() for name, array in inputs.items()}
    for name, tensor in tensors.items():
        context.set_input_shape(name, tuple(tensor.shape))
    dtypes = {"FLOAT": torch.float32, "HALF": torch.float16, "INT64": torch.int64}
    outputs = [name for name in map(engine.get_tensor_name, range(engine.num_io_tensors)) if name not in tensors]
    for name in outputs:
        shape: tuple[int, ...] = tuple(context.get_tensor_shape(name))  # type: ignore[arg-type]
        tensors[name] = torch.empty(shape, device="cuda", dtype=dtypes[engine.get_tensor_dtype(name).name])
    for name, tensor in tensors.items():
        context.set_tensor_address(name, tensor.data_ptr())
    stream = torch.cuda.current_stream()
    if not context.execute_async_v3(stream.cuda_stream):
        raise BuildError(f"{plan} does not run: {log.errors()}")
    stream.synchronize()
    return {name: tensors[name].float().cpu().numpy() for name in outputs}


def can_run() -> bool:
    """Whether this machine has a GPU that torch can use, and TensorRT to run plans on it."""
    import torch

    try:
        bindings_module("tensorrt")
    except Unavailable:
        return False
    return torch.cuda.is_available()


def structure_key(graph: onnx.ModelProto, settings: BuildSettings) -> str:
    """SHA-256 of all that a stripped plan depends on: settings, TensorRT, the GPU, and the graph without weights."""
    bare = onnx.ModelProto()
    bare.CopyFrom(graph)
    for tensor in bare.graph.initializer:
        if tensor.data_type in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16):
            for field in ("raw_data", "float_data", "int32_data", "external_data"):
                tensor.ClearField(field)
    for node in bare.graph.node:
        del node.metadata_props[:]
    parts = (
        bare.SerializeToString(deterministic=True),
        repr(settings).encode(),
        _capability(settings).encode(),
        bindings_module(settings.builder).__version__.encode(),
    )
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()


def count_fused(layers: str) -> int:
    """How many attentions became one kernel, going by a report of layers."""
    return len(re.findall(r"^(?:Layer\S*|Name): \S*mha\S*", layers, re.MULTILINE | re.IGNORECASE))


# --- building --------------------------------------------------------------------------------------------------------
def _read(graph: Path) -> onnx.ModelProto:
    """The graph without its weights, to name nodes by."""
    try:
        return onnx.load(graph, load_external_data=False)
    except DecodeError as error:
        raise BuildError(f"{graph} is no ONNX file: {error}") from None


def _parse(api: Any, builder: trt.Builder, log: Any, graph: Path, model: onnx.ModelProto) -> trt.INetworkDefinition:
    # TensorRT 11 has no other networks, and may drop the flag one day.
    flag = getattr(api.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network: trt.INetworkDefinition = builder.create_network(0 if flag is None else 1 << int(flag))
    parser: trt.OnnxParser = api.OnnxParser(network, log)
    if not parser.parse_from_file(str(graph)):
        nodes = {node.name: node for node in model.graph.node}
        errors = []
        for index in range(parser.num_errors):
            error: trt.ParserError = parser.get_error(index)
            node = nodes.get(error.node_name())
            where = f"node {error.node_name()} ({error.node_operator()})"
            if node is not None and module_of(node):
                where += f" of {module_of(node)}"
            errors.append(f"{where}: {error.desc()}")
        raise BuildError(
            f"{graph.parents[1].name}: {api.__name__} {api.__version__} cannot parse "
            f"{'; '.join(errors) or log.errors()}"
        )
    return network


def _bindings(network: trt.INetworkDefinition) -> list[Binding]:
    tensors = [(network.get_input(i), True) for i in range(network.num_inputs)]
    tensors += [(network.get_output(i), False) for i in range(network.num_outputs)]
    return [
        Binding(t.name, _DTYPES.get(t.dtype.name, t.dtype.name), tuple(t.shape), is_input)  # type: ignore[arg-type]
        for t, is_input in tensors
    ]


def _config(
    api: Any, builder: trt.Builder, network: trt.INetworkDefinition, bindings: list[Binding], settings: BuildSettings
) -> trt.IBuilderConfig:
    config: trt.IBuilderConfig = builder.create_builder_config()
    config.set_memory_pool_limit(api.MemoryPoolType.WORKSPACE, int(settings.workspace_gib * (1 << 30)))
    config.profiling_verbosity = api.ProfilingVerbosity.DETAILED
    config.clear_flag(api.BuilderFlag.TF32)  # fp32 means fp32; what may be less says so in the graph
    if settings.strip_weights:
        config.set_flag(api.BuilderFlag.STRIP_PLAN)
        config.set_flag(api.BuilderFlag.REFIT)  # without it, other weights than those of the build are undefined
    if settings.version_compatible:
        config.set_flag(api.BuilderFlag.VERSION_COMPATIBLE)
    if settings.hardware_compatible:
        config.hardware_compatibility_level = api.HardwareCompatibilityLevel.AMPERE_PLUS
    if settings.compute_capability is not None:
        rtx: Any = config  # not in TensorRT proper
        rtx.num_compute_capabilities = 1
        name = f"SM{settings.compute_capability.replace('.', '')}"
        if not rtx.set_compute_capability(getattr(api.ComputeCapability, name), 0):
            raise BuildError(f"TensorRT-RTX {api.__version__} does not build for {settings.compute_capability}")
    if settings.timing_cache is not None:
        known = settings.timing_cache.read_bytes() if settings.timing_cache.is_file() else b""
        cache = config.create_timing_cache(known)
        if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
            raise InvalidInput(
                f"{settings.timing_cache} is no timing cache, or that of another GPU or TensorRT: name another"
            )
    for batches in settings.profiles:
        profile: trt.IOptimizationProfile = builder.create_optimization_profile()
        for binding in bindings:
            if not binding.is_input:
                continue
            batch, *shape = binding.shape
            if batch != -1 or -1 in shape:
                raise BuildError(f"{binding.name} is {binding.shape}: the batch axis, and it alone, must be free")
            least, tuned, most = ((n, *shape) for n in batches)
            profile.set_shape(binding.name, least, tuned, most)  # type: ignore[arg-type]
        if config.add_optimization_profile(profile) < 0:
            raise BuildError(f"TensorRT does not take a profile of {batches} volumes (fewest, best, most)")
    return config


def _engine(api: Any, log: Any, plan: Path) -> trt.ICudaEngine:
    runtime: trt.Runtime = api.Runtime(log)
    runtime.engine_host_code_allowed = True  # a version compatible plan has a runtime in it; ours were built here
    engine = runtime.deserialize_cuda_engine(plan.read_bytes())
    if engine is None:
        raise Unavailable(f"{plan} cannot be loaded on this machine: {log.errors()}")
    return engine


def _layers(api: Any, engine: trt.ICudaEngine) -> str:
    """The engine's layers with types and kernels."""
    inspector: trt.EngineInspector = engine.create_engine_inspector()
    return inspector.get_engine_information(api.LayerInformationFormat.ONELINE)


def _context_bytes(engine: trt.ICudaEngine) -> list[int]:
    """Memory that an execution context of each profile takes."""
    return [engine.get_device_memory_size_for_profile_v2(index) for index in range(engine.num_optimization_profiles)]


def _capability(settings: BuildSettings) -> str:
    if settings.compute_capability is not None:
        return settings.compute_capability
    import torch

    return ".".join(map(str, torch.cuda.get_device_capability())) if torch.cuda.is_available() else "unknown"


def _named(errors: str, model: onnx.ModelProto) -> str:
    """`errors` with the PyTorch module behind each ONNX node that they mention."""
    modules = {node.name: module_of(node) for node in model.graph.node if node.name}
    return re.sub(
        r"[\w./:]+", lambda word: f"{word[0]} (of {modules[word[0]]})" if modules.get(word[0]) else word[0], errors
    )


def _log(api: Any) -> Any:
    class Log(api.ILogger):
        """Keeps what TensorRT says; nothing of it is printed."""

        def __init__(self):
            super().__init__()
            self.messages: list[tuple[Any, str]] = []

        def log(self, severity, message):
            self.messages.append((severity, message))

        def errors(self) -> str:
            wrong = (api.ILogger.Severity.ERROR, api.ILogger.Severity.INTERNAL_ERROR)
            said = [message for severity, message in self.messages if severity in wrong]
            return "; ".join(dict.fromkeys(said)) or "no cause given"

        def layers(self) -> str:
            """What `_layers` says: at this verbosity a build ends with it."""
            found = [
                message for _, message in self.messages if message.startswith(("Layers:", "Engine Layer Information:"))
            ]
            return found[-1] if found else ""

        def context_bytes(self, profiles: int) -> list[int] | None:
            """What `_context_bytes` says, as a build has said it for each of its profiles; None if it has not."""
            found = [re.match(r"Total Activation Memory: (\d+) bytes", message) for _, message in self.messages]
            sizes = [int(match[1]) for match in found if match]
            return sizes if len(sizes) == profiles else None

    return Log()
