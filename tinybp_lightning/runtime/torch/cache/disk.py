"""Keep plans on disk for later processes, in a folder with one small file for each key.

If the file or the folder is bad, a warning names the file and the reason, and the program is measured and planned
again. A file is written beside its place and moved there, so a reader sees all of the old one or all of the new one. A
file that another process removes meanwhile counts as missing.
"""

import contextlib
import hashlib
import json
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

from tinybp_lightning.errors import HCBWarning, PlanFileError
from tinybp_lightning.graph.chain import Chain
from tinybp_lightning.schedule.measured import MeasuredPlan
from tinybp_lightning.schedule.serialize import SCHEMA_VERSION, load_measured_plan, save_measured_plan

__all__ = ["MAX_CACHE_BYTES", "DiskCache", "cache_folder", "open_cache"]

MAX_CACHE_BYTES = 64 * 2**20  # a plan for a hundred blocks takes about 100 KiB
_PLAN_FILE = re.compile(r"[0-9a-f]{32}\.json")
_UNFINISHED_FILE = re.compile(r"\.[0-9a-f]{32}\.json\..+")
_UNFINISHED_S = 3600.0  # no write takes this long: a process that died has left an older file


def cache_folder(environ: Mapping[str, str] = os.environ, *, platform: str = sys.platform) -> Path:
    """Return the folder of `plan_cache=True`: `$TINYBP_CACHE`, or `tinybp_lightning` in the user's cache folder."""
    if named := environ.get("TINYBP_CACHE", "").strip():
        return Path(named).expanduser()
    if platform == "darwin":
        caches = "~/Library/Caches"
    elif platform == "win32":
        caches = environ.get("LOCALAPPDATA") or "~/AppData/Local"
    else:
        caches = environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(caches).expanduser() / "tinybp_lightning" / "plans"


def open_cache(wanted: bool | str) -> "DiskCache | None":
    """Return the cache that `HCBConfig.plan_cache` asks for: none for `False`."""
    if wanted is False:
        return None
    try:
        return DiskCache(cache_folder() if wanted is True else Path(wanted).expanduser())
    except RuntimeError as error:
        _warn(
            f"`plan_cache={wanted!r}` names no folder, so plans are not kept on disk: {error} "
            "Set `TINYBP_CACHE` to one, or use `plan_cache=False`."
        )
        return None


class DiskCache:
    """Plans in `folder`, which is made when the first plan is put there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path_of(self, context: Mapping[str, str]) -> Path:
        """Return the file of the plan for `context`, whether or not it exists."""
        key = json.dumps({**context, "schema_version": SCHEMA_VERSION}, sort_keys=True)
        return self.folder / f"{hashlib.blake2b(key.encode(), digest_size=16).hexdigest()}.json"

    def find(self, context: Mapping[str, str], check: Callable[[Chain], None]) -> MeasuredPlan | None:
        """Return the plan for `context`; `None` if there is none or, with a warning, if `check` refuses its chain."""
        path = self.path_of(context)
        try:
            known = load_measured_plan(path, context=context)
            check(known.chain)
        except FileNotFoundError:
            return None
        except (PlanFileError, OSError) as error:
            _warn(f"`{path}` cannot be used, so the program is measured and planned again: {error}")
            return None
        with contextlib.suppress(OSError):  # a folder that cannot be written to can still be read
            os.utime(path)
        return known

    def put(self, context: Mapping[str, str], known: MeasuredPlan) -> None:
        """Write the plan for `context`."""
        path = self.path_of(context)
        try:
            save_measured_plan(path, known, context=context)
            self._remove_oldest()
        except OSError as error:
            _warn(
                f"`{path}` cannot be written, so the next process will measure and plan again: {error}. Set "
                "`TINYBP_CACHE` to a folder that can be written to, or use `plan_cache=False`."
            )

    def _remove_oldest(self) -> None:
        """Remove the least recently used of the files that this class has named, down to `MAX_CACHE_BYTES`."""
        found: list[tuple[float, int, Path]] = []
        for path in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):
                if _PLAN_FILE.fullmatch(path.name):
                    status = path.stat()
                    found.append((status.st_mtime, status.st_size, path))
                elif _UNFINISHED_FILE.fullmatch(path.name) and time.time() - path.stat().st_mtime > _UNFINISHED_S:
                    path.unlink()
        size_bytes = sum(size for _, size, _ in found)
        for _, size, path in sorted(found)[:-1]:  # never the one just used
            if size_bytes <= MAX_CACHE_BYTES:
                return
            path.unlink(missing_ok=True)
            size_bytes -= size


def _warn(message: str) -> None:
    warnings.warn(message, HCBWarning, stacklevel=2)
