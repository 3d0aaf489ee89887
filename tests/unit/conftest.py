"""What the tests of one process share."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
from by_hand import HeapByHand


@pytest.fixture
def hand(heap_name: str) -> Iterator[HeapByHand]:
    """A heap of which the test is the coordinator; it is sound at the end."""
    with HeapByHand(heap_name) as hand:
        yield hand
        gc.collect()
        hand.assert_sound()
