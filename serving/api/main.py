"""`python -m serving.api.main`, and `uvicorn serving.api.main:app`."""

from fastapi import FastAPI

from app import main as service
from app.cli import serve_only
from serving import read_variables


def __getattr__(name: str) -> FastAPI:
    """Build the application for uvicorn, as `app.main` does.

    Raises: SystemExit: the configuration cannot be used.
    """
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    read_variables()
    app: FastAPI = service.app
    return app


if __name__ == "__main__":
    read_variables()
    serve_only()
