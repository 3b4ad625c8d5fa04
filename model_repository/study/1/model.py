"""Opens studies: a scan's bytes, or the handle of a known one, become a handle whose visual tokens are in the store."""

from pathlib import Path

from engine import logs
from engine.manifest import Manifest
from engine.runtime import triton_io
from engine.runtime.request_pool import RequestPool
from engine.runtime.request_service import RequestService
from engine.runtime.server_folder import SHARED_MEMORY
from engine.runtime.settings import Settings
from engine.runtime.study import Studies
from engine.runtime.study_step import StudyStep
from engine.runtime.study_store import StudyStore, default_limit


class TritonPythonModel:
    def initialize(self, args):
        logs.set_up(args["model_name"])
        repository = Path(args["model_repository"]).parent
        settings = Settings.read(repository).study
        self.store = StudyStore.of_server(settings.study_store_mb * 1_000_000 or default_limit(SHARED_MEMORY))
        studies = Studies(self.store, Manifest.read(repository), triton_io.infer, settings.limits)
        self.step = StudyStep(studies)
        self.service = RequestService(self.step, RequestPool(settings.threads, settings.waiting))

    def execute(self, requests):
        self.step.uploads.forget_idle()
        self.service.execute(requests)

    def finalize(self):
        self.service.close()
        self.step.close()
        self.store.close()
