"""Find the fastest persistent schedule of a chain within a byte budget."""
