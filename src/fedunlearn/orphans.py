"""A process that does not outlive whoever started it, however that one dies."""

import os
import select
import signal
import threading


def end_with_parent(fd: int) -> None:
    """Ends this process's group when the other end of the pipe or socket `fd` is closed, as it is when the parent dies, however it does."""
    threading.Thread(target=_watch, args=(fd,), daemon=True).start()


def _watch(fd: int) -> None:
    """Who trains, or hangs, does not read the pipe: this thread sees that the other end is gone."""
    poll = select.poll()
    poll.register(fd, 0)  # POLLHUP is told unasked
    poll.poll()
    os.killpg(os.getpid(), signal.SIGKILL)
