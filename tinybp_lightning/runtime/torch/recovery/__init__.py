"""Run a step again, with nothing lost, when it has run out of device memory."""
