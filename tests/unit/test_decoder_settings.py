"""What the decoder needs of its process: vLLM's surroundings, and a GPU where the export is for one."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from unittest.mock import MagicMock

import pytest
import torch

from engine import gpu
from engine.errors import Unavailable
from engine.runtime import decoder
from engine.runtime.decoder_settings import DecoderSettings
from tests.conftest import ROOT


@pytest.mark.integration
def test_on_a_gpu_the_engine_is_spawned_and_computes_what_it_says_without_a_compiler(tmp_path):
    """In a process of its own, in which PyTorch says that there is a GPU; the first finding of the GPU audit."""
    program = """
import os
import torch
asked = []
torch.cuda.is_available = lambda: asked.append(os.environ.get("PYTORCH_NVML_BASED_CUDA_CHECK")) or True
from engine.runtime.decoder import vllm_environment
vllm_environment.prepare(0)
from vllm.utils.system_utils import get_mp_context
from vllm import envs
floats = os.environ["TRITON_F32_DEFAULT"]
print(asked, get_mp_context().get_start_method(), envs.VLLM_USE_FLASHINFER_SAMPLER, floats)
"""
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    said = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    assert said.stdout.splitlines()[-1] == "['1'] spawn False ieee"


def test_a_driver_that_is_too_old_is_refused_though_nvml_counts_its_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # as with PYTORCH_NVML_BASED_CUDA_CHECK
    monkeypatch.setattr(gpu, "cuda_version", lambda: "12.4")
    with pytest.raises(Unavailable, match="supports CUDA 12.4; needed is CUDA 13.0"):
        decoder.check_cuda()
    monkeypatch.setattr(gpu, "cuda_version", lambda: "13.0")
    decoder.check_cuda()


@pytest.mark.parametrize(("target", "asked"), [("tensorrt", True), ("cpu", False)])
def test_a_decoder_for_a_gpu_looks_for_one_and_takes_the_plans_share_of_its_memory(monkeypatch, target, asked):
    looked, made = [], []

    class Engine:
        def __init__(self, *arguments, memory_share, temporary):
            made.append(memory_share)

        async def start(self):
            pass

    for name, stand_in in {
        "check_cuda": lambda: looked.append(True),
        "decoder_share": lambda repository, manifest: 0.625,
        "LlmEngine": Engine,
        "Prompt": MagicMock(),
        "_read_tokenizer": MagicMock(),
        "FAMILIES": MagicMock(),
    }.items():
        monkeypatch.setattr(decoder, name, stand_in)
    monkeypatch.setattr(decoder.vllm_environment, "prepare", lambda threads: None)
    one = object.__new__(decoder.Decoder)
    one.settings, one.manifest = DecoderSettings(), MagicMock(target=target, family="lamed_llama", num_visual_tokens=8)
    one.repository = one.folder = one.dtype = one.context_length = one.temporary = None
    asyncio.run(one.start())
    (share,) = made
    assert bool(looked) == asked and (share() == 0.625 if asked else share is None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine where PyTorch sees no GPU")
def test_an_export_for_a_gpu_that_pytorch_does_not_see_is_refused_with_pytorchs_reason():
    with pytest.raises(Unavailable, match=r"PyTorch .* sees none \(.*(CUDA|NVIDIA).*\).*driver 580"):
        decoder.check_cuda()
