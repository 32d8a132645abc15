"""`python -m manyheads` is the `manyheads` command."""

from manyheads.cli import main

main()
