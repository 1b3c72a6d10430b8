"""Remember the plans of one target, over all the shapes it is called with, and look up the closest one.

Note [Larger shapes]
    A schedule is legal for any sizes, and the same blocks on smaller tensors need no more memory. So a plan that was
    measured to fit for some shape fits for a smaller one too, without measuring or planning; but it recomputes as much
    as the larger shape needs. Therefore the shapes must be near (`_NEAR`), the cuts the same, and the headroom that of
    the larger shape. The first step is traced, because kernels chosen by size may use more scratch memory. Such a plan
    is not written to disk, where every chain belongs to its own program. If lengths come in any order, about one plan
    is made for each power of `1 / _NEAR` between the shortest and the longest.
"""

import json
from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial

from tinybp_lightning.capture.torch.pieces import Program
from tinybp_lightning.config import HCBConfig
from tinybp_lightning.graph.ir import StorageKind
from tinybp_lightning.runtime.profile import PlanCounts
from tinybp_lightning.runtime.torch.cache.disk import open_cache
from tinybp_lightning.runtime.torch.measure.chain_builder import check_chain_is_of
from tinybp_lightning.schedule.measured import MeasuredPlan

__all__ = ["CacheEntry", "Origin", "PlanCache"]

_NEAR = 0.75
_MAX_ENTRIES = 64  # remembered in this process, with their chains' costs: some 100 KiB each


class Origin(Enum):
    """Where a plan comes from; the value is its reason in reports."""

    MEASURED = "measured"
    CACHED = "cached"
    LARGER = "larger shape"


@dataclass(frozen=True, slots=True)
class CacheEntry:
    """One program in one situation, and the plan if one is `known`; `is_measured`: a traced step showed that it fits.

    `layout`: equal for programs that differ only in sizes; `own_bytes`: the sum of the storages that the forward makes.
    """

    key: Mapping[str, str]
    layout: str
    sizes_bytes: tuple[int, ...]
    own_bytes: int
    origin: Origin
    known: MeasuredPlan | None
    is_on_disk: bool
    is_measured: bool = False

    def serves(self, smaller: "CacheEntry") -> bool:
        """Return whether the plan fits `smaller`, none of whose storages may be larger, nor their sum much smaller."""
        return (
            self.is_measured
            and self.layout == smaller.layout
            and smaller.own_bytes >= _NEAR * self.own_bytes
            and all(small <= large for small, large in zip(smaller.sizes_bytes, self.sizes_bytes, strict=True))
        )


class PlanCache:
    """The plans of one target, in memory and on disk."""

    def __init__(self, config: HCBConfig) -> None:
        self.num_compiled = 0
        self.num_plans: Counter[Origin] = Counter()
        self._entries: OrderedDict[str, CacheEntry] = OrderedDict()
        self._disk = open_cache(config.plan_cache)

    def look_up(self, program: Program, layout: str, key: Mapping[str, str]) -> CacheEntry:
        """Return the entry of `program` under `key`: with its own plan, with that of a larger shape, or with none."""
        graph = program.graph
        sizes_bytes = tuple(storage.size_bytes for storage in graph.storages)
        own_bytes = sum(s.size_bytes for s in graph.storages if s.kind is StorageKind.ACTIVATION)
        others = {name: value for name, value in key.items() if name not in ("graph", "code")}
        # A schedule names options by number, so programs with different numbers of options share no plan.
        num_options = [len(piece.calls) for piece in program.pieces]
        layout = f"{layout} {num_options} {_name(others)}"
        entry = partial(CacheEntry, key, layout, sizes_bytes, own_bytes)
        if (mine := self._entries.get(_name(key))) is not None:
            self._entries.move_to_end(_name(key))
            return entry(Origin.CACHED, mine.known, mine.is_on_disk)
        if self._disk is not None and (found := self._disk.find(key, partial(check_chain_is_of, program))) is not None:
            return entry(Origin.CACHED, found, True)
        empty = entry(Origin.MEASURED, None, False)
        # With several options a smaller shape chooses by itself what they save, and may choose more.
        larger = [e for e in self._entries.values() if e.serves(empty)] if set(num_options) == {1} else []
        closest = min(larger, key=lambda e: e.own_bytes, default=None)  # See Note [Larger shapes]
        return empty if closest is None or closest.known is None else entry(Origin.LARGER, closest.known, False)

    def record(self, entry: CacheEntry, known: MeasuredPlan, is_measured: bool) -> None:
        """Record what a controller has learned for its entry; on disk once it is measured."""
        if entry.origin is Origin.LARGER:  # See Note [Larger shapes]
            return
        name = _name(entry.key)
        last = self._entries.get(name, entry)
        is_on_disk = last.is_on_disk and known == last.known
        if is_measured and not is_on_disk and self._disk is not None:
            self._disk.put(entry.key, known)
            is_on_disk = True
        self._entries[name] = replace(entry, known=known, is_on_disk=is_on_disk, is_measured=is_measured)
        self._entries.move_to_end(name)
        if len(self._entries) > _MAX_ENTRIES:
            self._entries.popitem(last=False)

    def counts(self, target: str, *, num_graphs: int, num_live: int, num_evicted: int) -> PlanCounts:
        """Return the counts so far, with those that the target keeps."""
        return PlanCounts(
            target=target,
            num_graphs=num_graphs,
            num_live=num_live,
            num_evicted=num_evicted,
            num_measured=self.num_plans[Origin.MEASURED],
            num_cached=self.num_plans[Origin.CACHED],
            num_larger=self.num_plans[Origin.LARGER],
            num_compiled=self.num_compiled,
        )


def _name(key: Mapping[str, str]) -> str:
    return json.dumps(dict(key), sort_keys=True)
