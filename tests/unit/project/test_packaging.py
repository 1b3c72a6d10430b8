"""Would an installed copy be complete? Every source and configuration file belongs to a package that is installed."""

import re
import tomllib
from importlib import resources
from pathlib import Path

_ROOT = Path(__file__).parents[3]
_PROJECT = tomllib.loads((_ROOT / "pyproject.toml").read_text())["project"]
_EXTRAS = _PROJECT["optional-dependencies"]


def _requirement_name(requirement: str) -> str:
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert found is not None
    return found.group().lower().replace("_", "-")


def _pinned_names() -> set[str]:
    lines = (_ROOT / "constraints.txt").read_text().splitlines()
    return {_requirement_name(line) for line in lines if line and not line.startswith("#")}


def test_every_source_is_in_a_regular_package() -> None:
    sources = sorted((_ROOT / "tinybp_lightning").rglob("*.py"))
    assert sources
    assert [source for source in sources if not (source.parent / "__init__.py").exists()] == []


def test_every_configuration_is_reachable_as_a_resource() -> None:
    sources = sorted((_ROOT / "conf").rglob("*.yaml"))
    installed = [
        resources.files("tinybp_lightning.conf").joinpath(*source.relative_to(_ROOT / "conf").parts)
        for source in sources
    ]
    assert sources
    assert [s for s, i in zip(sources, installed, strict=True) if i.read_text() != s.read_text()] == []


def test_every_direct_requirement_of_development_is_pinned() -> None:
    wanted = [
        *_PROJECT["dependencies"],
        *_EXTRAS["dev"],
        *_EXTRAS["accelerate"],
        *_EXTRAS["lightning"],
        *_EXTRAS["recipes"],
    ]
    names = {_requirement_name(requirement) for requirement in wanted} - {_PROJECT["name"]}
    assert names - _pinned_names() == set()


def test_development_leaves_torchvision_out() -> None:
    assert not any("torchvision" in requirement for requirement in _EXTRAS["dev"] + _EXTRAS["recipes"])
    assert "tinybp-lightning[vision]" not in " ".join(_EXTRAS["dev"])
