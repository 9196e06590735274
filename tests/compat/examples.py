"""The examples in the documents of older services, one row each: what is called as there, and what comes back.

Only address, key and model differ from what the documents print.  Commands are run by a shell, programs by Python and
Node; `$URL` and `$KEY` stand for address and key.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

INFERENCE_API = "LLM Inference API"
MICROSERVICE = "LLM Inference Microservice"
CUSTOM_LLM = "CustomLLM Inference API"
LLM_SERVER = "LLM Server"
FASTAPI_SERVICE = "LLM FastAPI Service"

Fields = Mapping[str, Any]
"""Documented field -> its type, the fields of an object, or a list of one that says what its items are."""

_GENERATE = """curl -X POST $URL/generate -H "x-API-Key: $KEY" -H "Content-Type: application/json" -d"""
_JSON = '-H "Content-Type: application/json"'


@dataclass(frozen=True, slots=True)
class Example:
    """One example of a document."""

    system: str
    shows: str
    command: str
    fields: Fields = field(default_factory=dict)
    """Of the JSON that comes back."""
    texts: Sequence[str] = ()
    """What a response that is no JSON contains."""

    @property
    def id(self) -> str:
        return f"{self.system}: {self.shows}"


GENERATED = {"generated_text": str, "prompt": str, "model": str, "tokens_generated": int, "cached": bool}
CHATTED = {
    "message": {"role": str, "content": str},
    "model": str,
    "tokens_generated": int,
    "cached": bool,
}
PREDICTED = {
    "generated_text": str,
    "prompt": str,
    "tokens_generated": int,
    "processing_time": float,
    "model_name": str,
    "model_version": str,
    "timestamp": str,
}
COMPLETED = {
    "success": bool,
    "request_time": float,
    "completions": [{"text": str, "tokens": [{"text": str, "logprob": float}]}],
}

CALLS = [
    Example(
        INFERENCE_API,
        "generate an API key",
        f"""curl -X POST $URL/generate_apikey -H "x-API-Key: $KEY" {_JSON} -d '{{"username": "myuser"}}'""",
        {"api_key": str},
    ),
    Example(
        INFERENCE_API,
        "generate text from the loaded model",
        _GENERATE
        + """ '{
  "model_name": "tiny-chat",
  "prompt": "Explain quantum computing.",
  "parameters": {
    "temperature": 0.7,
    "max_new_tokens": 200,
    "top_p": 0.9,
    "num_return_sequences": 1,
    "stop_sequences": []
  }
}'""",
        COMPLETED,
    ),
    Example(INFERENCE_API, "status", "curl $URL/status", {"status": "cpu: model loaded on CPU"}),
    Example(INFERENCE_API, "Swagger UI", "curl $URL/docs", texts=["swagger-ui"]),
    Example(INFERENCE_API, "ReDoc", "curl $URL/redoc", texts=["redoc"]),
    Example(MICROSERVICE, "health check", "curl $URL/health", {"status": str, "service": str}),
    Example(
        MICROSERVICE,
        "generate text",
        f"""curl -X POST $URL/generate -H "x-api-key: $KEY" {_JSON} """
        """-d '{"prompt": "The future of AI is", "max_new_tokens": 50}'""",
        {"generated_text": str},
        ["The future of AI is"],
    ),
    Example(
        CUSTOM_LLM,
        "health check",
        "curl $URL/health",
        {
            "status": "healthy",
            "api_status": "running",
            "model_status": "loaded",
            "gpu_status": str,
            "timestamp": str,
            "uptime_seconds": float,
        },
    ),
    Example(
        CUSTOM_LLM,
        "generate text",
        """curl -X POST "$URL/predict" \\
  -H "Authorization: Bearer $KEY" \\
  -H "Content-Type: application/json" \\
  -d '{
    "prompt": "Once upon a time",
    "max_length": 100,
    "temperature": 0.7
  }'""",
        PREDICTED,
    ),
    Example(
        CUSTOM_LLM,
        "batch generation",
        """curl -X POST "$URL/predict/batch" \\
  -H "Authorization: Bearer $KEY" \\
  -H "Content-Type: application/json" \\
  -d '{
    "prompts": ["Hello world", "How are you?"],
    "max_length": 50
  }'""",
        {"results": [PREDICTED]},
    ),
    Example(CUSTOM_LLM, "metadata of the model", "curl $URL/info", {"models": [{"name": str, "revision": object}]}),
    Example(CUSTOM_LLM, "basic status", "curl $URL/status", {"status": str}),
    Example(CUSTOM_LLM, "metrics", "curl $URL/metrics", texts=["model_loaded 1.0"]),
    Example(CUSTOM_LLM, "OpenAPI schema", "curl $URL/openapi.json", {"openapi": str, "paths": {"/predict": dict}}),
    Example(
        CUSTOM_LLM,
        "structured errors",
        """curl -X POST "$URL/predict" -H "Content-Type: application/json" -d '{"prompt": "Hello"}'""",
        {"error": "unauthorized", "message": str, "details": dict, "timestamp": str, "request_id": str},
        ["Invalid API key"],
    ),
    Example(
        LLM_SERVER,
        "generate text",
        """curl -X POST $URL/v1/generate \\
  -H "Content-Type: application/json" \\
  -H "X-API-Key: $KEY" \\
  -d '{"prompt": "Hello, world!", "max_new_tokens": 32}'""",
        {"model": str, "output": str, "cached": bool},
    ),
    Example(
        LLM_SERVER,
        "stream text",
        """curl -N -X POST $URL/v1/stream \\
  -H "Content-Type: application/json" \\
  -H "X-API-Key: $KEY" \\
  -d '{"prompt": "Hello, world!", "max_new_tokens": 32, "temperature": 0.7, "top_p": 0.9, "top_k": 50, "stop": ["#"]}'
""",
        texts=['data: {"text":', "data: [DONE]"],
    ),
    Example(LLM_SERVER, "health", "curl $URL/health", {"status": str}),
    Example(LLM_SERVER, "readiness", "curl $URL/readyz", {"status": "ready"}),
    Example(LLM_SERVER, "metrics", "curl $URL/metrics", texts=["http_requests_total", "http_request_duration_seconds"]),
    Example(
        FASTAPI_SERVICE,
        "health",
        "curl $URL/health",
        {"status": "healthy", "model_loaded": True, "model_name": "tiny-chat"},
    ),
    Example(FASTAPI_SERVICE, "status with cache statistics", "curl $URL/status", {"cache": {"hits": int}}),
    Example(
        FASTAPI_SERVICE,
        "generate text",
        """curl -X POST $URL/v1/generate \\
  -H "Content-Type: application/json" \\
  -H "X-API-Key: $KEY" \\
  -d '{
    "prompt": "Explain quantum computing in simple terms",
    "max_tokens": 200,
    "temperature": 0.7
  }'""",
        GENERATED,
    ),
    Example(
        FASTAPI_SERVICE,
        "chat",
        """curl -X POST $URL/v1/chat \\
  -H "Content-Type: application/json" \\
  -H "X-API-Key: $KEY" \\
  -d '{
    "messages": [
      {"role": "user", "content": "What is the capital of France?"}
    ],
    "max_tokens": 100,
    "temperature": 0.7
  }'""",
        CHATTED,
    ),
    Example(
        FASTAPI_SERVICE,
        "chat with a session, first message",
        """curl -X POST $URL/v1/chat \\
  -H "Content-Type: application/json" \\
  -H "X-API-Key: $KEY" \\
  -d '{
    "session_id": "user-123-conversation",
    "messages": [
      {"role": "user", "content": "What is Python?"}
    ],
    "max_tokens": 100
  }'""",
        CHATTED,
    ),
    Example(
        FASTAPI_SERVICE,
        "chat with a session, follow-up",
        """curl -X POST $URL/v1/chat \\
  -H "Content-Type: application/json" \\
  -H "X-API-Key: $KEY" \\
  -d '{
    "session_id": "user-123-conversation",
    "messages": [
      {"role": "user", "content": "What are its main features?"}
    ],
    "max_tokens": 100
  }'""",
        CHATTED,
    ),
    Example(
        FASTAPI_SERVICE,
        "streaming response",
        """curl -X POST $URL/v1/chat \\
  -H "Content-Type: application/json" \\
  -H "X-API-Key: $KEY" \\
  -d '{
    "messages": [{"role": "user", "content": "Tell me a story"}],
    "stream": true
  }'""",
        texts=["event: delta", "event: done"],
    ),
    Example(
        FASTAPI_SERVICE,
        "metrics",
        "curl $URL/metrics",
        texts=["http_requests_total", "tokens_generated_total", "http_request_duration_seconds"],
    ),
]
"""Each by itself; the service has the embedded model and listens on a loopback address."""

LIFE_CYCLE = [
    Example(
        INFERENCE_API,
        "load a model",
        f"""curl -X POST $URL/load_model -H "x-API-Key: $KEY" {_JSON} """
        """-d '{"model_name": "other-model", "device": "cpu", "hf_token": null}'""",
        {"message": str},
        ["other-model"],
    ),
    Example(
        INFERENCE_API,
        "generate text from it",
        _GENERATE + """ '{"model_name": "other-model", "prompt": "Hello", "parameters": {"max_new_tokens": 8}}'""",
        COMPLETED,
    ),
    Example(
        INFERENCE_API,
        "unload it",
        'curl -X POST $URL/unload_model -H "x-API-Key: $KEY"',
        {"message": "Modelo other-model descarregado com sucesso."},
    ),
]
"""One after the other."""

PYTHON = """
import os

import requests
import json

# Configuration
API_URL = os.environ["URL"]
API_KEY = os.environ["KEY"]

headers = {
    "Authorization": f"Bearer {API_KEY}",
    "Content-Type": "application/json"
}

# Single prediction
response = requests.post(
    f"{API_URL}/predict",
    headers=headers,
    json={
        "prompt": "Explain machine learning in simple terms:",
        "max_length": 150,
        "temperature": 0.8,
        "top_p": 0.9
    }
)

result = response.json()
print(f"Generated: {result['generated_text']}")
"""
"""CustomLLM Inference API: its client in Python."""

JAVASCRIPT = """
async function generateText(prompt) {
  const response = await fetch(`${process.env.URL}/predict`, {
    method: 'POST',
    headers: {
      'Authorization': `Bearer ${process.env.KEY}`,
      'Content-Type': 'application/json'
    },
    body: JSON.stringify({ prompt: prompt, max_length: 100, temperature: 0.7 })
  });
  return response.json();
}

// Usage
generateText("Write a haiku about programming:")
  .then(result => console.log(result.generated_text));
"""
"""CustomLLM Inference API: its client in JavaScript with the platform's own fetch; as it was printed, with axios, it is
in `tests/clients/programs`."""
