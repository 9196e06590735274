"""LiteLLM with an OpenAI-compatible model."""

import json

import litellm
import scenario as s
from pydantic import BaseModel


class Record(BaseModel):
    """A structured answer."""

    name: str
    age: int


route = {"model": f"openai/{s.MODEL}", "api_base": s.BASE_URL, "api_key": s.KEY, "temperature": 0}
s.check("chat", s.CHAT_ANSWER, litellm.completion(messages=s.user(s.CHAT), **route).choices[0].message.content)
chunks = litellm.completion(messages=s.user(s.CHAT), stream=True, **route)
s.check("stream", s.CHAT_ANSWER, "".join(chunk.choices[0].delta.content or "" for chunk in chunks))
messages = s.user(s.TOOL_QUESTION)
message = litellm.completion(messages=messages, tools=[s.TOOL], tool_choice="auto", **route).choices[0].message
s.check("tool call", {"city": "London"}, json.loads(message.tool_calls[0].function.arguments))
messages += [message, {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": s.TOOL_RESULT}]
reply = litellm.completion(messages=messages, tools=[s.TOOL], **route).choices[0].message.content
s.check("answer from the tool", s.TOOL_RESULT, reply)
structured = litellm.completion(messages=s.user(s.RECORD_QUESTION), response_format=Record, **route)
record = Record.model_validate_json(structured.choices[0].message.content)
s.check_record(record.name, record.age)
