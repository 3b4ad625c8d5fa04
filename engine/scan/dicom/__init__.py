"""DICOM: one series, from a zip of its files or from one enhanced multi-frame file."""

from engine.scan.dicom.dataset import looks_like_dicom
from engine.scan.dicom.series import read_dicom_file, read_dicom_zip, read_series_of_file, read_series_of_zip

__all__ = ["looks_like_dicom", "read_dicom_file", "read_dicom_zip", "read_series_of_file", "read_series_of_zip"]
