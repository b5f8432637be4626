"""Focused linear attention: weights of powers of queries and keys, never formed."""
