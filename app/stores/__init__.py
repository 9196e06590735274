"""The in-memory sides of the ports that other packages define."""
