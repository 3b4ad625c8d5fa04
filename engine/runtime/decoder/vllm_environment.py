"""Everything that vLLM reads from the process before it is imported, in one place."""

from __future__ import annotations

import locale
import os

import torch

from engine.runtime import acceleration

_ALWAYS = {
    # Nothing leaves the machine and nothing is looked for outside it: the model folder is complete.
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    # A Triton stub starts in the C locale; the engine's process inherits this.
    "LC_ALL": "C.UTF-8",
    # To ask PyTorch for a GPU makes a fork of this process useless to CUDA, unless PyTorch asks the driver's NVML. vLLM
    # would fork its engine all the same, and this process has many threads: the engine starts as a program of its own.
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    # FlashInfer's sampler would be compiled by nvcc at every start; vLLM's own one needs no compiler but gcc.
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    # Megabytes of compiled JSON schemas, which clients choose.
    "VLLM_XGRAMMAR_CACHE_MB": "64",
    # OpenAI's Triton would compute products of fp32 in TF32: an export in fp32 is fp32.
    "TRITON_F32_DEFAULT": "ieee",
}
_ON_CPU = {
    # The worker lives in the engine's process, as on one GPU: one import of torch and vLLM less to wait for and to keep
    # in memory. vLLM then cannot bind the worker's threads to cores.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # Model runner V2 needs kernels in OpenAI's Triton, which has none for CPUs.
    "VLLM_USE_V2_MODEL_RUNNER": "0",
}
_DEFAULTS = {"VLLM_LOGGING_LEVEL": "WARNING"}


def prepare(threads: int) -> None:
    """Set this process up for importing vLLM and for starting its engine. threads: of the engine, on a CPU."""
    if locale.getencoding() != "UTF-8":
        locale.setlocale(locale.LC_ALL, "C.UTF-8")  # vLLM reads its sources as text while it is imported
    os.environ.update(_ALWAYS)
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    if not torch.cuda.is_available():
        os.environ.update(acceleration.variables())
        os.environ.update(_ON_CPU)
        os.environ["OMP_NUM_THREADS"] = str(threads or len(os.sched_getaffinity(0)))
