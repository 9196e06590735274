"""Translates requests to the bodies of OpenAI's routes, as far as the kind of server understands them."""

import json
from collections.abc import Mapping
from hashlib import sha256
from typing import Any

from app.engine.remote.servers import OURS, Server
from app.requests import RESOLVABLE, GenerationRequest
from app.types import Grammar, Message, Role, SamplingParams, Tool, ToolChoice

CHAT_PATH, TEXT_PATH = "/v1/chat/completions", "/v1/completions"
_NEUTRAL = SamplingParams()
_ANY_OBJECT: Mapping[str, Any] = {"type": "object"}
_MAX_SEED = 2**31


def request_path(request: GenerationRequest) -> str:
    """Return the route of a request."""
    return CHAT_PATH if request.is_chat else TEXT_PATH


def request_body(request: GenerationRequest, model: str, server: Server = OURS) -> dict[str, Any]:
    """Return the body of a streamed request; what the caller left open stays open, for the service to decide.

    Args: model: its name there.
    """
    body: dict[str, Any] = {"model": model, "stream": True, "stream_options": {"include_usage": True}}
    if request.is_chat:
        body |= _chat(request)
    elif request.prompt_ids is not None and server.takes_tokens:
        body["prompt"] = list(request.prompt_ids)
    else:
        body["prompt"] = request.text or ""
    return body | _sampling(request, server)


def _chat(request: GenerationRequest) -> dict[str, Any]:
    body: dict[str, Any] = {"messages": chat_messages(request)}
    if request.tools:
        body["tools"] = chat_tools(request)
        body["tool_choice"] = _choice(request.tool_choice)
        body["parallel_tool_calls"] = request.parallel_tool_calls
    if request.template_kwargs:
        body["chat_template_kwargs"] = {name: value for name, value in request.template_kwargs if value is not None}
    if request.reasoning_effort is not None:
        body["reasoning_effort"] = request.reasoning_effort
    if request.continue_final_message:
        body |= {"continue_final_message": True, "add_generation_prompt": False}
    return body


def _sampling(request: GenerationRequest, server: Server) -> dict[str, Any]:
    params, renamed, neutral = request.sampling, dict(server.field_names), dict(server.neutral)
    fields: dict[str, Any] = {}
    for name in sorted((RESOLVABLE - request.unset) & server.sampling):
        value = getattr(params, name)
        if value == getattr(_NEUTRAL, name) and name in neutral:
            value = neutral[name]
        if value is not None:
            fields[renamed.get(name, name)] = value
    for name in ("presence_penalty", "frequency_penalty", "ignore_eos"):
        if (value := getattr(params, name)) != getattr(_NEUTRAL, name):
            fields[name] = value
    if params.seed is not None:
        fields["seed"] = _seed(params)
    if params.stop and server.names_stops:
        fields["stop"] = list(params.stop)
    if params.stop_token_ids:
        fields["stop_token_ids"] = list(params.stop_token_ids)
    if params.logit_bias:
        fields["logit_bias"] = {str(token_id): bias for token_id, bias in params.logit_bias}
    if params.logprobs is not None:
        fields |= (
            {"logprobs": True, "top_logprobs": params.logprobs} if request.is_chat else {"logprobs": params.logprobs}
        )
    return fields | (_grammar(params.grammar, server) if params.grammar is not None else {})


def _seed(params: SamplingParams) -> int | None:
    """Return the seed of one of several samples, which are requests of their own there and must not be alike."""
    if params.seed is None or not params.sample:
        return params.seed
    digest = sha256(f"{params.seed} {params.sample}".encode()).digest()
    return int.from_bytes(digest[:4]) % _MAX_SEED


def _grammar(grammar: Grammar, server: Server) -> dict[str, Any]:
    if server.structured == "structured_outputs":
        if grammar.kind == "json_schema":
            return {"structured_outputs": {"json": json.loads(grammar.text)}}
        return {"structured_outputs": {"regex" if grammar.kind == "regex" else "grammar": grammar.text}}
    if grammar.kind == "regex":
        return {"regex": grammar.text}
    schema = json.loads(grammar.text)
    if schema == _ANY_OBJECT:
        return {"response_format": {"type": "json_object"}}
    if server.structured == "json_object":
        return {"response_format": {"type": "json_object", "schema": schema}}
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}}


def chat_messages(request: GenerationRequest) -> list[dict[str, Any]]:
    """Return the messages of a chat."""
    return list(map(_message, request.messages))


def chat_tools(request: GenerationRequest) -> list[dict[str, Any]]:
    """Return the tools of a chat."""
    return list(map(_tool, request.tools))


def _message(message: Message) -> dict[str, Any]:
    fields: dict[str, Any] = {"role": message.role.value, "content": message.content}
    if message.name is not None:
        fields["name"] = message.name
    if message.role is Role.TOOL and message.tool_call_id is not None:
        fields["tool_call_id"] = message.tool_call_id
    if message.reasoning is not None:
        fields["reasoning_content"] = message.reasoning
    if message.tool_calls:
        fields["content"] = message.content or None
        fields["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    return fields


def _tool(tool: Tool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name, "parameters": json.loads(tool.parameters)}
    if tool.description is not None:
        function["description"] = tool.description
    if tool.strict:
        function["strict"] = True
    return {"type": "function", "function": function}


def _choice(choice: ToolChoice) -> Any:
    return choice.mode if choice.name is None else {"type": "function", "function": {"name": choice.name}}
