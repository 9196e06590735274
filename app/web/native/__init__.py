"""The service's own dialect."""
