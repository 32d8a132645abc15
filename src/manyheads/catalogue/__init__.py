"""The catalogue as a tool: what every mechanism is, what it costs here, which of them fits a question, and pages of it.

Facts come from the cards, figures from `figures.json`, which `benchmarks/figures.py` makes from committed results.
"""

from manyheads.catalogue.facts import example_code, facts
from manyheads.catalogue.figures import Figures, load_figures
from manyheads.catalogue.page import catalogue_page

__all__ = ["Figures", "catalogue_page", "example_code", "facts", "load_figures"]
