"""Opens studies: a scan's bytes, or the handle of a known one, become a handle whose visual tokens are in the store."""

from __future__ import annotations

import json
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

from engine import contract
from engine.api import StudyInfo
from engine.errors import InvalidInput
from engine.runtime.step import Inputs, Later, Outputs
from engine.runtime.study import ScanRequest, Studies
from engine.runtime.uploads import Uploads
from engine.volume.crop import Crop

_log = logging.getLogger(__name__)

_WITH_THE_LAST_PART = (
    contract.AFFINE_IN,
    contract.PRESET,
    contract.CROP,
    contract.CROP_UNIT,
    contract.STUDY,
    contract.SEGMENT_HINT,
)
_NOTHING: Outputs = {contract.STUDY: "", contract.STUDY_INFO: "", contract.MODEL_INFO: ""}


class StudyStep:
    """Opens, forgets and describes.

    Uploads that do not go on are forgotten by `uploads.forget_idle`, which somebody calls now and then.
    """

    def __init__(self, studies: Studies):
        self.studies = studies
        self.uploads = Uploads(studies.limits)
        self._early = ThreadPoolExecutor(1, "early-segmentation")

    def __call__(self, inputs: Inputs) -> Outputs | Later:
        if inputs.flag(contract.DESCRIBE):
            _check_alone(inputs, contract.DESCRIBE)
            return {**_NOTHING, contract.MODEL_INFO: json.dumps(asdict(self.studies.manifest.info))}
        if inputs.flag(contract.FORGET):
            _check_alone(inputs, contract.FORGET, contract.STUDY)
            handle = inputs.needed_text(contract.STUDY)
            return lambda: self._forgotten(handle)
        scan = self._scan(inputs)
        if scan is None:
            return _NOTHING
        if scan.handle is not None and self.studies.is_ready(scan.handle):
            return self._opened(inputs, scan.handle, self.studies.info(scan.handle, cached=True))
        return lambda: self._opened(inputs, *self.studies.open(scan))

    def close(self) -> None:
        self._early.shutdown(wait=True, cancel_futures=True)

    def _forgotten(self, handle: str) -> Outputs:
        self.studies.forget(handle)
        return _NOTHING

    def _opened(self, inputs: Inputs, handle: str, info: StudyInfo) -> Outputs:
        if inputs.flag(contract.SEGMENT_HINT) and self.studies.manifest.segments:
            self._early.submit(self._encode_early, handle)
        return {**_NOTHING, contract.STUDY: handle, contract.STUDY_INFO: json.dumps(asdict(info))}

    def _scan(self, inputs: Inputs) -> ScanRequest | None:
        """What the request says about its scan; None if it brings a part, and more are to come."""
        data, digest = inputs.array(contract.VOLUME), None
        upload, place = inputs.text(contract.UPLOAD), inputs.array(contract.UPLOAD_RANGE)
        if upload is not None or place is not None:
            if upload is None or place is None or data is None:
                raise InvalidInput(
                    "a part of an upload has a VOLUME (the part), an UPLOAD (its name) and an "
                    "UPLOAD_RANGE (where it begins, and the bytes of the whole file)"
                )
            start, size = place.tolist()
            for name in _WITH_THE_LAST_PART if start + data.size < size else ():
                if inputs.array(name) is not None:
                    raise InvalidInput(f"{name} came with a part of an upload that is not its last: give it with that")
            whole = self.uploads.add(upload, start, size, data, inputs.peer())
            if whole is None:
                return None
            data, digest = whole.data, whole.digest.hexdigest()
        return ScanRequest(
            data,
            inputs.array(contract.AFFINE_IN),
            inputs.text(contract.PRESET),
            inputs.text(contract.STUDY),
            digest,
            _crop(inputs),
        )

    def _encode_early(self, handle: str) -> None:
        try:
            self.studies.encode_for_segmentation(handle)
        except Exception as error:  # not lost: the segmentation model runs into it again, and tells its client
            _log.error("encoding early for segmentation failed", exc_info=error)


def _crop(inputs: Inputs) -> Crop | None:
    box, unit = inputs.array(contract.CROP), inputs.text(contract.CROP_UNIT)
    if box is None:
        if unit is not None:
            raise InvalidInput("CROP_UNIT came without a CROP: give both")
        return None
    return Crop.of_numbers(box, unit)


def _check_alone(inputs: Inputs, name: str, *with_it: str) -> None:
    """Raises InvalidInput if a request has other inputs than these."""
    for other in contract.MODELS["study"].input_names:
        if other not in (name, *with_it) and inputs.array(other) is not None:
            raise InvalidInput(f"{other} came with {name}, which goes with {' and '.join(with_it) or 'nothing'}")
