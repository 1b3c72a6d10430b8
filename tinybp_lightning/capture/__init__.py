"""How does a user's program become a `Graph`? One sub-package for each framework; `torch` uses Dynamo and FX."""

__all__: list[str] = []
