"""Hydra group `size`."""
