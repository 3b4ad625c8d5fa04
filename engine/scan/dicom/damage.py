"""Whatever a damaged DICOM file makes pydicom raise becomes InvalidInput."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from engine.errors import InvalidInput


@contextmanager
def damage_named(name: str) -> Iterator[None]:
    """pydicom converts an element only when it is asked for, and raises whatever a damaged one makes it stumble over."""
    try:
        yield
    except InvalidInput:
        raise
    except Exception as error:
        raise InvalidInput(f"{name} is a damaged DICOM file ({words(error)}): export or copy it again") from None


def words(error: Exception) -> str:
    """An error in one short line."""
    return " ".join(str(error).split())[:200] or type(error).__name__
