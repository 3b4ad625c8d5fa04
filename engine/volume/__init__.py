"""From a scan to the model's volume, and the way back. Clients import modules of this package that need no SciPy."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.volume.crop import Crop
    from engine.volume.geometry import Geometry
    from engine.volume.presets import PRESETS, Prepared, Preset, prepare

__all__ = ["Crop", "Geometry", "PRESETS", "Prepared", "Preset", "prepare"]

_MODULES = {"Crop": "crop", "Geometry": "geometry"}  # of the others: presets


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES.get(name, 'presets')}"), name)
