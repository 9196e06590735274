"""The environments of real clients: each has its own, with the versions that the table in docs/clients.md names."""

import hashlib
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import filelock

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".cache" / "clients"


@dataclass(frozen=True)
class Client:
    """A client and the program that tries it."""

    program: str
    """Its file in `programs/`."""
    packages: tuple[str, ...]
    """From the Python package index or, for a program in JavaScript, from npm's."""
    without: tuple[str, ...] = ()
    """What its last package asks for and works without, or has already."""

    @property
    def is_javascript(self) -> bool:
        return self.program.endswith((".mjs", ".cjs"))

    @property
    def name(self) -> str:
        """Return the package that gives the client its name, with its version."""
        return self.packages[0]


CLIENTS = (
    Client("openai_chat.py", ("openai==3.57.0",)),
    Client("openai_responses.py", ("openai==3.57.0",)),
    Client("langchain_openai_chat.py", ("langchain-openai==1.7.4", "langgraph==1.2.24", "langchain==1.5.2")),
    Client("llama_index_chat.py", ("llama-index-llms-openai-like==0.8.1",)),
    Client("litellm_completion.py", ("litellm==1.110.2",)),
    Client("instructor_record.py", ("instructor==1.17.0",)),
    Client("pydantic_ai_agent.py", ("pydantic-ai-slim[openai]==2.68.0",)),
    Client("openai_agents_run.py", ("openai-agents==0.24.0",)),
    Client("llm_prompt.py", ("llm==0.36",)),
    Client("dspy_predict.py", ("dspy==3.4.1",)),
    Client("openai_npm.mjs", ("openai@6.49.0",)),
    Client(
        "ai_sdk.mjs",
        ("ai@6.0.326", "@ai-sdk/openai@3.0.141", "@ai-sdk/openai-compatible@2.0.92", "zod@4.6.7"),
    ),
)
AXIOS = Client("predict_axios.cjs", ("axios@1.21.1",))
"""The client in JavaScript that an older service printed."""
LM_EVAL = Client("../lm_eval_round.py", ("lm-eval[api]==0.4.13", "transformers==5.23.0", "jinja2>=3.1.6"))
OPEN_WEBUI = Client("open_webui_page.py", ("open-webui==0.12.4", "torch==2.13.0"))
"""The program itself; torch is named for the wheel without CUDA, which is what machines without a GPU take."""
PLAYWRIGHT = Client("open_webui_page.py", ("playwright==1.65.2",))
"""What types into its page, in the system's own Chromium."""
_REQUIREMENTS = """
import sys
from importlib.metadata import requires
from pip._vendor.packaging.requirements import Requirement
name, *without = sys.argv[1:]
for each in map(Requirement, requires(name) or ()):
    if each.name not in without and (each.marker is None or each.marker.evaluate({"extra": ""})):
        print(str(each).partition(";")[0])
"""
"""Prints what a package asks for on this machine, but for some packages."""


def command(client: Client) -> list[str]:
    """Return the command that runs a client's program, after installing the client if need be."""
    folder = installed(client)
    program = Path(__file__).parent / "programs" / client.program
    if not client.is_javascript:
        return [str(folder / "bin" / "python"), str(program)]
    # Node looks for packages beside the program.
    for source in (program, program.with_name("scenario.mjs")):
        shutil.copy(source, folder)
    return ["node", str(folder / program.name)]


def is_installed(client: Client) -> bool:
    """Return whether a client's environment is here."""
    return (_folder(client) / "installed").exists()


def installed(client: Client) -> Path:
    """Return the folder of a client's environment, after installing it if need be; equal packages share one."""
    folder = _folder(client)
    CACHE.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{folder}.lock"):
        if not (folder / "installed").exists():
            shutil.rmtree(folder, ignore_errors=True)
            install = _install_javascript if client.is_javascript else _install_python
            install(folder, client)
            (folder / "installed").touch()
    return folder


def _folder(client: Client) -> Path:
    facts = (client.packages, sys.version_info[:2], *filter(None, [client.without]))
    digest = hashlib.sha256(repr(facts).encode()).hexdigest()[:12]
    return CACHE / digest


def _install_python(folder: Path, client: Client) -> None:
    """Make a virtual environment with the client's packages."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = str(folder / "bin" / "python")
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if not client.without:
        subprocess.run([*pip, *client.packages], check=True)
        return
    *first, last = client.packages
    subprocess.run([*pip, *first], check=True)
    subprocess.run([*pip, "--no-deps", last], check=True)
    listing = [python, "-c", _REQUIREMENTS, last.partition("==")[0], *client.without]
    wanted = subprocess.run(listing, check=True, capture_output=True, text=True).stdout.splitlines()
    subprocess.run([*pip, *first, *wanted], check=True)


def _install_javascript(folder: Path, client: Client) -> None:
    folder.mkdir(parents=True)
    npm = shutil.which("npm")
    assert npm is not None, "needs npm"
    subprocess.run([npm, "install", "--silent", "--no-audit", "--no-fund", *client.packages], cwd=folder, check=True)
