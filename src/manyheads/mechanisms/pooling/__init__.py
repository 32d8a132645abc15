"""A sequence in, a vector out."""
