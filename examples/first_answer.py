"""From a real MRI scan to a streamed answer, a mask, a picture and ranked reports: what `make demo` runs, and how the
library is used.

    python examples/first_answer.py --repository model_repository --out out
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from pathlib import Path

import nibabel

from engine.cli import console
from engine.client import M3DClient
from engine.errors import M3DError
from engine.picture import montage
from engine.server import Server, free_ports
from m3d_demo.samples import write_sample

QUESTIONS = (
    "Is this a CT or an MR scan?",
    "Which part of the body is shown?",
    "Is the brain stem visible in this scan?",
)
REPORTS = (
    "This is a CT scan of the chest. There is a small tumour in the right lung.",
    "This is an MR scan of the brain. The skull has been removed and no tumour is seen.",
    "This is an MR scan of the lumbar spine. No tumour is seen.",
)
SEGMENT = "Please segment the left thalamus."


def main(repository: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    scan = write_sample("brain-mr", out)
    say(f"a real scan: {scan}")
    started = time.perf_counter()
    with Server(repository, **free_ports(), on_progress=say) as server, M3DClient(server.url) as client:
        say(f"Triton is ready on {server.url} after {time.perf_counter() - started:.0f} s")
        ask(client, scan, out)
    say("the server is stopped")


def ask(client: M3DClient, scan: Path, out: Path) -> None:
    """Ask about `scan`, draw a mask and a picture into `out`, rank reports; print all of it."""
    study = client.upload(scan)
    say(f"the server chose preset {study.info.preset}: {study.info.reason}")
    for question in QUESTIONS:
        print(f"\n  Q  {question}\n  A ", end="")
        for text in client.stream(study, question):
            print(text, end="", flush=True)
        print()
    print(f"\n  Q  {SEGMENT}")
    found = client.segment(study, SEGMENT)
    print(f"  A {found.answer.text}\n")
    if found.mask is None:
        raise M3DError("the model drew no mask")
    mask = found.save(out / "mask.nii.gz")
    voxels = nibabel.load(scan).dataobj[:]
    texts = (SEGMENT, found.answer.text)
    picture = montage(out / "mask.png", voxels, found.affine, found.mask, *texts, preset=found.preset)
    print("  Which report fits the scan?")
    for text, score in client.rank(study, REPORTS).sorted():
        print(f"  {score:6.2f}  {text}")
    print()
    say(f"mask in the scan's own space: {mask}")
    say(f"picture: {picture}")


def say(text: str) -> None:
    print(f"- {text}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repository", type=Path, default=Path("model_repository"), help="an exported repository")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for scan, mask and picture")
    arguments = parser.parse_args()
    sys.exit(console.run(lambda: main(arguments.repository, arguments.out), (signal.SIGINT, signal.SIGTERM)))
