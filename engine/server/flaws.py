"""Published flaws of Triton by release, and what keeps clients of `m3d serve` from them.

Sources: NVIDIA's security bulletins (github.com/NVIDIA/product-security, by their number) and the release notes of
triton-inference-server/server, as far as they were public on READ. A bulletin seldom says which way an attack takes.
Where it does not, `closed` goes by the changes of the release that mends the flaw, and is empty where these do not show
it either. None of it holds for a `tritonserver` that was started without `m3d serve`.

Left out are flaws of what no repository of ours uses: DALI, SageMaker, Vertex AI, the MLflow plugin (CVE-2025-23268,
CVE-2025-33238, CVE-2026-24213, -24214, -24215, -47487); that of 24.11 alone (CVE-2024-53880); and those that were
mended before 2.51, the oldest Triton that this package starts. CVE-2025-23335, of TensorRT's backend before 25.05,
needs a model configuration of a kind that no export writes.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine import gpu
from engine.server.triton import Triton

READ = "30 November 2026"  # the newest bulletin then was 5875 of 8 September, the newest Triton 26.11
# Triton's own version in releases of the package, whose number is another; its log tells it.
WHEELS = {"0.7.0": "2.51.0"}
# By the tags and release notes of triton-inference-server/server. NVIDIA's bulletins name releases, files the version.
VERSIONS = {
    "25.05": (2, 58, 0),
    "25.06": (2, 59, 0),
    "25.07": (2, 59, 1),
    "25.08": (2, 60, 0),
    "25.09": (2, 61, 0),
    "25.10": (2, 62, 0),
    "26.01": (2, 65, 0),
    "26.02": (2, 66, 0),
    "26.03": (2, 67, 0),
    "26.04": (2, 68, 0),
    "26.05": (2, 69, 0),
    "26.06": (2, 70, 0),
    "26.07": (2, 71, 0),
    "26.11": (2, 75, 0),
}

_NO_HTTP = "Triton's HTTP is off"
_NO_CONTROL = "the front serves no model control"
_NO_SHARED_MEMORY = "the front serves no shared memory"
_NO_PARAMETER = "the front refuses the parameter"
_NO_OTHER_FRONT = "the release changed HTTP, SageMaker's and OpenAI's fronts, and `m3d serve` starts none of them"
_SIZES = "the front refuses a tensor whose bytes are not those of its shape"


@dataclass(frozen=True)
class Flaw:
    """What one release mended and one thing closes.

    numbers: CVEs, if it has any. does: in one sentence. mended: the first release without it. closed: what keeps
    clients of `m3d serve` from it; empty if nothing does, or if it is not known which way it takes.
    source: NVIDIA's bulletin, or where else it was published.
    """

    numbers: tuple[str, ...]
    does: str
    mended: str
    closed: str
    source: str


FLAWS = (
    Flaw(
        ("CVE-2025-23325",),
        "deeply nested JSON ends the server",
        "25.05",
        _NO_HTTP,
        "bulletin 5687, server#8172",
    ),
    Flaw(
        ("CVE-2025-23323", "CVE-2025-23324", "CVE-2025-23326", "CVE-2025-23327"),
        "a request whose sizes overflow an integer ends the server",
        "25.05",
        _SIZES,
        "bulletin 5687, server#8170, server#8182, core#434",
    ),
    Flaw(
        ("CVE-2025-23322",),
        "a stream that is cancelled early frees memory twice, which ends the server",
        "25.06",
        "the front cancels no call of Triton's",
        "bulletin 5687, server#8220",
    ),
    Flaw(
        ("CVE-2025-23331",),
        "a request for too much memory ends the server",
        "25.06",
        _NO_HTTP,
        "bulletin 5687, server#8174",
    ),
    Flaw(
        ("CVE-2025-23310", "CVE-2025-23311", "CVE-2025-23317"),
        "an HTTP request in many chunks writes over the stack or the heap, and may run an attacker's code",
        "25.07",
        f"{_NO_HTTP}, and its metrics, which the same library serves, are on a Unix socket",
        "bulletin 5687, server#8305",
    ),
    Flaw(
        ("CVE-2025-23318", "CVE-2025-23319", "CVE-2025-23320", "CVE-2025-23333", "CVE-2025-23334"),
        "the Python backend tells the name of its shared memory and believes what a client writes there, "
        "which may run an attacker's code",
        "25.07",
        _NO_SHARED_MEMORY,
        "bulletin 5687, python_backend#403, #405, #406, server#8273",
    ),
    Flaw(
        ("CVE-2025-23321",),
        "the parameter `classification` of a text output divides by zero, which ends the server",
        "25.07",
        _NO_PARAMETER,
        "bulletin 5687, server#8267",
    ),
    Flaw(
        ("CVE-2025-23316", "CVE-2025-23336"),
        "a name or a configuration that is given to model control runs code or ends the server",
        "25.08",
        _NO_CONTROL,
        "bulletin 5691, python_backend#404",
    ),
    Flaw(
        ("CVE-2025-23328", "CVE-2025-23329"),
        "a client writes beyond a region of shared memory, or into the Python backend's, which ends the server",
        "25.08",
        _NO_SHARED_MEMORY,
        "bulletin 5691, server#8330, server#8335, server#8336",
    ),
    Flaw(
        ("CVE-2025-33202",),
        "a very large payload overflows the stack, which ends the server",
        "25.09",
        "the front refuses messages over 17 MB, and Triton's HTTP is off",
        "bulletin 5723",
    ),
    Flaw(
        ("CVE-2025-33201", "CVE-2025-33211"),
        "a very large payload, or a length out of range, ends the server",
        "25.10",
        _NO_HTTP,
        "bulletin 5734, server#8432, server#8447",
    ),
    Flaw(
        ("CVE-2026-24158",),
        "a compressed payload takes all memory",
        "26.01",
        _NO_HTTP,
        "bulletin 5790, server#8570",
    ),
    Flaw(
        ("CVE-2025-33254",),
        "two threads spoil the server's state, which ends it",
        "26.01",
        "",
        "bulletin 5790",
    ),
    Flaw(
        ("CVE-2026-24146",),
        "the parameter `classification` of a large output takes all memory",
        "26.02",
        _NO_PARAMETER,
        "bulletin 5816, server#8603",
    ),
    Flaw(
        ("CVE-2026-24173", "CVE-2026-24174", "CVE-2026-24175"),
        "a malformed request or header ends the server",
        "26.02",
        _NO_HTTP,
        "bulletin 5816, server#8611, server#8619, server#8637",
    ),
    Flaw(
        ("CVE-2026-24147",),
        "a model configuration that a client uploads reads the server's files",
        "26.02",
        _NO_CONTROL,
        "bulletin 5816, core#465",
    ),
    Flaw(
        ("CVE-2026-24206", "CVE-2026-24207"),
        "a client gets past authentication, and may run code",
        "26.03",
        "Triton's own protocols are on a Unix socket in a private folder",
        "bulletin 5828, server#8680, server#8686",
    ),
    Flaw(
        ("CVE-2026-24208", "CVE-2026-24209"),
        "a path or a model's name leads out of its folder, which ends the server",
        "26.03",
        _NO_CONTROL,
        "bulletin 5828, core#472, server#8659",
    ),
    Flaw(
        ("CVE-2026-24210",),
        "a shape whose size overflows an integer ends the server",
        "26.03",
        _SIZES,
        "bulletin 5828, core#475",
    ),
    Flaw(
        ("CVE-2026-24264",),
        "highly compressed data takes all memory",
        "26.04",
        "the front bounds a message by its size without compression, and Triton's HTTP is off",
        "bulletin 5848",
    ),
    Flaw(
        ("CVE-2026-24266",),
        "a client that asks for gRPC's own errors makes a stream use freed memory, which ends the server",
        "26.04",
        "the front passes no headers on",
        "bulletin 5848, server#8708",
    ),
    Flaw(
        ("CVE-2026-47625",),
        "anybody may use shared memory of the server's machine",
        "26.04",
        _NO_SHARED_MEMORY,
        "bulletin 5875, server#8721",
    ),
    Flaw(
        ("CVE-2026-47476", "CVE-2026-47479"),
        "a request in very many pieces takes all memory: chunks in HTTP, texts in gRPC",
        "26.05",
        "",
        "bulletin 5853, server#8769, server#8770",
    ),
    Flaw(
        ("CVE-2026-47477", "CVE-2026-47480", "CVE-2026-47482"),
        "JSON of unforeseen form and failed compressed requests end the server",
        "26.05",
        _NO_HTTP,
        "bulletin 5853, common#156, server#8745, server#8764",
    ),
    Flaw(
        ("CVE-2026-47478", "CVE-2026-47481"),
        "shared memory uses a file that is closed, and a header takes the place of a parameter of Triton's own",
        "26.05",
        "the front serves no shared memory and passes no headers on",
        "bulletin 5853, server#8733, server#8763",
    ),
    Flaw(
        ("CVE-2026-47606", "CVE-2026-47627", "CVE-2026-47630"),
        "paths in a model lead out of its folder, which may run code",
        "26.06",
        _NO_CONTROL,
        "bulletin 5865, core#497, python_backend#437",
    ),
    Flaw(
        ("CVE-2026-47628", "CVE-2026-47629"),
        "a request takes memory without a limit, or is not checked, which ends the server",
        "26.06",
        _NO_OTHER_FRONT,
        "bulletin 5865, server#8787, server#8791, server#8794",
    ),
    Flaw(
        ("CVE-2026-16497",),
        "a request keeps the server in a loop",
        "26.07",
        _NO_OTHER_FRONT,
        "bulletin 5875, server#8811, server#8833",
    ),
    Flaw(
        (),
        "the dynamic batcher uses freed memory (since when is not said)",
        "26.11",
        "",
        "Triton's release notes 2.75.0",
    ),
)


def version_of(triton: Triton) -> tuple[int, ...]:
    """Triton's own version; empty if it is not known."""
    return gpu.release(WHEELS.get(triton.version, "") if triton.wheel else triton.version)


def flaws_of(version: tuple[int, ...]) -> list[Flaw]:
    """The flaws of Triton `version`, those first that nothing closes."""
    found = [flaw for flaw in FLAWS if version < VERSIONS[flaw.mended]]
    return sorted(found, key=lambda flaw: bool(flaw.closed))
