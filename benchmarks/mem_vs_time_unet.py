"""Memory against time for the unet recipe: `python -m benchmarks.mem_vs_time_unet --help`."""

from benchmarks.mem_vs_time import make_app
from recipes.config import ModelName

app = make_app(ModelName.unet)

if __name__ == "__main__":
    app()
