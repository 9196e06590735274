"""DSPy: a prediction by its JSON adapter, a stream, and a tool by native function calls."""

import asyncio
import json

import dspy
import scenario as s


class ServiceLM(dspy.LM):  # type: ignore[misc]  # it is untyped
    """DSPy knows the models of its own catalogue; of others it has to be told what they can do."""

    supports_response_schema = True
    supports_function_calling = True


class Reply(dspy.Signature):  # type: ignore[misc]  # it is untyped
    """Answer the question."""

    question: str = dspy.InputField()
    answer: str = dspy.OutputField()


def tool_answer(lm: dspy.LM) -> object:
    """Return what the model makes of the result of the tool that it calls."""
    ((call,),) = (each["tool_calls"] for each in lm(messages=s.user(s.TOOL_QUESTION), tools=[s.TOOL]))
    s.check("tool call", "London", call.function.arguments)
    calls = [{"id": call.id, "type": "function", "function": dict(call.function)}]
    result = {"role": "tool", "tool_call_id": call.id, "content": s.TOOL_RESULT}
    called = {"role": "assistant", "content": None, "tool_calls": calls}
    return lm(messages=[*s.user(s.TOOL_QUESTION), called, result], tools=[s.TOOL])


async def streamed(predict: dspy.Predict) -> list[object]:
    """Return what arrives of a prediction, its end last."""
    return [part async for part in dspy.streamify(predict)(question=s.CHAT)]


lm = ServiceLM(f"openai/{s.MODEL}", api_base=s.BASE_URL, api_key=s.KEY, temperature=0.0, max_tokens=200, cache=False)
s.check("chat", s.CHAT_ANSWER, lm(messages=s.user(s.CHAT)))
s.check("answer from the tool", s.TOOL_RESULT, tool_answer(lm))
(text,) = lm(
    messages=s.user(s.RECORD_QUESTION),
    response_format={"type": "json_schema", "json_schema": {"name": "record", "schema": s.RECORD_SCHEMA}},
)
record = json.loads(text)
s.check_record(record["name"], record["age"])

# The adapter's prompt is beyond a model of this size: its answer has the form and no sense.
dspy.configure(lm=lm, adapter=dspy.JSONAdapter())
predict = dspy.Predict(Reply)
s.check("prediction", "str", type(predict(question=s.CHAT).answer).__name__)
*parts, last = asyncio.run(streamed(predict))
s.check("stream", "True", len(parts) > 1 and isinstance(last, dspy.Prediction))
