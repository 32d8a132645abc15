"""Attention to other sequences."""
