"""LlamaIndex with an OpenAI-compatible model."""

import scenario as s
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel


class Record(BaseModel):
    """A structured answer."""

    name: str
    age: int


def get_weather(city: str) -> str:
    """Get the weather in a city."""
    return s.TOOL_RESULT


llm = OpenAILike(
    model=s.MODEL,
    api_base=s.BASE_URL,
    api_key=s.KEY,
    is_chat_model=True,
    is_function_calling_model=True,
    should_use_structured_outputs=True,
    context_window=2048,
    temperature=0,
)
chat = [ChatMessage(role="user", content=s.CHAT)]
s.check("chat", s.CHAT_ANSWER, llm.chat(chat).message.content)
s.check("stream", s.CHAT_ANSWER, "".join(each.delta or "" for each in llm.stream_chat(chat)))
tool = FunctionTool.from_defaults(get_weather)
question = ChatMessage(role="user", content=s.TOOL_QUESTION)
reply = llm.chat_with_tools([tool], chat_history=[question])
calls = llm.get_tool_calls_from_response(reply)
s.check("tool call", {"city": "London"}, calls[0].tool_kwargs)
result = ChatMessage(role="tool", content=s.TOOL_RESULT, additional_kwargs={"tool_call_id": calls[0].tool_id})
after = llm.chat_with_tools([tool], chat_history=[question, reply.message, result])
s.check("answer from the tool", s.TOOL_RESULT, after.message.content)
record = llm.as_structured_llm(Record).chat([ChatMessage(role="user", content=s.RECORD_QUESTION)]).raw
assert isinstance(record, Record)
s.check_record(record.name, record.age)
