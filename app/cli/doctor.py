"""`python -m app doctor`: what is wrong with an installation, and what to do."""

import asyncio
import sys
from collections.abc import Sequence

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from app.cli.terminal import CONFIG, ConfigOption, JsonOption, existing, print_json, printable
from app.doctor import Finding, Level, examine

_STYLES = {Level.OK: "green", Level.WARNING: "yellow", Level.PROBLEM: "bold red"}


def doctor(config: ConfigOption = CONFIG, as_json: JsonOption = False) -> None:
    """Examine configuration, data, databases, model and machine, and say what to do; fails if there is a problem."""
    findings = asyncio.run(examine(existing(config)))
    if as_json:
        print_json(findings)
    elif sys.stdout.isatty():
        Console().print(_table(findings))
    else:
        for each in findings:
            typer.echo(f"{each.level:8} {each.subject}: {_sentence(each)}")
    problems = sum(each.level is Level.PROBLEM for each in findings)
    if problems:
        typer.echo(f"llm-service: {problems} problem{'s' if problems > 1 else ''}", err=True)
        raise typer.Exit(1)


def _table(findings: Sequence[Finding]) -> Table:
    table = Table(title="Examination")
    for column in ("", "subject", "finding"):
        table.add_column(column, overflow="fold")
    for each in findings:
        # As text and not as markup: a path may hold brackets.
        table.add_row(Text(each.level, _STYLES[each.level]), Text(each.subject), Text(_sentence(each)))
    return table


def _sentence(finding: Finding) -> str:
    """Return the text and the advice without signs that a terminal obeys: names in a model's files may hold any."""
    sentence = f"{finding.text}. To do: {finding.advice}." if finding.advice else f"{finding.text}."
    return printable(sentence)
