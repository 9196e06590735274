"""The check of the lock: what it finds out of step."""

from typing import Any

from scripts.check_lock import content_hash, problems

PYPROJECT: dict[str, Any] = {"project": {"dependencies": ["a"], "optional-dependencies": {"dev": ["b"]}}}
LOCK: dict[str, Any] = {
    "metadata": {"content-hash": content_hash(PYPROJECT)},
    "package": [
        {"name": "a", "version": "1", "groups": ["main"], "optional": False},
        {"name": "b", "version": "2", "groups": ["main"], "optional": True},
        {"name": "nvidia-cublas", "version": "3", "groups": ["main"], "optional": False},
    ],
}
CONSTRAINTS = "# made\na==1\nb==2\nnvidia-cublas==3\n"
HEAD = "# made\n-c constraints.txt\n"


def test_files_in_step_have_no_problem():
    """Requirements hold what the service needs but for CUDA's libraries, constraints the extras as well."""
    assert [] == problems(PYPROJECT, LOCK, CONSTRAINTS, f"{HEAD}a==1 ; python_version >= '3'\n")


def test_requirements_out_of_step_are_named():
    def found(requirements: str) -> list[str]:
        return problems(PYPROJECT, LOCK, CONSTRAINTS, requirements)

    assert ["requirements.txt lacks a==1 of poetry.lock"] == found(HEAD)
    assert ["requirements.txt has b==2, poetry.lock has not"] == found(f"{HEAD}a==1\nb==2\n")
    odd = ["requirements.txt: not an exact pin: a>=1", "requirements.txt lacks a==1 of poetry.lock"]
    assert odd == found(f"{HEAD}a>=1\n")
    assert ["requirements.txt has nvidia-cublas==3, poetry.lock has not"] == found(f"{HEAD}a==1\nnvidia-cublas==3\n")
    assert ["requirements.txt lacks the line -c constraints.txt"] == found("a==1\n")


def test_changed_requirements_and_constraints_are_named():
    changed = {"project": {"dependencies": ["a", "c"]}}

    assert ["pyproject.toml changed its requirements after poetry.lock was made"] == problems(
        changed, LOCK, CONSTRAINTS, f"{HEAD}a==1\n"
    )
    assert ["constraints.txt lacks b==2 of poetry.lock"] == problems(
        PYPROJECT, LOCK, "a==1\nnvidia-cublas==3\n", f"{HEAD}a==1\n"
    )
