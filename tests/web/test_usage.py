"""GET /v1/usage after requests that failed, and for months at the edges of the calendar."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select

from app.access.tables import inference_log
from tests.waiting import HANG_SECONDS
from tests.web.access import Running, running

REFUSED: list[tuple[str, dict[str, Any], int]] = [
    ("/v1/generate", {"prompt": "a", "model": "nobody"}, 404),
    ("/v1/generate", {"prompt": "a", "max_tokens": 999_999}, 400),
    ("/v1/generate", {"prompt": "a", "logit_bias": {"9999999": 1}}, 400),
    ("/v1/generate", {"prompt": "a", "stop_token_ids": [2**31 - 1]}, 400),
    ("/v1/generate", {"prompt": "x" * 3999, "max_tokens": 8000}, 400),
    ("/v1/completions", {"prompt": [2**31 - 1]}, 400),
    ("/v1/completions", {"prompt": "a", "model": "nobody"}, 404),
    ("/v1/chat", {"messages": [{"role": "user", "content": "a"}], "model": "nobody"}, 404),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "model": "nobody"}, 404),
]


async def rows_written(service: Running, count: int = 2) -> None:
    """Wait until the log has so many rows."""

    async def written() -> int:
        async with service.access.database.read() as connection:
            return await connection.scalar(select(func.count()).select_from(inference_log)) or 0

    async with asyncio.timeout(HANG_SECONDS):
        while await written() < count:  # noqa: ASYNC110  # another task's work
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(("path", "body", "status"), REFUSED, ids=str)
async def test_a_request_that_failed_early_does_not_break_the_months_report(
    tmp_path: Path, path: str, body: dict[str, Any], status: int
):
    """JSON and CSV; a request without a model is counted as one."""
    async with running(tmp_path) as service:
        await service.generate(key := await service.key())
        async with service.client(key) as http:
            refused = await http.post(path, json=body)
            # OpenAI's routes find out that there is no such model before there is a generation to log.
            await rows_written(service, 1 if status == 404 and "completions" in path else 2)
            report = await http.get("/v1/usage")
            table = await http.get("/v1/usage", params={"format": "csv"})

    assert status == refused.status_code, refused.text
    assert 200 == report.status_code == table.status_code, report.text
    models = {each["model"]: each["requests"] for each in report.json()["by_model"]}
    assert 1 == models["echo"]
    assert models.keys() <= {"echo", None}
    assert sum(models.values()) == sum(each["requests"] for each in report.json()["by_day"])


async def test_requests_without_a_model_are_reported_with_null(tmp_path: Path):
    """In a row of their own, which a client can count; the table leaves the cell empty."""
    async with running(tmp_path) as service, service.client() as http:
        for _ in range(2):
            await http.post("/v1/generate", json={"prompt": "a", "model": "nobody"})
        await rows_written(service)
        (row,) = (await http.get("/v1/usage")).json()["by_model"]
        table = (await http.get("/v1/usage", params={"format": "csv"})).text

    assert (None, 2, 0) == (row["model"], row["requests"], row["charged_tokens"])
    assert ",,2,0,0,0" in table


@pytest.mark.parametrize("month", ["2000-01", "2026-02", "2999-12"])
async def test_months_of_this_millennium_have_a_report(tmp_path: Path, month: str):
    async with running(tmp_path) as service:
        assert month == (await service.usage(month=month))["month"]


@pytest.mark.parametrize(
    "month", ["9999-12", "0000-00", "1999-12", "3000-01", "2026-13", "2026-1", "2026-00", "٢٠٢٦-١١", "2026-11\n", ""]
)
async def test_any_other_month_is_refused_by_name(tmp_path: Path, month: str):
    async with running(tmp_path) as service, service.client() as http:
        reply = await http.get("/v1/usage", params={"month": month})

    assert 400 == reply.status_code
    assert ["month"] == [each["field"] for each in reply.json()["details"]["errors"]]
