"""Compare the ways to train a model in less activation memory: `python -m recipes.compare --help`.

It trains one model in every mode, each in its own process with the same seeds and data, and writes a table and a
picture.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.console import Console
from rich.markdown import Markdown

from recipes.config import CompareConfig, conf_dir, register_schemas, to_compare_config
from recipes.launch import run_modes
from recipes.modes import parse_modes
from recipes.outcome import Finished, Outcome
from recipes.picture import draw_comparison
from recipes.table import markdown_report, naive_of

__all__ = ["compare", "main", "write_report"]

register_schemas()


def compare(config: CompareConfig, folder: Path, *, console: Console) -> tuple[Outcome, ...]:
    """Train in every mode that `config` names, and write the table, the picture and the results to `folder`.

    **Returns:** the outcomes, plain training's first.

    **Raises:** `ConfigError` when `config.mode` names no mode.
    """
    outcomes = run_modes(config, parse_modes(config.mode), folder, console=console)
    write_report(config, outcomes, folder, console=console)
    return outcomes


def write_report(config: CompareConfig, outcomes: Sequence[Outcome], folder: Path, *, console: Console) -> None:
    """Write `table.md` and `compare.png` to `folder`, and show the table."""
    report = markdown_report(config, outcomes)
    (folder / "table.md").write_text(report)
    console.print(Markdown(report) if console.is_terminal else report, soft_wrap=not console.is_terminal)
    if any(isinstance(outcome, Finished) for outcome in outcomes):
        draw_comparison(config, outcomes, folder / "compare.png")
    console.print(f"Written to {folder}", soft_wrap=True)


@hydra.main(config_path=str(conf_dir()), config_name="compare", version_base="1.3")
def main(config: DictConfig) -> None:
    """Run the comparison in the folder that Hydra made for it."""
    console = Console()
    outcomes = compare(to_compare_config(config), Path(HydraConfig.get().runtime.output_dir), console=console)
    if naive_of(outcomes) is None:
        sys.exit(1)


if __name__ == "__main__":
    main()
