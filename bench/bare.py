"""The least that a FastAPI service can do: the yardstick that `bench.overhead` holds ours against."""

from collections.abc import AsyncIterator

from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

app = FastAPI()


class Ask(BaseModel):
    """What both services are asked."""

    prompt: str
    stream: bool = False
    cache: bool = True


@app.get("/readyz")
async def ready() -> dict[str, str]:
    """Answer at once."""
    return {"status": "ready"}


@app.post("/v1/generate", response_model=None)
async def generate(ask: Ask) -> dict[str, str] | StreamingResponse:
    """Give the prompt back, whole or one character at a time."""
    if not ask.stream:
        return {"generated_text": ask.prompt}

    async def frames() -> AsyncIterator[bytes]:
        for character in ask.prompt:
            yield f'event: delta\ndata: {{"content": "{character}"}}\n\n'.encode()

    return StreamingResponse(frames(), media_type="text/event-stream")
