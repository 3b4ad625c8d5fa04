"""What leaves: masks as files that other programs read."""

from engine.results.mask import save_mask

__all__ = ["save_mask"]
