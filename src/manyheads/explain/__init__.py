"""What every head does: taps, attributions, detectors and views, on any model, offline."""
