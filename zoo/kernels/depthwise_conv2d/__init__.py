"""Convolution with one kernel a channel."""
