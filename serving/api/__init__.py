"""The module that the older service started with."""
