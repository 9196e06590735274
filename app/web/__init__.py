"""The HTTP layer: the only package that uses FastAPI, slowapi, headers, status codes and SSE."""
