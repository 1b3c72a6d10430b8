"""What the adapters share: registration in Lightning, the strategies' options and steps, and the step log."""
