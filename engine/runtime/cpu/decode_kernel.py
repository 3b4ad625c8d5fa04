"""What lies between two attentions of a LLaMA, for the few rows of a step that decodes: `decode_kernel.c`.

`engine.runtime.cpu.compile_kernel` compiles it; where that has not been done it is absent, and decoding takes longer.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from ctypes import c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass

import torch

from engine.runtime.cpu.compile_kernel import LIBRARY

# Of a model's layers. The kernel has weights of its own beside vLLM's, and large products are near the memory's
# bandwidth without it.
MOST_BYTES = 1 << 30
_LINE = 32  # floats that it takes at once, at most
BLOCK = 8  # rows of a weight


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernel, if there is one of this version that can be loaded.

    Compiled by GCC it shares PyTorch's OpenMP threads, as PyTorch is loaded by now.
    """
    try:
        found = ctypes.CDLL(str(LIBRARY)) if LIBRARY.is_file() else None
        current = found and found.m3d_structures() == sum(map(ctypes.sizeof, (_Geometry, _Layer, _Step)))
    except (OSError, AttributeError):  # built for another machine; of another version
        return None
    return found if current else None


@dataclass(frozen=True)
class KernelShape:
    """Of the model: widths of its states and of its MLP, heads of attention, what RMSNorm adds to squares."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int
    epsilon: float
    dtype: torch.dtype

    @property
    def queries(self) -> int:
        """Values of a row's queries."""
        return self.heads * self.head_size

    @property
    def projected(self) -> int:
        """Values of a row's queries, keys and values."""
        return (self.heads + 2 * self.kv_heads) * self.head_size

    def fits(self) -> bool:
        """Whether the kernel can compute it."""
        return (
            self.dtype in (torch.float32, torch.bfloat16)
            and self.head_size % (2 * BLOCK) == 0
            and not any(width % _LINE for width in (self.hidden, self.intermediate, self.queries))
        )


@dataclass(frozen=True)
class LayerWeights:
    """Of one layer, in the model's type. qkv: queries, keys, values. gate_up: the gates, then what they let through."""

    input_norm: torch.Tensor
    qkv: torch.Tensor
    out: torch.Tensor
    attention_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


class DecodeKernel:
    """A model's layers without their attention, for steps of at most `most_rows` rows; one step at a time.

    cos_sin: [positions, head_size], cosines and then sines of half a head's angles each, in the model's type.
    """

    def __init__(
        self, geometry: KernelShape, layers: Sequence[LayerWeights], last_norm: torch.Tensor, cos_sin: torch.Tensor
    ):
        kernel = library() if geometry.fits() else None
        if kernel is None:
            raise ValueError(f"no kernel for {geometry}")
        self._call = kernel.m3d_between_attentions
        self._call.restype = None
        self._multiply = kernel.m3d_product
        self._multiply.restype = None
        self._multiply.argtypes = [c_void_p, c_int32, c_int64, c_void_p, c_int64, c_void_p, c_int32, c_void_p, c_int64]
        self.most_rows = kernel.m3d_most_rows()
        self._kept: list[torch.Tensor] = []  # what the kernel knows the addresses of
        self._geometry = _Geometry(
            geometry.hidden,
            geometry.intermediate,
            geometry.heads,
            geometry.kv_heads,
            geometry.head_size,
            int(geometry.dtype is torch.bfloat16),
            geometry.epsilon,
        )
        befores, afters = [None, *layers], [*layers, None]
        self._layers = [
            ctypes.byref(
                _Layer(
                    *map(
                        self._address,
                        (
                            before.out if before else None,
                            before.gate_up if before else None,
                            before.down if before else None,
                            after.qkv if after else None,
                            before.attention_norm.float() if before else None,
                            after.input_norm.float() if after else last_norm.float(),
                        ),
                    )
                )
            )
            for before, after in zip(befores, afters)
        ]
        rows, threads = self.most_rows, torch.get_num_threads()
        self._residual = torch.empty(rows, geometry.hidden)
        activated = torch.empty(rows, geometry.intermediate)
        scratch = torch.empty(threads, rows, max(geometry.hidden, geometry.queries))
        projected = torch.empty(rows, geometry.heads + 2 * geometry.kv_heads, geometry.head_size, dtype=geometry.dtype)
        attended = torch.empty(rows, geometry.heads, geometry.head_size, dtype=geometry.dtype)
        self._attention = [
            (*projected[:n].split([geometry.heads, geometry.kv_heads, geometry.kv_heads], 1), attended[:n])
            for n in range(rows + 1)
        ]
        self._step = _Step(
            cos_sin=self._address(cos_sin.to(geometry.dtype)),
            residual=self._address(self._residual),
            activated=self._address(activated),
            scratch=self._address(scratch),
            threads=threads,
            attended=self._address(attended),
            projected=self._address(projected),
        )

    def run(self, embedded: torch.Tensor, positions: torch.Tensor, attend: Callable) -> torch.Tensor:
        """The states [R, H] after the last layer, in the model's type, of the rows `embedded` [R, H].

        positions: int64 [R]. attend(number, query, key, value, out): attention of layer `number`, [R, heads, D] each.
        """
        rows, states = len(embedded), torch.empty_like(embedded)
        positions = positions.contiguous()
        geometry, step, attention = ctypes.byref(self._geometry), self._step, self._attention[rows]
        step.rows, step.positions, step.states = rows, positions.data_ptr(), states.data_ptr()
        self._residual[:rows] = embedded
        by_step = ctypes.byref(step)
        for number, layer in enumerate(self._layers):
            if number:
                attend(number - 1, *attention)
            self._call(geometry, layer, by_step)
        return states

    def product(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """x @ weight.T of at most `most_rows` rows x [R, H], for a weight [out, H] with rows in multiples of 8."""
        x = x.contiguous()
        result = x.new_empty(len(x), len(weight))
        self._multiply(
            weight.data_ptr(),
            weight.shape[1],
            len(weight) // BLOCK,
            x.data_ptr(),
            len(x),
            result.data_ptr(),
            self._geometry.is_bf16,
            self._step.scratch,
            self._step.threads,
        )
        return result

    def _address(self, tensor: torch.Tensor | None) -> int | None:
        if tensor is None:
            return None
        self._kept.append(tensor.contiguous())
        return self._kept[-1].data_ptr()


class _Geometry(ctypes.Structure):
    _fields_ = [
        *((name, c_int32) for name in ("hidden", "intermediate", "heads", "kv_heads", "head_size", "is_bf16")),
        ("epsilon", c_float),
    ]


class _Layer(ctypes.Structure):
    _fields_ = [(name, c_void_p) for name in ("attention_out", "gate_up", "down", "qkv", "attention_norm", "next_norm")]


class _Step(ctypes.Structure):
    _fields_ = [
        ("rows", c_int64),
        ("threads", c_int64),
        *(
            (name, c_void_p)
            for name in ("positions", "cos_sin", "attended", "residual", "activated", "projected", "states", "scratch")
        ),
    ]
