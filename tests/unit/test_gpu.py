"""What a machine's GPU is, and why an exported repository does not fit it, before Triton fails with it."""
from __future__ import annotations

from dataclasses import replace

import pytest

from engine import doctor, gpu
from engine.errors import RepositoryError, Unavailable
from engine.gpu import Gpu
from engine.manifest import Manifest
from engine.server import Server, free_ports

L4 = Gpu("NVIDIA L4", "580.95.05", "8.9", 24 << 30, 22 << 30)
PLAN = {"builder": "tensorrt", "tensorrt": "11.4.0.106", "compute_capability": "8.9", "version_compatible": False,
        "hardware_compatible": False}
MANIFEST = Manifest(
    checkpoint="lamed", checkpoint_sha256="0", target="tensorrt", precision="fp16", image_size=(32, 256, 256),
    patch_size=(4, 16, 16), num_visual_tokens=256, llm_width=4096, vocab_size=32000, context_length=2048,
    image_token_id=1, seg_token_id=2, eos_token_ids=(2,), models=("study",), graphs={"vision_encoder": {"plan": PLAN}},
    versions={}, plans={"builder": "tensorrt"}, files={"decoder/1/llm/model.safetensors": 13_500_000_000})


def planned(**changes) -> Manifest:
    return replace(MANIFEST, graphs={"vision_encoder": {"plan": {**PLAN, **changes}}})


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Puts a program of that name on PATH, which says what the real one says about two GPUs."""
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\n"
                       "case \"$1\" in --query-gpu=*)\n"
                       "echo 'NVIDIA L4, 580.95.05, 8.9, 23034, 22000'\necho 'NVIDIA RTX 5090, 580.95.05, 12.0, 32607, 32000'\n"
                       ";; *) echo '| NVIDIA-SMI 580.95.05   Driver Version: 580.95.05   CUDA Version: 13.0  |' ;; esac\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    return program


def test_gpus_are_what_the_driver_says(nvidia_smi):
    first, second = gpu.find_gpus()
    assert (first.name, first.compute_capability, first.memory) == ("NVIDIA L4", "8.9", 23034 << 20)
    assert second.compute_capability == "12.0"
    assert gpu.cuda_version() == "13.0"


@pytest.mark.parametrize("program", [None, "#!/bin/sh\nexit 9\n", "#!/bin/sh\necho 'No devices were found'\n"])
def test_a_machine_without_a_working_driver_has_no_gpu(nvidia_smi, program):
    nvidia_smi.unlink() if program is None else nvidia_smi.write_text(program)
    assert gpu.find_gpus() == [] and gpu.cuda_version() is None


def test_a_repository_built_on_this_gpu_fits_it():
    assert gpu.misfits(MANIFEST, [L4], "11.4.0") == []


@pytest.mark.parametrize(("manifest", "gpus", "tensorrt", "words"), [
    (MANIFEST, [], "11.4.0", "no NVIDIA GPU"),
    (replace(MANIFEST, plans={"builder": "rtx"}), [L4], "11.4.0", "TensorRT for RTX"),
    (planned(compute_capability="12.0"), [L4], "11.4.0", "compute capability 12.0, NVIDIA L4 has 8.9"),
    (planned(tensorrt="11.3.0.1"), [L4], "11.4.0", "built by TensorRT 11.3.0.1, here is 11.4.0"),
    (planned(tensorrt="11.5.0.1", version_compatible=True), [L4], "11.4.0", "built by TensorRT 11.5.0.1"),
    (MANIFEST, [replace(L4, memory=16 << 30)], "11.4.0", "18.6 GiB of GPU memory"),
])
def test_what_does_not_fit_is_named_with_the_way_out(manifest, gpus, tensorrt, words):
    (found,) = gpu.misfits(manifest, gpus, tensorrt)
    assert words in found


@pytest.mark.parametrize("manifest", [planned(compute_capability="8.0", hardware_compatible=True),
                                      planned(tensorrt="11.3.0.1", version_compatible=True)])
def test_compatible_plans_fit_other_machines(manifest):
    assert gpu.misfits(manifest, [L4], "11.4.0") == []


def test_the_doctor_looks_at_the_repositorys_own_target(tmp_path, monkeypatch):
    planned(compute_capability="12.0").write(tmp_path)
    monkeypatch.setattr(gpu, "find_gpus", lambda: [L4])
    monkeypatch.setattr(gpu, "tensorrt_version", lambda: "11.4.0")
    assert doctor.target_of(tmp_path) == "tensorrt" and doctor.target_of(tmp_path / "none") == "cpu"
    found = {finding.what: finding for finding in doctor.examine(tmp_path, "tensorrt")}
    assert found["GPU"].state == found["TensorRT"].state == "ok" and "8.9" in found["GPU"].detail
    assert found["fits this machine"].state == "missing" and "12.0" in found["fits this machine"].detail
    assert found["Triton"].state == "missing"


@pytest.mark.parametrize(("version", "state"), [("0.29.1", "missing"), ("0.30.0", "ok"), ("1.0", "ok")])
def test_a_vllm_with_published_flaws_is_refused(monkeypatch, version, state):
    monkeypatch.setattr("importlib.metadata.version", lambda name: version)
    (vllm,) = [finding for finding in doctor._packages("tensorrt") if finding.what == "vllm"]
    assert vllm.state == state


def test_a_server_does_not_start_what_does_not_fit(tmp_path, monkeypatch):
    replace(MANIFEST, plans={"builder": "rtx"}).write(tmp_path)
    with pytest.raises((RepositoryError, Unavailable), match="TensorRT for RTX"):
        Server(tmp_path, target="tensorrt", **free_ports())._check()
