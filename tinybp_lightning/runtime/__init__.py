"""Who plays the schedule? One sub-package per framework, and the framework-free records of what was played."""

__all__: list[str] = []
