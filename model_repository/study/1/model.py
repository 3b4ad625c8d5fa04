"""Opens studies: a scan's bytes, or the handle of a known one, become a handle whose visual tokens are in the store."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from engine.errors import InvalidInput
from engine.manifest import Manifest
from engine.runtime import triton_io
from engine.runtime.desk import Desk
from engine.runtime.run_folder import PEER
from engine.runtime.server_folder import SHARED_MEMORY
from engine.runtime.study import ScanRequest, Studies
from engine.runtime.study_store import StudyStore, default_limit
from engine.runtime.uploads import Uploads
from engine.scan.limits import Limits
from engine.volume.crop import Crop

_WITH_THE_LAST_PART = ("AFFINE", "PRESET", "CROP", "CROP_UNIT", "STUDY", "SEGMENT_HINT")


class TritonPythonModel:
    def initialize(self, args):
        self.manifest = Manifest.read(Path(args["model_repository"]).parent)
        megabytes = triton_io.parameter(args, "study_store_mb", 0)
        limits = Limits(
            **{
                name: triton_io.parameter(args, name, getattr(Limits, name))
                for name in ("max_bytes", "max_voxels", "max_files")
            }
        )
        self.store = StudyStore.of_server(megabytes * 1_000_000 or default_limit(SHARED_MEMORY))
        self.studies = Studies(self.store, self.manifest, triton_io.infer, limits)
        self.uploads = Uploads(limits)
        self.desk = Desk(
            self._answer,
            threads=triton_io.parameter(args, "threads", 4),
            waiting=triton_io.parameter(args, "waiting", 64),
        )
        self.early = ThreadPoolExecutor(1, "early-segmentation")

    def execute(self, requests):
        self.uploads.forget_idle()
        self.desk.execute(requests)

    def finalize(self):
        self.desk.close()
        self.early.shutdown(wait=True, cancel_futures=True)
        self.store.close()

    def _answer(self, request):
        scan = self._scan(request)
        if scan is None:
            return triton_io.response(request.requested_output_names(), STUDY="", STUDY_INFO="")
        if scan.handle is not None and self.studies.is_ready(scan.handle):
            return self._opened(request, scan.handle, self.studies.info(scan.handle, cached=True))
        return lambda: self._opened(request, *self.studies.open(scan))

    def _opened(self, request, handle, info):
        if triton_io.flag(request, "SEGMENT_HINT") and self.manifest.segments:
            self.early.submit(self._encode_early, handle)
        return triton_io.response(request.requested_output_names(), STUDY=handle, STUDY_INFO=json.dumps(info))

    def _scan(self, request):
        """What the request says about its scan; None if it brings a part, and more are to come."""
        data, digest = triton_io.array(request, "VOLUME"), None
        upload, place = triton_io.text(request, "UPLOAD"), triton_io.array(request, "UPLOAD_RANGE")
        if upload is not None or place is not None:
            if upload is None or place is None or data is None:
                raise InvalidInput(
                    "a part of an upload has a VOLUME (the part), an UPLOAD (its name) and an "
                    "UPLOAD_RANGE (where it begins, and the bytes of the whole file)"
                )
            start, size = place.tolist()
            for name in _WITH_THE_LAST_PART if start + data.size < size else ():
                if triton_io.array(request, name) is not None:
                    raise InvalidInput(f"{name} came with a part of an upload that is not its last: give it with that")
            whole = self.uploads.add(upload, start, size, data, triton_io.told(request, PEER))
            if whole is None:
                return None
            data, digest = whole.data, whole.digest.hexdigest()
        return ScanRequest(
            data,
            triton_io.array(request, "AFFINE"),
            triton_io.text(request, "PRESET"),
            triton_io.text(request, "STUDY"),
            digest,
            self._crop(request),
        )

    def _crop(self, request):
        box, unit = triton_io.array(request, "CROP"), triton_io.text(request, "CROP_UNIT")
        if box is None:
            if unit is not None:
                raise InvalidInput("CROP_UNIT came without a CROP: give both")
            return None
        return Crop.of_numbers(box, unit)

    def _encode_early(self, handle):
        try:
            self.studies.encode_for_segmentation(handle)
        except Exception as error:  # not lost: the segmentation model runs into it again, and tells its client
            triton_io.log_error("encoding early for segmentation failed", error)
