"""Instructor: structured answers by tools and by JSON schema."""

import instructor
import scenario as s
from openai import OpenAI
from pydantic import BaseModel


class Record(BaseModel):
    """A person's name and age."""

    name: str
    age: int


plain = OpenAI()
answer = plain.chat.completions.create(model=s.MODEL, messages=s.user(s.CHAT), temperature=0)
s.check("chat", s.CHAT_ANSWER, answer.choices[0].message.content)
for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
    client = instructor.from_openai(OpenAI(), mode=mode)
    record = client.chat.completions.create(
        model=s.MODEL, messages=s.user(s.RECORD_QUESTION), response_model=Record, temperature=0, max_retries=0
    )
    s.check(str(mode), "Record", type(record).__name__)
client = instructor.from_openai(OpenAI(), mode=instructor.Mode.JSON_SCHEMA)
last = None
for partial in client.chat.completions.create_partial(
    model=s.MODEL, messages=s.user(s.RECORD_QUESTION), response_model=Record, temperature=0
):
    last = partial
s.check("stream", "name=", last)
