"""How order enters."""
