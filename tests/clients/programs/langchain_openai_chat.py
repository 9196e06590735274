"""LangChain's ChatOpenAI, and an agent of LangGraph with a tool."""

import scenario as s
from langchain.agents import create_agent
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel


class Record(BaseModel):
    """A structured answer."""

    name: str
    age: int


@tool(s.TOOL_NAME, description=s.TOOL_DESCRIPTION)
def weather(city: str) -> str:
    """Return the weather."""
    return s.TOOL_RESULT


model = ChatOpenAI(model=s.MODEL, temperature=0)
s.check("chat", s.CHAT_ANSWER, model.invoke(s.CHAT).content)
s.check("stream", s.CHAT_ANSWER, "".join(str(chunk.content) for chunk in model.stream(s.CHAT)))
s.check("bind_tools", "{'city': 'London'}", model.bind_tools([weather]).invoke(s.TOOL_QUESTION).tool_calls[0]["args"])
for method in ("json_schema", "function_calling", "json_mode"):
    record = model.with_structured_output(Record, method=method).invoke(s.RECORD_QUESTION)
    if method == "json_schema":
        s.check_record(record.name, record.age)
    s.check(method, "Record", type(record).__name__)
agent = create_agent(model, [weather])
messages = agent.invoke({"messages": s.user(s.TOOL_QUESTION)})["messages"]
s.check("agent", s.TOOL_RESULT, messages[-1].content)
s.check("agent's messages", ["human", "ai", "tool", "ai"], [message.type for message in messages])
