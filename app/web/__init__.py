"""HTTP in, HTTP out.  Alone in knowing FastAPI, slowapi, headers, status codes and SSE."""
