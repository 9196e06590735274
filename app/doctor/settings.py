"""Examines the configuration: whether it can be read, where it comes from, and what was probably meant for it."""

import os
from collections.abc import Iterator
from pathlib import Path

from app.config import Settings, load_settings
from app.config.variables import own_variables, unread_variables
from app.doctor.findings import Finding, ok, problem, warning
from app.errors import ConfigError

SUBJECT = "configuration"
ENV_FILE = Path(".env")


def examine_configuration(config: Path) -> tuple[Settings | None, list[Finding]]:
    """Return the settings, None if they cannot be read, and what there is to say of them."""
    variables = own_variables()
    try:
        settings = load_settings(config, ENV_FILE)
    except ConfigError as error:
        advice = "correct it; docs/configuration.md and config.yml say what each key means"
        return None, [problem(SUBJECT, str(error), advice), *_unread()]
    ours = sorted(name for name in os.environ if name in variables)
    sources = [f"{path}" for path in (config, ENV_FILE) if path.exists()]
    sources += [f"{len(ours)} environment variables ({', '.join(ours)})"] if ours else []
    found = [ok(SUBJECT, f"read from {', '.join(sources) or 'nothing but the defaults'}")]
    return settings, [
        *found,
        *_unread(),
        *_env_file(),
        *_prompts(settings),
    ]


def _unread() -> Iterator[Finding]:
    for variable in unread_variables(os.environ, ENV_FILE):
        advice = (
            f"if it is meant for the service, say {variable.meant}" if variable.meant else "remove it if it is not used"
        )
        yield warning(SUBJECT, f"the variable {variable.name} in {variable.where} is not read", advice)


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
