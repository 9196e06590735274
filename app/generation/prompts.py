"""Reads our own words from prompts/ once, at start.  A missing file or an unknown variable ends the start."""

from pathlib import Path
from string import Formatter

from app.errors import ConfigError


def read_prompt(folder: Path, name: str, variables: dict[str, str]) -> str:
    """Read `<folder>/<name>.txt` and fill in its `{variables}`.

    Raises: ConfigError: the file is missing, not UTF-8, empty, or names a variable that is not given.
    """
    path = folder / f"{name}.txt"
    try:
        template = path.read_text(encoding="utf-8").strip()
        fields = {field for _, field, _, _ in Formatter().parse(template) if field is not None}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"prompt {path}: cannot be read as UTF-8 text ({type(error).__name__})") from None
    except ValueError as error:
        raise ConfigError(f"prompt {path}: {error}; write {{{{ and }}}} for plain braces") from None
    if not template:
        raise ConfigError(f"prompt {path}: the file is empty")
    if unknown := sorted(fields - variables.keys()):
        known = ", ".join(sorted(variables))
        raise ConfigError(f"prompt {path}: unknown variable {', '.join(unknown)}; known: {known}")
    return template.format_map(variables)
