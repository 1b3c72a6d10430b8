"""Prove how far a plan can be from the best schedule. Nothing here runs in a training step."""
