"""What runs a block: the user's own kernels, or Inductor's, behind one protocol."""
