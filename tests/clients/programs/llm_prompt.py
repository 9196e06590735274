"""The `llm` tool with an OpenAI-compatible model of its own configuration."""

import json

import scenario as s
from llm.default_plugins.openai_models import Chat

model = Chat(
    model_id="service",
    model_name=s.MODEL,
    api_base=s.BASE_URL,
    supports_schema=True,
    supports_tools=True,
)
model.key = s.KEY
s.check("chat", s.CHAT_ANSWER, model.prompt(s.CHAT, temperature=0, stream=False).text())
s.check("stream", s.CHAT_ANSWER, "".join(model.prompt(s.CHAT, temperature=0)))


def get_weather(city: str) -> str:
    """Get the weather in a city."""
    return s.TOOL_RESULT


s.check(
    "answer from the tool",
    s.TOOL_RESULT,
    model.chain(s.TOOL_QUESTION, tools=[get_weather], options={"temperature": 0}).text(),
)
record = json.loads(model.prompt(s.RECORD_QUESTION, schema=s.RECORD_SCHEMA, temperature=0, stream=False).text())
s.check_record(record["name"], record["age"])
