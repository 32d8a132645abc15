"""Pages of the catalogue, made from the cards: `python -m manyheads.catalogue > docs/catalogue.md` prints it whole, and
`python -m manyheads.catalogue --families docs/families` writes a page for each family, with pictures; `--index` and
`--vectors` make what ships: what the classes say, and what `manyheads find` knows of their meaning."""

from __future__ import annotations

import argparse
from pathlib import Path

from manyheads.catalogue.page import catalogue_page

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m manyheads.catalogue", description=__doc__)
    parser.add_argument("--families", type=Path, metavar="FOLDER", help="write a page for each family into it")
    parser.add_argument("--vectors", action="store_true", help="write the package's vectors for `find`")
    parser.add_argument("--index", action="store_true", help="write what `list`, `show` and `find` read")
    asked = parser.parse_args()
    folder = asked.families
    if asked.index:
        from manyheads.catalogue.index import write_index

        write_index()
    elif asked.vectors:
        from manyheads.catalogue.entries import entries
        from manyheads.catalogue.meaning import ship
        from manyheads.catalogue.search import texts_of

        ship(texts_of(entries()))
    elif folder is None:
        print(catalogue_page(), end="")
    else:
        from manyheads.catalogue.families import write_families

        write_families(folder)
