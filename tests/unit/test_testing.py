from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Iterator

import pytest
from sequenced import child

from shmheap.testing import FakeClock, Sequencer


def test_a_fake_clock_goes_only_when_told_to() -> None:
    clock = FakeClock(start_s=1.5)
    assert clock.monotonic_ns() == clock.monotonic_ns() == 1_500_000_000
    clock.advance(0.25)
    assert clock.monotonic() == 1.75
    with pytest.raises(ValueError, match="does not go back"):
        clock.advance(-1)


@pytest.fixture
def seq() -> Iterator[Sequencer]:
    with Sequencer() as made:
        yield made


def enter_all(seq: Sequencer, steps: list[int], done: list[int]) -> None:
    for step in steps:
        with seq(step):
            done.append(step)


@pytest.mark.parametrize("order", [([0, 1, 2, 3], []), ([1, 3], [0, 2]), ([2], [0, 1, 3])])
def test_threads_enter_in_order(seq: Sequencer, order: tuple[list[int], list[int]]) -> None:
    done: list[int] = []
    other = threading.Thread(target=enter_all, args=(seq, order[0], done))
    other.start()
    enter_all(seq, order[1], done)
    other.join()
    assert done == [0, 1, 2, 3]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_enter_in_order(seq: Sequencer, method: str) -> None:
    context = multiprocessing.get_context(method)
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(seq, [1, 3], send))
    process.start()
    seen = []
    for step in (0, 2, 4):
        with seq(step):
            seen += [receive.recv()] if step else []
    process.join()
    assert seen == [1, 3]
    receive.close()
    send.close()


def die_inside(seq: Sequencer) -> None:
    with seq(0):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_block_that_is_killed_has_been_left(seq: Sequencer) -> None:
    process = multiprocessing.get_context("fork").Process(target=die_inside, args=(seq,))
    process.start()
    with seq(1):
        process.join()
    assert process.exitcode == -signal.SIGKILL


def test_a_block_that_raises_has_been_left(seq: Sequencer) -> None:
    with pytest.raises(ZeroDivisionError), seq(0):
        _ = 1 / 0
    with seq(1):
        pass


def test_a_child_that_a_block_forked_does_not_keep_it(seq: Sequencer) -> None:
    receive, send = os.pipe()
    with seq(0):
        pid = os.fork()
        if pid == 0:
            os.read(receive, 1)  # until the parent has been in the next block
            os._exit(0)
    with seq(1):
        os.write(send, b"x")
    assert os.waitpid(pid, 0)[1] == 0
    os.close(receive)
    os.close(send)


@pytest.mark.parametrize("step", [0, -1])
def test_a_step_is_had_once(seq: Sequencer, step: int) -> None:
    with seq(0):
        pass
    with pytest.raises(ValueError, match=f"step {step} is negative, or was claimed"), seq(step):
        pytest.fail("entered")


def test_a_turn_that_never_comes_is_told() -> None:
    nobody_came = pytest.raises(TimeoutError, match="step 1: no turn")
    with Sequencer(timeout_s=0.01) as seq, nobody_came, seq(1):
        pytest.fail("entered")


def test_closing_ends_who_waits() -> None:
    seq = Sequencer()
    raised: list[BaseException] = []

    def wait_in_vain() -> None:
        with pytest.raises(RuntimeError, match="step 5: the sequencer is closed") as info, seq(5):
            pytest.fail("entered")
        raised.append(info.value)

    waiter = threading.Thread(target=wait_in_vain)
    with seq(0):
        waiter.start()
    seq.close()
    waiter.join()
    assert raised


def test_a_copy_gives_turns_of_the_same_order_and_closing_it_ends_nothing(seq: Sequencer) -> None:
    twin = pickle.loads(pickle.dumps(seq))
    with twin(0):
        pass
    twin.close()
    with seq(1):
        pass


def test_closing_it_in_a_forked_child_ends_nothing(seq: Sequencer) -> None:
    process = multiprocessing.get_context("fork").Process(target=seq.close)
    process.start()
    process.join()
    assert process.exitcode == 0
    with seq(0):
        pass


def test_it_leaves_nothing_behind() -> None:
    before = set(os.listdir("/proc/self/fd"))
    with Sequencer() as seq, seq(0):
        pass
    seq.close()
    assert set(os.listdir("/proc/self/fd")) <= before
