"""OpenAI's Agents SDK, which speaks the Responses API by default, and chat completions when told."""

import asyncio

import scenario as s
from agents import Agent, ModelSettings, Runner, function_tool, set_default_openai_api, set_tracing_disabled
from pydantic import BaseModel


class Record(BaseModel):
    """A person's name and age."""

    name: str
    age: int


@function_tool
def get_weather(city: str) -> str:
    """Get the weather in a city."""
    return s.TOOL_RESULT


async def main() -> None:
    """Run an agent of each kind over both APIs."""
    set_tracing_disabled(True)
    settings = ModelSettings(temperature=0)
    for api in ("responses", "chat_completions"):
        set_default_openai_api(api)
        plain = Agent(name="plain", model=s.MODEL, model_settings=settings)
        s.check(f"{api}: chat", s.CHAT_ANSWER, (await Runner.run(plain, s.CHAT)).final_output)
        run = Runner.run_streamed(plain, s.CHAT)
        async for _ in run.stream_events():
            pass
        s.check(f"{api}: stream", s.CHAT_ANSWER, run.final_output)
        agent = Agent(name="tools", model=s.MODEL, tools=[get_weather], model_settings=settings)
        s.check(f"{api}: tool", s.TOOL_RESULT, (await Runner.run(agent, s.TOOL_QUESTION)).final_output)
        structured = Agent(name="record", model=s.MODEL, output_type=Record, model_settings=settings)
        record = (await Runner.run(structured, s.RECORD_QUESTION)).final_output
        s.check_record(record.name, record.age)


asyncio.run(main())
