"""Compare mechanisms by measurement: run, store, report."""
