"""Declare the command-line options that benchmarks of recipes share."""

from typing import Annotated

import typer

from recipes.config import ModelName

__all__ = ["Models", "Size"]

Models = Annotated[list[ModelName] | None, typer.Option(help="Recipe to train; repeatable. Default: all recipes.")]
Size = Annotated[str, typer.Option(help="Size of the recipes: tiny or small.")]
