"""Boxes the other way: `Geometry.boxes_to_scan` is held to it."""

from __future__ import annotations

import numpy as np

from engine.volume.geometry import Geometry


def boxes_to_model(geometry: Geometry, boxes: np.ndarray) -> np.ndarray:
    """The inverse of `boxes_to_scan`: [K, 6] edges in the scan's array to M3D's normalised boxes."""
    size, crop = np.array(geometry.image_size), np.array(geometry.crop, float)
    edges = np.asarray(boxes, float).reshape(-1, 2, 3)[..., list(geometry.axes)]
    edges = (edges - crop[:, 0]) / (crop[:, 1] - crop[:, 0])
    edges[..., list(geometry.flips)] = 1 - edges[..., list(geometry.flips)]
    first, last = np.sort(np.clip(edges, 0, 1), axis=1).swapaxes(0, 1)
    return np.concatenate([first, np.maximum(last - 1 / size, first)], axis=-1)
