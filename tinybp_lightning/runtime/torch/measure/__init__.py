"""Measure: bytes by the allocator, seconds by the timer; of a block, of a step, and what memory is left for it."""
