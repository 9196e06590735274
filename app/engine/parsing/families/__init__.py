"""One parser for each family's way to write calls of tools."""
