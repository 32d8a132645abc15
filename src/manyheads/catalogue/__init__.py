"""The catalogue as a tool: what every mechanism is, what it costs here, which of them fits a question, and pages of it.

Facts come from the cards, figures from `figures.json`, which `benchmarks/figures.py` makes from committed results.
"""
