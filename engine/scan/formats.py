"""Which formats are read, and what a file is that is none of them."""

from __future__ import annotations

import re

FORMATS = (
    "NIfTI (.nii, .nii.gz), NRRD (.nrrd), MetaImage (.mha), MGH (.mgh, .mgz), a DICOM series as a folder, zip or one "
    "enhanced multi-frame file, or .npy"
)

HEAD = 600  # bytes from the start of a file that tell its format

_PICTURE = "a picture has neither voxel sizes nor the scan's values: export the series itself"
_ARRAY = "save the volume in it with numpy.save, or as NIfTI with its affine"
_DOWNLOAD = "download the file itself"
# (where, what stands there, what the file is, what to do)
_OTHERS: tuple[tuple[int, bytes, str, str], ...] = (
    (0, rb"\xff\xd8\xff", "a JPEG picture", _PICTURE),
    (0, rb"\x89PNG\r\n", "a PNG picture", _PICTURE),
    (0, rb"GIF8[79]a", "a GIF picture", _PICTURE),
    (0, rb"BM.{4}\0\0\0\0", "a BMP picture", _PICTURE),
    (0, rb"II\*\0|MM\0\*|II\+\0|MM\0\+", "a TIFF picture", _PICTURE),
    (0, rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51", "a JPEG 2000 picture", _PICTURE),
    (0, rb"RIFF.{4}(WEBP|AVI )", "a picture or video", _PICTURE),
    (4, rb"ftyp", "a video or HEIF picture", _PICTURE),
    (0, rb"%PDF", "a PDF document", "send the scan that it shows"),
    (0, rb"MATLAB 5|MATLAB 7", "a MATLAB file (.mat)", _ARRAY),
    (0, rb"\x89HDF\r\n", "an HDF5 file", _ARRAY),
    (0, rb"CDF[\x01\x02\x05]", "a NetCDF (MINC) file", "convert it, for example with mnc2nii"),
    (0, rb"\x80[\x02-\x05]", "a pickle", "pickles are never loaded: " + _ARRAY),
    (257, rb"ustar", "a tar archive", "pack the DICOM series as a zip"),
    (0, rb"7z\xbc\xaf", "a 7z archive", "pack the DICOM series as a zip"),
    (0, rb"Rar!", "a RAR archive", "pack the DICOM series as a zip"),
    (0, rb"BZh[1-9]", "compressed by bzip2", "decompress it, or compress it with gzip"),
    (0, rb"\xfd7zXZ", "compressed by xz", "decompress it, or compress it with gzip"),
    (0, rb"\x28\xb5\x2f\xfd", "compressed by zstd", "decompress it, or compress it with gzip"),
    (0, rb"\x1f\x8b", "gzipped once more", "decompress it once"),
    (0, rb"\s*<(!DOCTYPE|!doctype|html|HTML)", "a web page", _DOWNLOAD),
    (0, rb"version https://git-lfs", "a pointer of Git LFS", _DOWNLOAD + ", with git lfs pull"),
    (0, rb"/annex/objects/|(\.\./)*\.git/annex/", "a pointer of git-annex", _DOWNLOAD + ", with git annex get"),
    (0, rb"# vtk|\s*<VTKFile|\s*<\?xml", "a VTK or XML file", "convert it to one of these formats"),
    (0, rb"# === DATA DESCRIPTION FILE", "the header of a PAR/REC pair", "convert the pair to one .nii"),
    (0, rb"\s*type\s*=\s*(string|integer|float)-attribute", "the header of an AFNI dataset", "convert it to one .nii"),
    (0, rb"!INTERFILE", "an Interfile header", "convert it to one .nii"),
)


def named(head: bytes) -> str | None:
    """What a file is that is not read here, and what to do with it, from its first HEAD bytes; None if unknown."""
    for position, pattern, what, way_out in _OTHERS:
        if re.compile(pattern, re.DOTALL).match(head, position):
            return f"it is {what}: {way_out}"
    return None


def not_an_image(head: bytes) -> str:
    """The error's text for a file that starts with `head`."""
    if not head:
        return f"the file is empty: send {FORMATS}"
    what = named(head) or f"it starts with {head[:8]!r}"
    return f"the data is not an image that is read here; {what}; send {FORMATS}"
