"""From a scan's bytes to a study: decoded, preprocessed and encoded once, however often it is asked about."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

import numpy as np

from engine.api import StudyInfo
from engine.contract import FEATURES, IMAGE, VISUAL_TOKENS
from engine.errors import InvalidInput, Unavailable
from engine.manifest import Manifest
from engine.runtime.study_store import StudyStore, content_digest
from engine.scan import read_scan
from engine.scan.limits import Limits
from engine.volume import Crop, prepare

Infer = Callable[[str, Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]
"""infer(model, {input: batch}) -> {output: batch}: call a compute model; names are those of engine.contract."""


@dataclass(frozen=True)
class ScanRequest:
    """What a request says about its scan: `data` (a file's bytes as uint8) with its companions, or a `handle`.

    digest: the data's `content_digest`, if it is known already. crop: the region that the model is to see.
    """

    data: np.ndarray | None
    affine: np.ndarray | None
    preset: str | None
    handle: str | None
    digest: str | None = None
    crop: Crop | None = None

    def __post_init__(self):
        if (self.data is None) == (self.handle is None):
            given = "neither" if self.data is None else "both"
            raise InvalidInput(
                f"a request names its scan by VOLUME (a scan file's bytes) or by STUDY (the handle of a "
                f"scan that the server holds); this one has {given}"
            )
        if self.handle is not None and not (self.affine is None and self.preset is None and self.crop is None):
            raise InvalidInput("AFFINE, PRESET and CROP belong to VOLUME; a STUDY was prepared when it was uploaded")


class Studies:
    """Opens studies for one exported model.

    infer: how to call the encoders. limits: what a scan may weigh.
    """

    def __init__(self, store: StudyStore, manifest: Manifest, infer: Infer, limits: Limits = Limits()):
        self.store = store
        self.manifest = manifest
        self.infer = infer
        self.limits = limits

    def is_ready(self, handle: str) -> bool:
        """Whether everything that a question needs is in the store. Raises StudyNotFound for an unknown handle."""
        return self.store.get(handle, "visual_tokens") is not None

    def info(self, handle: str, cached: bool) -> StudyInfo:
        """For the user. cached: whether the scan was known before."""
        info = self.store.info(handle)
        del info["geometry"], info["header"]
        return StudyInfo(**info, cached=cached, model=self.manifest.model)

    def forget(self, handle: str) -> None:
        """Drop a study. Raises StudyNotFound."""
        self.store.remove(handle)

    def open(self, scan: ScanRequest) -> tuple[str, StudyInfo]:
        """(handle, info) of the study, with its visual tokens in the store.

        Raises InvalidInput for a scan that cannot be used, StudyNotFound, ResourceExhausted, Unavailable.
        """
        if scan.handle is not None:
            handle, cached = scan.handle, True
        else:
            handle, cached = self._add(scan)
        self.store.computed(handle, "visual_tokens", self._visual_tokens)
        return handle, self.info(handle, cached)

    def encode_for_segmentation(self, handle: str) -> np.ndarray:
        return segmentation_features(self.store, self.infer, handle)

    def _add(self, scan: ScanRequest) -> tuple[str, bool]:
        preset = scan.preset or "auto"
        content = scan.digest or content_digest(scan.data)
        handle = self.store.handle_of(content, scan.affine, preset, self.manifest.identity, scan.crop)
        if handle in self.store:
            return handle, True
        with self.store.lock(handle, "image"):
            if handle in self.store:
                return handle, True
            started = time.perf_counter()
            decoded = read_scan(cast(np.ndarray, scan.data), affine=scan.affine, limits=self.limits)
            prepared = prepare(decoded, self.manifest.image_size, preset, scan.crop)
            info = {
                "preset": prepared.preset,
                "reason": prepared.reason,
                "shape": list(decoded.array.shape),
                "spacing_mm": list(decoded.spacing_mm),
                "orientation": decoded.orientation,
                "prepare_s": time.perf_counter() - started,
                "geometry": prepared.geometry.to_dict(),
                "header": base64.b64encode(decoded.header or b"").decode(),
            }
            if prepared.region is not None:
                info["crop"] = prepared.region
            self.store.add(handle, info, prepared.image)
        return handle, False

    def _visual_tokens(self, image: np.ndarray) -> np.ndarray:
        tokens = self.infer("vision_encoder", {IMAGE: image[None]})[VISUAL_TOKENS][0]
        # One bad row in the language model's cache would spoil the answers to other requests.
        if not np.isfinite(tokens).all():
            raise Unavailable(
                "the vision encoder returned values that are not finite for this scan; with reduced "
                "precision, export with --precision fp32"
            )
        return tokens


def segmentation_features(store: StudyStore, infer: Infer, handle: str) -> np.ndarray:
    """SegVol's features of a study, E x D/p x H/p x W/p, from the store or encoded now."""
    return store.computed(
        handle, "segmentation_features", lambda image: infer("segmentation_encoder", {IMAGE: image[None]})[FEATURES][0]
    )
