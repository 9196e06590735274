"""What `with_structured_output` of a chat model is made of: a bound schema, and a parser behind the model."""

from operator import itemgetter
from typing import Any, Literal

from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.output_parsers import JsonOutputParser, PydanticOutputParser
from langchain_core.output_parsers.openai_tools import JsonOutputKeyToolsParser, PydanticToolsParser
from langchain_core.runnables import Runnable, RunnableMap, RunnablePassthrough
from langchain_core.utils.function_calling import convert_to_json_schema, convert_to_openai_tool
from pydantic import BaseModel

Method = Literal["function_calling", "json_mode", "json_schema"]


def structured_output(
    chat: BaseChatModel, schema: Any, *, method: Method, include_raw: bool, **kwargs: Any
) -> Runnable[Any, Any]:
    """Return a chat model whose answers follow a schema, parsed.

    Raises: ValueError: there is no schema, or an argument that nothing would honour.
    """
    strict = kwargs.pop("strict", None)
    if kwargs:
        raise ValueError(f"unknown arguments: {', '.join(sorted(kwargs))}")
    if schema is None and method != "json_mode":
        raise ValueError(f"method {method} needs a schema")
    if method == "function_calling":
        name = convert_to_openai_tool(schema)["function"]["name"]
        model = chat.bind_tools([schema], tool_choice=name, strict=strict, parallel_tool_calls=False)
        parser = _tool_parser(schema, name)
    else:
        model = chat.bind(response_format=_response_format(schema, method))
        parser = _json_parser(schema)
    if not include_raw:
        return model | parser
    parsed = RunnablePassthrough.assign(parsed=itemgetter("raw") | parser, parsing_error=lambda _: None)
    unparsed = RunnablePassthrough.assign(parsed=lambda _: None)
    return RunnableMap(raw=model) | parsed.with_fallbacks([unparsed], exception_key="parsing_error")


def _response_format(schema: Any, method: Method) -> dict[str, Any]:
    if method == "json_mode":
        return {"type": "json_object"}
    converted = convert_to_json_schema(schema)
    return {"type": "json_schema", "json_schema": {"name": converted.get("title", "answer"), "schema": converted}}


def _is_pydantic(schema: Any) -> bool:
    return isinstance(schema, type) and issubclass(schema, BaseModel)


def _tool_parser(schema: Any, name: str) -> Runnable[Any, Any]:
    if _is_pydantic(schema):
        return PydanticToolsParser(tools=[schema], first_tool_only=True)
    return JsonOutputKeyToolsParser(key_name=name, first_tool_only=True)


def _json_parser(schema: Any) -> Runnable[Any, Any]:
    return PydanticOutputParser(pydantic_object=schema) if _is_pydantic(schema) else JsonOutputParser()
