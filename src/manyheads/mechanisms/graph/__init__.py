"""Inputs with a height and a width."""
