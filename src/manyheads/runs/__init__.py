"""What every run shares that is measured, stored and shown: cells, store, loop, progress, tables, charts, page."""
