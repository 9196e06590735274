"""Write docs/settings.md from the settings of the code: `python -m scripts.settings_page > docs/settings.md`."""

import ast
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from app.config import Settings
from app.config.model import ModelEntry

HEADER = """\
# Every setting

Made from the code by `python -m scripts.settings_page`, and not to be edited. How settings are given, and which page
each section belongs to: [configuration.md](configuration.md).

`requests_per_minute` in the section `rate_limit` is the variable `RATE_LIMIT__REQUESTS_PER_MINUTE` of the environment
and of `.env`, which win over `config.yml`; a list or an object is JSON there. "-" is no value.
"""
CONFIG = Path(__file__).parents[1] / "config.yml"
KINDS = {"integer": "integer", "number": "number", "boolean": "true, false", "string": "text", "object": "object"}


def page() -> str:
    """Return the whole page."""
    schema = Settings.model_json_schema()
    defaults = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    sections = _sections()
    parts = [HEADER]
    for name, kind in sections.items():
        known = schema["$defs"][kind.__name__]["properties"]
        rows = _rows(known, documented(kind), defaults.get(name) or {})
        parts.append(f"## `{name}`\n\n{_first_words(kind)}\n\n{_table(rows)}")
    known = schema["$defs"][ModelEntry.__name__]["properties"]
    texts = {name: f"As `model.{name}`." for name in known} | documented(ModelEntry)
    entry = (
        "A list: each entry is one more model, with these keys; what it leaves open is taken from the section `model`."
    )
    parts.append(f"## `models`\n\n{entry}\n\n{_table(_rows(known, texts, {'source': 'auto'}))}")
    single = {name: each for name, each in schema["properties"].items() if name not in {*sections, "models"}}
    text = "Without a section: variables of these names, in capitals, and keys of `config.yml`."
    parts.append(f"## Single settings\n\n{text}\n\n{_table(_rows(single, documented(Settings), defaults))}")
    return "\n".join(parts)


def documented(kind: type[BaseModel]) -> dict[str, str]:
    """Return the text below each field of a class and of those that it inherits from."""
    texts: dict[str, str] = {}
    for each in reversed(kind.__mro__):
        if issubclass(each, BaseModel) and each.__module__.startswith("app."):
            body = ast.parse(textwrap.dedent(inspect.getsource(each))).body[0]
            assert isinstance(body, ast.ClassDef)
            texts |= dict(_below_fields(body))
    return texts


def _below_fields(body: ast.ClassDef) -> Iterator[tuple[str, str]]:
    for field, below in zip(body.body, body.body[1:], strict=False):
        match field, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                yield name, " ".join(text.split())


def _sections() -> dict[str, type[BaseModel]]:
    kinds = {name: field.annotation for name, field in Settings.model_fields.items()}
    return {name: kind for name, kind in kinds.items() if isinstance(kind, type) and issubclass(kind, BaseModel)}


def _first_words(kind: type[BaseModel]) -> str:
    return " ".join((inspect.getdoc(kind) or "").split("\n\n")[0].split())


def _rows(
    known: Mapping[str, Any], texts: Mapping[str, str], defaults: Mapping[str, Any]
) -> Iterator[tuple[str, str, str, str]]:
    for name, field in known.items():
        default = defaults.get(name, field.get("default"))
        yield f"`{name}`", _type(field, default), _shown(default), texts.get(name, "")


def _type(field: Mapping[str, Any], default: object) -> str:
    """Return what a value may be, in words: from the schema of its field."""
    options = [each for each in field.get("anyOf", [field]) if each.get("type") != "null"]
    if len(options) != 1:
        return ", or ".join(_type(each, default) for each in options)
    option = options[0]
    if "enum" in option:
        others = [] if default is None or default in option["enum"] else [default]
        return ", ".join(f"`{word}`" for word in (*others, *option["enum"]))
    if option.get("type") == "array":
        return "list"
    limits = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    words = [f"{word} {option[limit]:g}" for limit, word in limits.items() if limit in option]
    return ", ".join([KINDS.get(option.get("type", "object"), "object"), *words])


def _shown(default: object) -> str:
    if default is None or default in ("", [], {}):
        return "-"
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    if isinstance(default, list):
        return f"`{', '.join(map(str, default))}`"
    return f"`{default:g}`" if isinstance(default, float) else f"`{default}`"


def _table(rows: Iterator[tuple[str, str, str, str]]) -> str:
    lines = "".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |\n" for row in rows)
    return f"| setting | value | default | meaning |\n|---|---|---|---|\n{lines}"


if __name__ == "__main__":
    print(page(), end="")
