"""How heads are combined."""
