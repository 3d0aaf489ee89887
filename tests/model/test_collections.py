"""Shared lists and dicts against list and dict: whatever is done in whatever order, both say the
same, and raise the same.

Nested ones too: what is taken out of a shared collection and changed is changed in it. Between the
steps a collection may go on, so that every barrier is passed.
"""

from __future__ import annotations

import gc
import math
import os
import pickle
from collections.abc import Callable
from typing import Any

from by_hand import HeapByHand
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    rule,
    run_state_machine_as_test,
)

from shmheap import SharedDict, SharedList

EXAMPLES = max(1, int(60 * float(os.environ.get("SH_TEST_SCALE", "1"))))

ODD_KEYS = [
    None, True, False, 0, 1, 2, 1.0, 1.5, -1, 2**70, float(2**70), 1j, 1 + 0j, "", "a", "b", "é",
    b"", b"a", "long" * 100, math.inf, -(2**63), 2**63, hash("a"), -0.0, 2**53, float(2**53),
    complex(-0.0, 1),
]  # fmt: skip
KEYS = st.sampled_from(ODD_KEYS) | st.integers(0, 200)
LEAVES = KEYS | st.text(max_size=5) | st.floats(allow_nan=False)
VALUES = st.recursive(
    LEAVES,
    lambda inside: (
        st.lists(inside, max_size=3)
        | st.dictionaries(KEYS, inside, max_size=3)
        | st.lists(inside, max_size=3).map(tuple)
    ),
    max_leaves=6,
)
LISTS = st.lists(VALUES, max_size=5)
INDEXES = st.integers(-12, 12)
BOUNDS = st.none() | INDEXES
SLICES = st.builds(slice, BOUNDS, BOUNDS, st.none() | st.sampled_from([1, 1, 2, -1, -3, 0]))
CYCLE = ("start_cycle", "mark", "finish_mark", "sweep", "stamp", "end_cycle")


def plain(value: Any) -> Any:
    """With plain collections in the place of shared ones."""
    if isinstance(value, SharedDict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, SharedList | list):
        return [plain(item) for item in value]
    return tuple(map(plain, value)) if isinstance(value, tuple) else value


def shape(value: Any) -> str:
    """What tells apart what is equal: types, order."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{k!r}: {shape(v)}' for k, v in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"{type(value).__name__}({', '.join(map(shape, value))})"
    return repr(value)


class Collections(RuleBasedStateMachine):
    hand: HeapByHand

    def __init__(self) -> None:
        super().__init__()
        self.at = 0
        self.mapping = self.hand.heap.dict("mapping")
        self.sequence = self.hand.heap.list("sequence")
        self.model: dict[Any, Any] = {}
        self.other: list[Any] = []

    def both(self, shared: Any, model: Any, act: Callable[[Any], Any]) -> None:
        """Both return or raise the same."""
        outcomes = []
        for one in (shared, model):
            try:
                outcomes.append(shape(plain(act(one))))
            except (KeyError, IndexError, ValueError, TypeError) as error:
                outcomes.append(type(error).__name__)
        assert outcomes[0] == outcomes[1]

    def on_dict(self, act: Callable[[Any], Any]) -> None:
        self.both(self.mapping, self.model, act)

    def on_list(self, act: Callable[[Any], Any]) -> None:
        self.both(self.sequence, self.other, act)

    @rule(key=KEYS, value=VALUES)
    def set(self, key: Any, value: Any) -> None:
        self.on_dict(lambda d: d.__setitem__(key, copied(value)))

    @rule(key=KEYS)
    def look(self, key: Any) -> None:
        self.on_dict(lambda d: d[key])
        self.on_dict(lambda d: d.get(key, "none"))
        self.on_dict(lambda d: key in d)
        self.on_dict(lambda d: [item in d.items() for item in (key, (key, 1), [key, 1], (key,))])

    @rule(key=KEYS, default=st.none() | st.just("none"))
    def pop(self, key: Any, default: Any) -> None:
        self.on_dict(lambda d: d.pop(key) if default is None else d.pop(key, default))

    @rule(key=KEYS)
    def delete(self, key: Any) -> None:
        self.on_dict(lambda d: d.__delitem__(key))

    @rule(key=KEYS, value=VALUES)
    def setdefault(self, key: Any, value: Any) -> None:
        self.on_dict(lambda d: d.setdefault(key, copied(value)))

    @rule()
    def popitem(self) -> None:
        self.on_dict(lambda d: d.popitem())

    @rule(values=st.dictionaries(KEYS, VALUES, max_size=30))
    def update(self, values: dict[Any, Any]) -> None:
        self.on_dict(lambda d: d.update(copied(values)))
        self.on_dict(lambda d: [*(d | values).items()])
        self.on_dict(lambda d: [*(values | d).items()])

    @rule()
    def clear_dict(self) -> None:
        self.on_dict(lambda d: d.clear())

    @rule(key=KEYS)
    def bad_key(self, key: Any) -> None:
        self.on_dict(lambda d: d.__getitem__([key]))
        self.on_dict(lambda d: [key] in d)

    @rule(value=VALUES)
    def append(self, value: Any) -> None:
        self.on_list(lambda s: s.append(copied(value)))

    @rule(index=INDEXES, value=VALUES)
    def insert(self, index: int, value: Any) -> None:
        self.on_list(lambda s: s.insert(index, copied(value)))

    @rule(index=INDEXES, value=VALUES)
    def set_item(self, index: int, value: Any) -> None:
        self.on_list(lambda s: s.__setitem__(index, copied(value)))

    @rule(index=INDEXES | SLICES)
    def get_item(self, index: Any) -> None:
        self.on_list(lambda s: s[index])

    @rule(index=INDEXES | SLICES)
    def delete_item(self, index: Any) -> None:
        self.on_list(lambda s: s.__delitem__(index))

    @rule(index=SLICES, values=LISTS)
    def set_slice(self, index: slice, values: list[Any]) -> None:
        self.on_list(lambda s: s.__setitem__(index, copied(values)))

    @rule(index=INDEXES)
    def pop_item(self, index: int) -> None:
        self.on_list(lambda s: s.pop(index))
        self.on_list(lambda s: s.pop())

    @rule(values=LISTS)
    def extend(self, values: list[Any]) -> None:
        self.on_list(lambda s: s.extend(copied(values)))
        self.on_list(lambda s: s + values)
        self.on_list(lambda s: values + s)
        self.on_list(lambda s: [s < values, s <= values, s > values, s >= values])
        self.on_list(lambda s: values < s)

    @rule(value=VALUES, start=INDEXES, stop=INDEXES)
    def find(self, value: Any, start: int, stop: int) -> None:
        self.on_list(lambda s: s.index(value, start, stop))
        self.on_list(lambda s: s.count(value))
        self.on_list(lambda s: value in s)

    @rule(value=VALUES)
    def remove(self, value: Any) -> None:
        self.on_list(lambda s: s.remove(value))

    @rule(times=st.integers(-1, 2))
    def multiply(self, times: int) -> None:
        self.on_list(lambda s: s * times)
        if len(self.other) < 100:
            self.sequence *= times
            self.other[:] = copied(self.other * times) if times > 1 else self.other * times
            self.sequence[:] = copied(self.other)  # else parts of the model are one object

    @rule()
    def turn_round(self) -> None:
        self.on_list(lambda s: s.reverse())
        self.on_list(lambda s: s.sort(key=lambda value: repr(shape(plain(value)))))
        self.on_list(lambda s: [*reversed(s)])

    @rule()
    def clear_list(self) -> None:
        self.on_list(lambda s: s.clear())

    @rule(data=st.data(), value=VALUES)
    def change_inside(self, data: st.DataObject, value: Any) -> None:
        nested = [key for key, found in self.model.items() if isinstance(found, list | dict)]
        if nested:
            key = data.draw(st.sampled_from(nested))
            if isinstance(self.model[key], list):
                self.on_dict(lambda d: d[key].append(copied(value)))
            else:
                self.on_dict(lambda d: d[key].__setitem__("inside", copied(value)))

    @rule()
    def find_again(self) -> None:
        self.mapping = pickle.loads(pickle.dumps(self.mapping))
        self.sequence = self.hand.heap.roots["sequence"]

    @rule()
    def collector_goes_on(self) -> None:
        step = getattr(self.hand.steward, CYCLE[self.at])
        arguments = {"stamp": (1,), "end_cycle": (1 << 40, False, 0)}
        step(*arguments.get(CYCLE[self.at], ()))
        self.at = (self.at + 1) % len(CYCLE)

    @invariant()
    def both_are_the_same(self) -> None:
        assert shape(plain(self.mapping)) == shape(self.model)
        assert shape(plain(self.sequence)) == shape(self.other)
        assert self.mapping == self.model
        assert self.sequence == self.other
        assert (len(self.mapping), len(self.sequence)) == (len(self.model), len(self.other))
        assert self.hand.heap._check() == []

    def teardown(self) -> None:
        while self.at:
            self.collector_goes_on()
        self.hand.heap.roots.clear()
        del self.mapping, self.sequence
        gc.collect()  # what a rule raised
        self.hand.collect()
        self.hand.collect()
        assert self.hand.stats.heap_objects == 0
        self.hand.assert_sound()


def copied(value: Any) -> Any:
    """So that no part of the model is changed from two sides."""
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(copied, value))
    return value


def test_collections_are_like_dict_and_list(heap_name: str) -> None:
    with HeapByHand(heap_name) as hand:
        Collections.hand = hand
        run_state_machine_as_test(
            Collections,
            settings=settings(
                max_examples=EXAMPLES,
                stateful_step_count=30,
                deadline=None,
                suppress_health_check=[*HealthCheck],
            ),
        )
