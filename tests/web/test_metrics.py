"""What a scrape shows of the real application, and how little of what clients send."""

import random
import string

import httpx

from app.engine.echo import EchoEngine
from tests.web.harness import CHAT, make_web
from tests.web.test_application import said


def series(scrape: str) -> dict[str, float]:
    """Return all series by name and labels, without the times of their creation."""
    lines = (line.rsplit(" ", 1) for line in scrape.splitlines() if line and line[0] != "#")
    return {name: float(value) for name, value in lines if "_created" not in name}


async def scrape(http: httpx.AsyncClient) -> dict[str, float]:
    return series((await http.get("/metrics")).text)


async def test_what_clients_make_up_adds_at_most_two_series() -> None:
    """Hundreds of paths, methods and models, each sent once; one series for their answers, by status."""
    web, draw = await make_web(engines={"echo": EchoEngine(model="echo")}), random.Random(2)
    async with web.client() as http:
        await http.post("/v1/chat", json=CHAT | {"model": "first"})
        await scrape(http)
        before = await scrape(http)
        for _ in range(150):
            word = "".join(draw.choices(string.ascii_letters, k=9))
            await http.get(f"/{word}", headers={"User-Agent": word, "X-Request-ID": word})
            await http.request(word.upper(), "/v1/chat")
            await http.post("/v1/chat", json=CHAT | {"model": word, "session_id": word})
        after = await scrape(http)

    added = after.keys() - before.keys()
    assert {name.partition("{")[0] for name in added} <= {"http_requests_total", "errors_total"}
    assert len([name for name in added if name.startswith("http_")]) <= 2
    assert sum(value for name, value in after.items() if 'endpoint="unmatched"' in name and "requests" in name) == 300


async def test_the_stages_of_a_request_are_measured_for_each_model() -> None:
    """Wait, prompt, tokens and filters, under vLLM's names where it has one."""
    web = await make_web(engines={"echo": EchoEngine(model="echo"), "second": EchoEngine(model="second")})
    async with web.client() as http:
        body = said("hello") | {"model": "second", "max_tokens": 3, "n": 1, "cache": True}
        answers = [await http.post("/v1/chat", json=body) for _ in range(2)]
        figures = await scrape(http)

    assert [200, 200] == [each.status_code for each in answers]
    labels = 'engine="0",model_name="second"'
    for name in ("queue_time", "prefill_time", "decode_time", "inference_time", "time_per_output_token"):
        assert 1 == figures[f"vllm:request_{name}_seconds_count{{{labels}}}"], name
    assert 1 == figures[f"vllm:e2e_request_latency_seconds_count{{{labels}}}"]
    assert 3 == figures[f"vllm:request_params_max_tokens_sum{{{labels}}}"]
    assert 3 == figures[f"vllm:request_max_num_generation_tokens_sum{{{labels}}}"]
    assert 1 == figures[f'vllm:engine_sleep_state{{{labels},sleep_state="awake"}}']
    assert 0 == figures[f'vllm:num_requests_waiting_by_reason{{{labels},reason="capacity"}}']
    assert 1 == figures['vllm:request_success_total{engine="0",finished_reason="length",model_name="second"}']
    assert 0 == figures['vllm:request_decode_time_seconds_count{engine="0",model_name="echo"}']
    assert 2 == figures['pii_filter_seconds_count{direction="input",model="second"}']
    assert 1 == figures['pii_filter_seconds_count{direction="output",model="second"}']
    assert (1, 1) == (figures['cache_hits_total{model="second"}'], figures['cache_misses_total{model="second"}'])


async def test_what_a_full_engine_refuses_is_counted_as_rejected_and_not_as_ended() -> None:
    web = await make_web(engines={"echo": EchoEngine(model="echo", max_running=0)})
    async with web.client() as http:
        answer = await http.post("/v1/chat", json=CHAT)
        figures = await scrape(http)

    assert 503 == answer.status_code
    assert 1 == figures['vllm:admission_rejections_total{engine="0",model_name="echo",reason="queue_full"}']
    assert not [name for name in figures if name.startswith("vllm:request_success_total")]
