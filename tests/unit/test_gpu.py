"""What a machine's GPU is, and why an exported repository does not fit it, before Triton fails with it."""

from __future__ import annotations

import json
import re
import shutil
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest

from engine import doctor, gpu
from engine.errors import RepositoryError, Unavailable
from engine.gpu import Gpu
from engine.manifest import Manifest
from engine.server.server import Server, free_ports
from engine.server.triton import Sockets, Triton
from tests.conftest import ROOT

L4 = Gpu("NVIDIA L4", "580.95.05", "8.9", 24 << 30, 22 << 30)
RTX_5090 = Gpu("NVIDIA RTX 5090", "580.95.05", "12.0", 32 << 30, 31 << 30, 1)
T4 = Gpu("NVIDIA T4", "580.95.05", "7.5", 24 << 30, 22 << 30, 2)
PLAN = {
    "builder": "tensorrt",
    "tensorrt": "11.4.0.106",
    "compute_capability": "8.9",
    "version_compatible": False,
    "hardware_compatible": False,
}
GRAPHS = ("vision_encoder", "segmentation_encoder")
MEMORY = {"weights": 178_000_000, "contexts": [33_000_000, 118_000_000], "bindings": 51_000_000, "source": "engine"}
MANIFEST = Manifest(
    checkpoint="lamed",
    checkpoint_sha256="0",
    target="tensorrt",
    precision="fp16",
    image_size=(32, 256, 256),
    patch_size=(4, 16, 16),
    family="lamed_llama",
    num_visual_tokens=256,
    llm_width=4096,
    vocab_size=32000,
    context_length=2048,
    image_token_id=1,
    seg_token_id=2,
    eos_token_ids=(2,),
    models=("study",),
    graphs={name: {"plan": PLAN, "gpu_memory": MEMORY} for name in GRAPHS},
    versions={},
    plans={"builder": "tensorrt"},
    files={"decoder/1/llm/model.safetensors": 13_500_000_000},
)
FILES = {"clip_text_encoder/1/model.onnx": 20, "vision_encoder/1/model.plan": 10}
TRITON = Triton(Path("/opt/tritonserver/bin/tritonserver"), None, "2.72.0")


def planned(**changes) -> Manifest:
    return replace(MANIFEST, graphs={name: {"plan": {**PLAN, **changes}, "gpu_memory": MEMORY} for name in GRAPHS})


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Puts a program of that name on PATH, which says what the real one says about two GPUs."""
    program = tmp_path / "nvidia-smi"
    program.write_text(
        "#!/bin/sh\n"
        'case "$1" in --query-gpu=*)\n'
        "echo '0, GPU-11aa, NVIDIA L4, 580.95.05, 8.9, 23034, 455, 22000, [N/A]'\n"
        "echo '1, GPU-22bb, NVIDIA RTX 5090, 580.95.05, 12.0, 32607, [N/A], 32000, Disabled'\n"
        ";; *) echo '| NVIDIA-SMI 580.95.05   Driver Version: 580.95.05   CUDA Version: 13.0  |' ;; esac\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return program


@pytest.fixture
def here(monkeypatch):
    """here(*gpus): what this machine has, with TensorRT 11.4.0."""

    def has(*gpus):
        monkeypatch.setattr(gpu, "find_gpus", lambda: list(gpus))
        monkeypatch.setattr(gpu, "tensorrt_version", lambda: "11.4.0")

    return has


@pytest.fixture
def exported(tmp_path):
    """A folder with all the files of FILES, and a manifest for target tensorrt that lists them."""
    for path, size in FILES.items():
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_bytes(bytes(size))
    for model in ("study", "decoder"):
        (tmp_path / model).mkdir(exist_ok=True)
        shutil.copy(ROOT / "model_repository" / model / "config.pbtxt", tmp_path / model)
    (tmp_path / "decoder" / "1" / "llm").mkdir(parents=True)
    config = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    (tmp_path / "decoder" / "1" / "llm" / "config.json").write_text(json.dumps({**config, "vocab_size": 32000}))
    replace(MANIFEST, files=FILES).write(tmp_path)
    return tmp_path


def examined(repository) -> dict[str, list[doctor.Finding]]:
    """What the doctor finds for target tensorrt, by what it is about."""
    found = defaultdict(list)
    for finding in doctor.examine(repository, "tensorrt"):
        found[finding.what].append(finding)
    return found


@pytest.mark.parametrize(
    ("precision", "native", "noted"), [("bf16", False, True), ("bf16", True, False), ("fp32", False, False)]
)
def test_a_language_model_in_bf16_on_a_processor_without_it_is_noted(exported, monkeypatch, precision, native, noted):
    replace(MANIFEST, files=FILES, target="cpu", precision=precision).write(exported)
    monkeypatch.setattr(doctor, "has_bf16", lambda: native)
    notes = [finding.detail for finding in doctor.examine(exported, "cpu") if finding.what == "precision"]
    assert len(notes) == noted and all("--precision fp32" in note for note in notes)


def test_gpus_are_what_the_driver_says(nvidia_smi):
    first, second = gpu.find_gpus()
    assert (first.name, first.compute_capability, first.memory, first.number) == (
        "NVIDIA L4",
        "8.9",
        (23034 - 455) << 20,
        0,
    )
    assert second.compute_capability == "12.0" and str(second) == "NVIDIA RTX 5090 (GPU 1)"
    assert gpu.cuda_version() == "13.0"


@pytest.mark.parametrize(
    ("driver", "says", "cuda", "state"),
    [
        ("550.163.01", "CUDA Version: 12.4", "12.4", "missing"),
        ("580.95.05", "CUDA Version: 13.0", "13.0", None),
        ("610.43.02", "CUDA UMD Version: 13.4", "13.4", None),
        ("610.43.02", "", None, "note"),
    ],
)
def test_a_driver_that_pytorch_cannot_use_is_missing(nvidia_smi, tmp_path, driver, says, cuda, state):
    banner = f"| NVIDIA-SMI {driver}   Driver Version: {driver}   {says}  |"
    nvidia_smi.write_text(re.sub(r"\| NVIDIA-SMI.*\|", banner, nvidia_smi.read_text()))
    assert gpu.cuda_version() == cuda
    found = examined(tmp_path)["driver"]
    assert [finding.state for finding in found] == ([state] if state else [])
    assert all("driver 580 or later" in finding.detail for finding in found)


@pytest.mark.parametrize(
    ("chosen", "numbers"),
    [
        ("0", [0]),
        ("1,0", [1, 0]),
        ("GPU-22bb", [1]),
        ("GPU-2, 0", [1, 0]),
        ("", []),
        ("-1", []),
        ("0,7,1", [0]),
        ("GPU-", []),
        ("MIG-33cc", [0, 1]),
    ],
)
def test_gpus_are_those_that_cuda_would_see(nvidia_smi, monkeypatch, chosen, numbers):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    assert [found.number for found in gpu.find_gpus()] == numbers


def test_triton_numbers_gpus_as_nvidia_smi_does(tmp_path):
    assert TRITON.environment(tmp_path)["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"


@pytest.mark.parametrize("unknown", ["[N/A]", "[Not Supported]"])
def test_a_gpu_that_shares_the_cpus_memory_is_taken_as_it_is(nvidia_smi, exported, unknown):
    nvidia_smi.write_text(nvidia_smi.read_text().replace("23034, 455, 22000", f"{unknown}, {unknown}, {unknown}"))
    first, second = gpu.find_gpus()
    assert first.memory is None and first.free is None and second.memory == 32607 << 20
    assert gpu.misfits(MANIFEST, [first], "11.4.0") == []
    assert "does not tell" in examined(exported)["GPU"][0].detail


@pytest.mark.parametrize("program", [None, "#!/bin/sh\nexit 9\n", "#!/bin/sh\necho 'No devices were found'\n"])
def test_a_machine_without_a_working_driver_has_no_gpu(nvidia_smi, program):
    nvidia_smi.unlink() if program is None else nvidia_smi.write_text(program)
    assert gpu.find_gpus() == [] and gpu.cuda_version() is None


def test_a_gpu_that_is_split_is_not_said_to_fit(nvidia_smi, exported):
    nvidia_smi.write_text(nvidia_smi.read_text().replace("22000, [N/A]", "22000, Enabled").replace("5090", "4090"))
    first, second = gpu.find_gpus()
    assert first.split and first.memory is None and first.free is None and not second.split
    found = examined(exported)
    assert "split by MIG" in found["GPU"][0].detail
    assert any(one.state == "note" and "is not known" in one.detail for one in found["fits this machine"])


@pytest.mark.parametrize("row", ["'[N/A], GPU-11aa, NVIDIA L4, 580, 8.9, 23034, 455, 22000, [N/A]'", "'GPU is lost'"])
def test_a_row_that_says_nothing_is_left_out(nvidia_smi, row):
    nvidia_smi.write_text(re.sub(r"'0, GPU-11aa.*'", row, nvidia_smi.read_text()))
    assert [found.number for found in gpu.find_gpus()] == [1]


def test_a_driver_that_is_too_old_is_refused_before_anything_starts(nvidia_smi, exported):
    nvidia_smi.write_text(nvidia_smi.read_text().replace("CUDA Version: 13.0", "CUDA Version: 12.4"))
    with pytest.raises(RepositoryError, match="supports CUDA 12.4; needed is CUDA 13.0 or later, .* driver 580"):
        Server(exported, target="tensorrt", **free_ports())._check()


def test_a_language_model_in_bf16_does_not_fit_a_gpu_without_it():
    manifest = replace(planned(hardware_compatible=True), precision="bf16")
    assert "export with --precision fp16" in gpu.misfits(manifest, [T4], "11.4.0")[0]
    assert gpu.misfits(manifest, [L4], "11.4.0") == []


def test_a_repository_built_on_this_gpu_fits_it():
    assert gpu.misfits(MANIFEST, [L4], "11.4.0") == []


@pytest.mark.parametrize(
    ("manifest", "gpus", "tensorrt", "words"),
    [
        (MANIFEST, [], "11.4.0", "no NVIDIA GPU"),
        (replace(MANIFEST, plans={"builder": "rtx"}), [L4], "11.4.0", "TensorRT for RTX"),
        (
            planned(compute_capability="12.0"),
            [L4],
            "11.4.0",
            "compute capability 12.0, NVIDIA L4 (GPU 0) has 8.9: export again on this machine: ",
        ),
        (
            planned(compute_capability="12.0", hardware_compatible=True),
            [T4],
            "11.4.0",
            "compute capability 8.0 or later, NVIDIA T4 (GPU 2) has 7.5: export again on this machine, without "
            "--hardware",
        ),
        (planned(tensorrt="11.3.0.1"), [L4], "11.4.0", "built by TensorRT 11.3.0.1, here is 11.4.0"),
        (planned(tensorrt="11.5.0.1", version_compatible=True), [L4], "11.4.0", "built by TensorRT 11.5.0.1"),
        (planned(tensorrt="11.3.0rc1"), [L4], "11.4.0", "built by TensorRT 11.3.0rc1, here is 11.4.0"),
        (planned(tensorrt="unknown"), [L4], "11.4.0", "built by TensorRT unknown, here is 11.4.0"),
        # Triton loads every plan on every GPU.
        (
            MANIFEST,
            [L4, RTX_5090],
            "11.4.0",
            "NVIDIA RTX 5090 (GPU 1) has 12.0: leave out what does not fit, by CUDA_VISIBLE_DEVICES=0",
        ),
        (
            planned(compute_capability="12.0"),
            [L4, RTX_5090, T4],
            "11.4.0",
            "NVIDIA L4 (GPU 0) has 8.9, NVIDIA T4 (GPU 2) has 7.5: leave out what does not fit, by "
            "CUDA_VISIBLE_DEVICES=1",
        ),
        (planned(hardware_compatible=True), [L4, RTX_5090, T4], "11.4.0", "CUDA_VISIBLE_DEVICES=0,1"),
    ],
)
def test_what_does_not_fit_is_named_with_the_way_out(manifest, gpus, tensorrt, words):
    (found,) = gpu.misfits(manifest, gpus, tensorrt)  # one for all plans
    assert words in found


@pytest.mark.parametrize(
    "manifest",
    [
        planned(compute_capability="8.0", hardware_compatible=True),
        planned(tensorrt="11.3.0.1", version_compatible=True),
        planned(tensorrt="11.4.0rc1"),
    ],
)
def test_compatible_plans_fit_other_machines(manifest):
    assert gpu.misfits(manifest, [L4], "11.4.0") == []


def test_plans_that_differ_are_told_apart():
    capabilities = {"a": "9.0", "b": "12.0", "c": "9.0"}
    manifest = replace(
        MANIFEST,
        graphs={
            name: {"plan": {**PLAN, "compute_capability": capability}} for name, capability in capabilities.items()
        },
    )
    first, second = gpu.misfits(manifest, [L4], "11.4.0")
    assert first.startswith("a, c: built for compute capability 9.0") and second.startswith("b: built for")


def test_the_doctor_notes_memory_that_something_else_holds(here, exported):
    here(replace(L4, free=1 << 30))
    (note,) = examined(exported)["GPU memory"]
    assert note.state == "note" and "NVIDIA L4 (GPU 0) has 1.00 GiB of memory free" in note.detail
    here(L4)
    assert not examined(exported)["GPU memory"]
    here(replace(L4, memory=2 << 30, free=1 << 30))  # that is not to be mended by stopping something
    found = examined(exported)
    assert not found["GPU memory"] and found["fits this machine"][0].state == "missing"
    with pytest.raises(RepositoryError, match="does not fit this machine: it needs"):
        Server(exported, target="tensorrt", **free_ports())._check()


def test_the_doctor_looks_at_the_repositorys_own_target(tmp_path, here):
    planned(compute_capability="12.0").write(tmp_path)
    here(L4)
    assert doctor.target_of(tmp_path) == "tensorrt" and doctor.target_of(tmp_path / "none") == "cpu"
    found = {what: finding for what, (finding,) in examined(tmp_path).items()}
    assert found["GPU"].state == found["TensorRT"].state == "ok" and "8.9" in found["GPU"].detail
    assert found["fits this machine"].state == "missing" and "12.0" in found["fits this machine"].detail
    assert found["Triton"].state == "missing"


def test_a_repository_that_was_never_exported_is_refused_with_the_command_for_its_target(tmp_path, here):
    here(L4)
    (finding,) = examined(tmp_path)["repository"]
    assert finding.state == "missing" and "--target tensorrt" in finding.detail
    with pytest.raises(RepositoryError, match="never exported.*--target tensorrt"):
        Server(tmp_path, target="tensorrt", **free_ports())._check()


def test_a_whole_repository_is_ok_and_one_with_lost_or_torn_files_is_neither_ok_nor_started(exported, here):
    here(L4)
    server = Server(exported, target="tensorrt", **free_ports())
    assert examined(exported)["repository"][0].state == "ok" and server._check().files == FILES
    (exported / "vision_encoder" / "1" / "model.plan").unlink()
    (exported / "clip_text_encoder" / "1" / "model.onnx").write_bytes(b"torn")
    words = r"model\.onnx \(4 bytes instead of 20\), vision_encoder/1/model\.plan \(missing\): export the repo"
    (finding,) = examined(exported)["repository"]
    assert finding.state == "missing" and re.search(words, finding.detail)
    with pytest.raises(RepositoryError, match=words):
        server._check()


def test_the_doctor_does_not_take_a_manifest_for_a_repository(exported, here):
    here(L4)
    shutil.rmtree(exported / "study")
    (finding,) = examined(exported)["repository"]
    assert finding.state == "missing" and "lacks the models study" in finding.detail


@pytest.mark.parametrize("values", [{"graphs": []}, {"graphs": {"vision_encoder": {"plan": {}}}}])
def test_the_doctor_names_a_damaged_manifest(exported, here, values):
    here(L4)
    path = exported / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    (finding,) = examined(exported)["repository"]
    assert finding.state == "missing" and "manifest.json is damaged" in finding.detail


@pytest.mark.parametrize("compatible", [False, True])
def test_triton_runs_version_compatible_plans_as_they_want_it(compatible):
    planned_for = planned(version_compatible=compatible)
    command = TRITON.command(Path("/models"), planned_for, planned_for.models, Sockets(Path("/run")), None, "m3d-", 10)
    options = [value for option, value in zip(command, command[1:]) if option == "--backend-config"]
    assert ("tensorrt,version-compatible=true" in options) == compatible
    assert command[command.index("--load-model") + 1] == "study"


@pytest.mark.parametrize(
    ("version", "state"),
    [("0.29.1", "missing"), ("0.29rc1", "missing"), ("0.30.0", "ok"), ("1.0", "ok"), ("1rc1", "ok")],
)
def test_a_vllm_with_published_flaws_is_refused(monkeypatch, version, state):
    monkeypatch.setattr("importlib.metadata.version", lambda name: version)
    (vllm,) = [finding for finding in doctor._packages("tensorrt") if finding.what == "vllm"]
    assert vllm.state == state


def test_a_server_does_not_start_what_does_not_fit(tmp_path, monkeypatch):
    replace(MANIFEST, plans={"builder": "rtx"}).write(tmp_path)
    with pytest.raises((RepositoryError, Unavailable), match="TensorRT for RTX"):
        Server(tmp_path, target="tensorrt", **free_ports())._check()


@pytest.mark.parametrize(
    ("program", "header", "words"),
    [("gcc", True, None), (None, True, "no gcc or clang"), ("gcc", False, r"no \S*Python\.h")],
)
def test_the_doctor_wants_what_vllm_compiles_its_kernels_with(tmp_path, monkeypatch, program, header, words):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}" if name == program else None)
    monkeypatch.setattr(doctor.sysconfig, "get_path", lambda name: str(tmp_path))
    if header:
        (tmp_path / "Python.h").touch()
    found = doctor._compiler()
    assert found.state == ("missing" if words else "ok") and re.search(words or "gcc", found.detail)
