"""Checkpoints on the Hugging Face hub: what names one, and how it becomes a local folder."""

from __future__ import annotations

import errno
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from engine.errors import CheckpointError
from engine.models.hub_cache import COMMIT, HubCache, HubFile, size_text
from engine.models.layout import CONFIG, NO_WEIGHTS, WEIGHTS, files_read, weights_file

_SEGMENT = r"(?!\.+(?:[/@]|$))[\w.-]+"
_NAME = re.compile(rf"({_SEGMENT}/{_SEGMENT})((?:/{_SEGMENT})*)(?:@({_SEGMENT}(?:/{_SEGMENT})*))?", re.ASCII)
_ANSWER_S = 10.0  # for what the hub says about a repository
Say = Callable[[str], None]


@dataclass(frozen=True)
class HubName:
    """`owner/name` or `owner/name/subfolder`, either with `@revision`: a branch, a tag or a commit."""

    repository: str
    subfolder: str = ""
    revision: str = "main"

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision != "main" else ""
        return f"{self.repository}{self.subfolder and '/'}{self.subfolder}{revision}"

    def path(self, file: str) -> str:
        """The path in the repository of a file of the checkpoint."""
        return f"{self.subfolder}/{file}" if self.subfolder else file


@dataclass(frozen=True)
class Located:
    """Where a checkpoint lies. commit: of its repository on the hub; None for a local folder."""

    folder: Path
    commit: str | None
    source: str

    def __str__(self) -> str:
        return f"{self.source}, commit {self.commit}" if self.commit else self.source


class Listing(NamedTuple):
    """The files of a commit by path. unreachable: why the hub cannot be asked and only the cache counts."""

    commit: str
    files: dict[str, HubFile]
    unreachable: str | None = None


def parse(source: str | Path) -> Path | HubName:
    """What the source of a checkpoint names: a local folder, if there is one, or a place on the hub.

    Raises:
        CheckpointError: it names neither.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{source} is a file; a checkpoint is a folder or a Hugging Face id")
    if (match := _NAME.fullmatch(str(source))) is None:
        raise CheckpointError(
            f"{source} is neither a folder nor a Hugging Face id (owner/name or owner/name/subfolder, "
            "either with @revision)"
        )
    return HubName(match[1], match[2].removeprefix("/"), match[3] or "main")


def locate(source: str | Path, say: Say | None = None) -> Located:
    """The local folder of a checkpoint. Of one on the hub, the files that are read are downloaded if need be.

    Args:
        source: a folder, or what `HubName` describes.
        say: takes lines about the download; without it they go to stderr.

    Raises:
        CheckpointError: with the cause, and what to do about it.
    """
    name = parse(source)
    if isinstance(name, Path):
        if not (name / CONFIG).is_file():
            raise CheckpointError(f"{name} is no checkpoint: it has no {CONFIG}")
        return Located(name, None, str(source))
    cache, say = HubCache(name.repository), say or _to_stderr
    with translated_errors(name, cache):
        listing = list_files(name, cache, say)
        _complete(name, cache, listing, say)
    return Located(cache.snapshot(listing.commit) / name.subfolder, listing.commit, str(source))


def cached_commit(source: str) -> str | None:
    """The commit of the copy of a hub's checkpoint that was fetched last; None without one."""
    try:
        name = parse(source)
    except CheckpointError:
        return None
    return HubCache(name.repository).commit(name.revision) if isinstance(name, HubName) else None


def list_files(name: HubName, cache: HubCache, say: Say) -> Listing:
    """A commit and its files: as the hub has them, or, where it is out of reach, as the cache has them.

    A commit that was listed before needs no hub.
    """
    from huggingface_hub import constants

    cached = cache.commit(name.revision)
    if constants.HF_HUB_OFFLINE:
        unreachable = "HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) is set"
    elif COMMIT.fullmatch(name.revision) and (files := cache.listing(name.revision)):
        return Listing(name.revision, files)
    else:
        answer = _ask(name)
        if isinstance(answer, Listing):
            cache.keep(name.revision, answer.commit, answer.files)
            return answer
        unreachable = f"{constants.ENDPOINT} is out of reach ({answer})"
    if cached is None:
        raise CheckpointError(
            f"{name} is no folder here, {unreachable}, and {cache.root} has no copy of its revision {name.revision}: "
            "run this once with network (HF_ENDPOINT, if set, must name a hub), or copy HF_HOME "
            "from a machine that has it"
        )
    if cached != name.revision:
        say(f"{name}: {unreachable}; {name.revision} is taken to be commit {cached}, as when it was fetched last")
    if (files := cache.listing(cached)) is None:
        say(f"{name}: another program has filled the cache; a small file that is missing there goes unnoticed")
        files = cache.found(cached)
    return Listing(cached, files, unreachable)


def _ask(name: HubName) -> Listing | str:
    """What the hub says about a repository, or why it is out of reach."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError

    try:
        info = HfApi().model_info(name.repository, revision=name.revision, files_metadata=True, timeout=_ANSWER_S)
    except HTTPError as error:
        if isinstance(error, HfHubHTTPError) and error.response.status_code < 500:
            raise
        return _line(error)
    except HFValidationError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # not JSON, or not a hub's
        raise CheckpointError(_no_hub(_line(error))) from None
    if info.sha is None or info.siblings is None:
        raise CheckpointError(_no_hub("no commit"))
    files = {
        file.rfilename: HubFile(file.lfs.size, file.lfs.sha256) if file.lfs else HubFile(file.size or 0)
        for file in info.siblings
    }
    return Listing(info.sha, files)


def _complete(name: HubName, cache: HubCache, listing: Listing, say: Say) -> None:
    """Download what is read and not in the cache yet."""
    prefix = name.path("")
    files = {path.removeprefix(prefix): file for path, file in listing.files.items() if path.startswith(prefix)}

    def absent(names: list[str]) -> list[str]:
        found = [file for file in names if not cache.has(listing.commit, name.path(file), files.get(file))]
        if found and listing.unreachable:
            raise CheckpointError(missing_file_message(name, cache, listing, found))
        return found

    def path(file: str) -> Path:
        for one in absent([file]):
            cache.fetch(listing.commit, name.path(one), files[one])
        return cache.snapshot(listing.commit) / name.path(file)

    if weights_file(files) is None:
        if listing.unreachable and not cache.listing(listing.commit):
            raise CheckpointError(missing_file_message(name, cache, listing, [f"the weights ({' or '.join(WEIGHTS)})"]))
        raise CheckpointError(f"{name} {NO_WEIGHTS}{folder_hint(name, listing)}")
    names = files_read(files, path)
    wanted = absent(names)
    if unknown := [file for file in wanted if file not in files]:
        raise CheckpointError(f"{name}: its index names {', '.join(unknown)}, which the repository does not hold")
    if not wanted:
        return
    needed = sum(files[file].size - cache.arrived(files[file]) for file in wanted)
    cache.check_space(needed)
    say(
        f"{name} at commit {listing.commit}: {len(wanted)} of {len(names)} files are fetched, {size_text(needed)}, "
        f"into {cache.folder}"
    )
    for k, file in enumerate(wanted, 1):
        arrived = cache.arrived(files[file])
        here = f", of which {size_text(arrived)} are here" if arrived else ""
        say(f"[{k}/{len(wanted)}] {file}, {size_text(files[file].size)}{here}")
        cache.fetch(listing.commit, name.path(file), files[file])


def missing_file_message(name: HubName, cache: HubCache, listing: Listing, absent: list[str]) -> str:
    """The message about files that the cache lacks and that cannot be fetched now."""
    known = [name.path(file) for file in absent if name.path(file) in listing.files]
    sized = [f"{path} ({size_text(listing.files[path].size)})" for path in known]
    sized += [name.path(file) for file in absent if name.path(file) not in known]
    command = shlex.join(["hf", "download", name.repository, *known, "--revision", listing.commit])
    return (
        f"{name}: {listing.unreachable}, and of commit {listing.commit} {cache.folder} lacks {', '.join(sized)}: "
        f"run this once with network, or `{command}` on a machine that has it, and copy its HF_HOME"
    )


def folder_hint(name: HubName, listing: Listing) -> str:
    """Checkpoints in other folders of the repository, as the end of a message."""
    folders = {path.rpartition("/")[0] for path in listing.files if path.endswith(f"/{CONFIG}")} - {name.subfolder}
    return "".join(f"; {name.repository}/{folder} is a checkpoint" for folder in sorted(folders))


@contextmanager
def translated_errors(name: HubName, cache: HubCache) -> Iterator[None]:
    """Whatever goes wrong with the hub, the network or the disk becomes a CheckpointError that says what to do."""
    from huggingface_hub.errors import HFValidationError, HTTPError

    try:
        yield
    except (HTTPError, OSError, HFValidationError) as error:
        raise CheckpointError(f"{name}: {_cause(error, name, cache)}") from None


def _cause(error: Exception, name: HubName, cache: HubCache) -> str:
    from huggingface_hub import constants, errors

    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # the library looked into the cache after it
    page = f"{constants.ENDPOINT}/{name.repository}"
    log_in = "run `hf auth login` or set HF_TOKEN"
    kept = cache.commit(name.revision)
    copy = f" (HF_HUB_OFFLINE=1 uses the copy of commit {kept})" if kept and cache.found(kept) else ""
    if isinstance(error, errors.GatedRepoError):
        return f"access is restricted: ask for it on {page}, then {log_in}{copy}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"no folder here, and no repository on the hub, or a private one: check the name, or {log_in}{copy}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the repository has no revision {name.revision}: {page} shows its branches, tags and commits"
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        if status in (401, 403):
            return f"the hub refuses access ({status}, {_line(error)}): {log_in}{copy}"
        if status == 404:
            return _no_hub(_line(error))
        return f"the hub answers {status} ({_line(error)}): run again later, what has arrived is kept"
    if isinstance(error, errors.FileMetadataError):
        return _no_hub(_line(error))
    if isinstance(error, errors.HFValidationError):
        return f"no name of a repository ({_line(error)})"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk of {cache.root} is full: free some of it, or set HF_HOME to a folder on another one"
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{cache.root} cannot be written ({_line(error)}): set HF_HOME to a folder that can be"
    return (
        f"the download from {constants.ENDPOINT} fails ({_line(error)}): check the network and run again, "
        "what has arrived is kept"
    )


def _no_hub(said: str) -> str:
    from huggingface_hub import constants

    return f"{constants.ENDPOINT} does not answer as a Hugging Face hub does ({said}): check HF_ENDPOINT"


def _line(error: BaseException) -> str:
    """An error in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:300]}"


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
