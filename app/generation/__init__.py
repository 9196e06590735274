"""Generation: the service, which every generating route calls, and the steps that prepare a request."""
