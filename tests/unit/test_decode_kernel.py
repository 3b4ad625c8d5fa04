"""The compiled kernel against the same in PyTorch, written out."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

from engine import doctor
from engine.runtime.cpu import compile_kernel, decode_kernel, entry
from engine.runtime.cpu.decode_kernel import DecodeKernel, KernelShape, LayerWeights

# Widths that nothing else has, blocks that three threads cannot share evenly, fewer heads of keys than of queries.
GEOMETRY = KernelShape(
    hidden=96, intermediate=160, heads=5, kv_heads=1, head_size=64, epsilon=1e-5, dtype=torch.float32
)
LAYERS, POSITIONS = 3, 50
EXACT = {torch.float32: 2e-6, torch.bfloat16: 8e-3}  # of the largest value

needs_compiler = pytest.mark.skipif(not shutil.which("cc"), reason="without a C compiler there is no kernel")


def random(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator) / math.sqrt(shape[-1])


class Model:
    """Random weights in `dtype`, the kernel with them, and the states by PyTorch in fp32, where only what attention
    sees is rounded."""

    def __init__(self, dtype: torch.dtype, seed: int = 0):
        self.geometry = g = replace(GEOMETRY, dtype=dtype)
        generator = torch.Generator().manual_seed(seed)
        self.layers = [
            LayerWeights(
                1 + random(generator, g.hidden),
                random(generator, g.projected, g.hidden),
                random(generator, g.hidden, g.queries),
                1 + random(generator, g.hidden),
                3 * random(generator, 2 * g.intermediate, g.hidden),
                random(generator, g.hidden, g.intermediate),
            )
            for _ in range(LAYERS)
        ]
        self.layers = [LayerWeights(*(part.to(dtype) for part in vars(layer).values())) for layer in self.layers]
        self.last_norm = (1 + random(generator, g.hidden)).to(dtype)
        angles = torch.outer(torch.arange(POSITIONS), 0.7 ** torch.arange(g.head_size // 2))
        self.cos_sin = torch.cat([angles.cos(), angles.sin()], -1).to(dtype)
        self.kernel = DecodeKernel(g, self.layers, self.last_norm, self.cos_sin)

    def states(self, embedded: torch.Tensor, positions: torch.Tensor, attend) -> torch.Tensor:
        g = self.geometry

        def norm(x, weight):
            return functional.rms_norm(x, (g.hidden,), weight.float(), g.epsilon)

        def turned(x):
            cosine, sine = self.cos_sin[positions].float()[:, None].chunk(2, -1)
            low, high = x.chunk(2, -1)
            return torch.cat([low * cosine - high * sine, high * cosine + low * sine], -1)

        x = embedded.float()
        for number, layer in enumerate(self.layers):
            heads = functional.linear(norm(x, layer.input_norm), layer.qkv.float()).view(len(x), -1, g.head_size)
            query, key, value = heads.split([g.heads, g.kv_heads, g.kv_heads], 1)
            out = torch.empty(len(x), g.heads, g.head_size, dtype=g.dtype)
            attend(number, *(part.to(g.dtype) for part in (turned(query), turned(key), value)), out)
            x = x + functional.linear(out.flatten(1).float(), layer.out.float())
            gate, up = functional.linear(norm(x, layer.attention_norm), layer.gate_up.float()).chunk(2, -1)
            x = x + functional.linear(functional.silu(gate) * up, layer.down.float())
        return norm(x, self.last_norm)


def mix(number, query, key, value, out):
    """No attention, but all that goes into one, and different for each layer."""
    out.copy_((query + (number + 1) * key - 2 * value).sin())


def difference(result: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((result.float() - wanted).abs().max() / wanted.abs().max()).item()


def test_it_is_there_where_a_compiler_was():
    assert decode_kernel.library() or not shutil.which("cc")


@needs_compiler
@pytest.mark.parametrize("broken", [{"m3d_structures": lambda: 1}, {}])
def test_a_kernel_of_another_version_is_not_used(monkeypatch, broken):
    monkeypatch.setattr(decode_kernel.ctypes, "CDLL", lambda _: SimpleNamespace(**broken))
    assert decode_kernel.library.__wrapped__() is None


@pytest.mark.parametrize("built, state", [(True, "ok"), (False, "note")])
def test_the_doctor_says_whether_it_was_compiled(monkeypatch, tmp_path, built, state):
    monkeypatch.setattr(entry, "LIBRARY", tmp_path / "_decode_kernel.so")
    if built:
        (tmp_path / "_decode_kernel.so").write_text("")
    finding = doctor._acceleration()
    assert finding.state == state and ("gcc" in finding.detail) is not built


@needs_compiler
def test_a_compiler_that_fails_or_is_not_there_is_told_and_leaves_the_kernel_that_is_there(monkeypatch, tmp_path):
    library = tmp_path / "_decode_kernel.so"
    library.write_text("as it was")
    monkeypatch.setattr(compile_kernel, "LIBRARY", library)
    for compiler, words in (("false", "false failed"), (str(tmp_path / "none"), "No such file")):
        monkeypatch.setenv("CC", compiler)
        assert words in compile_kernel.compile_kernel()
    monkeypatch.delenv("CC")
    monkeypatch.setattr(compile_kernel.shutil, "which", lambda name: None)
    assert "no C compiler" in compile_kernel.compile_kernel()
    assert [file.read_text() for file in tmp_path.iterdir()] == ["as it was"]
    monkeypatch.undo()
    monkeypatch.setattr(compile_kernel, "LIBRARY", library)
    assert compile_kernel.compile_kernel() is None and library.stat().st_size > 1000


@needs_compiler
@pytest.mark.parametrize("dtype", EXACT)
def test_states_are_those_of_pytorch_for_each_number_of_rows(dtype):
    model = Model(dtype)
    generator = torch.Generator().manual_seed(1)
    assert model.kernel.most_rows == 4
    for rows in (4, 1, 2, 3):  # fewer after more: nothing of a step is left for the next
        embedded = random(generator, rows, GEOMETRY.hidden).to(dtype)
        positions = torch.randint(POSITIONS, (2 * rows,), generator=generator)[::2]
        given = embedded.clone()
        states = model.kernel.run(embedded, positions, mix)
        assert states.dtype is dtype and torch.equal(embedded, given)
        assert difference(states, model.states(embedded, positions, mix)) < EXACT[dtype]


@needs_compiler
@pytest.mark.parametrize("threads", [1, 3, 50])
def test_states_do_not_depend_on_the_number_of_threads(threads):
    before = torch.get_num_threads()
    embedded, positions = random(torch.Generator().manual_seed(1), 2, GEOMETRY.hidden), torch.tensor([4, 49])
    wanted = Model(torch.float32).kernel.run(embedded, positions, mix)
    torch.set_num_threads(threads)
    try:
        assert torch.equal(Model(torch.float32).kernel.run(embedded, positions, mix), wanted)
    finally:
        torch.set_num_threads(before)


@needs_compiler
def test_values_are_rounded_to_the_nearest_bf16():
    """Ties to the even one; infinity and NaN stay."""
    kernel, weight = Model(torch.bfloat16).kernel, torch.zeros(8, 32, dtype=torch.bfloat16)
    weight[:, :2] = 1  # sums of two
    for pair in (
        (1, 2**-8),
        (1, 2**-8 + 2**-12),
        (1 + 2**-7, 2**-8),
        (-1, -(2**-8) - 2**-12),
        (1, -(2**-9)),
        (math.inf, 1),
        (math.nan, 1),
    ):
        x = torch.zeros(1, 32, dtype=torch.bfloat16)
        x[0, :2] = torch.tensor(pair)
        wanted = x.float().sum().bfloat16().expand(1, 8)
        assert torch.equal(kernel.product(x, weight).view(torch.int16), wanted.contiguous().view(torch.int16)), pair


@needs_compiler
@pytest.mark.parametrize("dtype", EXACT)
def test_a_product_is_that_of_pytorch(dtype):
    generator = torch.Generator().manual_seed(2)
    weight = random(generator, 200, GEOMETRY.hidden).to(dtype)
    for rows in range(1, 5):
        x = random(generator, rows, 2, GEOMETRY.hidden).to(dtype)[:, 1]
        assert difference(Model(dtype).kernel.product(x, weight), x.float() @ weight.float().T) < EXACT[dtype]


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": torch.float16},
        {"hidden": 100},
        {"intermediate": 168},
        {"head_size": 40},
        {"heads": 5, "head_size": 48},
    ],
)
def test_other_geometries_are_refused(change):
    geometry = replace(GEOMETRY, **change)
    assert GEOMETRY.fits() and not geometry.fits()
    with pytest.raises(ValueError, match="no kernel for"):
        DecodeKernel(geometry, [], torch.ones(1), torch.ones(1))
