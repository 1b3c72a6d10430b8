"""Where a graph is cut into blocks, and which ops a replay of a block can skip."""
