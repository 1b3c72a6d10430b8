"""Which recipes does a benchmark train? The options that benchmarks of recipes share."""

from typing import Annotated

import typer

from recipes.config import ModelName

__all__ = ["Models", "Size"]

Models = Annotated[list[ModelName] | None, typer.Option(help="Recipe to train; repeat it. All when left out.")]
Size = Annotated[str, typer.Option(help="The recipes' size: tiny or small.")]
