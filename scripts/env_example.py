"""Write .env.example from config.yml, so that the two cannot differ: `python -m scripts.env_example > .env.example`."""

import re
from pathlib import Path

HEADER = """\
# Copy this file to .env and take the # away in front of what you want to change.
# The environment wins over .env, and .env wins over config.yml.

# The API key that clients send as X-API-Key or Authorization: Bearer.  At least 8 characters.
# Without one the first start makes a key, prints it and keeps it in data/api_key.
# SECURITY__API_KEY=

# Access to gated models on the Hugging Face hub; HF_TOKEN is read too.
# HUGGINGFACE_TOKEN=

# postgresql://user:password@host/name, for several replicas; without it the database is a file in the data folder.
# DATABASE_URL=

# The MLflow server whose registered models are loaded, and who we are there: a name and a password, or a token.
# MLFLOW_TRACKING_URI=
# MLFLOW_TRACKING_USERNAME=
# MLFLOW_TRACKING_PASSWORD=
# MLFLOW_TRACKING_TOKEN=

# The collector that traces go to, such as http://localhost:4318; the only protocol is http/protobuf.
# OTEL_EXPORTER_OTLP_ENDPOINT=
# OTEL_EXPORTER_OTLP_PROTOCOL=
"""


def env_example(config_text: str) -> str:
    """Return one commented variable for each key of config.yml, with its default, below the key's comment.

    The comment has a line of its own because `docker run --env-file` would take one behind the value for a part of it.
    """
    lines, section = [HEADER], ""
    for line in config_text.splitlines():
        if match := re.fullmatch(r"(\w+):\s*(?:#\s*(.*))?", line):
            section = match[1]
            lines.append(f"# --- {section}" + (f": {match[2]}" if match[2] else ""))
        elif match := re.fullmatch(r"(  )?(\w+): (.*?)(?:\s+#\s*(.*))?", line):
            name = f"{section}__{match[2]}" if match[1] else match[2]
            value = "" if match[3] == "null" else _as_json(match[3])
            lines += [f"# {match[4]}"] if match[4] else []
            lines.append(f"# {name.upper()}={value}")
        elif not line.strip():
            lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _as_json(value: str) -> str:
    """Lists are JSON in the environment."""
    if value.startswith("["):
        items = [item.strip() for item in value.strip("[]").split(",") if item.strip()]
        return "[" + ", ".join(f'"{item}"' for item in items) + "]"
    return value


if __name__ == "__main__":
    print(env_example(Path("config.yml").read_text(encoding="utf-8")), end="")
