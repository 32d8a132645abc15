"""Feature maps instead of scores: linear in the length."""
