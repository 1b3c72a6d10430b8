"""What surrounds an op, beside its arguments? Settings and generators: a replay must find them as the first run did.

A *setting* (autocast, the attention backends, the default dtype …) is put in place for a replay and taken back after
it. A *generator* advances as it is used; it is set to where the first run found it, and afterwards to where it was. All
of them stand in one registry, to which `register_ambient` adds the user's own.

Private API: `torch._C._get_fp32_precision_getter` and its setter, `_get_sdp_priority_order`, `_get_onednn_allow_tf32`,
`torch._C._get_*` of cuDNN, oneDNN and cuBLAS (torch 2.11 to 2.14).
"""

# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false, reportUnknownVariableType=false, reportUnknownMemberType=false
# Most settings have no public getter that does not warn.

import contextlib
import random
import sys
from collections.abc import Callable, Generator, Hashable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, cast

import torch
from torch.utils import deterministic
from torch.utils._device import DeviceContext

from tinybp_lightning.capture.torch.private import order_attention_backends
from tinybp_lightning.errors import ConfigError

__all__ = [
    "AmbientState",
    "RandomState",
    "Settings",
    "changed_settings",
    "closing_regions",
    "generators_in",
    "has_generators_of_users",
    "keeping_casts",
    "random_state_now",
    "register_ambient",
    "set_random_state",
    "settings_as",
    "settings_now",
    "switch_settings",
]

Settings = tuple[tuple[str, Hashable], ...]
"""Every setting's name and value, in the order of the registry."""


@dataclass(frozen=True, slots=True)
class AmbientState:
    """One thing that surrounds an op: `capture` returns its value now, `restore` puts a captured value in place.

    The value of a setting is hashable and does not change; that of a generator is compared by `==` or `torch.equal`.
    """

    name: str
    capture: Callable[[], Any]
    restore: Callable[[Any], None]


def register_ambient(
    name: str, capture: Callable[[], Any], restore: Callable[[Any], None], *, advances: bool = False
) -> Callable[[], None]:
    """Have replays find something of your own as the first run did: a backend switch, a generator of a library.

    **Arguments:** `capture()`: returns its value now (of a setting: hashable); `restore(value)`: puts a value in place;
    `advances`: it is a generator, which moves as it is used.

    **Returns:** a function that takes the entry out again. **Raises:** `ConfigError` for wrong types or a name in use.
    """
    if not isinstance(cast("Any", name), str) or not name:
        raise ConfigError(f"`name={name!r}` has type {type(name).__name__}: expected a name, such as 'my backend'.")
    for argument, value in (("capture", capture), ("restore", restore)):
        if not callable(value):
            raise ConfigError(f"`{argument}={value!r}` has type {type(value).__name__}: expected a function.")
    if name in _settings or name in _generators:
        raise ConfigError(f"`name={name!r}` is in use. Choose another.")
    if not advances:
        try:
            hash(capture())
        except TypeError as error:
            raise ConfigError(
                f"`capture={capture!r}` has type {type(capture).__name__}, and must return a value that can be hashed "
                f"({error}). Return a tuple, or pass `advances=True` for a generator."
            ) from error
    registry = _generators if advances else _settings
    registry[name] = AmbientState(name, capture, restore)
    return lambda: registry.pop(name, None) and None


# Settings


def settings_now() -> Settings:
    """Return every setting as it is now."""
    return tuple([(name, state.capture()) for name, state in _settings.items()])


def changed_settings(before: Settings, after: Settings) -> dict[str, Hashable]:
    """Return the settings of `after` that differ from those of `before`."""
    return {name: value for (name, value), old in zip(after, before, strict=True) if value != old[1]}


def switch_settings(base: Settings, changed: Mapping[str, Hashable]) -> None:
    """Put `base` in place, with the settings in `changed` as they are there."""
    for name, value in base:
        wanted = changed.get(name, value)
        state = _settings.get(name)
        if state is not None and state.capture() != wanted:
            state.restore(wanted)


@contextlib.contextmanager
def settings_as(settings: Settings) -> Generator[None]:
    """Run the body under `settings`; whatever it leaves behind is taken back."""
    before = settings_now()
    try:
        if before != settings:
            switch_settings(settings, {})
        yield
    finally:
        if settings_now() != before:
            switch_settings(before, {})


@contextlib.contextmanager
def closing_regions() -> Generator[None]:
    """Leave every region that the body entered and that an exception kept it from leaving.

    A traced block enters and leaves a region by two plain calls, and a replay that stops early never reaches the
    second. With autocast left open, later steps would use this step's cached weights.
    """
    before, grad_mode, nesting = settings_now(), torch.is_grad_enabled(), _autocast_nesting()
    try:
        yield
    finally:
        torch.set_grad_enabled(grad_mode)
        _leave_autocast(nesting)
        if settings_now() != before:
            switch_settings(before, {})


@contextlib.contextmanager
def keeping_casts() -> Generator[None]:
    """Let autocast keep its copies of weights while the body runs, as a region around it would."""
    nesting = _autocast_nesting()
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        _leave_autocast(nesting)


def _leave_autocast(nesting: int) -> None:
    if _autocast_nesting() > nesting:
        while torch.autocast_decrement_nesting() > nesting:
            pass
        if nesting == 0:
            torch.clear_autocast_cache()


def _autocast_nesting() -> int:
    # In one line: an interrupt between two lines would leave the region open that is entered only to be counted.
    return (torch.autocast_increment_nesting(), torch.autocast_decrement_nesting())[1]


_AUTOCAST_DEVICES = ("cpu", "cuda")
_C: Any = torch._C
_filling: Any = deterministic


def _autocast() -> Hashable:
    kinds = [(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in _AUTOCAST_DEVICES]
    return (torch.is_autocast_cache_enabled(), *kinds)


def _set_autocast(value: Any) -> None:
    cache, *kinds = value
    torch.set_autocast_cache_enabled(cache)
    for kind, (enabled, dtype) in zip(_AUTOCAST_DEVICES, kinds, strict=True):
        torch.set_autocast_enabled(kind, enabled)
        torch.set_autocast_dtype(kind, dtype)


_SDP = [
    (getattr(_C, f"_get_{kind}_sdp_enabled"), getattr(_C, f"_set_sdp_use_{kind}"))
    for kind in ("flash", "mem_efficient", "math", "cudnn", "overrideable")
    if hasattr(_C, f"_get_{kind}_sdp_enabled")
]


def _attention() -> Hashable:
    if torch.cuda.is_initialized():
        order_attention_backends()  # or the first run would change the order that it was found with
    return (tuple(_C._get_sdp_priority_order()), *[get() for get, _ in _SDP])


def _set_attention(value: Any) -> None:
    order, *enabled = value
    _C._set_sdp_priority_order(list(order))
    for (_, put), is_enabled in zip(_SDP, enabled, strict=True):
        put(is_enabled)


# (getter, setter) of what selects kernels. The public attributes warn when old and new spellings are mixed.
_KERNELS = [
    (getattr(_C, getter), getattr(_C, getter.replace("_get_", "_set_", 1)))
    for getter in (
        "_get_mkldnn_enabled",
        "_get_mkldnn_deterministic",
        "_get_cudnn_enabled",
        "_get_cudnn_benchmark",
        "_get_cudnn_deterministic",
        "_get_cublas_allow_fp16_accumulation",
        "_get_cublas_allow_fp16_reduced_precision_reduction",
        "_get_cublas_allow_bf16_reduced_precision_reduction",
    )
    if hasattr(_C, getter)
]


def _kernels() -> Hashable:
    return tuple([get() for get, _ in _KERNELS])


def _set_kernels(value: Any) -> None:
    for (_, put), wanted in zip(_KERNELS, value, strict=True):
        put(*(wanted if isinstance(wanted, tuple) else (wanted,)))


# What the narrower ones say unless it is set follows from the wider ones, which come first.
_PRECISIONS = [
    (partial(_C._get_fp32_precision_getter, backend, op), partial(_C._set_fp32_precision_setter, backend, op))
    for backend, op in (
        ("generic", "all"),
        *((backend, op) for backend in ("cuda", "mkldnn") for op in ("all", "matmul", "conv", "rnn")),
    )
]


def _precision() -> Hashable:
    try:
        matmul = torch.get_float32_matmul_precision()
    except RuntimeError:  # the user has set it by the newer attributes alone, and torch refuses to say
        matmul = None
    return (matmul, *[get() for get, _ in _PRECISIONS])


def _set_precision(value: Any) -> None:
    matmul, *precisions = value
    if matmul is not None:
        torch.set_float32_matmul_precision(matmul)
    for (get, put), wanted in zip(_PRECISIONS, precisions, strict=True):
        if get() != wanted:
            put(wanted)


def _deterministic() -> Hashable:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        _filling.fill_uninitialized_memory,
    )


def _set_deterministic(value: Any) -> None:
    enabled, warns, fills = value
    torch.use_deterministic_algorithms(enabled, warn_only=warns)
    _filling.fill_uninitialized_memory = fills


def _default_device() -> Hashable:
    if not _C._len_torch_function_stack():
        return None
    modes = torch.overrides._get_current_function_mode_stack()
    devices = [mode.device for mode in modes if isinstance(mode, DeviceContext)]
    return devices[-1] if devices else None


_settings: dict[str, AmbientState] = {
    state.name: state
    for state in (
        AmbientState("autocast", _autocast, _set_autocast),
        AmbientState("attention backends", _attention, _set_attention),
        AmbientState("float32 precision", _precision, _set_precision),
        AmbientState("kernels", _kernels, _set_kernels),
        AmbientState("deterministic algorithms", _deterministic, _set_deterministic),
        AmbientState("default dtype", torch.get_default_dtype, torch.set_default_dtype),
        AmbientState("default device", _default_device, torch.set_default_device),
    )
}


# Generators


@dataclass(frozen=True, slots=True)
class RandomState:
    """Where generators stand."""

    states: tuple[tuple[AmbientState, Any], ...]

    def moved(self, later: "RandomState") -> "RandomState":
        """Return where those generators stand that stand elsewhere in `later`, which has the same generators."""
        pairs = zip(self.states, later.states, strict=True)
        return RandomState(tuple(mine for mine, (_, value) in pairs if not _is_same(mine[1], value)))

    @property
    def size_bytes(self) -> int:
        """The memory that the states of torch's generators take, which is the host's."""
        return sum(value.nbytes for _, value in self.states if isinstance(value, torch.Tensor))


def _is_same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        mine, theirs = cast("dict[Any, Any]", a), cast("dict[Any, Any]", b)
        return mine.keys() == theirs.keys() and all(_is_same(mine[k], theirs[k]) for k in mine)
    if isinstance(a, tuple):
        return all(_is_same(x, y) for x, y in zip(cast("tuple[Any, ...]", a), cast("tuple[Any, ...]", b), strict=True))
    return bool(a.tobytes() == b.tobytes()) if hasattr(a, "tobytes") else bool(a == b)


def random_state_now(devices: Iterable[torch.device], owned: Iterable[AmbientState] | None = None) -> RandomState:
    """Return where the generators of the CPU, of the CUDA devices among `devices` and of users' entries stand.

    **Arguments:** `owned`: for Python code, which may also draw from Python's and NumPy's generators, and from these.
    """
    found = [_CPU, *(_cuda(index) for index in sorted({d.index for d in devices if d.type == "cuda"}))]
    found += _generators.values()
    if owned is not None:
        found += [_PYTHON, *([_NUMPY] if "numpy" in sys.modules else []), *owned]
    return RandomState(tuple([(state, state.capture()) for state in found]))


def set_random_state(random_state: RandomState) -> None:
    """Restore generators to where they stood."""
    for state, value in random_state.states:
        state.restore(value)


def generators_in(values: Iterable[Any]) -> list[AmbientState]:
    """Return those of `values`, and of the containers among them, that are generators of torch, Python or NumPy."""
    found: dict[int, AmbientState] = {}
    for value in values:
        items: Iterable[Any] = (value,)
        if isinstance(value, (list, tuple, dict)):
            held = cast("Any", value)
            items = held.values() if isinstance(value, dict) else held
        for item in items:
            if id(item) not in found and (state := _generator(item)) is not None:
                found[id(item)] = state
    return list(found.values())


def has_generators_of_users() -> bool:
    """Return whether the user has registered generators: any op may draw from them."""
    return bool(_generators)


def _generator(value: Any) -> AmbientState | None:
    if isinstance(value, torch.Generator):
        return AmbientState("generator", value.get_state, lambda state: value.set_state(state) and None)
    if isinstance(value, random.Random):
        return AmbientState("generator", value.getstate, value.setstate)
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.random.RandomState):
        return AmbientState("generator", value.get_state, value.set_state)
    if numpy is not None and isinstance(value, numpy.random.Generator):
        bits = value.bit_generator
        return AmbientState("generator", lambda: bits.state, lambda state: setattr(bits, "state", state))
    return None


def _numpy_random() -> Any:
    return sys.modules["numpy"].random  # a program that has not imported it does not draw from it


@cache
def _cuda(index: int) -> AmbientState:
    return AmbientState(
        f"generator of cuda:{index}",
        partial(torch.cuda.get_rng_state, index),
        lambda value: torch.cuda.set_rng_state(value, index),
    )


_CPU = AmbientState("generator of the CPU", torch.get_rng_state, torch.set_rng_state)
_PYTHON = AmbientState("random", random.getstate, random.setstate)
_NUMPY = AmbientState("numpy.random", lambda: _numpy_random().get_state(), lambda s: _numpy_random().set_state(s))
_generators: dict[str, AmbientState] = {}
