"""Attention of blocks of queries to windows of keys."""
