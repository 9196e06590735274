"""Conversations with tools in sessions: calls are stored, results continue them, and personal data stays out."""

from dataclasses import replace
from typing import Any

import pytest

from app.engine.base import EngineInfo
from app.errors import Forbidden, InvalidRequest
from app.events import Delta, ToolCallDelta
from app.generation.sessions import Turn, answered_turn, as_turns, new_messages, whole_turns
from app.privacy.filters import InputFilter
from app.privacy.redactor import PiiKind, Redactor
from app.requests import GenerationRequest
from app.types import FinishReason, Message, Role, Tool, ToolCall, ToolChoice
from tests.unit.engine.scripted import ScriptedEngine
from tests.unit.event_streams import finished_of
from tests.unit.generation.services import ANNA, Service, chat, serving

EMAIL = "anna@example.com"
TOOL = Tool("look_up", "Finds it.", '{"type": "object"}')
CALL = ToolCall("call_1", "look_up", '{"city": "Rome"}')
QUESTION = Message(Role.USER, "Weather?")
CALLS = Message(Role.ASSISTANT, "", tool_calls=(CALL,), reasoning="Hm.")
RESULT = Message(Role.TOOL, "sunny", tool_call_id="call_1")
ANSWER = Message(Role.ASSISTANT, "Sunny.")


class CallingEngine(ScriptedEngine):
    """Thinks and calls, and answers in one word once it has a result; its template shows reasoning."""

    def __init__(self, arguments: str = CALL.arguments) -> None:
        super().__init__(end=FinishReason.TOOL_CALLS)
        self.run_freely()
        half = len(arguments) // 2
        first = ToolCallDelta(id=CALL.id, name=CALL.name, arguments=arguments[:half])
        self.calling = (
            Delta(reasoning="Hm.", tokens=1),
            Delta(tool_calls=(first,), tokens=1),
            Delta(tool_calls=(ToolCallDelta(arguments=arguments[half:]),), tokens=1),
        )
        self.renders_reasoning = True
        self.answers = True

    @property
    def info(self) -> EngineInfo:
        return replace(super().info, renders_reasoning=self.renders_reasoning)

    def stream(self, request: GenerationRequest) -> Any:
        answered = self.answers and request.messages[-1].role is Role.TOOL
        self.texts, self.end = (("Sunny.",), FinishReason.STOP) if answered else (self.calling, FinishReason.TOOL_CALLS)
        return super().stream(request)


def input_filter() -> InputFilter:
    return InputFilter(Redactor(list(PiiKind)), "mask", lambda kind, count: None)


def sent(engine: ScriptedEngine) -> list[Message]:
    """Return the messages of the last request that reached the engine, without the operator's."""
    return [message for message in engine.requests[-1].messages if message.role is not Role.SYSTEM]


def request(*messages: Message, **fields: Any) -> GenerationRequest:
    return chat(messages=messages, tools=(TOOL,), **{"session_id": "s", **fields})


async def stored(service: Service) -> list[Message]:
    assert service.sessions is not None
    session = await service.sessions.read(ANNA.tenant, "s")
    return [message for turn in session.turns for message in turn.messages] if session else []


async def test_a_session_continues_with_the_result_of_a_call() -> None:
    """The client sends nothing but the result; the model sees question, call and result, and so does the session."""
    engine = CallingEngine()
    async with serving(engine) as service:
        first = finished_of(await service.read(request(QUESTION)))
        second = finished_of(await service.read(request(RESULT)))

        assert (FinishReason.TOOL_CALLS, FinishReason.STOP) == (first.finish_reason, second.finish_reason)
        assert [QUESTION, CALLS, RESULT] == sent(engine)
        assert [QUESTION, CALLS, RESULT, ANSWER] == await stored(service)

        await service.read(request(Message(Role.USER, "And Genf?")))
        assert [QUESTION, CALLS, RESULT, ANSWER, Message(Role.USER, "And Genf?")] == sent(engine)


async def test_an_agents_loop_is_one_turn_of_its_session() -> None:
    """More calls than the session may have turns: the model still sees the question, and no result is refused."""
    engine = CallingEngine()
    engine.answers = False
    async with serving(engine, max_turns=2) as service:
        await service.read(request(QUESTION))
        for _ in range(4):
            await service.read(request(RESULT))

        assert [QUESTION, *[CALLS, RESULT] * 4] == sent(engine)
        assert [QUESTION, *[CALLS, RESULT] * 4, CALLS] == await stored(service)


async def test_a_conversation_with_calls_that_comes_again_is_recognised() -> None:
    """Clients write arguments in their own way, and leave out what the assistant thought."""
    engine = CallingEngine()
    async with serving(engine) as service:
        await service.read(request(QUESTION))
        theirs = replace(CALLS, reasoning=None, tool_calls=(replace(CALL, arguments='{"city":"Rome"}'),))

        await service.read(request(QUESTION, theirs, RESULT))

        assert [QUESTION, CALLS, RESULT] == sent(engine)
        assert [QUESTION, CALLS, RESULT, ANSWER] == await stored(service)


async def test_a_result_for_a_call_that_the_session_does_not_have_is_refused() -> None:
    engine = CallingEngine()
    async with serving(engine) as service:
        with pytest.raises(InvalidRequest, match="does not end with"):
            await service.read(request(RESULT))
        await service.read(request(QUESTION))
        with pytest.raises(InvalidRequest, match="does not end with"):
            await service.read(request(replace(RESULT, tool_call_id="call_2")))

        assert [QUESTION, CALLS] == await stored(service)


async def test_reasoning_is_stored_where_the_template_shows_it() -> None:
    engine = CallingEngine()
    engine.renders_reasoning = False
    async with serving(engine) as service:
        await service.read(request(QUESTION))

        assert [QUESTION, replace(CALLS, reasoning=None)] == await stored(service)


async def test_a_result_stays_with_its_call_when_earlier_turns_must_go() -> None:
    """The window has no room for the turn before, and the call is no turn of its own."""
    engine = CallingEngine()
    engine._info = replace(engine.info, context_length=150)
    async with serving(engine, sessions=True) as service:
        assert service.sessions is not None
        long = Turn((Message(Role.USER, "x" * 60), Message(Role.ASSISTANT, "y" * 60)))
        await service.sessions.append(ANNA.tenant, "s", long)
        await service.sessions.append(ANNA.tenant, "s", Turn((QUESTION, CALLS)))

        finished = finished_of(await service.read(request(RESULT, max_tokens=20)))

        assert [QUESTION, CALLS, RESULT] == sent(engine)
        assert finished.context is not None
        assert (0, 1) == (finished.context.turns_kept, finished.context.turns_dropped)


async def test_personal_data_in_results_arguments_and_tools_reaches_neither_model_nor_session() -> None:
    """In JSON only its strings are masked, so that arguments are still arguments."""
    engine = CallingEngine(arguments=f'{{"to": "{EMAIL}"}}')
    mail = replace(CALL, arguments=f'{{"to": "{EMAIL}", "n": 1}}')
    tool = Tool("look_up", f"Ask {EMAIL}.", f'{{"type": "object", "description": "{EMAIL}"}}')
    async with serving(engine, input_filter=input_filter()) as service:
        conversation = (
            replace(QUESTION, name=EMAIL),
            replace(CALLS, tool_calls=(mail,), reasoning=EMAIL),
            replace(RESULT, content=f"sent to {EMAIL}"),
        )
        await service.read(chat(messages=conversation, tools=(tool,), session_id="s"))
        await service.read(chat(messages=(QUESTION,), tools=(tool,), session_id="s"))

        assert EMAIL not in repr(engine.requests)
        assert '{"to": "[EMAIL]", "n": 1}' == sent(engine)[1].tool_calls[0].arguments
        assert '{"type": "object", "description": "[EMAIL]"}' == engine.requests[-1].tools[0].parameters
        assert EMAIL not in repr(await stored(service))
        assert '{"to": "[EMAIL]"}' == (await stored(service))[-1].tool_calls[0].arguments


async def test_tools_are_a_part_of_the_system_message_to_the_callers_rights() -> None:
    """Their descriptions are the client's text in it, and so is a text for the template; a switch is none."""
    engine = CallingEngine()
    engine._info = replace(engine._info, template_variables=("enable_thinking", "persona", "reasoning_effort"))
    async with serving(engine) as service:
        uses = (
            chat("x", tools=(TOOL,)),
            chat("x", template_kwargs=(("persona", "a pirate"),)),
            chat("x", template_kwargs=(("enable_thinking", True),), reasoning_effort="low"),
        )
        for each in uses:
            await service.read(each)

        checked = [check["system_text"] for check in service.admission.checks]
        assert ["tools", "chat_template_kwargs", None] == checked
        service.admission.forbidden = Forbidden("Not for you.")
        with pytest.raises(Forbidden):
            await service.read(uses[0])


async def test_the_log_has_what_was_called_and_what_came_back() -> None:
    engine = CallingEngine()
    async with serving(engine, store_text=True) as service:
        await service.read(request(QUESTION))
        await service.read(request(RESULT))

        first, second = service.log.records
        assert ("Weather?", 'Hm.{"city": "Rome"}') == (first.prompt, first.answer)
        assert ("sunny", "Sunny.") == (second.prompt, second.answer)


def test_a_result_belongs_to_the_turn_that_called() -> None:
    """It is stored after it; once that turn is gone, it answers nothing."""
    first, second = Turn((QUESTION, CALLS)), Turn((RESULT, ANSWER))

    assert (Turn((QUESTION, CALLS, RESULT, ANSWER)),) == whole_turns([first, second])
    assert (first,) == whole_turns([second, first])
    assert () == whole_turns([second])


def test_only_results_take_the_turn_before_with_them() -> None:
    history = as_turns([QUESTION, ANSWER, QUESTION, CALLS])

    assert (history[:1], (QUESTION, CALLS, RESULT)) == answered_turn(history, (RESULT,))
    assert (history, (QUESTION,)) == answered_turn(history, (QUESTION,))


def test_calls_are_compared_by_what_they_say() -> None:
    """Not by the order of keys or the spaces between; another argument, id or name makes a conversation another."""
    call = replace(CALL, arguments='{"a": 1, "b": [2]}')
    history = as_turns([QUESTION, replace(CALLS, tool_calls=(call,))])

    def is_known(**changes: str) -> bool:
        again = replace(CALLS, tool_calls=(replace(call, **changes),))
        return (RESULT,) == new_messages(history, (QUESTION, again, RESULT))

    assert is_known()
    assert is_known(arguments='{"b":[2],"a":1}')
    assert not is_known(arguments='{"b":[2],"a":2}')
    assert not is_known(id="call_9")
    assert not is_known(name="other")


def test_the_size_of_a_turn_counts_everything_in_it() -> None:
    turn = Turn((QUESTION, CALLS, RESULT))

    assert len("Weather?" + "Hm." + CALL.arguments + "sunny") == turn.text_bytes


async def test_a_choice_reaches_the_engine() -> None:
    engine = CallingEngine()
    async with serving(engine) as service:
        await service.read(request(QUESTION, tool_choice=ToolChoice("required", "look_up"), parallel_tool_calls=False))

        (reached,) = engine.requests
        assert ((TOOL,), ToolChoice("required", "look_up"), False) == (
            reached.tools,
            reached.tool_choice,
            reached.parallel_tool_calls,
        )
