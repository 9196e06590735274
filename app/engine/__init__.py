"""How tokens are made, seen from the API process.  Imports no torch."""
