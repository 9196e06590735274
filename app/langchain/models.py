"""LangChain's classes over an engine, by the module that programs import."""

from app.langchain.chat_model import EngineChat
from app.langchain.pipeline import EnginePipeline

__all__ = ["EngineChat", "EnginePipeline"]
