"""GET /v1/usage: a key's token usage of a month, by day and by model, as JSON or CSV."""

import csv
import io
from datetime import UTC, datetime
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Response
from pydantic import BaseModel, Field

from app.access.quotas import month_of, next_month
from app.access.reports import COLUMNS, MONTH, UsageRow, first_of, summed
from app.errors import (
    Forbidden,
    InternalError,
    InvalidRequest,
    KeyNotFound,
    RateLimited,
    StoreUnavailable,
    Unauthorized,
)
from app.types import Limits
from app.web.http.dependencies import AccessDep, CallerDep
from app.web.http.errors import error_responses
from app.web.http.json_body import StrictRoute

router = APIRouter(prefix="/v1/usage", tags=["usage"], route_class=StrictRoute)

_ERRORS = error_responses(
    InvalidRequest, Unauthorized, Forbidden, KeyNotFound, RateLimited, InternalError, StoreUnavailable
)


class UsageCounts(BaseModel):
    """Counts of requests and tokens."""

    requests: int
    prompt_tokens: int
    completion_tokens: int
    charged_tokens: int = Field(description="Tokens charged to the quota.")


class DailyUsage(UsageCounts):
    """The usage of one day, UTC."""

    day: str


class ModelUsage(UsageCounts):
    """The usage of one model."""

    model: str | None = Field(description="null: requests that ended before their model was known.")


class UsageReport(BaseModel):
    """A key's usage of a month."""

    key_id: str
    month: str
    limit: int | None = Field(description="Tokens that the key may use in a month; null: any number.")
    used: int
    reserved: int = Field(description="Reserved by running requests.")
    remaining: int | None
    resets: datetime
    by_day: list[DailyUsage]
    by_model: list[ModelUsage]


@router.get(
    "",
    response_model=UsageReport,
    responses=_ERRORS | {200: {"content": {"text/csv": {}}, "description": "The report, or with format=csv a table."}},
)
async def usage(
    caller: CallerDep,
    access: AccessDep,
    key: Annotated[str | None, Query(pattern=r"^[0-9A-Za-z]{1,64}$", description="Another key's, for admins.")] = None,
    month: Annotated[str | None, Query(pattern=MONTH, description="As 2026-11; this one by default.")] = None,
    format: Annotated[Literal["json", "csv"], Query()] = "json",  # noqa: A002  # the parameter's name
) -> UsageReport | Response:
    """Report a key's usage: the caller's own, or any key's for callers who may manage keys."""
    key_id = key or caller.key_id
    if key_id != caller.key_id and not caller.rights.manage_keys:
        raise Forbidden("Another key's usage needs an API key whose role may manage keys.")
    limits = caller.limits if key_id == caller.key_id else await access.verifier.limits_of(key_id)
    month = month or month_of(datetime.now(UTC))
    rows = await access.reports.by_day_and_model(key_id, month)
    if format == "csv":
        return _table(rows, f"usage-{key_id}-{month}.csv")
    balance = await access.quotas.balance(key_id, month)
    return UsageReport(
        key_id=key_id,
        month=month,
        limit=limits.monthly_tokens or None,
        used=balance.used,
        reserved=balance.reserved,
        remaining=_remaining(limits, balance.used + balance.reserved),
        resets=next_month(first_of(month)),
        by_day=[DailyUsage.model_validate(row, from_attributes=True) for row in summed(rows, "model")],
        by_model=[ModelUsage.model_validate(row, from_attributes=True) for row in summed(rows, "day")],
    )


def _remaining(limits: Limits, taken: int) -> int | None:
    return max(0, limits.monthly_tokens - taken) if limits.monthly_tokens else None


def _table(rows: list[UsageRow], name: str) -> Response:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(COLUMNS)
    writer.writerows([getattr(row, column) for column in COLUMNS] for row in rows)
    headers = {"Content-Disposition": f'attachment; filename="{name}"'}
    return Response(text.getvalue(), media_type="text/csv", headers=headers)
