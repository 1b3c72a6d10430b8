"""Compare README and docs with the code (names, fields, errors, make targets), and their words with the glossary."""

import ast
import dataclasses
import importlib
import inspect
import re
import tomllib
from pathlib import Path

import pytest

import tinybp_lightning as tbp
from tinybp_lightning import errors

_ROOT = Path(__file__).parents[3]
_README = _ROOT / "README.md"
_PAGES = sorted([_README, *(_ROOT / "docs").rglob("*.md")])
_MOST_TERMS = 25
# Words that gave way to the field's own, as regular expressions on whole words. `docs/theory.md` has the words to use.
_RETIRED = (
    "pilots?",
    "flights?",
    "fl(?:y|ies|ew|own|ying)",
    "lessons?",
    "prob(?:e|es|ed|ing)",
    "clocks?",
    "rooms?",
    "plan books?",
    "known plans?",
    "replay scripts?",
    "replay segments?",
    "spare ops?",
    "keepers?",
    "rescu(?:e|es|ed|ing|ed_blocks)",
    "rewinders?",
    "(?:its|in|the) turns?",
    "interval trees?",
    "helpers?",
    "held sets?",
    "standing bytes",
    "slot sizes?",
    "slots (?:left|of memory)",
    "(?:priced|capped|quick) bounds?",
    "(?:slim|merged) chains?",
    "thrifty",
    "tight(?:er|est|en|ens|ened|ening|ly)?",
    "weav(?:e|es|ing)",
    "unfold(?:s|ed|ing)?",
    "workspaces?",
    "(?<!inner )(?<!outer )products?",
    "externals?",
    "boundary lea(?:f|ves)",
)
_RETIRED_WORD = re.compile(rf"\b(?:{'|'.join(_RETIRED)})\b", re.IGNORECASE)
_PYTHON_SNIPPET = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
_PAGES_WITH_PYTHON = [page for page in _PAGES if _PYTHON_SNIPPET.search(page.read_text())]


def _page_id(path: Path) -> str:
    return path.relative_to(_ROOT).as_posix()


def _names_used(page: Path) -> set[str]:
    """Return every `tbp.NAME` in the page, in snippets and in text."""
    return set(re.findall(r"\btbp\.([A-Za-z_]\w*)", page.read_text()))


def _keywords_used(page: Path, *, function: str) -> set[str]:
    """Return the keyword arguments that the page's Python snippets pass to `tbp.function`."""
    keywords: set[str] = set()
    for snippet in _PYTHON_SNIPPET.findall(page.read_text()):
        for node in ast.walk(ast.parse(snippet)):
            match node:
                case ast.Call(func=ast.Attribute(value=ast.Name(id="tbp"), attr=name)) if name == function:
                    keywords |= {keyword.arg for keyword in node.keywords if keyword.arg is not None}
                case _:
                    pass
    return keywords


def test_readme_shows_the_front_door() -> None:
    assert {"BudgetTooSmallError", "HCBStrategy", "explain", "hcb", "restore"} <= _names_used(_README)


@pytest.mark.parametrize("page", _PAGES, ids=_page_id)
def test_names_in_pages_are_public(page: Path) -> None:
    assert _names_used(page) <= set(tbp.__all__)


def test_every_public_name_can_be_had_and_is_in_the_reference() -> None:
    reference = (_ROOT / "docs" / "api_reference.md").read_text()
    missing = [name for name in tbp.__all__ if not hasattr(tbp, name)]
    undocumented = [name for name in tbp.__all__ if not re.search(rf"\b{re.escape(name)}\b", reference)]
    assert (missing, undocumented) == ([], [])


@pytest.mark.parametrize("page", _PAGES_WITH_PYTHON, ids=_page_id)
@pytest.mark.parametrize("function", ["HCBConfig", "HCBStrategy", "hcb"])
def test_options_in_snippets_exist(page: Path, function: str) -> None:
    config_fields = {field.name for field in dataclasses.fields(tbp.HCBConfig)}
    accepted = {
        "HCBConfig": config_fields,
        "HCBStrategy": config_fields | set(inspect.signature(tbp.HCBStrategy.__init__).parameters),
        "hcb": set(inspect.signature(tbp.hcb).parameters),
    }
    assert _keywords_used(page, function=function) <= accepted[function]


@pytest.mark.parametrize("page", _PAGES_WITH_PYTHON, ids=_page_id)
def test_snippets_are_python(page: Path) -> None:
    compile("\n".join(_PYTHON_SNIPPET.findall(page.read_text())), page.name, "exec")


def test_reference_lists_every_error() -> None:
    reference = (_ROOT / "docs" / "api_reference.md").read_text()
    assert [name for name in errors.__all__ if f"`{name}`" not in reference] == []


def test_reference_lists_the_options() -> None:
    reference = (_ROOT / "docs" / "api_reference.md").read_text()
    fields = [field.name for field in dataclasses.fields(tbp.HCBConfig)]
    assert [name for name in fields if f"| `{name}` |" not in reference] == []


def test_reference_lists_the_fields_of_a_step_profile() -> None:
    profile = importlib.import_module("tinybp_lightning.runtime.profile")
    reference = (_ROOT / "docs" / "api_reference.md").read_text()
    fields = [field.name for field in dataclasses.fields(profile.StepProfile)]
    assert [name for name in fields if f"`{name}`" not in reference] == []


def test_make_targets_in_pages_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (_ROOT / "Makefile").read_text(), re.MULTILINE))
    pages = [*_PAGES, _ROOT / "CONTRIBUTING.md"]
    named = {
        target for page in pages for target in re.findall(r"(?:`|^ +)make ([a-z-]+)", page.read_text(), re.MULTILINE)
    }
    assert {"demo", "test"} <= named <= targets


def test_extras_in_readme_are_those_of_the_package() -> None:
    project = tomllib.loads((_ROOT / "pyproject.toml").read_text())["project"]
    line = next(line for line in _README.read_text().splitlines() if "Extras:" in line)
    assert set(re.findall(r"`(\w+)`", line)) == set(project["optional-dependencies"])


def _terms() -> list[str]:
    """Return the terms that `docs/theory.md` defines, in order."""
    theory = (_ROOT / "docs" / "theory.md").read_text()
    return re.findall(r"^\*\*(.+)\*\*\n:   ", theory, re.MULTILINE)


def test_theory_defines_few_terms_each_once() -> None:
    terms = _terms()
    definitions = (_ROOT / "docs" / "theory.md").read_text().count("\n:   ")
    assert {"Boundary", "Persistent schedule", "Lower bound"} <= set(terms)
    assert len(terms) == len(set(terms)) == definitions <= _MOST_TERMS


@pytest.mark.parametrize("page", _PAGES, ids=_page_id)
def test_pages_use_no_retired_word(page: Path) -> None:
    assert [found.group() for found in _RETIRED_WORD.finditer(page.read_text())] == []


@pytest.mark.parametrize(
    "sentence",
    [
        "The plan is flown.",
        "a rescued block",
        "`rescued_blocks`",
        "The slim chain",
        "there is room for it",
        "Helpers pay",
    ],
)
def test_a_retired_word_would_be_found(sentence: str) -> None:
    assert _RETIRED_WORD.search(sentence)


@pytest.mark.parametrize(
    "sentence", ["The runtime replays it.", "an inner product", "The headroom", "a second keeps it"]
)
def test_a_standard_word_passes(sentence: str) -> None:
    assert _RETIRED_WORD.search(sentence) is None


def test_proofs_that_modules_cite_exist() -> None:
    proofs = set(re.findall(r"^### (P\d+)\. ", (_ROOT / "docs" / "proofs.md").read_text(), re.MULTILINE))
    texts = [path.read_text() for path in (_ROOT / "tinybp_lightning").rglob("*.py")]
    cited = {
        number
        for text in texts
        for found in re.findall(r"\bproofs? (P\w+(?: to P\w+)?)", text)
        for number in found.split(" to ")
    }
    assert cited
    assert cited - proofs == set()
