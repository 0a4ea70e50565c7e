"""A deadline that acts from another thread: once, and never after its block."""

import math
import threading
import time

import pytest

from fedunlearn.federation.watchdog import watchdog


def test_it_bites_once_while_the_block_goes_on():
    bitten = threading.Semaphore(0)
    with watchdog(0.01, bitten.release):
        assert bitten.acquire(timeout=10)
        time.sleep(0.05)
    assert not bitten.acquire(blocking=False)


@pytest.mark.parametrize("seconds", [0.05, 1e12, math.inf])
def test_it_does_nothing_once_the_block_is_left_in_time(seconds):
    bitten = threading.Event()
    with pytest.raises(ValueError, match="left"), watchdog(seconds, bitten.set):
        raise ValueError("left")
    time.sleep(0.1)
    assert not bitten.is_set()
    assert not [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]


def test_a_block_is_not_left_while_it_bites():
    begun, done = threading.Event(), threading.Event()

    def bite():
        begun.set()
        time.sleep(0.1)
        done.set()

    with watchdog(0.01, bite):
        assert begun.wait(10)
    assert done.is_set()
