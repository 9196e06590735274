"""The command line: `python -m app serve`, and commands that manage the database."""

from app.cli.root import cli, main, serve_only

__all__ = ["cli", "main", "serve_only"]
