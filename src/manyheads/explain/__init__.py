"""What every head does: taps, attributions, detectors, interventions and views, on any model, offline."""
