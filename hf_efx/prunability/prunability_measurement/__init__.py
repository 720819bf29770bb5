"""The module that `evaluate.load` reads from this folder."""
