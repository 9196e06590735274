"""Pydantic AI: an agent with a tool, and one with a structured answer, over both of OpenAI's APIs."""

import asyncio

import scenario as s
from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel


class Record(BaseModel):
    """A person's name and age."""

    name: str
    age: int


def get_weather(city: str) -> str:
    """Get the weather in a city."""
    return s.TOOL_RESULT


async def main() -> None:
    """Run an agent of each kind."""
    for model in (OpenAIChatModel(s.MODEL), OpenAIResponsesModel(s.MODEL)):
        settings = {"temperature": 0.0}
        s.check("chat", s.CHAT_ANSWER, (await Agent(model, model_settings=settings).run(s.CHAT)).output)
        async with Agent(model, model_settings=settings).run_stream(s.CHAT) as run:
            s.check("stream", s.CHAT_ANSWER, await run.get_output())
        agent = Agent(model, tools=[get_weather], model_settings=settings)
        s.check("answer from the tool", s.TOOL_RESULT, (await agent.run(s.TOOL_QUESTION)).output)
        structured = Agent(model, output_type=NativeOutput(Record), model_settings=settings)
        record = (await structured.run(s.RECORD_QUESTION)).output
        s.check_record(record.name, record.age)


asyncio.run(main())
