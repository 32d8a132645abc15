"""`python -m manyheads.steer`: the table of the catalogue's rows in docs/steering.md."""

from manyheads.steer.rows import table

if __name__ == "__main__":
    print(table())
