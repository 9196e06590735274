"""What is asked of each kind of server, and what is refused because it would be ignored there."""

from typing import Any

import pytest

from app.engine.remote.servers import SERVERS
from app.engine.remote.wire import request_body
from app.errors import InvalidRequest
from app.types import Grammar, Message, Role, SamplingParams, Tool, ToolChoice
from tests.unit.engine.remote.requests import make_request
from tests.unit.engine.remote.scripted_server import CARD, HELLO, Reply, ScriptedServer, engine_on
from tests.unit.event_streams import finished_of, read

SCHEMA = Grammar("json_schema", '{"type": "object", "properties": {"a": {}}}')
NEUTRAL = {"temperature": 0.0, "max_tokens": 20, "top_p": 1.0}


def cards(**fields: Any) -> Reply:
    return Reply.json({"data": [CARD | fields]})


@pytest.mark.parametrize(
    ("owner", "expected"),
    [
        ("llm-service", "llm-service"),
        ("vllm", "vllm"),
        ("sglang", "sglang"),
        ("llamacpp", "llama.cpp"),
        ("me", "llama.cpp"),
        ("library", "ollama"),
        ("somebody", "openai"),
        (None, "openai"),
    ],
)
async def test_a_server_is_known_by_its_list_of_models(owner: str | None, expected: str):
    """Unless the configuration says what it is."""
    for configured, kind in (("auto", expected), ("openai", "openai")):
        async with engine_on(ScriptedServer(models=cards(owned_by=owner)), server=configured) as engine:
            unsupported = set(engine.info.capabilities.unsupported)
            assert SERVERS[kind].unsupported <= unsupported
            assert ("top_k" in unsupported) == ("top_k" not in SERVERS[kind].sampling)


@pytest.mark.parametrize(
    ("kind", "expected"),
    {
        "llm-service": NEUTRAL | {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "min_tokens": 0},
        "vllm": NEUTRAL | {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "min_tokens": 0},
        "sglang": NEUTRAL | {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "min_tokens": 0},
        "llama.cpp": NEUTRAL | {"top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0},
        "tgi": {"temperature": 0.0, "max_tokens": 20},
        "ollama": NEUTRAL,
        "transformers": NEUTRAL,
        "openai": NEUTRAL,
    }.items(),
)
def test_what_is_neutral_is_said_since_servers_have_other_defaults(kind: str, expected: dict[str, Any]):
    """To each in its own words, and nothing that it does not know."""
    body = request_body(make_request(), "there", SERVERS[kind])

    frame = {"model", "stream", "stream_options", "messages"}
    assert expected == {name: value for name, value in body.items() if name not in frame}
    assert ("there", True) == (body["model"], body["stream"])


@pytest.mark.parametrize(
    ("kind", "expected"),
    {
        "vllm": {"structured_outputs": {"json": {"type": "object", "properties": {"a": {}}}}},
        "openai": {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "answer", "schema": {"type": "object", "properties": {"a": {}}}},
            }
        },
        "llama.cpp": {
            "response_format": {"type": "json_object", "schema": {"type": "object", "properties": {"a": {}}}}
        },
    }.items(),
)
def test_a_schema_stands_where_the_server_looks_for_it(kind: str, expected: dict[str, Any]):
    body = request_body(make_request(sampling={"grammar": SCHEMA}), "m", SERVERS[kind])

    assert expected.items() <= body.items()


def test_any_object_and_an_expression_have_their_own_forms():
    anything = request_body(
        make_request(sampling={"grammar": Grammar("json_schema", '{"type":"object"}')}), "m", SERVERS["openai"]
    )
    expression = request_body(make_request(sampling={"grammar": Grammar("regex", "a+")}), "m", SERVERS["sglang"])

    assert {"type": "json_object"} == anything["response_format"]
    assert "a+" == expression["regex"]


def test_samples_of_one_seed_are_not_alike_and_the_same_every_time():
    """They are requests of their own there."""
    seeds = [request_body(make_request(sampling={"seed": 5, "sample": number}), "m")["seed"] for number in range(4)]

    assert 5 == seeds[0]
    assert 4 == len(set(seeds))
    assert seeds[3] == request_body(make_request(sampling={"seed": 5, "sample": 3}), "m")["seed"]
    assert "seed" not in request_body(make_request(sampling={"sample": 3}), "m")


@pytest.mark.parametrize(
    ("kind", "field", "fields"),
    [
        ("openai", "top_k", {"sampling": {"top_k": 5}}),
        ("vllm", "prompt_logprobs", {"sampling": {"prompt_logprobs": 1}}),
        ("vllm", "stop_token_ids", {"sampling": {"stop_token_ids": (1,)}}),
        ("ollama", "logit_bias", {"sampling": {"logit_bias": ((1, 2.0),)}}),
        ("openai", "grammar", {"sampling": {"grammar": Grammar("regex", "a+")}}),
        ("openai", "grammar", {"sampling": {"grammar": SCHEMA}, "messages": (), "text": "x"}),
        ("vllm", "max_tokens", {"sampling": {"max_tokens": 0}}),
        ("openai", "continue_final_message", {"continue_final_message": True}),
        ("openai", "adapter", {"adapter": "a"}),
        ("openai", "seed", {"sampling": {"seed": 1}}),
        ("openai", "tools", {"tools": (Tool("f"),)}),
    ],
)
async def test_what_a_server_lacks_is_refused_by_name(kind: str, field: str, fields: dict[str, Any]):
    """Nothing is sent; the last two are lacking by configuration."""
    server = ScriptedServer()
    async with engine_on(server, server=kind, unsupported=["seed", "tools"]) as engine:
        with pytest.raises(InvalidRequest) as refused:
            await read(engine.stream(make_request(**fields)))

    assert field == refused.value.details["errors"][0]["field"]
    assert not server.received


@pytest.mark.parametrize(
    ("models", "others", "expected"),
    [
        (cards(max_model_len=777), {}, 777),
        (cards(context_length=888), {}, 888),
        (cards(), {}, 4096),
        (cards(owned_by="llamacpp", meta={"n_ctx_train": 999}), {}, 999),
        (
            cards(owned_by="llamacpp", meta={"n_ctx_train": 9999}),
            {"/props": Reply.json({"default_generation_settings": {"n_ctx": 512}})},
            512,
        ),
    ],
)
async def test_the_context_length_is_what_the_server_says_in_one_of_its_ways(
    models: Reply, others: dict[str, Reply], expected: int
):
    """What llama.cpp's model was trained for may be more than one of its slots has."""
    async with engine_on(ScriptedServer(models=models, others=others)) as engine:
        assert expected == engine.info.context_length


async def test_the_model_has_the_name_that_the_server_knows():
    """Of several the one with the public name, or the configured one; a single one may be called anything."""
    two = Reply.json({"data": [CARD | {"id": "m"}, CARD | {"id": "other"}]})
    for models, model, expected in (
        (two, None, "m"),
        (two, "other", "other"),
        (cards(id="/a/b.gguf"), None, "/a/b.gguf"),
    ):
        server = ScriptedServer(models=models)
        async with engine_on(server, model=model) as engine:
            await read(engine.stream(make_request()))
        assert (expected, "m") == (server.received[0].body["model"], engine.info.model)


@pytest.mark.parametrize("status", [404, 500])
async def test_a_server_without_a_list_of_models_is_what_the_configuration_says(status: int):
    """With the model's name there; without one nobody would know it."""
    server = ScriptedServer(models=Reply(status=status))
    async with engine_on(server, model="there", server="vllm") as engine:
        await read(engine.stream(make_request(sampling={"top_k": 5})))

    assert ("there", 5) == (server.received[0].body["model"], server.received[0].body["top_k"])


async def test_a_server_that_lists_other_models_is_believed_to_have_the_configured_one():
    """`transformers serve` lists the hub's folder on its disk, and serves one of any folder."""
    server = ScriptedServer(models=Reply.json({"data": [CARD | {"id": "a"}, CARD | {"id": "b"}]}))
    async with engine_on(server, model="/models/mine", server="transformers") as engine:
        await read(engine.stream(make_request()))

    assert "/models/mine" == server.received[0].body["model"]


@pytest.mark.parametrize("choice", [ToolChoice("required"), ToolChoice("none"), ToolChoice("required", "f")])
async def test_a_server_that_ignores_whether_tools_must_be_called_is_not_told_so(choice: ToolChoice):
    """What the model may do by itself is passed on."""
    server = ScriptedServer()
    tools = (Tool("f"),)
    async with engine_on(server, server="transformers", model="m") as engine:
        with pytest.raises(InvalidRequest) as refused:
            await read(engine.stream(make_request(tools=tools, tool_choice=choice)))
        assert not server.received
        await read(engine.stream(make_request(tools=tools)))

    assert "tool_choice" == refused.value.details["errors"][0]["field"]
    assert "f" == server.received[0].body["tools"][0]["function"]["name"]


async def test_a_chat_goes_as_messages_and_a_text_to_the_route_of_texts():
    """With its variables for the template where the server takes them, and its progress where that is told."""
    server = ScriptedServer([HELLO], models=cards(owned_by="vllm"))
    assistant = Message(Role.ASSISTANT, "It is")
    async with engine_on(server) as engine:
        chat = make_request(
            messages=(Message(Role.USER, "Hi"), assistant),
            continue_final_message=True,
            template_kwargs=(("enable_thinking", False), ("unset", None)),
            reasoning_effort="low",
        )
        finished = finished_of(await read(engine.stream(chat)))
        await read(engine.stream(make_request(messages=(), text="Once")))
        await read(engine.stream(make_request(messages=(), text="Once", prompt_ids=(1, 2))))

    chatted, text, tokens = server.received
    assert ["/v1/chat/completions", "/v1/completions", "/v1/completions"] == [each.path for each in server.received]
    assert [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "It is"}] == chatted.body["messages"]
    assert (True, False) == (chatted.body["continue_final_message"], chatted.body["add_generation_prompt"])
    assert ({"enable_thinking": False}, "low") == (
        chatted.body["chat_template_kwargs"],
        chatted.body["reasoning_effort"],
    )
    assert {"include_usage": True, "continuous_usage_stats": True} == chatted.body["stream_options"]
    assert ("Once", [1, 2]) == (text.body["prompt"], tokens.body["prompt"])
    assert engine.info.template_variables is None
    assert 7 == finished.usage.prompt_tokens


def test_every_sampling_parameter_is_a_fact_of_every_server():
    """A new one is unsupported everywhere until somebody says where it is."""
    others = [server for server in SERVERS.values() if server.name != "transformers"]
    assert all(SERVERS["openai"].sampling <= server.sampling | {"logit_bias"} for server in others)
    assert all(hasattr(SamplingParams(), name) for server in SERVERS.values() for name in server.sampling)
