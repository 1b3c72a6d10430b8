"""Which thread may trace allocations now? One at a time: there is one profiler, and one history of an allocator.

A thread that trains takes the turn for a traced step or for measuring its blocks, and does without where another has
it. Turns nest within a thread. One whose thread has ended is free again.
"""

import threading

__all__ = ["TracingLock"]


class TracingLock:
    """A right that one thread holds at a time, any number of times."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner: threading.Thread | None = None
        self._depth = 0

    def take(self) -> bool:
        """Take the turn if no other living thread has it; return whether it is ours."""
        with self._lock:
            me = threading.current_thread()
            if self._owner is not me:
                if self._owner is not None and self._owner.is_alive():
                    return False
                self._owner, self._depth = me, 0
            self._depth += 1
            return True

    def give_back(self) -> None:
        """Undo one `take`. Harmless where the turn has gone to another thread."""
        with self._lock:
            if self._owner is threading.current_thread():
                self._depth -= 1
                if self._depth == 0:
                    self._owner = None
