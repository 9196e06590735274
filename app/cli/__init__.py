"""The command line: `python -m app serve`, and commands that manage the database."""

from app.cli.root import cli, main

__all__ = ["cli", "main"]
