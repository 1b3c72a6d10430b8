"""What does one target know about plans, over all the shapes it is called with? Who asks gets the nearest plan.

Note [Larger shapes]
    A schedule is legal for any sizes, and the same blocks on smaller tensors need no more memory. So a plan that was
    measured to fit for some shape also fits for a smaller one: it needs neither measuring nor planning, and costs time
    only in that it recomputes as if it were large. Therefore the shapes must be near (`_NEAR`), the cuts the same, and
    the room that of the larger shape; and the first step is traced, because kernels chosen by size may use more scratch
    memory. Such a plan is not written to disk, where a chain is one of its own program. With lengths that come in any
    order about one plan is made for each power of `1 / _NEAR` between the shortest and the longest.
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
_MAX_KNOWN = 64  # plans remembered in this process, the chains' costs included: some 100 KiB each


class Origin(Enum):
    """Where a plan is known from; the value is its reason in reports."""

    MEASURED = "measured"
    CACHED = "cached"
    LARGER = "larger shape"


@dataclass(frozen=True, slots=True)
class CacheEntry:
    """One program in one situation: under which name its plan is noted, and what is known for it.

    `layout` names all programs that differ from this one in sizes only; `sizes_bytes` are those of its storages, and
    `own_bytes` the sum of the ones that the forward makes. `is_on_disk`: what is known is on disk too;
    `is_measured`: it was seen to fit.
    """

    key: Mapping[str, str]
    layout: str
    sizes_bytes: tuple[int, ...]
    own_bytes: int
    origin: Origin
    known: MeasuredPlan | None
    is_on_disk: bool
    is_measured: bool = False


class PlanCache:
    """The plans of one target, in memory and on disk."""

    def __init__(self, config: HCBConfig) -> None:
        self.num_compiled = 0
        self._num_plans: Counter[Origin] = Counter()
        self._pages: OrderedDict[str, CacheEntry] = OrderedDict()
        self._cache = open_cache(config.plan_cache)

    def look_up(self, program: Program, layout: str, key: Mapping[str, str]) -> CacheEntry:
        """Return the page of `program` under `key`: with its own known plan, or that of a larger shape, or none.

        **Arguments:** `layout`: of its `ProgramKey`.
        """
        graph = program.graph
        sizes_bytes = tuple(storage.size_bytes for storage in graph.storages)
        own_bytes = sum(s.size_bytes for s in graph.storages if s.kind is StorageKind.ACTIVATION)
        others = {name: value for name, value in key.items() if name not in ("graph", "code")}
        # A schedule names options by number: programs that offer other numbers of them share none.
        num_options = [len(piece.calls) for piece in program.pieces]
        layout = f"{layout} {num_options} {_name(others)}"
        page = partial(CacheEntry, key, layout, sizes_bytes, own_bytes)
        if (mine := self._pages.get(_name(key))) is not None:
            self._pages.move_to_end(_name(key))
            return page(Origin.CACHED, mine.known, mine.is_on_disk)
        found = None if self._cache is None else self._cache.find(key, partial(check_chain_is_of, program))
        if found is not None:
            return page(Origin.CACHED, found, True)
        empty = page(Origin.MEASURED, None, False)
        # A smaller shape chooses what its options save by itself, and may choose more.
        larger = self._larger(empty) if set(num_options) == {1} else None
        return empty if larger is None else page(Origin.LARGER, larger, False)

    def count(self, origin: Origin) -> None:
        """Count a plan."""
        self._num_plans[origin] += 1

    def record(self, page: CacheEntry, known: MeasuredPlan, is_measured: bool) -> None:
        """Note what a controller has learned for its entry, on disk once it was measured; not another shape's plan."""
        if page.origin is Origin.LARGER:  # See Note [Larger shapes]
            return
        name = _name(page.key)
        last = self._pages.get(name, page)
        is_on_disk = last.is_on_disk and known == last.known
        if is_measured and not is_on_disk and self._cache is not None:
            self._cache.put(page.key, known)
            is_on_disk = True
        self._pages[name] = replace(page, known=known, is_on_disk=is_on_disk, is_measured=is_measured)
        self._pages.move_to_end(name)
        if len(self._pages) > _MAX_KNOWN:
            self._pages.popitem(last=False)

    def counts(self, target: str, *, num_graphs: int, num_live: int, num_evicted: int) -> PlanCounts:
        """Return the counts so far, with those that the target keeps."""
        return PlanCounts(
            target=target,
            num_graphs=num_graphs,
            num_live=num_live,
            num_evicted=num_evicted,
            num_measured=self._num_plans[Origin.MEASURED],
            num_cached=self._num_plans[Origin.CACHED],
            num_larger=self._num_plans[Origin.LARGER],
            num_compiled=self.num_compiled,
        )

    def _larger(self, page: CacheEntry) -> MeasuredPlan | None:
        """Return the plan of the smallest shape that is as large as the page's everywhere, and near."""
        fitting = [other for other in self._pages.values() if other.is_measured and _bounds(other, page)]
        best = min(fitting, key=lambda other: other.own_bytes, default=None)
        return None if best is None else best.known


def _bounds(other: CacheEntry, page: CacheEntry) -> bool:
    """Whether each storage of `other` is as large as that of `page`, and in sum not much larger."""
    return (
        other.layout == page.layout
        and page.own_bytes >= _NEAR * other.own_bytes
        and all(mine <= theirs for mine, theirs in zip(page.sizes_bytes, other.sizes_bytes, strict=True))
    )


def _name(key: Mapping[str, str]) -> str:
    return json.dumps(dict(key), sort_keys=True)
