"""Engines: how tokens are generated, seen from the API process.  Imports no torch."""
