"""Set the user's dispatch modes aside while a forward is traced and planned; the step itself runs in them.

A `TorchDispatchMode` sees every operator: `FlopCounterMode` counts, others log or check. Dynamo traces nothing while
one is active (from torch 2.13 it runs the forward and then raises), and the user's counter should not count profiling
runs. So the modes are taken off their stack first and put back around the step's own operators. Torch's own modes (fake
tensors, proxies) stay in place.

Private API: `torch.utils._python_dispatch` (torch 2.11 to 2.14).
"""

# pyright: reportPrivateUsage=false

import contextlib
import threading
from collections.abc import Generator

from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _get_current_dispatch_mode_stack,
    _pop_mode,
    _push_mode,
)

__all__ = ["modes_back", "modes_set_aside"]


class _Aside(threading.local):
    """The modes that this thread has set aside; the last one acts first."""

    modes: tuple[TorchDispatchMode, ...] = ()


_aside = _Aside()


@contextlib.contextmanager
def modes_set_aside() -> Generator[None]:
    """Take the user's dispatch modes off their stack."""
    before = _aside.modes
    modes = tuple(m for m in _get_current_dispatch_mode_stack() if not m.is_infra_mode())
    for _ in modes:
        _pop_mode()
    _aside.modes = modes
    try:
        yield
    finally:
        _aside.modes = before
        for mode in modes:
            _push_mode(mode)


@contextlib.contextmanager
def modes_back() -> Generator[None]:
    """Put the modes that `modes_set_aside` took back in place while the body runs."""
    modes, _aside.modes = _aside.modes, ()
    for mode in modes:
        _push_mode(mode)
    try:
        yield
    finally:
        for _ in modes:
            _pop_mode()
        _aside.modes = modes
