"""Parts of LangChain that are not used, because they share what belongs to one caller or run what they are given."""

import ast
import asyncio
from pathlib import Path

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.globals import get_llm_cache

import app.main
from app.engine.echo import EchoEngine
from app.langchain.models import EngineChat, EnginePipeline

LEFT_OUT = {
    "langchain_core.load": "builds objects from data",
    "langchain_core.prompts.loading": "reads files that a name leads to",
    "langchain_core.runnables.history": "keeps sessions without their owner",
    "langchain_core.caches": "ignores the arguments of a call in its key",
}
FORBIDDEN_NAMES = {"load_prompt", "RunnableWithMessageHistory", "set_llm_cache", "trust_remote_code"}


def imported(source: Path) -> set[str]:
    """Return the modules and names that a file imports, dotted."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            names |= {each.name for each in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{each.name}" for each in node.names)}
    return names


def test_no_module_uses_what_would_cross_tenants_or_run_data() -> None:
    """Sessions, cache and prompts are our own; nothing deserialises LangChain's objects."""
    files = list(Path(app.main.__file__).parent.rglob("*.py"))
    found = {
        (file.name, name)
        for file in files
        for name in imported(file)
        if name.startswith(tuple(LEFT_OUT)) or name.rpartition(".")[2] in FORBIDDEN_NAMES
    }

    assert len(files) > 100
    assert set() == found


async def test_langchains_global_cache_is_not_used_even_where_it_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its key leaves out the sampling parameters of a call: a longer completion would be a stored shorter one."""
    assert get_llm_cache() is None
    monkeypatch.setattr("langchain_core.globals._llm_cache", InMemoryCache())
    engine = EchoEngine()
    await engine.start()
    pipeline = EnginePipeline(engine=engine, model_id="echo", loop=asyncio.get_running_loop())
    chat = EngineChat(llm=pipeline)

    assert ["he", "hello"] == [await pipeline.ainvoke("hello", max_tokens=tokens) for tokens in (2, 5)]
    assert ["he", "hello"] == [(await chat.ainvoke("hello", max_tokens=tokens)).content for tokens in (2, 5)]
