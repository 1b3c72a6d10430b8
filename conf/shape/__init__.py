"""Hydra group `shape`."""
