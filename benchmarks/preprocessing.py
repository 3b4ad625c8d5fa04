"""Time and memory of preparing a large CT, in a process of its own; prints JSON.

python benchmarks/preprocessing.py --shape 512,512,400
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import re
import subprocess
import sys
import time
from pathlib import Path

if __package__ in (None, ""):  # run as a script, from any folder
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

LARGE_CT = (512, 512, 400)


def measure(shape: tuple[int, int, int] = LARGE_CT, repeats: int = 3) -> dict:
    """{"shape", "file_bytes", "scan_bytes", "seconds": [...], "extra_bytes"} of an int16 .nii.gz of this shape.

    extra_bytes: the peak of the process above what it held with the file's bytes in memory.
    """
    command = [
        sys.executable,
        str(Path(__file__).resolve()),
        "--shape",
        ",".join(map(str, shape)),
        "--repeats",
        str(repeats),
    ]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def _measure_here(shape: tuple[int, int, int], repeats: int) -> dict:
    from engine.scan import read_scan
    from engine.volume import prepare

    data, scan_bytes = _made_elsewhere(shape)
    prepare(read_scan(_file((32, 32, 32))[0]))  # imports, and threads that start with the first product
    # getrusage's peak would be that of the process that started this one, if it was larger: exec hands it on.
    Path("/proc/self/clear_refs").write_text("5")
    before, seconds = _resident("VmRSS"), []
    for _ in range(repeats):
        started = time.perf_counter()
        prepare(read_scan(data))
        seconds.append(time.perf_counter() - started)
    return {
        "shape": shape,
        "file_bytes": len(data),
        "scan_bytes": scan_bytes,
        "seconds": seconds,
        "extra_bytes": _resident("VmHWM") - before,
    }


def _made_elsewhere(shape: tuple[int, int, int]) -> tuple[bytes, int]:
    """The file, made by another process, so that making it does not count as this one's peak."""
    command = [sys.executable, str(Path(__file__).resolve()), "--shape", ",".join(map(str, shape)), "--write"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        data = process.stdout.read()
    return data, 2 * shape[0] * shape[1] * shape[2]


def _file(shape: tuple[int, int, int]) -> tuple[bytes, int]:
    """An int16 .nii.gz of the benchmark's phantom, and the bytes of its voxels."""
    import nibabel

    from benchmarks.scans import phantom

    scan = phantom(shape)
    buffer = io.BytesIO()
    nibabel.Nifti1Image(scan.array, scan.affine).to_stream(buffer)
    return gzip.compress(buffer.getvalue(), 1), scan.array.nbytes


def _resident(field: str) -> int:
    """Bytes of this process in memory: VmRSS now, VmHWM at most."""
    return int(re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)[1]) * 1024


def shape_of(text: str) -> tuple[int, int, int]:
    """An argument's type. Raises ArgumentTypeError for anything but three axes."""
    sizes = text.split(",")
    if len(sizes) != 3 or not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise argparse.ArgumentTypeError(f"{text!r} is not the voxels of three axes, such as 512,512,400")
    return tuple(map(int, sizes))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=shape_of, default=LARGE_CT, help="voxels, I,J,K (default: 512,512,400)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="write the file to standard output instead")
    arguments = parser.parse_args()
    if arguments.write:
        sys.stdout.buffer.write(_file(arguments.shape)[0])
    else:
        print(json.dumps(_measure_here(arguments.shape, arguments.repeats)))
