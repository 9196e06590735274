"""OpenAI's Python client: the Responses API."""

import json

import scenario as s
from openai import OpenAI
from pydantic import BaseModel


class Record(BaseModel):
    """A structured answer."""

    name: str
    age: int


client = OpenAI()
first = client.responses.create(model=s.MODEL, input="My name is Tovin.", temperature=0)
second = client.responses.create(model=s.MODEL, input="What is my name?", previous_response_id=first.id, temperature=0)
s.check("conversation", "Tovin", second.output_text)
s.check("retrieve", second.output_text, client.responses.retrieve(second.id).output_text)
client.responses.delete(first.id)

with client.responses.stream(model=s.MODEL, input=s.CHAT, temperature=0) as stream:
    for _ in stream:
        pass
    s.check("stream", s.CHAT_ANSWER, stream.get_final_response().output_text)

tool = {"type": "function", "name": s.TOOL_NAME, "description": s.TOOL_DESCRIPTION, "parameters": s.PARAMETERS}
called = client.responses.create(model=s.MODEL, input=s.TOOL_QUESTION, tools=[tool], temperature=0)
(call,) = [item for item in called.output if item.type == "function_call"]
s.check("tool call", {"city": "London"}, json.loads(call.arguments))
reply = client.responses.create(
    model=s.MODEL,
    input=[{"type": "function_call_output", "call_id": call.call_id, "output": s.TOOL_RESULT}],
    previous_response_id=called.id,
    tools=[tool],
    temperature=0,
)
s.check("answer from the tool", s.TOOL_RESULT, reply.output_text)

parsed = client.responses.parse(model=s.MODEL, input=s.RECORD_QUESTION, text_format=Record, temperature=0)
s.check_record(parsed.output_parsed.name, parsed.output_parsed.age)
