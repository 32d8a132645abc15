"""The web app behind `manyheads serve`: explain a text, intervene and see the change, browse reports."""
