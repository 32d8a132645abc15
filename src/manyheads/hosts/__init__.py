"""Everything that touches somebody else's model: loading, taps, attention and cache interfaces, probes."""
