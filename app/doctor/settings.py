"""Examines the configuration: whether it can be read, where it comes from, and what was probably meant for it."""

import os
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path

from app.config import Section, Settings, load_settings
from app.config.older_names import OLDER_VARIABLES
from app.doctor.findings import Finding, ok, problem, warning
from app.errors import ConfigError

SUBJECT = "configuration"
ENV_FILE = Path(".env")


def examine_configuration(config: Path) -> tuple[Settings | None, list[Finding]]:
    """Return the settings, None if they cannot be read, and what there is to say of them."""
    variables = _variables()
    try:
        settings = load_settings(config, ENV_FILE)
    except ConfigError as error:
        advice = "correct it; docs/configuration.md and config.yml say what each key means"
        return None, [problem(SUBJECT, str(error), advice), *_misspelt(os.environ, variables)]
    ours = sorted(name for name in os.environ if name in variables)
    sources = [f"{path}" for path in (config, ENV_FILE) if path.exists()]
    sources += [f"{len(ours)} environment variables ({', '.join(ours)})"] if ours else []
    found = [ok(SUBJECT, f"read from {', '.join(sources) or 'nothing but the defaults'}")]
    return settings, [
        *found,
        *_misspelt(os.environ, variables),
        *_env_file(),
        *_prompts(settings),
    ]


def _variables() -> frozenset[str]:
    """Return every variable that the settings read."""
    names = set()
    for name, field in Settings.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            names |= {f"{name}__{key}".upper() for key in kind.model_fields}
        else:
            names.add(name.upper())
    return frozenset(names) | OLDER_VARIABLES


def _misspelt(environment: Mapping[str, str], variables: frozenset[str]) -> Iterator[Finding]:
    """Yield variables that are probably meant for the service and read by nobody.

    Those with one of the sections' names and two underscores stop the start already.
    """
    single = {name.replace("__", "_"): name for name in variables if "__" in name}
    top = [name for name in variables if "__" not in name]
    for name in sorted(environment):
        meant = single.get(name.upper()) or next(iter(get_close_matches(name.upper(), top, 1, 0.85)), None)
        if meant and name.upper() not in variables:
            yield warning(SUBJECT, f"the variable {name} is not read", f"if it is meant for the service, say {meant}")


def _env_file() -> Iterator[Finding]:
    if os.name == "posix" and ENV_FILE.exists() and ENV_FILE.stat().st_mode & 0o077:
        yield warning(SUBJECT, "others on this machine can read .env, where secrets are", "chmod 600 .env")


def _prompts(settings: Settings) -> Iterator[Finding]:
    path = settings.app.prompts_dir / "base_system.txt"
    try:
        path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        yield problem("prompts", f"{path} cannot be read: {reason}", "name the folder of templates as app.prompts_dir")
    else:
        yield ok("prompts", f"templates are read from {settings.app.prompts_dir}")
