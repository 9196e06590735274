"""OpenAI's two routes before an engine that has no server of its own, or none that counts tokens: streams only.

Runs in the environment of the peer that it serves.
"""

import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import uvicorn
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from tokenizers.decoders import DecodeStream
from transformers import AutoTokenizer


class Engine(Protocol):
    """Generates tokens."""

    def tokens(self, ids: Sequence[int], max_tokens: int) -> AsyncIterator[list[int]]:
        """Yield the tokens that follow these, in portions, greedily and exactly so many."""
        ...


def create_app(engine: Engine, tokenizer: Any) -> FastAPI:
    """Return the application: OpenAI's two routes, which stream only."""
    app = FastAPI()

    async def frames(ids: Sequence[int], max_tokens: int, *, chat: bool) -> AsyncIterator[str]:
        stream, completion_tokens = DecodeStream(skip_special_tokens=True), 0
        async for portion in engine.tokens(ids, max_tokens):
            completion_tokens += len(portion)
            text = "".join(stream.step(tokenizer.backend_tokenizer, token) or "" for token in portion)
            choice = {"index": 0, **({"delta": {"content": text}} if chat else {"text": text})}
            yield _frame({"choices": [choice]})
        yield _frame({"choices": [], "usage": {"prompt_tokens": len(ids), "completion_tokens": completion_tokens}})
        yield "data: [DONE]\n\n"

    def streamed(ids: Sequence[int], body: dict[str, Any], *, chat: bool) -> StreamingResponse:
        return StreamingResponse(frames(ids, body["max_tokens"], chat=chat), media_type="text/event-stream")

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/v1/completions")
    async def completions(body: dict[str, Any]) -> StreamingResponse:
        return streamed(tokenizer(body["prompt"])["input_ids"], body, chat=False)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: dict[str, Any]) -> StreamingResponse:
        text = tokenizer.apply_chat_template(body["messages"], add_generation_prompt=True, tokenize=False)
        return streamed(tokenizer(text, add_special_tokens=False)["input_ids"], body, chat=True)

    return app


def _frame(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


def serve(engine: Engine, model: Path, port: int) -> None:
    """Serve an engine with the model's tokenizer until the process ends."""
    app = create_app(engine, AutoTokenizer.from_pretrained(model))
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")
