"""Write tables as Markdown."""

from collections.abc import Iterable, Sequence

__all__ = ["markdown_rows"]


def markdown_rows(header: Sequence[str], alignment: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table as lines of Markdown, without a line break at the end.

    **Arguments:** `alignment`: of each column, `---`, `---:` or `:---:`. Cells must have their `|` escaped.
    """
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, alignment, *rows))
