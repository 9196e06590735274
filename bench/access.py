"""Measure what authentication, limits, quota and usage log cost a request, on SQLite or another database.

    python -m bench.access [--requests 2000] [--url postgresql://...]

Does, in one process and without HTTP or a model, all that these parts do for one request of a key with every kind of
limit, with the log's rows written behind it as in the service.  The event loop's lag shows whether anything blocks it.
"""

import argparse
import asyncio
import gc
import statistics
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from app.access.access import AccessControl
from app.access.admission import AdmissionControl
from app.access.limits import LimitSettings
from app.config import Settings, load_settings
from app.engine.echo import EchoEngine
from app.generation.context_window import FittedPrompt
from app.generation.metering import UsageRecorder
from app.generation.request_stats import RequestStats
from app.requests import GenerationRequest
from app.stores.memory_admission import MemoryAdmissionStore
from app.telemetry import Metrics

LIMITS = LimitSettings(
    monthly_tokens=10**12, requests_per_minute=10**7, burst=10**6, tokens_per_minute=10**9, parallel_requests=1000
)


class Request:
    """Everything that one request does in `app.access`."""

    def __init__(self, access: AccessControl, key: bytes) -> None:
        self._access, self._key = access, key
        self._metrics = Metrics(["echo"]).model("echo")
        self._info = EchoEngine().info
        self._admission = AdmissionControl(MemoryAdmissionStore(), access.quotas, on_refusal=lambda limit: None)
        self._usage = UsageRecorder(log=access.log, cached_prompt=0, cached_completion=0, store_text=False)

    async def run(self, number: int) -> float:
        """Run it once and return its seconds."""
        began = time.perf_counter()
        caller = await self._access.authenticator.authenticate(self._key)
        if caller is None:
            raise RuntimeError("the key is not known")
        request = GenerationRequest(id=f"r{number}", tenant=caller.tenant, text="")
        async with self._admission.admit(caller) as admitted:
            with self._usage.record(request, caller) as record:
                record.begin(self._info, FittedPrompt(request=request, prompt_tokens=100, max_tokens=100))
                async with self._admission.reserve(caller, 200) as reservation:
                    with record.charge(RequestStats(self._metrics, (request,)), reservation):
                        await admitted.limits()
        return time.perf_counter() - began


async def lag(found: list[float]) -> None:
    """Append how late the loop runs a timer, until it is cancelled."""
    while True:
        due = time.perf_counter() + 0.005
        await asyncio.sleep(0.005)
        found.append(time.perf_counter() - due)


async def _same(text: str, *, cut: bool = False) -> str:
    return text


async def measure(settings: Settings, requests: int) -> None:
    """Print a row for one request at a time and one for many."""
    access = AccessControl(settings, configured_key=None, bootstrap_key=None, mask=_same, on_drop=lambda count: None)
    await access.start()
    _, key = await access.keys.create(role="standard", limits=LIMITS)
    request, late = Request(access, key.encode()), list[float]()
    watching = asyncio.create_task(lag(late))
    print(f"{'SQLite' if access.database.sqlite else 'Postgres'}, {requests} requests\n")
    print("| at once | p50 ms | p99 ms | requests/s | loop lag p99 ms |\n|---|---|---|---|---|")
    for clients in (1, 32):
        took: list[float] = []

        async def send(clients: int = clients, took: list[float] = took) -> None:
            for number in range(requests // clients):
                took.append(await request.run(number))

        late.clear()
        began = time.perf_counter()
        await asyncio.gather(*(send() for _ in range(clients)))
        rate = len(took) / (time.perf_counter() - began)
        cuts, lags = statistics.quantiles(took, n=100), statistics.quantiles(late, n=100)
        print(f"| {clients} | {1000 * cuts[49]:.2f} | {1000 * cuts[98]:.2f} | {rate:.0f} | {1000 * lags[98]:.1f} |")
    watching.cancel()
    with suppress(asyncio.CancelledError):
        await watching
    await access.close()


def main() -> None:
    """Measure on a database that is thrown away, or on a given one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--url")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        url = arguments.url or f"sqlite:///{Path(folder) / 'service.db'}"
        settings = load_settings("absent.yml", None, database={"url": url})
        # As the service does once it is ready: a full collection would pause the loop for longer than any request.
        gc.collect()
        gc.freeze()
        asyncio.run(measure(settings, arguments.requests))


if __name__ == "__main__":
    main()
