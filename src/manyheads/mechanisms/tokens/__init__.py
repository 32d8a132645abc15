"""Fewer tokens on one side of the product."""
