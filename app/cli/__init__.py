"""The command line: `python -m app serve`, and commands that work on the database."""

from app.cli.root import cli, main

__all__ = ["cli", "main"]
