"""The shell with no stage changed."""
