"""Access control: keys, roles, rate limits, quotas, and the log of usage."""
