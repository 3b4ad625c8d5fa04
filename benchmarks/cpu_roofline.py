"""The least time that each stage can take: its arithmetic at the machine's matrix rate, or its bytes at the memory's.

FLOPs are counted by running the checkpoint's geometry on PyTorch's meta device, which computes shapes only.
"""

from __future__ import annotations

import socket
import threading
import time
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import machine
from engine.models.config import LamedConfig
from engine.models.lamed import Lamed

ITEMSIZE = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1}
# m, k, n of the products that are timed: the encoders' largest two, and a square one, which fills a GPU.
SHAPES = ((2048, 768, 3072), (2048, 3072, 768), (4096, 4096, 4096))


@dataclass(frozen=True)
class Rates:
    """A machine at its best. matmul: FLOP/s by precision. memory: bytes/s read. wire: bytes/s to itself by TCP."""

    matmul: dict[str, float]
    memory: float
    wire: float | None = None

    def or_better(self, other: Rates) -> Rates:
        """The better of two measurements, each by itself: a machine that is shared is not always at its best."""
        return Rates(
            {name: max(rate, other.matmul[name]) for name, rate in self.matmul.items()},
            max(self.memory, other.memory),
            max(self.wire, other.wire),
        )


@dataclass(frozen=True)
class Stage:
    """flops: of its matrix products and convolutions. bytes: that it must read, its weights above all."""

    name: str
    flops: float
    bytes: float
    precision: str

    def seconds(self, rates: Rates) -> float:
        return max(self.flops / rates.matmul[self.precision], self.bytes / rates.memory)

    def at(self, precision: str) -> Stage:
        """The same work in another precision; the bytes are those of the weights."""
        return replace(self, precision=precision, bytes=self.bytes * ITEMSIZE[precision] / ITEMSIZE[self.precision])

    def bound(self, rates: Rates) -> str:
        """What decides: compute or memory."""
        return "compute" if self.flops / rates.matmul[self.precision] >= self.bytes / rates.memory else "memory"


def stages(
    config: LamedConfig, *, llm: str, graphs: str, question_tokens: int, answer_tokens: int, at_once: int = 1
) -> dict[str, Stage]:
    """The compute stages of a question about a new scan, by the name that measurements use.

    llm, graphs: precisions. at_once: answers decoded at the same time, which share the reading of the weights;
    `decode` is one step of all of them.
    """
    with torch.device("meta"):
        model = Lamed(config).eval()
        image = torch.empty(1, 1, *config.vision.image_size)
        found = {
            "vision_encoder": Stage(
                "vision_encoder",
                flops(lambda: model.encode_images(image)),
                weights(model.vision_tower, model.mm_projector) * ITEMSIZE[graphs],
                graphs,
            )
        }
        if config.segmentation is not None:
            features = torch.empty(1, config.segmentation.hidden_size, *config.segmentation.grid)
            state = torch.empty(1, config.llm_width)
            encoder = model.seg_module.image_encoder
            found["segmentation_encoder"] = Stage(
                "segmentation_encoder",
                flops(lambda: model.seg_module.encode(image)),
                weights(encoder) * ITEMSIZE[graphs],
                graphs,
            )
            head = weights(model.seg_module, model.seg_projector) - weights(encoder)
            found["segmentation_head"] = Stage(
                "segmentation_head", flops(lambda: model.segment(features, state)), head * ITEMSIZE["fp32"], "fp32"
            )
        prompt = 1 + config.num_visual_tokens + question_tokens
        body, head = model.llm.model, model.llm.lm_head

        def llm_flops(rows: int) -> int:
            """Of a forward over `rows` rows of which the last one is sampled from."""
            # A mask of 4 axes is taken as it is; others are looked into, which has no answer on the meta device.
            mask = torch.empty(1, 1, rows, rows)
            return flops(
                lambda: head(
                    body(
                        inputs_embeds=torch.empty(1, rows, config.llm_width), attention_mask=mask, use_cache=False
                    ).last_hidden_state[:, -1]
                )
            )

        # Tied embeddings are the head; others are read a row at a time.
        read = (weights(body) - weights(body.embed_tokens) + weights(head)) * ITEMSIZE[llm]
        context = prompt + answer_tokens / 2
        attention = 4 * context * config.llm["num_attention_heads"] * _head_width(config) * len(body.layers)
        cache = 2 * context * _kv_heads(config) * _head_width(config) * len(body.layers) * ITEMSIZE[llm]
        found["prefill"] = Stage("prefill", llm_flops(prompt), read, llm)
        found["decode"] = Stage("decode", at_once * (llm_flops(1) + attention), read + at_once * cache, llm)
    return found


def flops(run) -> int:
    """FLOPs of the matrix products and convolutions that `run()` does, attention as plain products."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.inference_mode():
        run()
    return counter.get_total_flops()


def weights(*modules: nn.Module) -> int:
    """Parameters of `modules`, each once."""
    return sum(p.numel() for p in {id(p): p for module in modules for p in module.parameters()}.values())


def measure(seconds: float = 1.0) -> Rates:
    """The rates of this machine, of its GPU if it has one: the best of the repetitions that fit in `seconds` each.

    Of products, the best shape counts: a floor that a stage can go below is none. A processor that has no products of
    bf16 makes them in fp32 (PyTorch's own way takes minutes for the large one).
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    matmul = {
        name: max(_product_rate(shape, machine.DTYPES[name], seconds / len(SHAPES), device) for shape in SHAPES)
        for name in machine.precisions()
    }
    matmul["fp16"] = matmul.setdefault("bf16", matmul["fp32"])
    large = torch.ones(1 << 27, device=device, dtype=torch.float32)  # 512 MiB: beyond every cache
    memory = large.nbytes / _best(large.sum, seconds, device)
    return Rates(matmul, memory, _loopback(64 << 20))


def _product_rate(shape: tuple[int, int, int], dtype: torch.dtype, seconds: float, device: str) -> float:
    """FLOP/s of an m x k by k x n product."""
    m, k, n = shape
    left, right = (torch.randn(size, device=device).to(dtype) for size in ((m, k), (k, n)))
    product = torch.empty(m, n, device=device, dtype=dtype)
    return 2 * m * k * n / _best(lambda: torch.mm(left, right, out=product), seconds, device)


def _best(run, seconds: float, device: str) -> float:
    run()
    best, begun = float("inf"), time.perf_counter()
    while best == float("inf") or time.perf_counter() < begun + seconds:
        started = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return best


def _loopback(size: int) -> float:
    """Bytes/s of a TCP connection of this machine to itself, the best of three."""
    best = 0.0
    with socket.create_server(("127.0.0.1", 0)) as server:
        for _ in range(3):
            sending = socket.create_connection(server.getsockname())
            receiving, _ = server.accept()
            with sending, receiving:
                thread = threading.Thread(target=sending.sendall, args=(bytearray(size),))
                started = time.perf_counter()
                thread.start()
                left = size
                while left:
                    left -= len(receiving.recv(min(left, 1 << 20)))
                best = max(best, size / (time.perf_counter() - started))
                thread.join()
    return best


def _head_width(config: LamedConfig) -> int:
    return config.llm.get("head_dim") or config.llm_width // config.llm["num_attention_heads"]


def _kv_heads(config: LamedConfig) -> int:
    return config.llm.get("num_key_value_heads", config.llm["num_attention_heads"])
