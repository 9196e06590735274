"""The servers that are compared: how each is started, what a request to it looks like, how its events are parsed.

All get the same model, type, threads and loads.  Pure descriptions; `bench.serve` runs them.
"""

import importlib.util
import json
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bench.process import KEY, ROOT, our_command, our_environment
from bench.wire import Post, StreamEvent

Message = Mapping[str, str]
Dtype = Literal["float32", "bfloat16"]

DEADLINES = {
    "DEADLINES__WAITING_SECONDS": "3600",
    "DEADLINES__FIRST_TOKEN_SECONDS": "3600",
    "DEADLINES__TOTAL_SECONDS": "3600",
}
"""No server of the comparison gives up on a request, so ours must not either."""


@dataclass(frozen=True)
class Setup:
    """What is the same for all servers of a run."""

    model: Path
    dtype: Dtype
    threads: int
    folder: Path
    """For logs and data; goes away after the run."""
    system: str
    """The system prompt of the conversation."""
    vllm: Path | None = None
    """A virtual environment that has vLLM, or its `vllm` program."""
    openvino: Path | None = None
    """A virtual environment that has OpenVINO GenAI."""
    llama_cpp: Path | None = None
    """A virtual environment that has llama-cpp-python."""


class Peer(ABC):
    """One way to serve the model."""

    name: str
    """What --only calls it."""
    title: str
    """What the table calls it."""
    ready: str
    """Path that answers 200 once requests can be sent."""

    def missing(self, setup: Setup) -> str | None:
        """Return why it cannot be started here, or None."""
        return None

    @abstractmethod
    def command(self, setup: Setup, port: int) -> list[str]:
        """Return what starts it."""

    def environment(self, setup: Setup) -> dict[str, str]:
        """Return the environment that it is started in."""
        return {**os.environ, **_thread_settings(setup)}

    @abstractmethod
    def completion(self, setup: Setup, prompt: str, max_tokens: int) -> Post:
        """Return the request that continues a text, greedily and streamed."""

    @abstractmethod
    def chat(self, setup: Setup, session: str, turns: Sequence[Message], max_tokens: int) -> Post:
        """Return the request that answers the last of `turns`, greedily and streamed."""

    @abstractmethod
    def parse(self, name: str, data: str) -> StreamEvent:
        """Parse one event of its streams."""


class Ours(Peer):
    """This service by its own routes; a conversation is one session."""

    name, title, ready = "ours", "this service", "/readyz"

    def command(self, setup: Setup, port: int) -> list[str]:
        return our_command(port)

    def environment(self, setup: Setup) -> dict[str, str]:
        prompts = setup.folder / "prompts"
        prompts.mkdir(exist_ok=True)
        (prompts / "base_system.txt").write_text(setup.system)
        settings = {
            "APP__PROMPTS_DIR": str(prompts),
            "MODEL__NAME": str(setup.model),
            "MODEL__SOURCE": "local",
            "MODEL__DTYPE": setup.dtype,
            "MODEL__THREADS": str(setup.threads),
            # Others keep none.
            "MODEL__SPARE_WORKER": "false",
        }
        return our_environment(setup.folder, {**_thread_settings(setup), **settings, **DEADLINES})

    def completion(self, setup: Setup, prompt: str, max_tokens: int) -> Post:
        return self.post("/v1/generate", {"prompt": prompt}, max_tokens)

    def chat(self, setup: Setup, session: str, turns: Sequence[Message], max_tokens: int) -> Post:
        return self.post("/v1/chat", {"session_id": session, "messages": turns[-1:]}, max_tokens)

    def parse(self, name: str, data: str) -> StreamEvent:
        payload = json.loads(data)
        match name:
            case "delta":
                return StreamEvent(text=payload["content"])
            case "done":
                return StreamEvent(usage=_usage(payload["usage"]))
        return StreamEvent(error=data)

    def post(self, path: str, fields: Mapping[str, Any], max_tokens: int) -> Post:
        """Return a greedy, streamed request."""
        sampling = {"max_tokens": max_tokens, "temperature": 0, "stream": True, "cache": False, "ignore_eos": True}
        return Post(path, {**fields, **sampling}, {"X-API-Key": KEY})


class OpenAiPeer(Peer):
    """A server of OpenAI's two routes, which is sent the whole conversation each time."""

    ready = "/health"
    extra: Mapping[str, Any] = {}
    """Fields that only this server takes."""

    def completion(self, setup: Setup, prompt: str, max_tokens: int) -> Post:
        return self._post("/v1/completions", setup, {"prompt": prompt}, max_tokens)

    def chat(self, setup: Setup, session: str, turns: Sequence[Message], max_tokens: int) -> Post:
        messages = [{"role": "system", "content": setup.system}, *turns]
        return self._post("/v1/chat/completions", setup, {"messages": messages}, max_tokens)

    def parse(self, name: str, data: str) -> StreamEvent:
        if data == "[DONE]":
            return StreamEvent()
        payload = json.loads(data)
        if "error" in payload:
            return StreamEvent(error=str(payload["error"]))
        choice: Mapping[str, Any] = next(iter(payload.get("choices") or []), {})
        text = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
        usage = payload.get("usage")
        return StreamEvent(text=text, usage=_usage(usage) if usage else None)

    def _post(self, path: str, setup: Setup, fields: Mapping[str, Any], max_tokens: int) -> Post:
        sampling = {"model": str(setup.model), "max_tokens": max_tokens, "temperature": 0, "stream": True}
        return Post(path, {**fields, **sampling, **self.extra})


class TransformersServe(OpenAiPeer):
    """`transformers serve`, one request at a time."""

    name, title = "serve", "transformers serve"
    options: Sequence[str] = ()

    def missing(self, setup: Setup) -> str | None:
        lacking = [name for name in ("accelerate", "openai") if importlib.util.find_spec(name) is None]
        return f"needs {' and '.join(lacking)}: pip install -e '.[bench]'" if lacking else None

    def command(self, setup: Setup, port: int) -> list[str]:
        # The module and not the program beside the interpreter: it then runs on what this process imports.
        start = "from transformers.cli.transformers import main; main()"
        options = ["--port", str(port), "--host", "127.0.0.1", "--dtype", setup.dtype, *self.options]
        return [sys.executable, "-c", start, "serve", str(setup.model), *options]


class ContinuousServe(TransformersServe):
    """`transformers serve` with continuous batching, sized for these loads.

    By itself it takes most of the machine's memory for its cache, and a CPU then spends its time on masks as wide as
    the cache: 25 tokens/s instead of 650 with a tiny model.  More than enough for 32 sequences:
    """

    name, title = "serve-cb", "transformers serve --continuous-batching"
    options = ("--continuous-batching", "--cb-num-blocks", "128", "--cb-max-batch-tokens", "1024")


class Vllm(OpenAiPeer):
    """vLLM's CPU build, from an installation of its own."""

    name, title = "vllm", "vLLM"
    extra: Mapping[str, Any] = {"ignore_eos": True, "stream_options": {"include_usage": True}}

    def missing(self, setup: Setup) -> str | None:
        if setup.vllm is None:
            return "no installation given (--vllm)"
        return None if _vllm_program(setup.vllm).is_file() else f"there is no {_vllm_program(setup.vllm)}"

    def command(self, setup: Setup, port: int) -> list[str]:
        program = str(_vllm_program(setup.vllm or Path()))
        return [program, "serve", str(setup.model), "--port", str(port), "--host", "127.0.0.1", "--dtype", setup.dtype]

    def environment(self, setup: Setup) -> dict[str, str]:
        # GiB of KV cache are more than these loads need.  By itself
        # vLLM leaves one core to its front end, with which it is half as fast on two.
        cores = ",".join(map(str, sorted(os.sched_getaffinity(0))[: setup.threads]))
        own = {"VLLM_CPU_KVCACHE_SPACE": "4", "VLLM_CPU_OMP_THREADS_BIND": cores}
        # Its installation brings the OpenMP that it asks for.
        openmp = _vllm_program(setup.vllm or Path()).parent.parent / "lib" / "libiomp5.so"
        if openmp.is_file():
            own["LD_PRELOAD"] = str(openmp)
        return {**own, **_without_our_libraries(), **_thread_settings(setup)}


class OpenVino(OpenAiPeer):
    """OpenVINO GenAI's continuous batching, from an environment of its own, behind a few lines of HTTP."""

    name, title = "openvino", "OpenVINO GenAI"

    def missing(self, setup: Setup) -> str | None:
        if setup.openvino is None:
            return "no installation given (--openvino)"
        return None if _python(setup.openvino).is_file() else f"there is no {_python(setup.openvino)}"

    def command(self, setup: Setup, port: int) -> list[str]:
        return [*openvino_command(setup), "--port", str(port)]

    def environment(self, setup: Setup) -> dict[str, str]:
        return openvino_environment(setup)


class LlamaCpp(OpenAiPeer):
    """llama.cpp by its Python package, from an environment of its own; one request at a time, as the package serves."""

    name, title = "llama-cpp", "llama-cpp-python"

    def missing(self, setup: Setup) -> str | None:
        if setup.llama_cpp is None:
            return "no installation given (--llama-cpp)"
        return None if _python(setup.llama_cpp).is_file() else f"there is no {_python(setup.llama_cpp)}"

    def command(self, setup: Setup, port: int) -> list[str]:
        options = ["--dtype", setup.dtype, "--threads", str(setup.threads), "--port", str(port)]
        return [str(_python(setup.llama_cpp or Path())), "-m", "bench.llama_cpp_server", str(setup.model), *options]

    def environment(self, setup: Setup) -> dict[str, str]:
        return _foreign_environment(setup)


PEERS: tuple[Peer, ...] = (Ours(), TransformersServe(), ContinuousServe(), Vllm(), OpenVino(), LlamaCpp())


def openvino_command(setup: Setup) -> list[str]:
    """Return what runs OpenVINO GenAI alone."""
    options = ["--dtype", setup.dtype, "--threads", str(setup.threads)]
    return [str(_python(setup.openvino or Path())), "-m", "bench.openvino_server", str(setup.model), *options]


def openvino_environment(setup: Setup) -> dict[str, str]:
    """Return the environment that it is started in."""
    return _foreign_environment(setup)


def _foreign_environment(setup: Setup) -> dict[str, str]:
    """Return the environment of a program that reads our benchmark, and none of our libraries."""
    return {**_without_our_libraries(), **_thread_settings(setup), "PYTHONPATH": str(ROOT)}


def _python(environment: Path) -> Path:
    return environment / "bin" / "python"


def _without_our_libraries() -> dict[str, str]:
    """Return this machine's environment, in which another interpreter does not find our libraries."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def _vllm_program(installation: Path) -> Path:
    return installation / "bin" / "vllm" if installation.is_dir() else installation


def _thread_settings(setup: Setup) -> dict[str, str]:
    return {"OMP_NUM_THREADS": str(setup.threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def _usage(fields: Mapping[str, int]) -> tuple[int, int]:
    return fields["prompt_tokens"], fields["completion_tokens"]
