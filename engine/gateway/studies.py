"""The studies of the gateway's users: opened from files, inline scans and ids, known by whom they belong to.

Nothing here is needed to tell whose a study is: its public id says that. What is remembered saves work (a scan that is
known is not sent again) and says where an evicted study came from. It is lost with the process.
"""

from __future__ import annotations

import asyncio
import time
import weakref
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from engine.api import Study, StudyInfo
from engine.errors import StudyNotFound
from engine.gateway.backend import AsyncM3D
from engine.gateway.files import Content, Files, StoredFile
from engine.gateway.metrics import Metrics
from engine.gateway.refusal import gone, not_found
from engine.gateway.scans import Inline, Named, ScanPart
from engine.gateway.seal import Seal, SealedStudy
from engine.gateway.settings import GatewaySettings

REMEMBERED = 4096
T = TypeVar("T")


@dataclass(frozen=True)
class Preparation:
    """How a scan is to be prepared, see `engine.api.M3D.upload`."""

    preset: str = "auto"
    crop: str | None = None


@dataclass
class OpenStudy:
    """A study of one owner's. public: its id, which stays. study: where it is now: a server that was started anew has
    given it another handle. file: the name of the kept file that it came from. used: when it was used for the last
    time, seconds of a monotonic clock.
    """

    owner: str
    public: str
    study: Study
    preparation: Preparation
    file: bytes | None = None
    notes: tuple[str, ...] = ()
    used: float = 0.0


class Studies:
    """Opens studies. server: the name that ids have of it. clock: seconds."""

    def __init__(
        self,
        m3d: AsyncM3D,
        seal: Seal,
        files: Files,
        metrics: Metrics,
        settings: GatewaySettings,
        server: str,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._m3d, self._seal, self._files, self._metrics = m3d, seal, files, metrics
        self._settings, self._server, self._clock = settings, server, clock
        self._by_public: OrderedDict[str, OpenStudy] = OrderedDict()  # the one used last comes last
        self._by_origin: OrderedDict[tuple, str] = OrderedDict()
        # By handle: when it was forgotten on the server, as a count of such events.
        self._forgotten: OrderedDict[str, int] = OrderedDict()
        self._forgets = 0
        self._deleted: OrderedDict[str, None] = OrderedDict()
        self._locks: weakref.WeakValueDictionary[object, asyncio.Lock] = weakref.WeakValueDictionary()

    @property
    def count(self) -> int:
        return len(self._by_public)

    async def used(
        self, owner: str, scan: ScanPart, preparation: Preparation, work: Callable[[OpenStudy], Awaitable[T]]
    ) -> T:
        """What `work` does with the scan's study; if the server has evicted it, it is sent again, once, if it can be.

        Raises Refusal: 404 for an id that is not this owner's, 410 for what is not held any more.
        """
        opened = await self.opened(owner, scan, preparation)
        handle = opened.study.handle
        try:
            return await work(opened)
        except StudyNotFound:
            async with self._locks.setdefault(opened.public, asyncio.Lock()):
                self._refuse_deleted(opened.public)
                if opened.study.handle == handle:  # no other request has sent it to a new server meanwhile
                    await self._send_again(opened, scan)
                    if opened.public in self._deleted:  # meanwhile
                        await self._forget(opened)
                        self._refuse_deleted(opened.public)
        return await work(opened)

    async def opened(self, owner: str, scan: ScanPart, preparation: Preparation) -> OpenStudy:
        """The study of a scan; it is sent to the server if it is not known."""
        if isinstance(scan, Named) and scan.public.startswith("study-"):
            return self.known(owner, scan.public)
        name, content, notes = self._content(owner, scan)
        origin = (owner, scan.digest if isinstance(scan, Inline) else name, preparation)
        lock = self._locks.setdefault(origin, asyncio.Lock())  # the same scan is not sent twice at the same time
        async with lock:
            public = self._by_origin.get(origin)
            if public is not None and public in self._by_public:
                self._metrics.studies.labels("gateway").inc()
                return self._touched(self._by_public[public])
            opened = await self.upload(owner, content, preparation, name, notes)
            self._by_origin[origin] = opened.public
            while len(self._by_origin) > REMEMBERED:
                self._by_origin.popitem(last=False)
            return opened

    async def upload(
        self,
        owner: str,
        content: Content | bytes,
        preparation: Preparation,
        file: bytes | None = None,
        notes: tuple[str, ...] = (),
    ) -> OpenStudy:
        study = await self._uploaded(content, preparation)
        public = self._seal.study_id(owner, SealedStudy(self._server, study.handle))
        self._deleted.pop(public, None)
        before = self._by_public.get(public)
        opened = OpenStudy(owner, public, study, preparation, file or (before.file if before else None), notes)
        self._by_public[public] = opened
        self._forget_oldest()
        return self._touched(opened)

    def known(self, owner: str, public: str) -> OpenStudy:
        """The study of an id, which the server may have evicted. Raises Refusal."""
        sealed = self._seal.open_study(owner, public)
        if sealed is None or sealed.server != self._server:
            raise not_found("study", public)
        self._refuse_deleted(public)
        opened = self._by_public.get(public)
        if opened is None:
            opened = OpenStudy(owner, public, Study(sealed.handle), Preparation())
            self._by_public[public] = opened
            self._forget_oldest()
        return self._touched(opened)

    async def described(self, owner: str, public: str) -> tuple[OpenStudy, StudyInfo]:
        """How a study was prepared, if the server holds it. Raises Refusal."""
        opened = self.known(owner, public)

        async def describe(of: OpenStudy) -> StudyInfo:
            return await self._m3d.describe(of.study, timeout=self._settings.timeout_s)

        return opened, await self.used(owner, Named(public, "id"), opened.preparation, describe)

    async def delete(self, owner: str, public: str) -> None:
        """Drop a study on the server, unless another owner uses the same scan, who would lose it too."""
        opened = self.known(owner, public)
        await self._forget(opened)  # if the server is away, it can be asked for again
        if self._by_public.get(public, opened) is not opened:
            return  # the scan was uploaded anew meanwhile
        self._drop(opened)
        self._deleted[public] = None
        while len(self._deleted) > REMEMBERED:
            self._deleted.popitem(last=False)

    def forget_file(self, stored: StoredFile) -> None:
        """A deleted file does not lead to a study any more."""
        for origin in [each for each in self._by_origin if each[:2] == (stored.owner, stored.name)]:
            del self._by_origin[origin]

    async def sweep(self) -> None:
        """Drop the studies that have not been used for the retention time.

        Raises the first error when all have been tried: what one study fails with does not keep the others.
        """
        limit = self._clock() - 3600 * self._settings.study_hours
        failures: list[Exception] = []
        for opened in [each for each in self._by_public.values() if each.used <= limit]:
            if opened.used > limit:  # meanwhile
                continue
            try:
                await self._forget(opened)
            except Exception as error:
                failures.append(error)
                continue
            if self._by_public.get(opened.public) is opened and opened.used <= limit:
                self._drop(opened)
        if failures:
            raise failures[0]

    # --- inside ------------------------------------------------------------------------------------------------------
    def _content(self, owner: str, scan: ScanPart) -> tuple[bytes | None, Content | bytes, tuple[str, ...]]:
        if isinstance(scan, Inline):
            return None, scan.content, scan.notes
        name = self._seal.open_file(owner, scan.public)
        if name is None:
            raise not_found("file or study", scan.public)
        stored = self._files.get(owner, name)
        if stored is None:
            raise gone("the file is not kept any more (deleted, or its time is over): upload it again")
        return name, stored.content, ()

    def _refuse_deleted(self, public: str) -> None:
        if public in self._deleted:
            raise gone("the study was deleted: upload the scan again")

    async def _uploaded(self, content: Content | bytes, preparation: Preparation) -> Study:
        """The study on the server. The caller takes it into what is remembered before it waits for anything else."""
        source = _Bytes(content) if isinstance(content, bytes) else content
        while True:
            begun = self._forgets
            study = await self._m3d.upload(
                source, preset=preparation.preset, crop=preparation.crop, timeout=self._settings.timeout_s
            )
            async with self._locks.setdefault(study.handle, asyncio.Lock()):
                pass  # nobody forgets it now
            if self._forgotten.get(study.handle, 0) <= begun:
                break
            # Another key deleted the same scan meanwhile: the server may have dropped it after this upload.
        known = study.info is not None and study.info.cached
        self._metrics.studies.labels("server" if known else "new").inc()
        return Study(study.handle, study.info)  # without its source: what is sent again is decided here

    async def _send_again(self, opened: OpenStudy, scan: ScanPart) -> None:
        content: Content | bytes | None = None
        if isinstance(scan, Inline):
            content = scan.content
        else:  # the file that the request names, or the one that the study came from
            for name in (self._seal.open_file(opened.owner, scan.public), opened.file):
                stored = self._files.get(opened.owner, name) if name is not None else None
                if stored is not None:
                    content = stored.content
                    break
        if content is None:
            self._metrics.evicted.inc()
            raise gone(
                "the server does not hold this study any more, and there is no file to send it again from: upload the "
                "scan again (studies of /v1/files are sent again while their file is kept)"
            )
        opened.study = await self._uploaded(content, opened.preparation)
        self._metrics.resent.inc()

    async def _forget(self, opened: OpenStudy) -> None:
        handle = opened.study.handle
        async with self._locks.setdefault(handle, asyncio.Lock()):
            if any(other.study.handle == handle for other in self._by_public.values() if other is not opened):
                return
            try:
                await self._m3d.forget(opened.study, timeout=self._settings.timeout_s)
            except StudyNotFound:
                pass  # it is gone already
            finally:
                self._forgets += 1
                self._forgotten[handle] = self._forgets
                self._forgotten.move_to_end(handle)
                while len(self._forgotten) > REMEMBERED:
                    self._forgotten.popitem(last=False)

    def _touched(self, opened: OpenStudy) -> OpenStudy:
        opened.used = self._clock()
        if opened.public in self._by_public:
            self._by_public.move_to_end(opened.public)
        return opened

    def _drop(self, opened: OpenStudy) -> None:
        self._by_public.pop(opened.public, None)
        for origin in [each for each, public in self._by_origin.items() if public == opened.public]:
            del self._by_origin[origin]

    def _forget_oldest(self) -> None:
        while len(self._by_public) > REMEMBERED:
            self._drop(next(iter(self._by_public.values())))


class _Bytes:
    """Bytes as a file to read: see `Content`."""

    def __init__(self, content: bytes):
        self._content = content

    def read(self) -> bytes:
        return self._content
