"""What can be known of a checkpoint before its weights are read or downloaded: its files and tensor headers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from engine.errors import CheckpointError
from engine.models import hub, layout
from engine.models.hub_cache import HubCache

SAFETENSORS = ".safetensors"
_FIRST_BYTES = 100_000  # holds most headers whole
_LONGEST_HEADER = 100_000_000  # the format's own limit
_Say = Callable[[str], None]


class Entry(NamedTuple):
    """A tensor as a safetensors header describes it. dtype: the format's name, such as F32. size: bytes."""

    dtype: str
    shape: tuple[int, ...]
    size: int


@dataclass(frozen=True)
class Survey:
    """A checkpoint's files.

    folder: where its small files (settings, tokenizer, index) are on this machine. sizes: bytes of every file of the
    checkpoint's folder, by name. commit: of a checkpoint on the hub. absent: bytes that are still to be fetched, by the
    name of the file. others: checkpoints in other folders of the repository, as the end of a message.
    """

    source: str
    folder: Path
    sizes: dict[str, int]
    commit: str | None = None
    absent: dict[str, int] = field(default_factory=dict)
    others: str = ""
    cache: HubCache | None = None
    fetch_start: Callable[[str, int, int], bytes | None] | None = None

    @property
    def read(self) -> list[str]:
        """Names of the files that an export reads. Raises CheckpointError if config.json or the index is damaged."""
        return layout.files_read(self.sizes, self.folder.joinpath)

    @property
    def tensor_files(self) -> list[str]:
        """Names of the files with the weights. Raises CheckpointError if the index is damaged."""
        return layout.tensor_files(self.sizes, self.folder.joinpath)

    def header(self, name: str) -> dict[str, Entry] | None:
        """The tensors of a file by key; None if that cannot be told without reading or fetching it whole.

        Raises:
            CheckpointError: the header is damaged, or the file has another length than it says.
        """
        if not name.endswith(SAFETENSORS):
            return None
        start = self._local_start if name not in self.absent else self.fetch_start
        first = start(name, 0, _FIRST_BYTES) if start else None
        if start is None or first is None:
            return None
        length = 8 + int.from_bytes(first[:8], "little")
        if length > min(_LONGEST_HEADER, self.sizes[name]):
            raise _damaged(name, "its header does not fit into it")
        rest = start(name, len(first), length) if length > len(first) else b""
        return None if rest is None else _entries(name, (first + rest)[8:length], self.sizes[name] - length)

    def _local_start(self, name: str, start: int, end: int) -> bytes:
        with (self.folder / name).open("rb") as stream:
            stream.seek(start)
            return stream.read(end - start)


def survey(source: str | Path, say: _Say = lambda text: None) -> Survey:
    """Look at a checkpoint. Of one on the hub, only files that are small and not in the cache yet are fetched.

    Args:
        source: a folder, or what `hub.HubName` describes.
        say: takes lines about the hub.

    Raises:
        CheckpointError: there is none; with the cause, and what to do about it.
    """
    name = hub.parse(source)
    if isinstance(name, Path):
        sizes = {file.name: file.stat().st_size for file in name.iterdir() if file.is_file()}
        if layout.CONFIG not in sizes:
            raise CheckpointError(f"{name} is no checkpoint: it has no {layout.CONFIG}")
        named = layout.tensor_files(sizes, name.joinpath)  # an index may name files in folders below
        sizes |= {file: (name / file).stat().st_size for file in named if (name / file).is_file()}
        return Survey(str(source), name, sizes)
    cache = HubCache(name.repository)
    with hub.translated_errors(name, cache):
        return _on_the_hub(str(source), name, cache, say)


def _on_the_hub(source: str, name: hub.HubName, cache: HubCache, say: _Say) -> Survey:
    listing = hub.list_files(name, cache, say)
    prefix, commit = name.path(""), listing.commit
    files = {path.removeprefix(prefix): file for path, file in listing.files.items() if path.startswith(prefix)}
    others = hub.folder_hint(name, listing)
    if layout.CONFIG not in files:
        raise CheckpointError(f"{name} holds no {layout.CONFIG}{others}")
    small = [*layout.SETTINGS, *layout.TOKENIZER_FILES, layout.ADAPTER_CONFIG]
    if (weights := layout.weights_file(files)) is not None and weights.endswith(layout.INDEX):
        small.append(weights)
    wanted = [one for one in small if one in files and not cache.has(commit, name.path(one), files[one])]
    if wanted and listing.unreachable:
        raise CheckpointError(hub.missing_file_message(name, cache, listing, wanted))
    for one in wanted:
        cache.fetch(commit, name.path(one), files[one])
    folder = cache.snapshot(commit) / name.subfolder
    absent = {
        one: files[one].size - cache.arrived(files[one])
        for one in layout.files_read(files, folder.joinpath)
        if one in files and not cache.has(commit, name.path(one), files[one])
    }

    def fetch_start(file: str, start: int, end: int) -> bytes | None:
        with hub.translated_errors(name, cache):
            return _fetch_range(name.repository, name.path(file), commit, start, end)

    sizes = {one: file.size for one, file in files.items()}
    reachable = None if listing.unreachable else fetch_start
    return Survey(source, folder, sizes, commit, absent, others, cache, reachable)


def _fetch_range(repository: str, path: str, commit: str, start: int, end: int) -> bytes | None:
    """Some bytes of a file on the hub; None from a server that would send it whole."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.constants import HF_HUB_DOWNLOAD_TIMEOUT
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    headers = {**build_hf_headers(), "Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
    url = hf_hub_url(repository, path, revision=commit)
    with get_session().stream("GET", url, headers=headers, timeout=HF_HUB_DOWNLOAD_TIMEOUT) as response:
        hf_raise_for_status(response)
        return response.read() if response.status_code == 206 else None


def _entries(name: str, text: bytes, data: int) -> dict[str, Entry]:
    """What a header says. data: bytes of the file behind it."""
    try:
        values = json.loads(text)
        values.pop("__metadata__", None)
        ends = {key: value["data_offsets"] for key, value in values.items()}
        entries = {
            key: Entry(value["dtype"], tuple(value["shape"]), ends[key][1] - ends[key][0])
            for key, value in values.items()
        }
        needed = max((end for _, end in ends.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise _damaged(name, f"{type(error).__name__}: {error}") from None
    if needed != data:
        raise _damaged(name, f"{needed:,} bytes of tensors are announced, {data:,} are there")
    return entries


def _damaged(name: str, why: str) -> CheckpointError:
    return CheckpointError(f"{name} is not a readable safetensors file (cut off?): {why}")
