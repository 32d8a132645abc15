"""Where queries, keys and values come from."""
