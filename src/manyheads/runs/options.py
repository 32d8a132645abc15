"""Options that several commands have, each written once."""

from __future__ import annotations

from typing import Annotated

import typer

Scheduler = Annotated[
    str | None, typer.Option("--scheduler", help="Address of a Dask scheduler whose workers run the cells.")
]
