"""vLLM's process starts from any program, whatever its main module is like."""

from __future__ import annotations

import subprocess
import sys
import types

import pytest
import torch

from engine.runtime.decoder import engine_process
from tests.conftest import ROOT

# Without a main guard: if the new process imported it, it would start another, which Python refuses.
SCRIPT = """
import multiprocessing, operator, sys
sys.path.insert(0, {root!r})
from engine.runtime.decoder.engine_process import spawned_apart

def start():
    process = multiprocessing.get_context("spawn").Process(target=operator.add, args=(1, 2))
    process.start()
    process.join()
    return process.exitcode

with spawned_apart():
    print("apart", start())
print("as ever", start())
"""


def test_a_process_that_is_spawned_apart_does_not_run_the_script_again_and_others_do(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(root=str(ROOT)))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines() == ["apart 0", "as ever 1"] and "RuntimeError" in done.stderr


@pytest.mark.parametrize("device, is_changed", [("cpu", True), ("cuda", False)])
def test_a_cpu_ranks_tokens_without_compiling(monkeypatch, device, is_changed):
    from vllm.v1.sample import sampler

    compiled = sampler.batched_count_greater_than
    monkeypatch.setattr(sampler, "batched_count_greater_than", compiled)
    engine_process.rank_tokens_without_compiling(types.SimpleNamespace(device=torch.device(device)))
    assert (sampler.batched_count_greater_than is not compiled) is is_changed
    if is_changed:
        assert not hasattr(sampler.batched_count_greater_than, "_torchdynamo_orig_callable")
        scores = torch.tensor([[0.1, 0.5, 0.5], [3.0, 1.0, 2.0]])
        assert sampler.batched_count_greater_than(scores, torch.tensor([[0.5], [1.0]])).tolist() == [2, 3]
