"""The gateway's limits and retention times."""

from __future__ import annotations

from dataclasses import dataclass

MB = 1_000_000


@dataclass(frozen=True)
class GatewaySettings:
    """What the gateway allows; a key may have its own rate, concurrency and upload size.

    rate_per_minute: requests of a key. concurrency: of a key's requests in work at the same time.
    max_upload_mb: of one upload. max_json_mb: of one JSON body, inline scans included. json_room_mb: of all JSON
    bodies in work. files_mb, max_files: of all kept files; one key may have half of each. masks_mb, max_masks: of the
    kept masks of one key, the oldest of which make room for new ones. file_hours: how long a file or a mask is kept.
    study_hours: how long a study is kept after its last use; the server may evict it earlier.
    timeout_s: of a question, an upload to the server, a ranking.
    """

    rate_per_minute: int = 600
    concurrency: int = 16
    max_upload_mb: int = 2048
    max_json_mb: int = 64
    json_room_mb: int = 512
    files_mb: int = 16_384
    max_files: int = 256
    masks_mb: int = 1024
    max_masks: int = 128
    file_hours: float = 24.0
    study_hours: float = 24.0
    timeout_s: float = 600.0
