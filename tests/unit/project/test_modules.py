"""Does every module keep the house rules that no linter checks? Read from the source, so nothing is imported."""

import ast
import re
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[3]
_PACKAGE = _ROOT / "tinybp_lightning"
_MODULES = sorted(_PACKAGE.rglob("*.py"))
_FORBIDDEN_NAMES = {"common", "helpers", "misc", "util", "utils"}


def _module_id(path: Path) -> str:
    return path.relative_to(_ROOT).as_posix()


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


def test_the_package_is_found() -> None:
    assert _PACKAGE / "errors.py" in _MODULES


@pytest.mark.parametrize("path", _MODULES, ids=_module_id)
def test_all_is_sorted_and_without_repeats(path: Path) -> None:
    names = _declared_all(ast.parse(path.read_text())) or []
    assert names == sorted(set(names), key=_sort_key)


@pytest.mark.parametrize("path", [path for path in _MODULES if not _is_private(path)], ids=_module_id)
def test_all_names_every_public_definition(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert set(_public_definitions(tree)) <= set(_declared_all(tree) or [])


@pytest.mark.parametrize("path", [path for path in _MODULES if path.stat().st_size], ids=_module_id)
def test_module_says_what_it_is_for(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert docstring, f"`{_module_id(path)}` has no docstring: state the question it answers"


@pytest.mark.parametrize("path", _MODULES, ids=_module_id)
def test_module_name_says_more_than_utils(path: Path) -> None:
    assert _FORBIDDEN_NAMES.isdisjoint(path.relative_to(_PACKAGE).with_suffix("").parts)
