"""The local copy of a repository of the Hugging Face hub, in the hub library's own cache (`HF_HOME`).

The library begins a file anew when a download broke off in an earlier process, hf_xet too. Large files are therefore
fetched here, over plain HTTP: what has arrived stays in the cache as `<SHA-256>.incomplete`, the next run goes on
there, and the whole is checked by its SHA-256. Other programs find the files where the library would have put them.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from engine.errors import CheckpointError

COMMIT = re.compile("[0-9a-f]{40}")


class HubFile(NamedTuple):
    """A file of a repository. size: bytes. sha256: known of large files only."""

    size: int
    sha256: str | None = None


class HubCache:
    """The cache's folder of one repository: `snapshots/<commit>/` has the files, as links into `blobs/`, and
    `refs/<revision>` the commit that a branch or tag named when it was fetched last."""

    def __init__(self, repository: str):
        from huggingface_hub import constants

        self.repository = repository
        self.root = Path(constants.HF_HUB_CACHE).expanduser()
        self.folder = self.root / f"models--{repository.replace('/', '--')}"

    def snapshot(self, commit: str) -> Path:
        return self.folder / "snapshots" / commit

    def commit(self, revision: str) -> str | None:
        """The commit that was fetched last of a branch or tag, or the commit itself; None if nothing was."""
        if COMMIT.fullmatch(revision):
            return revision if self.snapshot(revision).is_dir() else None
        ref = self.folder / "refs" / revision
        return ref.read_text().strip() if ref.is_file() else None

    def listing(self, commit: str) -> dict[str, HubFile] | None:
        """All files of the repository by path, as `keep` has noted them."""
        try:
            values = json.loads(self._listing(commit).read_text())
            return {path: HubFile(*file) for path, file in values.items()}
        except (FileNotFoundError, ValueError, TypeError, AttributeError):  # none, or a damaged one: the hub is asked
            return None

    def keep(self, revision: str, commit: str, files: dict[str, HubFile]) -> None:
        """Note what the hub said, for when it is out of reach."""
        texts = {self._listing(commit): json.dumps(files, indent=1)}
        if not COMMIT.fullmatch(revision):
            texts[self.folder / "refs" / revision] = commit
        with suppress(OSError):  # a complete cache may be read-only; otherwise the download says what is wrong
            for path, text in texts.items():
                if not (path.is_file() and path.read_text() == text):
                    path.parent.mkdir(parents=True, exist_ok=True)
                    temporary = path.with_name(f"{path.name}.tmp")
                    temporary.write_text(text)
                    temporary.replace(path)

    def found(self, commit: str) -> dict[str, HubFile]:
        """The files that are here, by path in the repository."""
        root = self.snapshot(commit)
        return {str(path.relative_to(root)): HubFile(path.stat().st_size) for path in root.rglob("*") if path.is_file()}

    def has(self, commit: str, path: str, file: HubFile | None) -> bool:
        """Whether a file is here. Raises CheckpointError if its size is not the repository's."""
        here = self.snapshot(commit) / path
        if not here.is_file():
            return False
        if file is not None and (size := here.stat().st_size) != file.size:
            raise CheckpointError(
                f"{here} has {size:,} bytes, in the repository it has {file.size:,}: delete {here.resolve()} "
                f"and {here}, and run again"
            )
        return True

    def arrived(self, file: HubFile) -> int:
        """Bytes of a file that an earlier download has left."""
        part = self._part(file)
        return part.stat().st_size if part is not None and part.is_file() else 0

    def check_space(self, needed: int) -> None:
        """Raises CheckpointError if so many bytes do not fit into the cache."""
        folder = next(folder for folder in (self.folder, *self.folder.parents) if folder.is_dir())
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise CheckpointError(
                f"{self.repository} needs {size_text(needed)} more in {self.root}, where {size_text(free)} are free: "
                f"free {size_text(needed - free)}, or set HF_HOME to a folder on a larger disk"
            )

    def fetch(self, commit: str, path: str, file: HubFile) -> None:
        """Download a file into the snapshot. What the library and the network raise goes through."""
        from huggingface_hub import hf_hub_download
        from huggingface_hub.utils import WeakFileLock

        if part := self._part(file):
            lock = self.root / ".locks" / self.folder.name / f"{file.sha256}.lock"  # where the library has it
            for folder in (part.parent, lock.parent):
                folder.mkdir(parents=True, exist_ok=True)
            with WeakFileLock(lock):
                if not part.with_suffix("").exists():
                    self._fetch_blob(commit, path, file, part)
        hf_hub_download(self.repository, path, revision=commit)  # only links a blob that is there

    def _fetch_blob(self, commit: str, path: str, file: HubFile, part: Path) -> None:
        """Append to `part` what it lacks, and give it the blob's name if its SHA-256 is right."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.errors import HfHubHTTPError, HTTPError
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers

        url = hf_hub_url(self.repository, path, revision=commit)
        with part.open("ab") as stream:
            while (arrived := stream.tell()) < file.size:
                try:
                    http_get(url, stream, resume_size=arrived, headers=build_hf_headers(), displayed_filename=path)
                except HTTPError as error:  # of those that break a transfer, the library itself retries only some
                    if isinstance(error, HfHubHTTPError) or stream.tell() == arrived:
                        raise
        with part.open("rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        if sha256 != file.sha256:
            part.unlink()
            raise CheckpointError(f"{path} of {self.repository} arrived damaged (its SHA-256 is another): run again")
        part.rename(part.with_suffix(""))

    def _listing(self, commit: str) -> Path:
        return self.folder / "m3d" / f"{commit}.json"

    def _part(self, file: HubFile) -> Path | None:
        return self.folder / "blobs" / f"{file.sha256}.incomplete" if file.sha256 else None


def size_text(size: int) -> str:
    """Bytes as people read them, in decimal units as the hub has them."""
    unit, factor = next((u, f) for u, f in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("bytes", 1)) if size >= f or f == 1)
    return f"{size / factor:.2f} {unit}" if factor > 1 else f"{size} bytes"
