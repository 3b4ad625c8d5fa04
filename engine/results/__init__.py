"""Result files."""

from engine.results.mask import mask_bytes, save_mask

__all__ = ["mask_bytes", "save_mask"]
