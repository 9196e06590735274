"""OpenAI's Python client: chat completions."""

import json

import scenario as s
from openai import OpenAI
from pydantic import BaseModel


class Record(BaseModel):
    """A structured answer."""

    name: str
    age: int


client = OpenAI()
answer = client.chat.completions.create(model=s.MODEL, messages=s.user(s.CHAT), temperature=0)
s.check("chat", s.CHAT_ANSWER, answer.choices[0].message.content)

chunks = client.chat.completions.create(model=s.MODEL, messages=s.user(s.CHAT), temperature=0, stream=True)
s.check("stream", s.CHAT_ANSWER, "".join(chunk.choices[0].delta.content or "" for chunk in chunks))

messages = s.user(s.TOOL_QUESTION)
called = client.chat.completions.create(model=s.MODEL, messages=messages, tools=[s.TOOL], temperature=0)
message = called.choices[0].message
s.check("finish reason", "tool_calls", called.choices[0].finish_reason)
(call,) = message.tool_calls
s.check("tool call", {"city": "London"}, json.loads(call.function.arguments))
messages += [message, {"role": "tool", "tool_call_id": call.id, "content": s.TOOL_RESULT}]
reply = client.chat.completions.create(model=s.MODEL, messages=messages, tools=[s.TOOL], temperature=0)
s.check("answer from the tool", s.TOOL_RESULT, reply.choices[0].message.content)

with client.chat.completions.stream(
    model=s.MODEL, messages=s.user(s.TOOL_QUESTION), tools=[s.TOOL], temperature=0
) as stream:
    streamed = stream.get_final_completion().choices[0].message.tool_calls[0]
s.check("streamed tool call", {"city": "London"}, json.loads(streamed.function.arguments))

parsed = client.chat.completions.parse(
    model=s.MODEL, messages=s.user(s.RECORD_QUESTION), response_format=Record, temperature=0
)
record = parsed.choices[0].message.parsed
s.check_record(record.name, record.age)
