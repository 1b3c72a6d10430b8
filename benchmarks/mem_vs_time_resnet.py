"""Memory against time for the resnet recipe: `python -m benchmarks.mem_vs_time_resnet --help`."""

from benchmarks.mem_vs_time import make_app
from recipes.config import ModelName

app = make_app(ModelName.resnet)

if __name__ == "__main__":
    app()
