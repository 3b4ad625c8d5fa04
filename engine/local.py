"""The whole chain in this process, without a server.

from engine import M3DEngine

with M3DEngine("model_repository") as m3d:
    study = m3d.upload("scan.nii.gz")
    print(m3d.ask(study, "Describe the findings.").text)
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import queue
import threading
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import Future, InvalidStateError
from contextlib import ExitStack, aclosing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engine import contract
from engine.blocking import BlockingM3D
from engine.contract import GRAPHS, Tensor
from engine.errors import Cancelled, DeadlineExceeded, M3DError, RepositoryError, Unavailable, one_line
from engine.manifest import CLIP_TOKENIZER_FOLDER, Manifest
from engine.methods import DECODER, RETRIEVAL, SEGMENTATION, STUDY, File, Methods, Outputs, not_served

if TYPE_CHECKING:  # imported by the first engine: they bring PyTorch
    from engine.runtime.decoder import Decoder
    from engine.runtime.decoder_settings import DecoderSettings
    from engine.runtime.decoder_step import DecoderStep, LoopThread
    from engine.runtime.request_pool import RequestPool
    from engine.runtime.settings import PoolSettings
    from engine.runtime.step import Step
    from engine.runtime.study_store import StudyStore

TARGET = "cpu"
_LEAVE_S = 1.0


class M3DEngine(BlockingM3D):
    """An exported model repository in this process: the methods of `engine.api.M3D`, without Triton and gRPC.

    It answers as a server of the same repository does, with the settings in the repository's settings.toml. Its
    constructor returns when all models are loaded; close it, or use it in a `with` block. It works in scripts, with or
    without `if __name__ == "__main__":`, in interactive sessions and in notebooks. vLLM runs in a process of its own,
    which ends with this one; environment variables that vLLM reads are set in this process, see
    `engine.runtime.decoder.vllm_environment`: the Hugging Face libraries look for nothing outside this machine then.

    Args:
        repository: the folder, exported for a CPU.
        timeout: seconds until a call fails with DeadlineExceeded, None for no limit; each method takes its own. An
            answer is cancelled then; a scan that is being encoded is encoded to its end.

    An engine that is dropped without being closed is closed in the background, with its answers in work.

    Raises:
        RepositoryError: the repository was never exported, is damaged, or was exported for a GPU.
        ResourceExhausted: there is no memory for studies.
        Unavailable: the language model does not start, for want of memory for example, or the extra [cpu] is not
            installed.
    """

    _transport: LocalTransport

    def __init__(self, repository: Path | str = "model_repository", timeout: float | None = 600.0):
        methods = Methods(timeout)
        try:
            transport = LocalTransport(Path(repository).resolve())
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] == "engine":
                raise
            raise Unavailable(
                f"M3DEngine needs {error.name}, which the client alone does without: install 'm3d-engine[cpu]'"
            ) from None
        super().__init__(methods, transport)
        # On a thread, as an object may be dropped anywhere, and `close` waits. At exit, see `LocalTransport._leave`.
        weakref.finalize(
            self, lambda: threading.Thread(target=transport.close, name="m3d-close").start()
        ).atexit = False


class LocalTransport:
    """The steps of the chain, as a transport of `engine.methods`."""

    def __init__(self, repository: Path):
        self.repository = repository
        self._manifest = _checked_manifest(repository)
        self._closed = False
        self._steps: dict[str, tuple[Step, RequestPool]] = {}
        self._decoding: tuple[LoopThread, DecoderStep] | None = None
        self._waiting: set[Future] = set()
        self._streams: weakref.WeakSet[LocalStream] = weakref.WeakSet()
        with ExitStack() as opened:
            self._open(opened)
            self._opened = opened.pop_all()

    def infer(self, model: str, inputs: Mapping[Tensor, object], timeout: float | None) -> Outputs:
        """See `engine.methods`."""
        from engine.runtime.step import LocalInputs

        self._check_open()
        if model not in self._steps:
            raise not_served(f"{self.repository} has no {model}")
        step, pool = self._steps[model]
        with _typed_errors():
            answered = step(LocalInputs(inputs))
            return _as_received(self._waited(pool, answered, timeout) if callable(answered) else answered)

    def upload(self, file: File, inputs: Mapping[Tensor, object], timeout: float | None) -> Outputs:
        """See `engine.methods`. A file of several pieces is put together in memory."""
        pieces = file.take()
        whole = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        return self.infer(STUDY, {contract.VOLUME: np.frombuffer(whole, np.uint8), **inputs}, timeout)

    def stream(self, model: str, inputs: Mapping[Tensor, object], timeout: float | None) -> LocalStream:
        """See `engine.methods`. The decoder is the only model that streams."""
        self._check_open()
        if self._decoding is None:
            raise not_served(f"{self.repository} has no {model}")
        stream = LocalStream(*self._decoding, inputs, timeout)
        self._streams.add(stream)
        return stream

    def work(self, function: Callable, *arguments: Any) -> Any:
        return function(*arguments)

    def is_ready(self) -> bool:
        from engine.runtime.run_folder import READY

        decodes = self._decoding is None or self._decoding[1].decoder.health == READY
        return not self._closed and decodes

    def close(self) -> None:
        """Answers and requests in work fail with Cancelled; returns when all that was started has ended."""
        if self._closed:
            return
        self._closed = True
        for stream in list(self._streams):
            stream.close()
        for waiting in list(self._waiting):
            with contextlib.suppress(InvalidStateError):  # it was done meanwhile
                waiting.set_exception(_cancelled())
        self._opened.close()

    # --- inside ------------------------------------------------------------------------------------------------------
    def _open(self, opened: ExitStack) -> None:
        """Load everything; vLLM starts while the graphs are read. What was opened is closed in reverse."""
        from engine.runtime.graphs import Graphs
        from engine.runtime.retrieval import RetrievalStep, Retriever
        from engine.runtime.segmentation import SegmentationStep, Segmenter
        from engine.runtime.server_folder import SHARED_MEMORY, ServerFolder
        from engine.runtime.settings import Settings
        from engine.runtime.study import Studies
        from engine.runtime.study_step import StudyStep
        from engine.runtime.study_store import StudyStore, default_limit

        manifest, repository = self._manifest, self.repository
        settings = Settings.read(repository)
        limit = settings.study.study_store_mb * 1_000_000 or default_limit(SHARED_MEMORY)
        store = StudyStore(ServerFolder.of_process(), limit)
        opened.callback(store.close)
        started = self._start_decoder(store, settings.decoder.cpu, opened) if DECODER in manifest.models else None
        graphs = Graphs(repository, [model for model in manifest.models if model in GRAPHS], settings)
        opened.callback(graphs.close)
        study = StudyStep(Studies(store, manifest, graphs, settings.study.limits))
        opened.callback(study.close)
        self._add(STUDY, study, settings.study, opened)
        if SEGMENTATION in manifest.models:
            self._add(SEGMENTATION, SegmentationStep(Segmenter(store, graphs)), settings.segmentation, opened)
        if RETRIEVAL in manifest.models:
            retriever = Retriever(store, manifest, repository / CLIP_TOKENIZER_FOLDER, graphs)
            self._add(RETRIEVAL, RetrievalStep(retriever), settings.retrieval, opened)
        if started is not None:
            started.result()
        # Behind what vLLM registers, so that it is called before.
        atexit.register(self._leave, store)
        opened.callback(atexit.unregister, self._leave)

    def _start_decoder(self, store: StudyStore, settings: DecoderSettings, opened: ExitStack) -> Future:
        """Begin to start the language model on a loop of its own; done when it is ready."""
        from engine.runtime.decoder import Decoder
        from engine.runtime.decoder_step import DecoderStep, LoopThread

        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # a library is quiet
        decoder = Decoder(self.repository, settings, temporary=store.root)
        loop = LoopThread("answers")
        opened.callback(loop.close)
        self._decoding = loop, DecoderStep(decoder, store)
        started = loop.begin(decoder.start)
        opened.callback(_stop, loop, decoder, started)
        return started

    def _add(self, model: str, step: Step, settings: PoolSettings, opened: ExitStack) -> None:
        from engine.runtime.request_pool import RequestPool

        pool = RequestPool(settings.threads, settings.waiting)
        opened.callback(pool.close)
        self._steps[model] = step, pool

    def _waited(self, pool: RequestPool, work: Callable, timeout: float | None) -> Any:
        """What `work` returns on the pool, if it does within the timeout, and before this is closed."""
        waiting: Future = Future()

        def tell(done: Future) -> None:
            with contextlib.suppress(InvalidStateError):  # nobody waits any more
                if done.cancelled():
                    waiting.set_exception(_cancelled())
                elif error := done.exception():
                    waiting.set_exception(error)
                else:
                    waiting.set_result(done.result())

        doing = pool.submit(work)
        doing.add_done_callback(tell)
        self._waiting.add(waiting)
        try:
            return waiting.result(timeout)
        except TimeoutError:
            if waiting.done():  # it is the work's own
                raise
            raise _too_late() from None
        finally:
            doing.cancel()
            self._waiting.discard(waiting)

    def _leave(self, store: StudyStore) -> None:
        """At the end of a program that has not closed this. Python takes no more work on threads then, which `close`
        needs; vLLM's process ends by itself."""
        if self._decoding is not None:
            loop, step = self._decoding
            with contextlib.suppress(TimeoutError):
                loop.submit(step.decoder.engine.abandon()).result(_LEAVE_S)
        store.close()

    def _check_open(self) -> None:
        if self._closed:
            raise Unavailable(f"this engine of {self.repository} is closed: make a new one")


class LocalStream:
    """The responses to one question, which is asked at once; the next one is made when the last was read."""

    def __init__(
        self, loop: LoopThread, step: DecoderStep, inputs: Mapping[Tensor, object], timeout: float | None
    ) -> None:
        self._loop = loop
        self._responses: queue.SimpleQueue[Outputs | M3DError | None] = queue.SimpleQueue()
        self._wanted = asyncio.Semaphore(0)
        self._end: M3DError | None = None
        self._has_ended = False
        self._task = loop.begin(partial(_answer, step, inputs, timeout, self._responses, self._wanted))

    def read(self) -> Outputs | None:
        """The next one; None after the last."""
        if not self._has_ended:
            response = self._responses.get()
            if isinstance(response, Outputs):
                self._loop.call(self._wanted.release)
                return response
            self._end, self._has_ended = response, True
        if self._end is not None:
            raise self._end
        return None

    def finish(self) -> None:
        """There is nothing behind the last response that matters."""

    def close(self) -> None:
        self._task.cancel()
        self._responses.put(_cancelled())  # a task that has not begun yet does not

    def __del__(self):
        self._task.cancel()


async def _answer(
    step: DecoderStep,
    inputs: Mapping[Tensor, object],
    timeout: float | None,
    responses: queue.SimpleQueue[Outputs | M3DError | None],
    wanted: asyncio.Semaphore,
) -> None:
    """Put the responses to a question into a queue, each when it is wanted, and at the end the error, or None."""
    from engine.runtime.decoder_step import Asked
    from engine.runtime.step import LocalInputs

    end: M3DError | None = None
    try:
        async with asyncio.timeout(timeout):
            with _typed_errors():
                async with aclosing(step(Asked.of(LocalInputs(inputs)))) as answer:
                    async for outputs, _ in answer:
                        responses.put(_as_received(outputs))
                        await wanted.acquire()
    except asyncio.CancelledError:
        end = _cancelled()
        raise
    except TimeoutError:
        end = _too_late()
    except M3DError as error:
        end = error
    finally:
        responses.put(end)


def _stop(loop: LoopThread, decoder: Decoder, started: Future) -> None:
    """End the answers in work and the decoder. A start that fails or is cancelled leaves nothing."""
    loop.run(loop.end_begun())
    if not started.cancelled() and started.exception() is None:
        loop.run(decoder.stop())


def _checked_manifest(repository: Path) -> Manifest:
    manifest = Manifest.read(repository, TARGET)
    if manifest.target != TARGET:
        raise RepositoryError(
            f"{repository} was exported for target {manifest.target}; in this process it runs on a CPU only: export "
            f"with --target {TARGET}, or serve it (`m3d serve --target {manifest.target}`) and use M3DClient"
        )
    manifest.check(repository)
    return manifest


def _as_received(outputs: Mapping[str, np.ndarray | str]) -> Outputs:
    """A step's outputs as a client gets them from a server: nothing of them lies in the study store."""

    def received(value: np.ndarray | str) -> np.ndarray:
        if isinstance(value, str):
            return np.array([value.encode()], np.object_)
        return np.array(value) if isinstance(value, np.memmap) else value

    return Outputs((name, received(value)) for name, value in outputs.items())


@contextlib.contextmanager
def _typed_errors():
    """What is no error of ours becomes one, as on a server."""
    try:
        yield
    except M3DError:
        raise
    except Exception as error:
        raise M3DError(f"unexpected {type(error).__name__}: {one_line(error)}") from error


def _cancelled() -> Cancelled:
    return Cancelled("the request was cancelled, or the engine was closed")


def _too_late() -> DeadlineExceeded:
    return DeadlineExceeded(
        "no complete answer within the deadline; give a longer timeout (seconds), or fewer max_new_tokens"
    )
