"""Replay dropped blocks during backward, so that autograd finds what they saved."""
