"""Clients without a session send the whole conversation each time: what limits it is the context window alone."""

from typing import Any

import pytest

from tests.web.harness import AUTH, MODEL, RecordingEngine, Web, make_web

CHATS, TEXTS = "/v1/chat/completions", "/v1/completions"
SENTENCE = "What is the capital of the country in which this river has its source, and who founded it? "


async def web_of(engine: RecordingEngine, **sections: Any) -> Web:
    return await make_web(engines={MODEL: engine}, cache={"enabled": False}, **sections)


def resent(turns: int, text: str = SENTENCE) -> list[dict[str, str]]:
    """Return a conversation of so many turns, the last of which is to be answered; numbered, after a system message."""
    messages = [{"role": "system", "content": "Be brief."}]
    for number in range(turns):
        messages += [{"role": "user", "content": f"{number} {text}"}, {"role": "assistant", "content": text}]
    return messages[:-1]


@pytest.mark.parametrize("path", [CHATS, "/v1/chat"])
async def test_a_conversation_of_twenty_turns_is_answered_by_default(path):
    """Each of them sent again with the next, as chat pages do; the last has 3,600 characters and more."""
    engine = RecordingEngine()
    web = await web_of(engine)
    async with web.client(**AUTH) as client:
        for turns in range(1, 21):
            reply = await client.post(path, json={"messages": resent(turns), "max_tokens": 5})
            assert 200 == reply.status_code, reply.text

    assert 40 == len(engine.requests[-1].messages)


async def test_a_thousand_short_messages_are_no_reason_to_refuse():
    web = await web_of(RecordingEngine(context_length=100_000))
    async with web.client(**AUTH) as client:
        reply = await client.post(CHATS, json={"messages": resent(500, "a"), "max_tokens": 1})

    assert 200 == reply.status_code, reply.text


@pytest.mark.parametrize(
    ("path", "fields", "most"),
    [
        (CHATS, {"truncation": "auto"}, 590),
        (CHATS, {"truncate_prompt_tokens": -1}, 590),
        (CHATS, {"truncate_prompt_tokens": 300}, 300),
        ("/v1/chat", {"truncation": "auto"}, 590),
    ],
)
async def test_older_turns_go_where_the_client_asks_for_it(path, fields, most):
    """Whole turns, the oldest first, as many as must; the system message and the last one stay."""
    engine = RecordingEngine(context_length=600)
    web = await web_of(engine)
    async with web.client(**AUTH) as client:
        plain = await client.post(path, json={"messages": resent(20), "max_tokens": 10})
        reply = await client.post(path, json={"messages": resent(20), "max_tokens": 10, **fields})

    assert (400, 200) == (plain.status_code, reply.status_code), reply.text
    sent = [message.content for message in engine.requests[0].messages]
    whole = [message["content"] for message in resent(20)]
    assert sent == [whole[0], *whole[len(whole) - len(sent) + 1 :]]
    assert sent[1].split()[0].isdigit()
    tokens = engine.requests[0].prompt_tokens
    assert tokens <= most < tokens + 2 * (len(SENTENCE) + 4)
    if path == "/v1/chat":
        assert {"turns_kept": len(sent) // 2 - 1, "turns_dropped": 20 - len(sent) // 2}.items() <= reply.json()[
            "context"
        ].items()


async def test_a_response_leaves_older_turns_out_where_its_client_asks_for_it():
    """In OpenAI's newer API too, which has the field from the beginning."""
    engine = RecordingEngine(context_length=600)
    web = await web_of(engine)
    async with web.client(**AUTH) as client:
        body = {"input": resent(20), "max_output_tokens": 20, "store": False}
        plain = await client.post("/v1/responses", json=body)
        reply = await client.post("/v1/responses", json={**body, "truncation": "auto"})

    assert (400, 200) == (plain.status_code, reply.status_code), reply.text
    assert "Be brief." == engine.requests[0].messages[0].content
    assert 3 < len(engine.requests[0].messages) < 10


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (TEXTS, {"truncation": "auto"}),
        (TEXTS, {"truncate_prompt_tokens": -1}),
        ("/v1/generate", {"truncation": "auto"}),
    ],
)
@pytest.mark.parametrize("as_tokens", [False, True])
async def test_the_beginning_of_a_prompt_goes_where_the_client_asks_for_it(path, fields, as_tokens):
    engine = RecordingEngine(context_length=100)
    web = await web_of(engine)
    text = "".join(map(chr, range(500, 800)))
    prompt = list(range(500, 800)) if as_tokens and path == TEXTS else text
    async with web.client(**AUTH) as client:
        plain = await client.post(path, json={"prompt": prompt, "max_tokens": 10})
        reply = await client.post(path, json={"prompt": prompt, "max_tokens": 10, **fields})

    assert (400, 200) == (plain.status_code, reply.status_code), reply.text
    assert tuple(range(710, 800)) == engine.requests[0].prompt_ids


async def test_a_conversation_that_is_too_long_is_refused_as_openai_does():
    """Its clients look for the first words; how many tokens there are is said, and what may be done."""
    web = await web_of(RecordingEngine(context_length=600))
    async with web.client(**AUTH) as client:
        reply = await client.post(CHATS, json={"messages": resent(20), "max_tokens": 10})

    error = reply.json()["error"]
    assert ("context_length_exceeded", "messages") == (error["code"], error["param"])
    assert error["message"].startswith("This model's maximum context length is 600 tokens, but the request needs 3")
    assert "for the prompt and 10 for the completion" in error["message"]


async def test_characters_are_counted_only_where_that_is_configured():
    """The message names the setting."""
    async with (await web_of(RecordingEngine(context_length=100_000))).client(**AUTH) as client:
        assert 200 == (await client.post(TEXTS, json={"prompt": "a" * 50_000})).status_code
    limited = await web_of(RecordingEngine(context_length=100_000), security={"max_prompt_chars": 4000})
    async with limited.client(**AUTH) as client:
        replies = [await client.post(TEXTS, json={"prompt": "a" * length}) for length in (4000, 4001)]

    assert [200, 400] == [reply.status_code for reply in replies]
    assert "security.max_prompt_chars" in replies[1].json()["error"]["message"]
