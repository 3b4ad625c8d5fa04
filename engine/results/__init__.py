"""Result files."""

from engine.results.mask import save_mask

__all__ = ["save_mask"]
