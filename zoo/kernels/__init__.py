"""Tensor functions with a reference and fast implementations."""
