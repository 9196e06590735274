"""An OpenAI-style backend for your own Hugging Face models."""


def __getattr__(name: str) -> str:
    """Return `__version__`, which pyproject.toml says, also in a checkout that is not installed."""
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # Here, so that the first lines of a start run at once: see __main__.py.
    import tomllib
    from importlib.metadata import PackageNotFoundError, version
    from pathlib import Path

    try:
        return version("llm-service")
    except PackageNotFoundError:
        project = Path(__file__).resolve().parent.parent / "pyproject.toml"
        return str(tomllib.loads(project.read_text(encoding="utf-8"))["project"]["version"])
