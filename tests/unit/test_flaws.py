"""Published flaws of Triton: which releases have them, what the doctor says, and that what is called closed is."""

from __future__ import annotations

from pathlib import Path

import pytest
from tritonclient.grpc.service_pb2 import ModelInferRequest

from engine import doctor
from engine.server import flaws, requests
from engine.server.triton import WHEEL, Triton
from locks import lock
from tests.conftest import ROOT


def numbers(*version: int) -> set[str]:
    return {number for flaw in flaws.flaws_of(version) for number in flaw.numbers}


@pytest.mark.parametrize(
    ("number", "last", "mended"),
    [
        ("CVE-2025-23325", (2, 57, 0), (2, 58, 0)),
        ("CVE-2025-23310", (2, 59, 0), (2, 59, 1)),  # 25.07 has no minor version of its own
        ("CVE-2025-23321", (2, 59, 0), (2, 59, 1)),
        ("CVE-2025-23316", (2, 59, 1), (2, 60, 0)),
        ("CVE-2026-24207", (2, 66, 0), (2, 67, 0)),
        ("CVE-2026-16497", (2, 70, 0), (2, 71, 0)),
    ],
)
def test_a_flaw_ends_with_the_release_that_mends_it(number, last, mended):
    assert number in numbers(2, 51, 0) and number in numbers(*last) and number not in numbers(*mended)


def test_the_release_before_the_images_has_the_dynamic_batchers_flaw_alone():
    (flaw,) = flaws.flaws_of((2, 74, 0))
    assert "dynamic batcher" in flaw.does and not flaw.closed and flaw.mended == "26.11"
    assert flaws.flaws_of((2, 75, 0)) == []


def test_the_table_names_each_flaw_once_with_its_source_and_a_release_that_is_known():
    every = [number for flaw in flaws.FLAWS for number in flaw.numbers]
    assert len(set(every)) == len(every) and all(number.startswith("CVE-20") for number in every)
    assert {flaw.mended for flaw in flaws.FLAWS} == set(flaws.VERSIONS)
    assert all("bulletin " in flaw.source or "release notes" in flaw.source for flaw in flaws.FLAWS)
    assert list(flaws.VERSIONS) == sorted(flaws.VERSIONS)
    assert list(flaws.VERSIONS.values()) == sorted(flaws.VERSIONS.values())


def test_the_version_inside_of_the_locked_wheel_is_known():
    assert lock.pins(ROOT / "locks" / "cpu.txt")[WHEEL] in flaws.WHEELS


def said(monkeypatch, triton: Triton) -> list[doctor.Finding]:
    """What the doctor says of this Triton, without that it is there."""
    monkeypatch.setattr(Triton, "find", lambda target: triton)
    return doctor._triton("cpu")[1:]


def test_the_doctor_tells_open_flaws_from_those_that_serve_closes(monkeypatch):
    summary, *found = said(monkeypatch, Triton(Path("tritonserver"), Path("wheel"), "0.7.0"))
    assert {finding.state for finding in (summary, *found)} == {"note"}
    kinds = [finding.what for finding in found]
    still, closed = kinds.count("open flaw"), kinds.count("closed flaw")
    assert kinds == ["open flaw"] * still + ["closed flaw"] * closed and still and closed
    assert f"2.51.0 has those below, of what was known on {flaws.READ}: {still} open; {closed} closed" in summary.detail
    assert "`tritonserver` that was started without it has all of them" in summary.detail
    (http,) = [finding for finding in found if "CVE-2025-23311" in finding.detail]
    assert http.what == "closed flaw" and "; mended in Triton 25.07. Closed: Triton's HTTP is off" in http.detail
    (batcher,) = [finding for finding in found if "dynamic batcher" in finding.detail]
    assert batcher.what == "open flaw" and batcher.detail.startswith("Triton's release notes 2.75.0: ")
    assert batcher.detail.endswith("mended in Triton 26.11")


@pytest.mark.parametrize(
    ("triton", "state", "words"),
    [
        (Triton(Path("tritonserver"), None, "2.75.0"), "ok", "none of 2.75.0"),
        (Triton(Path("tritonserver"), None, "unknown"), "note", "cannot be told"),
        (Triton(Path("tritonserver"), Path("wheel"), "9.9.9"), "note", "cannot be told"),
    ],
)
def test_the_doctor_says_when_there_is_no_flaw_and_when_it_cannot_know(monkeypatch, triton, state, words):
    (finding,) = said(monkeypatch, triton)
    assert (finding.state, words in finding.detail) == (state, True)


def asking(model: str, *tensors: tuple[str, str, list[int], bytes]) -> ModelInferRequest:
    request = ModelInferRequest(model_name=model)
    for name, dtype, shape, content in tensors:
        request.inputs.add(name=name, datatype=dtype, shape=shape)
        request.raw_input_contents.append(content)
    return request


def with_classification(request: ModelInferRequest) -> None:
    request.outputs.add(name="STUDY").parameters["classification"].int64_param = 2


def in_shared_memory(request: ModelInferRequest) -> None:
    request.inputs[0].parameters["shared_memory_region"].string_param = "theirs"


@pytest.mark.parametrize("change", [with_classification, in_shared_memory])
def test_what_the_table_calls_closed_by_parameters_never_reaches_triton(change):
    request = asking("study", ("VOLUME", "UINT8", [3], b"abc"))
    requests.check(request, ["study"])
    change(request)
    with pytest.raises(requests.Refused, match="parameter"):
        requests.check(request, ["study"])


def test_a_tensor_whose_size_overflows_never_reaches_triton():
    """4 bytes x 2**31 x 2**31 are 0 in 64 bits. Triton 2.51 takes such a tensor; the Python model's process ends."""
    study = ("STUDY", "BYTES", [1], b"\1\0\0\0x")
    requests.check(asking("segmentation", ("SEG_STATES", "FP32", [1, 2], bytes(8)), study), ["segmentation"])
    with pytest.raises(requests.Refused):
        requests.check(asking("segmentation", ("SEG_STATES", "FP32", [2**31, 2**31], b""), study), ["segmentation"])
