"""Runnable comparisons of height-compressed backpropagation with what people use today, on real data."""
