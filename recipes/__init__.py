"""Programs that compare height-compressed backpropagation with other methods, on real data."""
