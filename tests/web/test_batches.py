"""Files and batches through the application: OpenAI's own client drives them, and limits, keys and filters hold."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI

from app.access.batches import BatchStore
from app.generation import batch_runner
from tests.waiting import HANG_SECONDS, START_SECONDS
from tests.web.access import ADMIN_KEY, Running, running
from tests.web.harness import RecordingEngine, ScriptedService, Web

CHAT = "/v1/chat/completions"
JSON_LINES = {"Content-Type": "application/jsonl"}
FORM = {"Content-Type": "multipart/form-data; boundary=b0"}
FINAL = {"completed", "failed", "cancelled", "expired"}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("POLL_SECONDS", "RETRY_SECONDS", "FRESH_SECONDS"):
        monkeypatch.setattr(batch_runner, name, 0.05)


def chat(content: str = "hello", **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 8, **fields}


def lines_of(bodies: Sequence[dict[str, Any]], url: str = CHAT) -> bytes:
    lines = ({"custom_id": f"c{n}", "method": "POST", "url": url, "body": body} for n, body in enumerate(bodies))
    return "\n".join(map(json.dumps, lines)).encode()


def form(content: bytes, *, purpose: str = "batch", **fields: str) -> bytes:
    parts = [
        f'--b0\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n' for name, value in fields.items()
    ]
    parts += [f'--b0\r\nContent-Disposition: form-data; name="purpose"\r\n\r\n{purpose}\r\n']
    head = '--b0\r\nContent-Disposition: form-data; name="file"; filename="in.jsonl"\r\n\r\n'
    return "".join([*parts, head]).encode() + content + b"\r\n--b0--\r\n"


@asynccontextmanager
async def openai(app: Running) -> AsyncIterator[AsyncOpenAI]:
    """OpenAI's client, on a socket."""
    async with (
        Web(app=app.app, service=ScriptedService()).listening() as port,
        AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=ADMIN_KEY, max_retries=0) as client,
    ):
        yield client


async def create(http: httpx.AsyncClient, content: bytes) -> dict[str, Any]:
    created = await http.post("/v1/batches", content=content, headers=JSON_LINES)
    assert 200 == created.status_code, created.text
    batch: dict[str, Any] = created.json()
    return batch


async def ended(http: httpx.AsyncClient, batch_id: str) -> dict[str, Any]:
    """Wait for the end of a batch."""
    async with asyncio.timeout(START_SECONDS):
        while True:
            reply = await http.get(f"/v1/batches/{batch_id}")
            batch: dict[str, Any] = reply.json()
            if reply.status_code == 200 and batch["status"] in FINAL:  # 503: the machine is too busy for the database
                return batch
            await asyncio.sleep(0.02)


async def progress(http: httpx.AsyncClient, batch_id: str) -> None:
    """Wait until a line of a batch is answered."""
    async with asyncio.timeout(HANG_SECONDS):
        while True:
            if (await http.get(f"/v1/batches/{batch_id}")).json()["request_counts"]["completed"]:
                return
            await asyncio.sleep(0.01)


async def results(http: httpx.AsyncClient, batch_id: str) -> dict[str, dict[str, Any]]:
    """Return the results of a batch by their ids."""
    found = [json.loads(line) for line in (await http.get(f"/v1/batches/{batch_id}/results")).text.split("\n")[:-1]]
    assert len(found) == len({each["custom_id"] for each in found})
    return {each["custom_id"]: each for each in found}


async def test_openais_client_uploads_runs_and_reads_a_batch(tmp_path: Path):
    """With its own methods for files and batches; what failed is in the other file."""
    bodies = [chat(f"number {n}") for n in range(5)] + [chat(max_tokens=-1)]
    async with running(tmp_path) as app, openai(app) as client, app.client() as http:
        file = await client.files.create(
            file=("in.jsonl", lines_of(bodies)),
            purpose="batch",
            expires_after={"anchor": "created_at", "seconds": 3600},
        )
        batch = await client.batches.create(
            input_file_id=file.id,
            endpoint="/v1/chat/completions",
            completion_window="24h",
            metadata={"run": "7"},
        )
        await ended(http, batch.id)
        done = await client.batches.retrieve(batch.id)
        assert done.request_counts is not None
        assert (5, 1, 6) == (done.request_counts.completed, done.request_counts.failed, done.request_counts.total)
        assert ("completed", {"run": "7"}, 24 * 3600) == (done.status, done.metadata, done.expires_at - done.created_at)  # type: ignore[operator]
        assert done.output_file_id is not None
        assert done.error_file_id is not None
        output = (await client.files.content(done.output_file_id)).text.splitlines()
        (error,) = (await client.files.content(done.error_file_id)).text.splitlines()
        assert [f"c{n}" for n in range(5)] == [json.loads(line)["custom_id"] for line in output]
        assert {"object": "chat.completion"}.items() <= json.loads(output[0])["response"]["body"].items()
        assert ("c5", 400) == (json.loads(error)["custom_id"], json.loads(error)["response"]["status_code"])
        assert {file.id, done.output_file_id, done.error_file_id} == {each.id async for each in client.files.list()}
        assert [batch.id] == [each.id async for each in client.batches.list(limit=1)]
        assert (3600, "in.jsonl") == (file.expires_at - file.created_at, file.filename)  # type: ignore[operator]
        assert lines_of(bodies) == (await client.files.content(file.id)).content
        assert (await client.files.delete(file.id)).deleted
        assert 404 == (await http.get(f"/v1/files/{file.id}")).status_code


async def test_a_file_that_comes_slowly_expires_as_long_after_its_creation_as_was_asked(tmp_path: Path):
    fields = {"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}
    content = form(lines_of([chat()]), **fields)

    async def slowly() -> AsyncIterator[bytes]:
        yield content[:-20]
        await asyncio.sleep(1.1)
        yield content[-20:]

    async with running(tmp_path) as app, app.client() as http:
        file = (await http.post("/v1/files", content=slowly(), headers=FORM)).json()

    assert 3600 == file["expires_at"] - file["created_at"]


async def test_openais_client_pages_through_batches(tmp_path: Path):
    """The newest first, each once, with its own metadata."""
    async with running(tmp_path) as app, openai(app) as client:
        file = await client.files.create(file=("in.jsonl", lines_of([chat()])), purpose="batch")
        for number in range(5):
            await client.batches.create(
                input_file_id=file.id,
                endpoint="/v1/chat/completions",
                completion_window="24h",
                metadata={"number": str(number)},
            )
        found = [each.metadata async for each in client.batches.list(limit=2)]
    assert [{"number": str(number)} for number in (4, 3, 2, 1, 0)] == found


async def test_what_a_batch_writes_expires_when_its_creator_said(tmp_path: Path):
    """Counted from the end of the batch; never later than everything else of a batch."""
    async with running(tmp_path, batches={"retention_days": 1}) as app, openai(app) as client, app.client() as http:
        file = await client.files.create(file=("in.jsonl", lines_of([chat(), chat(max_tokens=-1)])), purpose="batch")
        lifetimes = []
        for seconds in (7200, 30 * 24 * 3600, 3599):
            given = {"input_file_id": file.id, "endpoint": CHAT, "completion_window": "24h"}
            policy = {"anchor": "created_at", "seconds": seconds}
            created = await http.post("/v1/batches", json=given | {"output_expires_after": policy})
            if created.status_code != 200:
                lifetimes.append(created.json()["error"]["param"])
                continue
            done = await ended(http, created.json()["id"])
            files = [await client.files.retrieve(done[name]) for name in ("output_file_id", "error_file_id")]
            lifetimes += [(each.expires_at or 0) - each.created_at for each in files]
    assert [7200, 7200, 24 * 3600, 24 * 3600, "output_expires_after.seconds"] == lifetimes


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, chat("hello " * 40)),
        ("/v1/completions", {"prompt": "hello " * 40, "max_tokens": 9}),
        ("/v1/responses", {"input": "hello " * 40, "max_output_tokens": 20}),
    ],
)
async def test_a_batch_sums_up_the_tokens_of_its_responses(tmp_path: Path, path: str, body: dict[str, Any]):
    """As each response counts them, whatever names its route has for them; lines that failed have none."""
    async with running(tmp_path) as app, openai(app) as client, app.client() as http:
        batch = await create(http, lines_of([body, body | {"user": "u"}, body | {"model": "absent"}], path))
        assert (0, None) == (batch["usage"]["total_tokens"], batch["model"])
        await ended(http, batch["id"])
        done = await client.batches.retrieve(batch["id"])
        found = (await results(http, batch["id"])).values()
    usages = [each["response"]["body"]["usage"] for each in found if each["response"]["status_code"] == 200]
    assert done.usage is not None
    assert ("echo", 2) == (done.model, len(usages))
    assert 0 < sum(usage["total_tokens"] for usage in usages) == done.usage.total_tokens
    names = ("output_tokens", "completion_tokens")
    assert sum(usage.get(name, 0) for usage in usages for name in names) == done.usage.output_tokens
    details = [usage.get("prompt_tokens_details") or usage.get("input_tokens_details") for usage in usages]
    assert sum(each["cached_tokens"] for each in details) == done.usage.input_tokens_details.cached_tokens


async def test_metrics_say_how_many_batches_and_lines_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(batch_runner, "COUNT_SECONDS", 0)
    expected = {
        'batches{status="completed"} 1.0',
        'batches{status="failed"} 1.0',
        'batches{status="in_progress"} 0.0',
        'batch_lines{state="completed"} 3.0',
        'batch_lines{state="failed"} 1.0',
        'batch_lines{state="waiting"} 0.0',
        'batch_lines{state="running"} 0.0',
    }
    async with running(tmp_path) as app, app.client() as http:
        for content in (lines_of([chat("a"), chat("b"), chat("c"), chat(max_tokens=-1)]), lines_of([chat()]) + b"\n{"):
            await ended(http, (await create(http, content))["id"])
        async with asyncio.timeout(HANG_SECONDS):
            while not expected <= set((await http.get("/metrics")).text.splitlines()):  # noqa: ASYNC110  # no event
                await asyncio.sleep(0.02)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, chat(temperature=0)),
        (CHAT, chat(temperature=0, n=2, tools=[{"type": "function", "function": {"name": "f"}}])),
        ("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 4, "echo": True}),
        ("/v1/responses", {"input": "hello", "max_output_tokens": 20, "store": False}),
        (CHAT, chat(temprature=1)),
        (CHAT, chat(model="absent")),
        (CHAT, chat(max_tokens="x", logprobs=True)),
        ("/v1/embeddings", {"input": "a"}),
        ("/v1/completions", {"prompt": "hello " * 9000}),
    ],
)
async def test_a_line_has_the_response_that_its_route_sends(tmp_path: Path, path: str, body: dict[str, Any]):
    """Status and body, of errors too, but for what differs from one live response to the next."""
    async with running(tmp_path, cache={"enabled": False}) as app, app.client() as http:
        live = await http.post(path, json=body)
        batch = await create(http, lines_of([body], path))
        await ended(http, batch["id"])
        response = (await results(http, batch["id"]))["c0"]["response"]
    assert (live.status_code, _fixed(live.json())) == (response["status_code"], _fixed(response["body"]))
    assert response["request_id"].startswith("batch_req_")


def _fixed(value: Any) -> Any:
    """Leave out ids and times."""
    if isinstance(value, dict):
        return {
            name: _fixed(each)
            for name, each in value.items()
            if name not in ("id", "created", "created_at", "completed_at")
        }
    return [_fixed(each) for each in value] if isinstance(value, list) else value


async def test_lines_are_requests_of_the_background(tmp_path: Path):
    """Whatever priority they name themselves; each has its row in the log, under its own id."""
    engine = RecordingEngine("echo")
    async with running(tmp_path, engine=engine) as app, app.client() as http:
        await http.post(CHAT, json=chat(priority=7))
        batch = await create(http, lines_of([chat(priority=7)]))
        await ended(http, batch["id"])
        live, line = engine.requests
        assert (7, True) == (live.priority, line.priority > 1000)
        assert (live.tenant, CHAT) == (line.tenant, line.origin.route)
        assert (await results(http, batch["id"]))["c0"]["id"] == line.origin.request_id


async def test_lines_count_against_the_quota_and_no_rate(tmp_path: Path):
    """Three requests: the upload, the batch and one more, however many lines the batch has."""
    limits = {"requests_per_minute": 1, "burst": 3, "tokens_per_minute": 50, "monthly_tokens": 10_000}
    async with running(tmp_path) as app:
        key = await app.key(limits=limits)
        async with app.client(key) as http:
            uploaded = await http.post(
                "/v1/files", content=form(lines_of([chat(f"{n}") for n in range(9)])), headers=FORM
            )
            left = [uploaded.headers["x-ratelimit-remaining-requests"]]
            given = {"input_file_id": uploaded.json()["id"], "endpoint": CHAT, "completion_window": "24h"}
            batch = await http.post("/v1/batches", json=given)
            left.append(batch.headers["x-ratelimit-remaining-requests"])
            done = await ended(http, batch.json()["id"])
            assert ["2", "1"] == left
            assert 9 == done["request_counts"]["completed"]
            bodies = [each["response"]["body"] for each in (await results(http, done["id"])).values()]
            assert 200 == (await http.post(CHAT, json=chat(max_tokens=1))).status_code
            assert 429 == (await http.post("/v1/batches", json=given)).status_code
        used = sum(body["usage"]["total_tokens"] for body in bodies)
        assert used <= (await app.usage(key))["used"] < used + 50


async def test_a_batch_over_its_quota_fails_the_lines_that_are_left(tmp_path: Path):
    """With the quota's own error; those that were answered stay, and no token is charged beyond."""
    async with running(tmp_path) as app:
        key = await app.key(limits={"monthly_tokens": 100})
        async with app.client(key) as http:
            batch = await create(http, lines_of([chat(f"line {n}") for n in range(12)]))
            done = await ended(http, batch["id"])
            found = await results(http, batch["id"])
        counts = done["request_counts"]
        assert ("completed", 12) == (done["status"], counts["completed"] + counts["failed"])
        assert counts["completed"] > 0
        codes = {
            each["response"]["body"]["error"]["code"]
            for each in found.values()
            if each["response"]["status_code"] != 200
        }
        assert {"insufficient_quota"} == codes
        assert (await app.usage(key))["used"] <= 100


async def test_another_tenant_finds_nothing(tmp_path: Path):
    async with running(tmp_path) as app:
        anna, friend, bert = await app.key(owner="anna"), await app.key(owner="anna"), await app.key(owner="bert")
        async with app.client(anna) as http:
            batch = await create(http, lines_of([chat()]))
            done = await ended(http, batch["id"])
        paths = [f"/v1/batches/{batch['id']}", f"/v1/batches/{batch['id']}/results"]
        for file in (done["input_file_id"], done["output_file_id"]):
            paths += [f"/v1/files/{file}", f"/v1/files/{file}/content"]
        async with app.client(bert) as http:
            assert {404} == {(await http.get(path)).status_code for path in paths}
            assert 404 == (await http.post(f"{paths[0]}/cancel")).status_code
            assert 404 == (await http.delete(f"/v1/files/{done['input_file_id']}")).status_code
            given = {"input_file_id": done["input_file_id"], "endpoint": CHAT, "completion_window": "24h"}
            assert 400 == (await http.post("/v1/batches", json=given)).status_code
            assert ([], []) == tuple([(await http.get(path)).json()["data"] for path in ("/v1/files", "/v1/batches")])
        async with app.client(friend) as http:
            assert {200} == {(await http.get(path)).status_code for path in paths}


async def test_a_revoked_key_stops_its_batches(tmp_path: Path):
    """What was answered before stays, for the other keys of its owner."""
    async with running(tmp_path) as app, app.client() as admin:
        key = await app.key(owner="anna")
        async with app.client(key) as http:
            batch = await create(http, lines_of([chat(f"line {n}", max_tokens=400) for n in range(400)]))
        key_id = next(each["id"] for each in (await admin.get("/v1/keys")).json()["keys"] if each["owner"] == "anna")
        assert 200 == (await admin.delete(f"/v1/keys/{key_id}")).status_code
        async with app.client(await app.key(owner="anna")) as http:
            done = await ended(http, batch["id"])
    assert ("cancelled", ["invalid_api_key"]) == (done["status"], [each["code"] for each in done["errors"]["data"]])
    assert done["request_counts"]["completed"] < 400


async def test_a_cancelled_batch_has_the_results_that_there_were(tmp_path: Path):
    async with running(tmp_path) as app, app.client() as http:
        batch = await create(http, lines_of([chat(f"line {n}") for n in range(400)]))
        await progress(http, batch["id"])
        assert "cancelling" == (await http.post(f"/v1/batches/{batch['id']}/cancel")).json()["status"]
        done = await ended(http, batch["id"])
        lines = (await http.get(f"/v1/files/{done['output_file_id']}/content")).text.splitlines()
        again = await http.post(f"/v1/batches/{batch['id']}/cancel")
    assert ("cancelled", "cancelled") == (done["status"], again.json()["status"])
    assert 0 < len(lines) == done["request_counts"]["completed"] < 400


async def test_personal_data_is_masked_where_it_is_masked_live_and_files_are_as_sent(tmp_path: Path):
    secret = "jane.doe@example.com"
    content = lines_of([chat(f"I am {secret}", max_tokens=40)])
    engine = RecordingEngine("echo")
    async with running(tmp_path, engine=engine) as app, app.client() as http:
        batch = await create(http, content)
        done = await ended(http, batch["id"])
        assert secret in (await http.get(f"/v1/files/{done['input_file_id']}/content")).text
        assert secret not in (await http.get(f"/v1/batches/{batch['id']}/results")).text
    assert "[EMAIL]" in engine.requests[0].messages[-1].all_text


async def test_a_filter_that_refuses_refuses_the_line(tmp_path: Path):
    async with running(tmp_path, pii={"input": "block"}) as app, app.client() as http:
        batch = await create(http, lines_of([chat("I am jane.doe@example.com"), chat()]))
        await ended(http, batch["id"])
        found = await results(http, batch["id"])
    assert (400, 200) == tuple(found[name]["response"]["status_code"] for name in ("c0", "c1"))
    assert "pii_blocked" == found["c0"]["response"]["body"]["error"]["code"]


async def test_a_line_may_neither_stream_nor_be_longer_than_a_body(tmp_path: Path):
    async with running(tmp_path, security={"max_body_bytes": 2000}) as app, app.client() as http:
        batch = await create(http, lines_of([chat(stream=True), chat("a" * 2000), chat()]))
        await ended(http, batch["id"])
        found = await results(http, batch["id"])
    assert [400, 413, 200] == [found[f"c{n}"]["response"]["status_code"] for n in range(3)]
    assert "stream" == found["c0"]["response"]["body"]["error"]["param"]


@pytest.mark.parametrize(
    ("content", "code"),
    [(b'{"custom_id": "a"}', 400), (lines_of([chat()], "/v1/chat"), 400), (b"", 400), (b"\n", 400)],
)
async def test_lines_that_name_no_endpoint_make_no_batch(tmp_path: Path, content: bytes, code: int):
    async with running(tmp_path) as app, app.client() as http:
        refused = await http.post("/v1/batches", content=content, headers=JSON_LINES)
        assert (code, "invalid_request_error") == (refused.status_code, refused.json()["error"]["type"])
        assert [] == (await http.get("/v1/files")).json()["data"]


async def test_a_batch_of_wrong_lines_fails_and_names_them(tmp_path: Path):
    content = lines_of([chat(), chat()]) + b"\n{"
    async with running(tmp_path, batches={"max_lines": 2}) as app, app.client() as http:
        done = [await ended(http, (await create(http, each))["id"]) for each in (content, lines_of([chat()] * 3))]
    assert ["failed", "failed"] == [each["status"] for each in done]
    assert [3, None] == [each["errors"]["data"][0]["line"] for each in done]
    assert "too_many_requests" == done[1]["errors"]["data"][0]["code"]


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        (form(b"x", purpose="assistants"), 400, "purpose"),
        (form(b"x", **{"expires_after[seconds]": "3600"}), 400, "expires_after[anchor]"),
        (
            form(b"x", **{"expires_after[anchor]": "created_at", "expires_after[seconds]": "1"}),
            400,
            "expires_after[seconds]",
        ),
        (
            form(b"x", **{"expires_after[anchor]": "created_at", "expires_after[seconds]": "x"}),
            400,
            "expires_after[seconds]",
        ),
        (form(b"x", other="x"), 400, None),
        (b"--b0--", 400, "file"),
        (form(b"x" * 1001), 413, None),
        (form(b"x" * 20_000), 413, None),
    ],
)
async def test_an_upload_that_cannot_be_stored_leaves_nothing(
    tmp_path: Path, body: bytes, status: int, param: str | None
):
    async with running(tmp_path, batches={"max_file_bytes": 1000}) as app, app.client() as http:
        refused = await http.post("/v1/files", content=body, headers=FORM)
        assert (status, param) == (refused.status_code, refused.json()["error"]["param"]), refused.text
        assert [] == (await http.get("/v1/files")).json()["data"]


async def test_uploads_may_be_longer_than_other_bodies_and_those_may_not(tmp_path: Path):
    async with running(tmp_path, security={"max_body_bytes": 2000}) as app, app.client() as http:
        uploaded = await http.post("/v1/files", content=form(b"x" * 100_000), headers=FORM)
        assert (200, 100_000) == (uploaded.status_code, uploaded.json()["bytes"])
        long = {"input_file_id": "file-1", "endpoint": CHAT, "completion_window": "24h", "metadata": {"a": "x" * 3000}}
        assert 413 == (await http.post("/v1/batches", json=long)).status_code
        assert 413 == (await http.post(CHAT, json=chat("x" * 3000))).status_code


async def test_a_tenant_has_so_many_unfinished_batches_and_no_more(tmp_path: Path):
    async with running(tmp_path, batches={"max_unfinished": 1}) as app, app.client() as http:
        batch = await create(http, lines_of([chat(f"line {n}") for n in range(300)]))
        refused = await http.post("/v1/batches", content=lines_of([chat()]), headers=JSON_LINES)
        assert (429, True) == (refused.status_code, "max_unfinished" in refused.text)
        await http.post(f"/v1/batches/{batch['id']}/cancel")
        await ended(http, batch["id"])
        await create(http, lines_of([chat()]))


async def test_a_batch_that_another_one_came_before_is_refused_without_leaving_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Both were let in while there was a place for one."""

    async def let_in(*_: Any) -> None:
        return

    monkeypatch.setattr(BatchStore, "check_place", let_in)
    async with running(tmp_path, batches={"max_unfinished": 1}) as app, app.client() as http:
        await create(http, lines_of([chat(f"line {n}") for n in range(300)]))
        refused = await http.post("/v1/batches", content=lines_of([chat()]), headers=JSON_LINES)
        files = (await http.get("/v1/files", params={"purpose": "batch"})).json()["data"]

    assert (429, True) == (refused.status_code, "max_unfinished" in refused.text)
    assert 1 == len(files)


async def test_what_is_switched_off_is_not_there(tmp_path: Path):
    async with running(tmp_path, batches={"enabled": False}) as app, app.client() as http:
        replies = [await http.get("/v1/files"), await http.get("/v1/batches")]
        replies += [await http.post("/v1/files", content=form(b"x"), headers=FORM)]
        replies += [await http.post("/v1/batches", content=lines_of([chat()]), headers=JSON_LINES)]
    assert {404} == {reply.status_code for reply in replies}
    assert all("switched off" in reply.text for reply in replies)


async def test_a_batch_goes_on_where_the_service_was_stopped(tmp_path: Path):
    """A shutdown gives its lines back: they need not wait for a lease."""
    settings: dict[str, Any] = {"cache": {"enabled": False}, "batches": {"lease_seconds": 10 * START_SECONDS}}
    async with running(tmp_path, **settings) as app, app.client() as http:
        batch = await create(http, lines_of([chat(f"line {n}") for n in range(60)]))
        await progress(http, batch["id"])
    async with running(tmp_path, **settings) as app, app.client() as http:
        done = await ended(http, batch["id"])
        found = await results(http, batch["id"])
    assert (60, 60) == (done["request_counts"]["completed"], len(found))
