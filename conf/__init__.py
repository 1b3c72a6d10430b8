"""Hydra configuration of the recipes, as a package so that a wheel carries it."""
