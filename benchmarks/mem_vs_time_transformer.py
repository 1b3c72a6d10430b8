"""Memory against time for the transformer recipe: `python -m benchmarks.mem_vs_time_transformer --help`."""

from benchmarks.mem_vs_time import make_app
from recipes.config import ModelName

app = make_app(ModelName.transformer)

if __name__ == "__main__":
    app()
