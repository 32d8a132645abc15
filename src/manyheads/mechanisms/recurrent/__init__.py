"""A state that is carried along."""
