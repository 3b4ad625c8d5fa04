"""What a refusal has to say."""

from __future__ import annotations

import pytest

from engine.errors import InvalidInput
from engine.scan import pack_scan, read_scan


def refused(data, *words, read=read_scan, **options):
    """Reading `data` raises InvalidInput with these words."""
    with pytest.raises(InvalidInput) as caught:
        read(data, **options)
    for word in words:
        assert word in str(caught.value), f"{word!r} not in {caught.value}"


def refused_source(source, *words, **options):
    """Handing `source` over raises InvalidInput with these words."""
    refused(source, *words, read=pack_scan, **options)
