"""Keys, roles, usage and the state of the service."""
