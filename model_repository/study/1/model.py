"""Opens studies: a scan's bytes, or the handle of a known one, become a handle whose visual tokens are in the store."""

from pathlib import Path

from engine.manifest import Manifest
from engine.runtime import triton_io
from engine.runtime.desk import Desk
from engine.runtime.request_pool import RequestPool
from engine.runtime.server_folder import SHARED_MEMORY
from engine.runtime.study import Studies
from engine.runtime.study_step import StudyStep, limits_of
from engine.runtime.study_store import StudyStore, default_limit


class TritonPythonModel:
    def initialize(self, args):
        manifest = Manifest.read(Path(args["model_repository"]).parent)
        parameters = triton_io.parameters(args)
        megabytes = parameters.integer("study_store_mb", 0)
        self.store = StudyStore.of_server(megabytes * 1_000_000 or default_limit(SHARED_MEMORY))
        studies = Studies(self.store, manifest, triton_io.infer, limits_of(parameters))
        self.step = StudyStep(studies, triton_io.log_error)
        self.desk = Desk(self.step, RequestPool.of(parameters))

    def execute(self, requests):
        self.step.uploads.forget_idle()
        self.desk.execute(requests)

    def finalize(self):
        self.desk.close()
        self.step.close()
        self.store.close()
