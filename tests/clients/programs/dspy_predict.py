"""DSPy: a prediction by its JSON adapter, and a tool by ReAct's native function calls."""

import dspy
import scenario as s


class Reply(dspy.Signature):
    """Answer the question."""

    question: str = dspy.InputField()
    answer: str = dspy.OutputField()


lm = dspy.LM(f"openai/{s.MODEL}", api_base=s.BASE_URL, api_key=s.KEY, temperature=0.0, max_tokens=200, cache=False)
s.check("chat", s.CHAT_ANSWER, lm(messages=s.user(s.CHAT)))
dspy.configure(lm=lm, adapter=dspy.JSONAdapter())
prediction = dspy.Predict(Reply)(question=s.CHAT)
s.check("structured answer", "str", type(prediction.answer).__name__)
called = lm(messages=s.user(s.TOOL_QUESTION), tools=[s.TOOL])
s.check("tool call", "London", called)
