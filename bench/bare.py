"""The least that a FastAPI service can do: the yardstick that `bench.overhead` holds ours against."""

from collections.abc import AsyncIterator

from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

app = FastAPI()


class GenerateRequest(BaseModel):
    """The fields of a request that both services read."""

    prompt: str
    stream: bool = False
    cache: bool = True


@app.get("/readyz")
async def ready() -> dict[str, str]:
    """Answer at once."""
    return {"status": "ready"}


@app.post("/v1/generate", response_model=None)
async def generate(request: GenerateRequest) -> dict[str, str] | StreamingResponse:
    """Give the prompt back, whole or one character at a time."""
    if not request.stream:
        return {"generated_text": request.prompt}

    async def frames() -> AsyncIterator[bytes]:
        for character in request.prompt:
            yield f'event: delta\ndata: {{"content": "{character}"}}\n\n'.encode()

    return StreamingResponse(frames(), media_type="text/event-stream")
