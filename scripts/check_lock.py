"""Say whether pyproject.toml, poetry.lock, constraints.txt and requirements.txt still belong together.

Needs nothing but Python, so that it can run before anything is installed.  `make lock` puts right whatever it finds.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINED = "-c constraints.txt"
"""The line of requirements.txt that leaves what it does not name to constraints.txt."""
CUDA = re.compile(r"(nvidia|cuda)-.*|triton")
"""Packages that torch asks for itself where its wheel is one with CUDA; named in requirements.txt, they would be
installed on machines without a GPU too."""
PIN = re.compile(r"(?P<name>[a-z0-9-]+)==(?P<version>[^\s;]+)(\s*;.*)?")


def content_hash(pyproject: dict[str, Any]) -> str:
    """What poetry 2.3 and later writes into the lock: a digest of the tables that decide its content.

    Source: `Locker._get_content_hash` in poetry/packages/locker.py.
    """

    def pick(table: dict[str, Any], *keys: str) -> dict[str, Any]:
        return {key: table[key] for key in keys if key in table}

    project = pick(pyproject.get("project", {}), "requires-python", "dependencies", "optional-dependencies")
    poetry = pyproject.get("tool", {}).get("poetry", {})
    relevant = {
        "project": project,
        "tool": {"poetry": pick(poetry, "dependencies", "source", "extras", "dev-dependencies", "group")},
    }
    if groups := pyproject.get("dependency-groups"):
        relevant["dependency-groups"] = groups
    return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()


def read_pins(text: str) -> tuple[set[tuple[str, str]], list[str]]:
    """The (name, version) pairs of a constraints file, and the lines that are no exact pin."""
    pins, odd = set(), []
    for line in text.splitlines():
        if not line or line.startswith("#"):
            continue
        if match := PIN.fullmatch(line):
            pins.add((match["name"], match["version"]))
        else:
            odd.append(line)
    return pins, odd


def problems(pyproject: dict[str, Any], lock: dict[str, Any], constraints: str, requirements: str) -> list[str]:
    """One sentence for each thing that is out of step."""
    found = []
    if lock["metadata"]["content-hash"] != content_hash(pyproject):
        found.append("pyproject.toml changed its requirements after poetry.lock was made")

    locked = {(package["name"], package["version"]) for package in lock["package"]}
    versions = Counter(name for name, _ in locked)
    # All of them would land in constraints.txt, and where their markers overlap pip can satisfy none.
    found += [f"poetry.lock has {n} versions of {name}" for name, n in sorted(versions.items()) if n > 1]
    # poetry names a package's index only when that is not the public one; such an address works on one network only.
    found += [f"poetry.lock takes {p['name']} from {p['source'].get('url')}" for p in lock["package"] if "source" in p]

    found += _differences("constraints.txt", constraints, locked)
    needed = {(p["name"], p["version"]) for p in lock["package"] if "main" in p["groups"] and not p["optional"]}
    needed = {(name, version) for name, version in needed if not CUDA.fullmatch(name)}
    lines = requirements.splitlines()
    if CONSTRAINED not in lines:
        found.append(f"requirements.txt lacks the line {CONSTRAINED}")
    pinned = "\n".join(line for line in lines if line != CONSTRAINED)
    found += _differences("requirements.txt", pinned, needed)
    return found


def _differences(file: str, text: str, locked: set[tuple[str, str]]) -> list[str]:
    """One sentence for each line that a file of pins has or lacks against the lock."""
    pins, odd = read_pins(text)
    found = [f"{file}: not an exact pin: {line}" for line in odd]
    found += [f"{file} lacks {name}=={version} of poetry.lock" for name, version in sorted(locked - pins)]
    found += [f"{file} has {name}=={version}, poetry.lock has not" for name, version in sorted(pins - locked)]
    return found


def main(root: Path = ROOT) -> int:
    found = problems(
        tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8")),
        tomllib.loads((root / "poetry.lock").read_text(encoding="utf-8")),
        *((root / name).read_text(encoding="utf-8") for name in ("constraints.txt", "requirements.txt")),
    )
    for problem in found:
        print(problem, file=sys.stderr)
    if found:
        print("Run `make lock` and commit poetry.lock, constraints.txt and requirements.txt.", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
