"""Pages of the catalogue: `python -m manyheads.catalogue > docs/catalogue.md`."""

from __future__ import annotations

from manyheads.catalogue.page import catalogue_page

if __name__ == "__main__":
    print(catalogue_page(), end="")
