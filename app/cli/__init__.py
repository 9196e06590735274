"""The command line: `python -m app serve`, and what there is to say to the database.  Knows no routes."""

from app.cli.root import cli, main

__all__ = ["cli", "main"]
