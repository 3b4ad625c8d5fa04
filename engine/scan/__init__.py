"""A scan: an array of 3 axes and the affine that says where its voxels lie; how to read one and pack one to send."""

from engine.scan.affine import ARRAY_AFFINE
from engine.scan.formats import FORMATS
from engine.scan.read import read_scan, read_series, read_volume
from engine.scan.scan import Scan
from engine.scan.sources import files_of, pack_scan, scan_pieces

__all__ = [
    "ARRAY_AFFINE",
    "FORMATS",
    "Scan",
    "files_of",
    "pack_scan",
    "read_scan",
    "read_series",
    "read_volume",
    "scan_pieces",
]
