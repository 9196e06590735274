"""Starting, stopping, hanging up and being killed, on real sockets and processes."""

import getpass
import json
import os
import re
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.e2e.conftest import KEY, ROOT, Service, Start, environment, ready, serve
from tests.e2e.test_conversation import events
from tests.ports import free_port
from tests.waiting import HANG_SECONDS, START_SECONDS, wait_for

pytestmark = pytest.mark.e2e

LONG: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Tell me a story"}],
    "max_tokens": 1900,
    "ignore_eos": True,
    "cache": False,
}
"""Does not end by itself."""


def generated(service: Service, request_id: str) -> int:
    """Return how many tokens the inference log says of a request; waits until it stands there."""
    found: list[tuple[int]] = []

    def is_logged() -> bool:
        with closing(sqlite3.connect(service.log.parent / "data" / "service.db")) as database:
            query = "SELECT completion_tokens FROM inference_log WHERE request_id = ?"
            found.extend(database.execute(query, [request_id]))
        return bool(found)

    wait_for(is_logged)
    return found[0][0]


def idle(service: Service) -> bool:
    engine = service.engine()
    return (0, 0) == (engine["running"], engine["waiting"])


def test_importing_the_application_does_not_import_torch() -> None:
    """The API process stays small and starts fast; only the worker knows tensors."""
    code = "import sys, app.main, app.server; sys.exit('torch' in sys.modules)"

    assert 0 == subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, timeout=60).returncode


def test_a_client_that_hangs_up_a_stream_frees_the_model(service: Service) -> None:
    """The generation stops long before its end; the next request is served at once."""
    headers, body = {"X-Request-ID": "hang-up"}, {**LONG, "stream": True}
    with service.client.stream("POST", "/v1/chat", json=body, headers=headers) as response:
        # Kept: a generator that is thrown away closes the connection.
        arriving = events(response)
        assert "delta" == next(arriving)[0]
        assert 1 == service.engine()["running"]

    wait_for(lambda: idle(service))
    assert generated(service, "hang-up") < LONG["max_tokens"]


def test_a_client_that_hangs_up_while_waiting_for_a_whole_answer_frees_the_model(service: Service) -> None:
    """The same without a stream, where no chunk would tell that the client has gone."""
    body = json.dumps(LONG).encode()
    host, port = service.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as client:
        head = f"POST /v1/chat HTTP/1.1\r\nHost: {host}\r\nX-API-Key: {KEY}\r\nContent-Type: application/json\r\n"
        head += "X-Request-ID: whole\r\n"
        client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        wait_for(lambda: service.engine()["running"] == 1)

    wait_for(lambda: idle(service))
    assert generated(service, "whole") < LONG["max_tokens"]
    wait_for(lambda: '"status_code": 499' in service.log.read_text())


def test_two_requests_of_one_session_take_turns(service: Service) -> None:
    """Eight turns sent at once leave eight whole pairs."""

    def send(number: int) -> None:
        service.chat(f"Repeat after me: word{number}", session_id="turns", max_tokens=20)

    threads = [threading.Thread(target=send, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)

    roles = [message["role"] for message in service.get("/v1/sessions/turns").json()["messages"]]
    assert ["user", "assistant"] * 8 == roles


def test_a_killed_worker_ends_its_requests_at_once_and_is_started_again(service: Service) -> None:
    """The stream ends with an error event, readiness goes off, and the service serves again by itself."""
    restarts = service.engine()["restarts"]
    with service.client.stream("POST", "/v1/chat", json={**LONG, "stream": True}) as response:
        got = events(response)
        next(got)
        service.worker().kill()
        name, data = list(got)[-1]

    assert ("error", "service_unavailable") == (name, data["error"])
    assert 503 == service.get("/readyz").status_code
    assert 200 == service.get("/health").status_code
    refused = service.client.post("/v1/generate", json={"prompt": "x"})
    assert (503, True) == (refused.status_code, "retry-after" in refused.headers)
    wait_for(lambda: ready(service), START_SECONDS)
    assert "Paris" in service.chat("What is the capital of France?")["message"]["content"]
    assert restarts + 1 == service.engine()["restarts"]


COUNT = {
    "messages": [{"role": "user", "content": "Count from 1 to 50"}],
    "temperature": 0,
    "cache": False,
    "stream": True,
}
"""About 170 tokens."""


def stream_in_threads(
    service: Service, bodies: list[dict[str, Any]]
) -> tuple[list[threading.Thread], list[tuple[str, str]]]:
    """Let clients stream these at once; the list fills with each one's last event and its finish reason."""
    last: list[tuple[str, str]] = []

    def read(body: dict[str, Any]) -> None:
        # A connection that is cut leaves no last event, which is what a test then sees.
        with (
            suppress(httpx.TransportError),
            service.client.stream("POST", "/v1/chat", json={**body, "stream": True}) as response,
        ):
            name, data = list(events(response))[-1]
            last.append((name, data["finish_reason"]))

    threads = [threading.Thread(target=read, args=[body]) for body in bodies]
    for thread in threads:
        thread.start()
    wait_for(lambda: service.engine()["running"] + service.engine()["waiting"] == len(bodies))
    return threads, last


def test_sigterm_ends_every_stream_with_a_last_event_and_leaves_no_process(start: Start) -> None:
    """Streams go on until the grace period is over; new work is refused meanwhile; then the rest ends with abort."""
    # Uncompiled, so that the long ones are not done within the grace period.
    service = start(APP__SHUTDOWN_GRACE_SECONDS="5", MODEL__COMPILE="none")
    processes = [psutil.Process(service.process.pid), service.worker()]
    short = {**COUNT, "max_tokens": 60}
    threads, last = stream_in_threads(service, [short, LONG, short, LONG])

    service.process.send_signal(signal.SIGTERM)
    signalled = time.monotonic()
    wait_for(lambda: service.get("/readyz").status_code == 503)
    refused = service.client.post("/v1/generate", json={"prompt": "x"})
    for thread in threads:
        thread.join(HANG_SECONDS)
    took = time.monotonic() - signalled

    assert (503, "service_unavailable") == (refused.status_code, refused.json()["error"])
    assert "retry-after" in refused.headers
    assert [("done", "abort")] * 2 + [("done", "length")] * 2 == sorted(last)
    assert took > 4.9
    assert 0 == service.process.wait(HANG_SECONDS)
    wait_for(lambda: not any(process.is_running() for process in processes))


def test_sigterm_lets_a_running_stream_finish_and_then_stops(start: Start) -> None:
    """Within the grace period the answer comes to its own end, and the service does not wait longer than that."""
    service = start(MODEL__ENGINE="echo", MODEL__MAX_MODEL_LEN="1000000")
    # Long enough that they are not done before anybody has seen them run.
    threads, last = stream_in_threads(service, [{**endless(str(number)), "max_tokens": 10_000} for number in range(2)])

    assert 0 == service.stop(15)

    for thread in threads:
        thread.join(HANG_SECONDS)
    assert [("done", "length")] * 2 == last


@pytest.mark.soak
def test_a_signal_that_comes_twice_within_a_second_counts_once(start: Start) -> None:
    """`make run` passes SIGTERM on to a process that got it too; running answers still finish."""
    service = start(MODEL__COMPILE="none")  # slow enough that the answers are not over within a tenth of a second
    threads, last = stream_in_threads(service, [COUNT] * 2)

    service.process.send_signal(signal.SIGTERM)
    time.sleep(0.1)
    service.process.send_signal(signal.SIGTERM)

    assert 0 == service.process.wait(HANG_SECONDS)
    for thread in threads:
        thread.join(HANG_SECONDS)
    assert [("done", "stop")] * 2 == last


def endless(request_id: str) -> dict[str, Any]:
    """Return a body for either dialect that the echo engine streams for minutes."""
    messages = [{"role": "user", "content": f"Tell me story {request_id}"}]
    return {"model": "echo", "messages": messages, "max_tokens": 400_000, "ignore_eos": True, "stream": True}


def stream_until_the_end(service: Service, path: str, request_id: str, lines: dict[str, list[str]]) -> None:
    body, headers = endless(request_id), {"X-Request-ID": request_id}
    # A connection that is cut leaves no last line, which is what a test then sees.
    with (
        suppress(httpx.TransportError),
        service.client.stream("POST", path, json=body, headers=headers, timeout=20) as response,
    ):
        for line in response.iter_lines():
            if line.startswith("data: "):
                lines.setdefault(request_id, []).append(line.removeprefix("data: "))


def logged_rows(service: Service) -> dict[str, str | None]:
    """Return the finish reason of every request in the inference log, by request id."""
    with closing(sqlite3.connect(service.log.parent / "data" / "service.db")) as database:
        return dict(database.execute("SELECT request_id, finish_reason FROM inference_log").fetchall())


@pytest.mark.parametrize("sent", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.soak)])
def test_a_second_signal_ends_every_stream_with_a_last_event_and_loses_no_row(
    start: Start, sent: signal.Signals
) -> None:
    """Whoever presses Ctrl-C again does not want to wait; clients see an end, and the log stays complete."""
    settings = {"APP__SHUTDOWN_GRACE_SECONDS": "600", "USAGE_LOG__FLUSH_SECONDS": "60"}
    service = start(MODEL__ENGINE="echo", MODEL__MAX_MODEL_LEN="1000000", **settings)
    lines: dict[str, list[str]] = {}
    paths = {"native": "/v1/chat", "openai": "/v1/chat/completions"}
    threads = [
        threading.Thread(target=stream_until_the_end, args=(service, path, f"{name}-{number}", lines))
        for name, path in paths.items()
        for number in range(3)
    ]
    for thread in threads:
        thread.start()
    wait_for(lambda: len(lines) == len(threads))

    service.process.send_signal(sent)
    time.sleep(1.5)
    assert all(thread.is_alive() for thread in threads)
    service.process.send_signal(sent)
    for thread in threads:
        thread.join(HANG_SECONDS)

    assert not any(thread.is_alive() for thread in threads)
    assert 0 == service.process.wait(HANG_SECONDS)
    for request_id, got in lines.items():
        if request_id.startswith("openai"):
            assert "[DONE]" == got.pop()
            # No finish reason of OpenAI's says that the service ended an answer early.
            assert "service_unavailable" == json.loads(got[-1])["error"]["code"]
        else:
            assert "abort" == json.loads(got[-1])["finish_reason"]
    assert dict.fromkeys(lines, "abort") == logged_rows(service)
    assert "Traceback" not in service.log.read_text()


def test_a_client_that_does_not_read_cannot_hold_up_a_forced_stop(start: Start) -> None:
    """It is disconnected, its request is in the log, and the worker is gone within seconds."""
    service = start(MODEL__ENGINE="echo", MODEL__MAX_MODEL_LEN="1000000", APP__SHUTDOWN_GRACE_SECONDS="600")
    body = json.dumps(endless("deaf")).encode()
    host, port = service.url.removeprefix("http://").split(":")
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect((host, int(port)))
        head = f"POST /v1/chat HTTP/1.1\r\nHost: {host}\r\nX-API-Key: {KEY}\r\nX-Request-ID: deaf\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        client.sendall(head.encode() + body)
        wait_for(lambda: service.engine()["running"] == 1)
        time.sleep(3)  # until the buffers between the two are full

        service.process.send_signal(signal.SIGTERM)
        time.sleep(1.1)
        service.process.send_signal(signal.SIGTERM)
        assert 0 == service.process.wait(HANG_SECONDS)

    assert ["deaf"] == list(logged_rows(service))
    assert "Traceback" not in service.log.read_text()


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A temporary directory for a service; `tmp_path` may be too long for a socket's address."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def test_a_third_signal_kills_the_service_where_a_forced_stop_does_not_end(start: Start, temporary: Path) -> None:
    """The last resort, as with a worker that is suspended: no process stays, and a folder until the next start."""
    service = start(MODEL__COMPILE="none", TMPDIR=str(temporary))
    worker = service.worker()
    stream_in_threads(service, [COUNT])
    worker.suspend()

    for _ in range(3):
        service.process.send_signal(signal.SIGTERM)
        time.sleep(1.1)

    assert -signal.SIGTERM == service.process.wait(HANG_SECONDS)
    wait_for(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE)


@pytest.mark.parametrize(
    "state", ["suspended", *(pytest.param(each, marks=pytest.mark.soak) for each in ("streaming", "loading"))]
)
def test_a_second_signal_leaves_no_folder_of_a_worker(start: Start, temporary: Path, state: str) -> None:
    """The stop is cut short; the worker and its folder still go."""
    service = start(MODEL__COMPILE="none", TMPDIR=str(temporary), wait=state != "loading")
    if state == "loading":
        wait_for(lambda: any(temporary.glob("llm-worker-*")))
    else:
        worker = service.worker()
        stream_in_threads(service, [LONG] * 2)
        if state == "suspended":
            worker.suspend()

    service.process.send_signal(signal.SIGTERM)
    time.sleep(1.1)
    with suppress(ProcessLookupError):
        service.process.send_signal(signal.SIGTERM)

    assert service.process.wait(HANG_SECONDS) in (0, -signal.SIGTERM)
    wait_for(lambda: not any(temporary.glob("llm-worker-*")))
    assert "Traceback" not in service.log.read_text()


def test_a_file_in_the_place_of_a_folder_for_compiled_code_stops_nothing(
    start: Start, temporary: Path, tmp_path: Path
) -> None:
    """Anybody may create one in the temporary directory; the layers are compiled all the same, with one warning."""
    (tmp_path / "compiled").touch()
    for name in (f"llm-service-{os.geteuid()}", f"torchinductor_{getpass.getuser()}"):
        (temporary / name).touch()

    service = start(MODEL__COMPILE="layers", TMPDIR=str(temporary), APP__DATA_DIR=str(tmp_path))

    assert "Paris" in service.chat("What is the capital of France?")["message"]["content"]
    service.logged("compiled code cannot be kept")
    (warning,) = [line for line in service.log.read_text().splitlines() if "compiled code cannot be kept" in line]
    assert 2 == warning.count("something else has its name")


def test_ctrl_c_while_the_model_loads_is_no_error(start: Start) -> None:
    """Exit code 0, and nothing is said of a failure."""
    service = start(wait=False)
    wait_for(lambda: "Application startup complete" in service.log.read_text())

    service.process.send_signal(signal.SIGINT)

    assert 0 == service.process.wait(HANG_SECONDS)
    assert "llm-service:" not in service.log.read_text()


def test_an_idle_service_stops_at_once_on_ctrl_c(start: Start) -> None:
    """SIGINT with nothing to do: exit code 0 within seconds, no traceback."""
    service = start(MODEL__ENGINE="echo")

    service.process.send_signal(signal.SIGINT)

    assert 0 == service.process.wait(HANG_SECONDS)
    assert "Traceback" not in service.log.read_text()


def test_the_first_start_makes_a_key_and_prints_a_curl_that_works(tmp_path: Path) -> None:
    """Printed once, kept in a file that only its owner reads, and the same at the next start."""
    folder = tmp_path / "a folder"
    folder.mkdir()

    def first_lines(port: int) -> str:
        environ = environment(folder / "data", MODEL__ENGINE="echo")
        with subprocess.Popen(
            serve(port), cwd=folder, env=environ, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as process:
            try:
                assert process.stdout is not None
                shown = ""
                while "capital of France" not in shown:
                    line = process.stdout.readline()
                    assert line, shown
                    shown += line
                curl = shown[shown.index("  curl ") :].strip().replace("curl ", "curl -s ")
                answer = subprocess.run(["/bin/bash", "-c", curl], capture_output=True, text=True, timeout=20)
                assert "What is the capital of France?" == json.loads(answer.stdout)["message"]["content"]
                process.send_signal(signal.SIGTERM)
                process.wait(HANG_SECONDS)
            finally:
                process.kill()  # else a failed line above leaves the block waiting for a server that nobody stops
        return shown

    first, second = first_lines(free_port()), first_lines(free_port())

    key_file = folder / "data" / "api_key"
    key = key_file.read_text().strip()
    assert re.fullmatch(r"llm_\w+_\w+", key)
    assert key in first
    assert key not in second
    assert 0o600 == stat.S_IMODE(key_file.stat().st_mode)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"MODEL__NMAE": "x"}, "model.nmae: there is no such key"),
        ({"MODEL__NAME": "models/none"}, "models/none"),
        ({"SECURITY__API_KEY": "change-me-in-env"}, "security.api_key"),
        ({"APP__PROMPTS_DIR": "none"}, "none/base_system.txt"),
        ({"PII__PHONE_REGIONS": '["XX"]'}, "pii.phone_regions"),
    ],
)
def test_a_wrong_start_ends_with_one_clear_line(tmp_path: Path, settings: dict[str, str], message: str) -> None:
    """No traceback: the reason, and an exit code that is not 0."""
    ended = subprocess.run(
        serve(free_port()),
        cwd=tmp_path,
        env=environment(tmp_path, **settings),
        capture_output=True,
        text=True,
        timeout=START_SECONDS,
    )

    assert ended.returncode != 0
    plain = [line for line in ended.stderr.splitlines() if not line.startswith("{")]
    assert 1 == len(plain), ended.stderr
    assert message in plain[0]


def test_a_busy_port_ends_with_one_clear_line(service: Service, tmp_path: Path) -> None:
    """The line names the port and says what to do."""
    port = service.url.rsplit(":", 1)[1]
    ended = subprocess.run(
        serve(int(port)), cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True, timeout=60
    )

    assert 2 == ended.returncode
    assert 1 == len(ended.stderr.splitlines()), ended.stderr
    assert port in ended.stderr
    assert "another program uses it" in ended.stderr


def test_a_minute_of_a_persons_requests_passes_and_a_flood_is_told_when_to_come_back(start: Start) -> None:
    """The default limit: 60 at once and one more each second, streams too; other routes go on."""
    service = start(MODEL__ENGINE="echo", RATE_LIMIT__ENABLED="true")
    body = {"prompt": "x", "cache": False}

    codes = [service.client.post("/v1/generate", json=body).status_code for _ in range(60)]
    further = (service.client.post("/v1/generate", json={**body, "stream": True}) for _ in range(60))
    refused = next(reply for reply in further if reply.status_code != 200)

    assert [200] * 60 == codes
    assert (429, "rate_limit_exceeded") == (refused.status_code, refused.json()["error"])
    assert "1" == refused.headers["retry-after"]
    assert "0" == refused.headers["x-ratelimit-remaining-requests"]
    assert 200 == service.get("/status").status_code


def test_a_request_leaves_one_json_line_with_the_fields_of_an_access_log(service: Service) -> None:
    """A request leaves one line with method, route, status and latency, and its request id."""
    request_id = "log-line-1"
    reply = httpx.get(service.url + "/status", headers={"X-API-Key": KEY, "X-Request-ID": request_id})

    def line() -> dict[str, object] | None:
        found = [entry for entry in service.log.read_text().splitlines() if request_id in entry]
        return json.loads(found[0]) if found else None

    wait_for(lambda: line() is not None)
    entry = line()
    assert entry is not None
    assert request_id == reply.headers["x-request-id"]
    assert ("GET", "/status", 200) == (entry["method"], entry["route"], entry["status_code"])
    assert {"timestamp", "level", "logger", "message", "latency_ms"} <= entry.keys()
