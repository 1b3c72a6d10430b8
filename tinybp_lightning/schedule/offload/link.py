"""When do copies to and from host memory end, and what do they hold on the device until then?

# Note [Two directions of one link]
Copies run beside compute, and each direction of the link moves one boundary after the other. The directions do not
share bandwidth: PCIe and NVLink are full duplex, and pinned copies were measured at the same rate both ways at once.

- `Offload` copies the storages of its boundary that have no host copy yet; another offloaded boundary may share some.
  They are on the device until the copy has ended, and are let go of before the first action after that.
- `Reload` copies those that nothing holds on the device. One that is still on its way out is waited for first, and
  compute waits with it. The bytes are taken at once; the first forward that reads the boundary waits for the end.
- A boundary dropped while its copy is under way is released when the copy has ended.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from tinybp_lightning.errors import ScheduleError
from tinybp_lightning.schedule.arguments import check_link

__all__ = ["Leaving", "Link"]


@dataclass(frozen=True, slots=True)
class Leaving:
    """Storages that the device holds for a copy alone, until it ends."""

    end_s: float
    storages: tuple[int, ...]


class Link:
    """The state of both directions, and of the copies in host memory."""

    def __init__(self, storage_bytes: Sequence[int], bytes_per_s: float | None) -> None:
        if bytes_per_s is not None:
            check_link(bytes_per_s)
        self._storage_bytes = storage_bytes
        self._bytes_per_s = bytes_per_s
        self._out_free_s = self._back_free_s = 0.0
        self._host_references = dict[int, int]()
        self._arrives_s = dict[int, float]()
        self.leaving: list[Leaving] = []

    def offload(self, storages: tuple[int, ...], now_s: float) -> tuple[int, ...]:
        """Begin to copy out what has no host copy, and hold it till then; return what the device need not hold."""
        moved = tuple(s for s in storages if not self._host_references.get(s))
        for storage in storages:
            self._host_references[storage] = self._host_references.get(storage, 0) + 1
        # What is still arriving can leave again only when it is there.
        start_s = max(self._out_free_s, now_s, self.arrival_s(moved))
        self._out_free_s = start_s + self._copy_s(moved)
        self.leaving.append(Leaving(self._out_free_s, moved))
        arriving = tuple(s for s in storages if s not in moved and self._arrives_s.get(s, 0.0) > now_s)
        if arriving:
            self.leaving.append(Leaving(self.arrival_s(arriving), arriving))
        return tuple(s for s in storages if s not in moved and s not in arriving)

    def reload(self, storages: tuple[int, ...], missing: Sequence[int], now_s: float) -> None:
        """Begin to copy `missing` in, and let go of the host's copy of all `storages`."""
        self.forget(storages)
        if missing:
            self._back_free_s = max(self._back_free_s, now_s) + self._copy_s(missing)
            self._arrives_s.update(dict.fromkeys(missing, self._back_free_s))

    def forget(self, storages: tuple[int, ...]) -> None:
        """Let go of an offloaded boundary's host copies."""
        for storage in storages:
            self._host_references[storage] -= 1

    def leaves_s(self, storages: Sequence[int]) -> float:
        """Return when the last of `storages` that is on its way out has left; 0 where none is."""
        return max((one.end_s for one in self.leaving if any(s in storages for s in one.storages)), default=0.0)

    def arrival_s(self, storages: Sequence[int]) -> float:
        """Return when the last of `storages` that was copied in arrives; 0 where none was."""
        if not self._arrives_s:
            return 0.0
        return max((self._arrives_s.get(s, 0.0) for s in storages), default=0.0)

    def take_ended(self, now_s: float) -> list[Leaving]:
        """Return what has left by now, once."""
        ended = [one for one in self.leaving if one.end_s <= now_s]
        self.leaving = [one for one in self.leaving if one.end_s > now_s]
        return ended

    def _copy_s(self, storages: Sequence[int]) -> float:
        if self._bytes_per_s is None:
            raise ScheduleError(
                "`link_bytes_per_s=None` but the schedule offloads: give the measured bandwidth to host memory."
            )
        return sum(self._storage_bytes[s] for s in storages) / self._bytes_per_s
