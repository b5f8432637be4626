"""Blocks that more than one backbone uses."""
