"""Small real architectures, built from configs, on which every executor is checked. Nothing is downloaded."""

from benchmarks.zoo.architecture import Architecture, Batch, Blocks, Phase, Workload
from benchmarks.zoo.diffusion import DIFFUSION
from benchmarks.zoo.language import LANGUAGE
from benchmarks.zoo.plain import PLAIN
from benchmarks.zoo.vision import VISION

__all__ = ["ZOO", "Architecture", "Batch", "Blocks", "Phase", "Workload", "architecture_named"]

ZOO: tuple[Architecture, ...] = (*LANGUAGE, *VISION, *DIFFUSION, *PLAIN)


def architecture_named(name: str) -> Architecture:
    """Return one architecture of the zoo.

    **Raises:** `ValueError` naming those there are.
    """
    for architecture in ZOO:
        if architecture.name == name:
            return architecture
    raise ValueError(f"`{name}` is not in the zoo: expected one of {', '.join(a.name for a in ZOO)}.")
