"""How a score is made and normalised."""
