"""Opens studies: a scan's bytes, or the handle of a known one, become a handle whose visual tokens are in the store."""
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from engine.manifest import Manifest
from engine.runtime import triton_io
from engine.runtime.desk import Desk
from engine.runtime.server_folder import SHARED_MEMORY
from engine.runtime.study import ScanRequest, Studies
from engine.runtime.study_store import StudyStore, default_limit
from engine.scan.limits import Limits


class TritonPythonModel:
    def initialize(self, args):
        self.manifest = Manifest.read(Path(args["model_repository"]).parent)
        megabytes = triton_io.parameter(args, "study_store_mb", 0)
        limits = Limits(**{name: triton_io.parameter(args, name, getattr(Limits, name))
                           for name in ("max_bytes", "max_voxels", "max_files")})
        self.store = StudyStore.of_server(megabytes * 1_000_000 or default_limit(SHARED_MEMORY))
        self.studies = Studies(self.store, self.manifest, triton_io.infer, limits)
        self.desk = Desk(self._known, self._open, threads=triton_io.parameter(args, "threads", 2),
                         waiting=triton_io.parameter(args, "waiting", 16))
        self.early = ThreadPoolExecutor(1, "early-segmentation")

    def execute(self, requests):
        self.desk.execute(requests)

    def finalize(self):
        self.desk.close()
        self.early.shutdown(wait=True, cancel_futures=True)
        self.store.close()

    def _known(self, request):
        scan = _scan(request)
        if scan.handle is not None and self.studies.is_ready(scan.handle):
            return self._response(request, scan.handle, self.studies.info(scan.handle, cached=True))

    def _open(self, request):
        return self._response(request, *self.studies.open(_scan(request)))

    def _response(self, request, handle, info):
        if triton_io.flag(request, "SEGMENT_HINT") and self.manifest.segments:
            self.early.submit(self._encode_early, handle)
        return triton_io.response(request.requested_output_names(), STUDY=handle, STUDY_INFO=json.dumps(info))

    def _encode_early(self, handle):
        try:
            self.studies.encode_for_segmentation(handle)
        except Exception as error:  # not lost: the segmentation model runs into it again, and tells its client
            triton_io.log_error("encoding early for segmentation failed", error)


def _scan(request):
    return ScanRequest(data=triton_io.array(request, "VOLUME"), affine=triton_io.array(request, "AFFINE"),
                       preset=triton_io.text(request, "PRESET"), handle=triton_io.text(request, "STUDY"))
