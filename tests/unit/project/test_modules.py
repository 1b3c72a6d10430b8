"""Does every module keep the house rules that no linter checks? Read from the source, so nothing is imported.

One test reads all modules for one rule, and its failure lists what breaks it.
"""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[3]
_PACKAGE = _ROOT / "tinybp_lightning"
_MODULES = sorted(_PACKAGE.rglob("*.py"))
_FORBIDDEN_NAMES = {"common", "helpers", "misc", "util", "utils"}
_MOST_LINES = 17_000
_MOST_SCHEDULE_MODULES = 25


def _module_id(path: Path) -> str:
    return path.relative_to(_ROOT).as_posix()


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def _declared_all(tree: ast.Module) -> list[str] | None:
    """Return the names in `__all__`, or `None` where the module declares none."""
    for statement in tree.body:
        match statement:
            case ast.Assign(targets=[ast.Name(id="__all__")], value=value):
                return ast.literal_eval(value)
            case ast.AnnAssign(target=ast.Name(id="__all__"), value=ast.expr() as value):
                return ast.literal_eval(value)
            case _:
                pass
    return None


def _public_definitions(tree: ast.Module) -> list[str]:
    """Return the classes and functions without a leading underscore that the module itself defines."""
    kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return [node.name for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")]


def _sort_key(name: str) -> tuple[int, list[tuple[int, int, str]]]:
    """Order as ruff's RUF022 does: constants, classes, the rest; digits by value."""
    if name.isupper() and len(name) > 1:
        group = 0
    elif name[:1].isupper():
        group = 1
    else:
        group = 2
    pieces = re.split(r"(\d+)", name)
    return group, [(1, int(piece), "") if piece.isdigit() else (0, 0, piece) for piece in pieces]


def _is_private(path: Path) -> bool:
    parts = path.relative_to(_PACKAGE).with_suffix("").parts
    return any(part.startswith("_") and part != "__init__" for part in parts)


def _action_names() -> frozenset[str]:
    """Return the names of the classes that `schedule.actions` joins in its union `Action`."""
    for statement in _tree(_PACKAGE / "schedule" / "actions.py").body:
        match statement:
            case ast.Assign(targets=[ast.Name(id="Action")], value=union):
                return frozenset(node.id for node in ast.walk(union) if isinstance(node, ast.Name))
            case _:
                pass
    raise AssertionError("`schedule.actions` declares no `Action`")


def _patterns(pattern: ast.pattern) -> Iterator[str]:
    """Yield the names of the classes that a case asks for."""
    for node in ast.walk(pattern):
        match node:
            case ast.MatchClass(cls=ast.Name(id=name) | ast.Attribute(attr=name)):
                yield name
            case _:
                pass


def _open_matches(tree: ast.Module, actions: frozenset[str]) -> list[int]:
    """Return the lines of each `match` over actions whose last case is not `assert_never`."""
    lines: list[int] = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Match):
            continue
        if actions.isdisjoint(name for case in node.cases for name in _patterns(case.pattern)):
            continue
        match node.cases[-1]:
            case ast.match_case(
                pattern=ast.MatchAs(pattern=None),
                guard=None,
                body=[ast.Expr(value=ast.Call(func=ast.Name(id="assert_never")))],
            ):
                pass
            case _:
                lines.append(node.lineno)
    return lines


def test_the_package_is_found() -> None:
    assert _PACKAGE / "errors.py" in _MODULES


def test_all_is_sorted_and_without_repeats() -> None:
    declared = {_module_id(path): _declared_all(_tree(path)) or [] for path in _MODULES}
    assert {path: names for path, names in declared.items() if names != sorted(set(names), key=_sort_key)} == {}


def test_all_names_every_public_definition() -> None:
    missing = {
        _module_id(path): sorted(set(_public_definitions(_tree(path))) - set(_declared_all(_tree(path)) or []))
        for path in _MODULES
        if not _is_private(path)
    }
    assert {path: names for path, names in missing.items() if names} == {}


def test_every_module_says_what_it_is_for() -> None:
    silent = [_module_id(path) for path in _MODULES if path.stat().st_size and not ast.get_docstring(_tree(path))]
    assert silent == [], "they have no docstring: state the question each one answers"


def test_module_names_say_more_than_utils() -> None:
    named = {_module_id(path): path.relative_to(_PACKAGE).with_suffix("").parts for path in _MODULES}
    assert [path for path, parts in named.items() if not _FORBIDDEN_NAMES.isdisjoint(parts)] == []


def test_no_module_has_the_name_of_a_public_function_in_it() -> None:
    """`from package import name` would be the one or the other, by what was imported before."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    shadowed = [
        _module_id(path)
        for path in _MODULES
        if any(isinstance(node, functions) and node.name == path.stem for node in _tree(path).body)
    ]
    assert shadowed == []


def test_every_match_over_actions_ends_in_assert_never() -> None:
    """What an interpreter does not know must not pass it by."""
    found = {_module_id(path): _open_matches(_tree(path), _action_names()) for path in _MODULES}
    assert {path: lines for path, lines in found.items() if lines} == {}


def _closed(*cases: str) -> ast.Module:
    return ast.parse("match action:\n" + "".join(f"    case {case}\n" for case in cases))


@pytest.mark.parametrize(
    ("cases", "lines"),
    [
        (("Store(b): f(b)", "_: assert_never(action)"), []),
        (("Store() | Drop(): pass", "other: assert_never(other)"), []),
        (("actions.Store(b): f(b)", "_: pass"), [1]),
        (("Move(action=Drop()): pass",), [1]),
        (("Store(): pass", "_ if late: assert_never(action)"), [1]),
        (("Other(): pass", "_: pass"), []),
    ],
)
def test_a_match_that_lets_actions_pass_is_seen(cases: tuple[str, ...], lines: list[int]) -> None:
    assert {"Store", "Drop", "Backward"} <= _action_names()
    assert _open_matches(_closed(*cases), _action_names()) == lines


def test_the_package_fits_in_a_head() -> None:
    num_lines = sum(path.read_text().count("\n") for path in _MODULES)
    num_planning = len([path for path in (_PACKAGE / "schedule").rglob("*.py") if path.name != "__init__.py"])
    assert num_lines <= _MOST_LINES
    assert num_planning <= _MOST_SCHEDULE_MODULES
