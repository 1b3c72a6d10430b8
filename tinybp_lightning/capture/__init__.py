"""How does a user's program become a `Graph`? One sub-package per framework; `torch` uses Dynamo and FX."""

__all__: list[str] = []
