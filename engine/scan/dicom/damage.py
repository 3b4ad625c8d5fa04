"""Whatever a damaged DICOM file makes pydicom raise becomes InvalidInput."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from engine.errors import InvalidInput, Unavailable, one_line


@contextmanager
def damage_named(name: str) -> Iterator[None]:
    """pydicom converts an element only when asked for it, and raises whatever a damaged one makes it stumble over."""
    try:
        yield
    except (InvalidInput, Unavailable):  # damage, named already, and a decoder that is not installed
        raise
    except Exception as error:
        raise InvalidInput(f"{name} is a damaged DICOM file ({one_line(error)}): export or copy it again") from None
