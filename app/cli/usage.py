"""`python -m app usage`: what each key has used in a month."""

from dataclasses import asdict
from datetime import UTC, datetime
from typing import Annotated

import typer

from app.access.database import Database
from app.access.quotas import month_of
from app.access.reports import Reports
from app.cli.terminal import CONFIG, ConfigOption, JsonOption, show, with_database


def usage(
    month: Annotated[str | None, typer.Option(help="As 2026-11; this month, UTC, by default.")] = None,
    config: ConfigOption = CONFIG,
    as_json: JsonOption = False,
) -> None:
    """Show the tokens that each key has used in a month, most first."""
    shown = month or month_of(datetime.now(UTC))

    async def work(database: Database) -> None:
        rows = [asdict(total) for total in await Reports(database).by_key(shown)]
        show(rows, title=f"Tokens used in {shown}", as_json=as_json)

    with_database(config, work)
