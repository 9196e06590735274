"""`python -m app doctor`: what it finds, what it says to do, and what it never says."""

import json
import os
import resource
import shutil
import socket
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from app.access.database import head_revision
from app.access.diagnosis import Diagnosis
from app.access.faults import Fault
from app.cli import cli
from app.doctor import machine, network, storage
from tests.ports import free_port

ROOT = Path(__file__).parents[3]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installation that is well: the embedded model, a data folder with a database and a key, a free port."""
    for name in list(os.environ):
        if "__" in name or name in ("DATABASE_URL", "HF_TOKEN", "HUGGINGFACE_TOKEN"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "prompts", tmp_path / "prompts")
    shutil.copytree(ROOT / "models" / "tiny-chat", tmp_path / "model", ignore=shutil.ignore_patterns("training"))
    monkeypatch.setenv("MODEL__NAME", "model")
    monkeypatch.setenv("APP__PORT", str(free_port()))
    monkeypatch.setattr(storage, "LITTLE_BYTES", 0)  # whatever room this machine has
    monkeypatch.setattr(storage, "TOO_LITTLE_BYTES", 0)
    ended = CliRunner().invoke(cli, ["db", "upgrade"])
    assert 0 == ended.exit_code, ended.output
    return tmp_path


def examine(code: int, *options: str) -> str:
    ended = CliRunner().invoke(cli, ["doctor", *options])
    assert code == ended.exit_code, ended.output
    assert ended.exception is None or isinstance(ended.exception, SystemExit)
    return ended.output


def findings(code: int) -> list[dict[str, str]]:
    """Return the findings, without the line at the end that counts the problems."""
    said = examine(code, "--json")
    found: list[dict[str, str]] = json.loads(said[: said.rindex("]") + 1])
    return found


def test_an_installation_that_is_well_has_no_problem(folder: Path):
    """Each subject has its line, in plain text where nobody looks at a terminal; nothing is left behind."""
    before = sorted(folder.rglob("*"))

    said = examine(0)

    lines = said.splitlines()
    assert {"ok", "warning"} >= {line.split()[0] for line in lines}
    subjects = {line[9:].partition(":")[0] for line in lines}
    wanted = ["configuration", "data folder", "database", "model", "network", "Python", "memory", "limits", "clock"]
    assert set() == {*wanted, "API key", "prompts", "processor", "GPU", "temporary folder"} - subjects
    assert "model (LlamaForCausalLM)" in said
    assert before == sorted(folder.rglob("*"))


def test_names_in_a_models_files_write_no_lines_and_no_colours(folder: Path):
    path = folder / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": ["Llama\x1b[31m\nok all is well"]}))

    said = examine(0)

    assert "(Llama?[31m?ok all is well)" in said
    assert "\x1b" not in said


def test_before_the_first_start_all_is_well_and_nothing_is_created(folder: Path):
    shutil.rmtree(folder / "data")

    said = examine(0)

    assert "data will be created" in said
    assert "the first start creates data/service.db" in said
    assert not (folder / "data").exists()


def spoil_database(change: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda folder: change(folder / "data" / "service.db")


def cut_weights(folder: Path) -> None:
    path = folder / "model" / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1)


def future_schema(path: Path) -> None:
    with closing(sqlite3.connect(path)) as database:
        database.execute("UPDATE alembic_version SET version_num = '9999'")
        database.commit()


def write(name: str, text: str) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)

    return act


def replace_data_folder(folder: Path) -> None:
    shutil.rmtree(folder / "data")
    (folder / "data").write_text("a file")


def test_every_configured_model_is_examined(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Those too that are loaded on their first use; one of a registry needs its address."""
    entries = [{"name": "absent"}, {"name": "models:/chat/3", "source": "mlflow"}]
    monkeypatch.setenv("MODELS", json.dumps(entries))
    said = examine(1)

    assert "absent/config.json cannot be read" in said
    assert "models.0.name" in said
    assert "mlflow.tracking_uri is not set" in said


def test_the_embedding_models_folder_is_examined_too(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("EMBEDDINGS__MODEL", "encoder")
    assert "encoder/config.json cannot be read" in examine(1)
    assert "embeddings.model" in examine(1)
    shutil.copytree(folder / "model", folder / "encoder")
    assert "encoder (" in examine(0)


def test_an_engine_elsewhere_needs_an_address_and_no_model(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Which may hold no key, as what is said of it would."""
    monkeypatch.setenv("MODEL__ENGINE", "remote")
    assert "remote.base_urls" in examine(1)
    monkeypatch.setenv("REMOTE__BASE_URLS", '["http://127.0.0.1:9/v1"]')
    assert "other servers generate (1 in" in examine(0)
    monkeypatch.setenv("REMOTE__BASE_URLS", '["http://user:sk-secret@127.0.0.1:9/v1"]')
    said = examine(1)
    assert "keys go into remote.api_key" in said
    assert "sk-secret" not in said


LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0"
INDEX = json.dumps({"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}})


@pytest.mark.parametrize(
    ("spoil", "subject", "text"),
    [
        (write("config.yml", "model: {nmae: x}"), "configuration", "model.nmae: there is no such key"),
        (write("config.yml", "model: [1"), "configuration", "not valid YAML"),
        (replace_data_folder, "data folder", "is no folder"),
        (write("data/api_key", "a secret of other software"), "API key", "holds no key of this service"),
        (spoil_database(lambda path: path.write_text("text " * 999)), "database", "is damaged"),
        (spoil_database(lambda path: os.truncate(path, 5000)), "database", "is damaged"),
        (spoil_database(future_schema), "database", "newer than this program"),
        (lambda folder: (folder / "prompts" / "base_system.txt").unlink(), "prompts", "No such file"),
        (lambda folder: (folder / "model" / "config.json").unlink(), "model", "config.json cannot be read"),
        (write("model/config.json", "[1"), "model", "holds no JSON object"),
        (lambda folder: (folder / "model" / "model.safetensors").unlink(), "model", "no weights"),
        (cut_weights, "model", "model.safetensors is cut off"),
        (write("model/model.safetensors", LFS_POINTER), "model", "pointer of Git LFS"),
        (write("model/model.safetensors", "PK\x03\x04" * 99), "model", "is no safetensors file"),
        (write("model/model.safetensors.index.json", INDEX), "model", "model-2.safetensors is missing"),
        (lambda folder: (folder / "model" / "tokenizer.json").unlink(), "model", "has no tokenizer"),
    ],
)
def test_what_keeps_the_service_from_working_is_a_problem_with_advice(
    folder: Path, spoil: Callable[[Path], object], subject: str, text: str
):
    """The command fails, and the other subjects are examined all the same."""
    spoil(folder)

    found = findings(1)

    problems = [each for each in found if each["level"] == "problem"]
    assert [subject] == [each["subject"] for each in problems if text in each["text"]]
    assert all(each["advice"] for each in problems)
    assert {"Python", "memory", "clock"} <= {each["subject"] for each in found}


def row_from_the_future(folder: Path) -> None:
    with closing(sqlite3.connect(folder / "data" / "service.db")) as database:
        later = (datetime.now(UTC) + timedelta(days=9)).replace(tzinfo=None)
        row = ("i", b"", "abcd", "free", str(later))
        database.execute("INSERT INTO api_keys (id, digest, last_four, role, created) VALUES (?, ?, ?, ?, ?)", row)
        database.commit()


def readable(name: str) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        (folder / name).touch()
        (folder / name).chmod(0o644)

    return act


@pytest.mark.parametrize(
    ("spoil", "variables", "subject", "text"),
    [
        (readable(".env"), {}, "configuration", "others on this machine can read .env"),
        (readable("data/service.db"), {}, "database", "others on this machine can read"),
        (readable("log"), {"LOGGING__FILE": "log"}, "log file", "others on this machine can read log"),
        (lambda folder: (folder / "data").chmod(0o777), {}, "data folder", "others may change"),
        (row_from_the_future, {}, "clock", "ahead of this machine's clock"),
        (lambda folder: None, {"MODEL_DEVICE": "cpu"}, "configuration", "MODEL_DEVICE in the environment is not read"),
        (lambda folder: None, {"DATABASE_URI": "x"}, "configuration", "DATABASE_URI in the environment is not read"),
    ],
)
def test_what_deserves_attention_is_a_warning(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[Path], object],
    variables: dict[str, str],
    subject: str,
    text: str,
):
    """The service works, so the command succeeds."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    spoil(folder)

    warnings = [each for each in findings(0) if each["level"] == "warning"]

    assert [subject] == [each["subject"] for each in warnings if text in each["text"]]
    assert all(each["advice"] for each in warnings)


def test_what_a_postgres_elsewhere_says_of_itself_is_looked_at(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """That it only follows another server, that nothing is encrypted on the way, that its clock is wrong."""

    async def diagnosis(_: object) -> Diagnosis:
        return Diagnosis(
            readable=True,
            revision=head_revision(),
            standby=True,
            encrypted=False,
            clock_skew_seconds=-7200,
            fault=Fault.READ_ONLY,
            reason="it follows another",
        )

    monkeypatch.setattr("app.doctor.database.diagnose", diagnosis)
    monkeypatch.setenv("DATABASE_URL", "postgresql://anna:canary@db.example.com/llm")

    said = examine(1)

    assert "problem  database: Postgres on db.example.com, port 5432, llm cannot be written" in said
    assert "problem  database: it is a standby" in said
    assert "warning  database: the connection to db.example.com is not encrypted" in said
    assert "warning  clock: the database's clock is -7200 s away" in said
    assert "canary" not in said


def test_a_log_that_is_never_emptied_is_a_warning(folder: Path):
    """SQLite's, by a reader that never ends."""
    with (folder / "data" / "service.db-wal").open("wb") as file:
        file.truncate(300_000_000)

    assert "write-ahead log has 300 MB" in examine(0)


@pytest.mark.parametrize(
    ("model", "variables", "code", "text"),
    [
        ("someone/some-model", {}, 0, "warning  model: no hub token is set"),
        ("someone/some-model", {"HF_TOKEN": "canary-0123456789"}, 0, "the start downloads it from the hub"),
        ("someone/some-model", {"HF_HUB_OFFLINE": "1"}, 1, "problem  model: someone/some-model is not on this machine"),
    ],
)
def test_a_model_of_the_hub_is_looked_for_on_this_machine_only(
    folder: Path, monkeypatch: pytest.MonkeyPatch, model: str, variables: dict[str, str], code: int, text: str
):
    for name, value in {"MODEL__SOURCE": "hub", "MODEL__NAME": model, **variables}.items():
        monkeypatch.setenv(name, value)

    assert text in examine(code)


@pytest.mark.parametrize(
    ("name", "address", "code", "text"),
    [
        (
            "models:/chat@production",
            "http://registry.test",
            0,
            "model: models:/chat@production comes from the",
        ),
        ("models:/chat@production", "", 1, "problem  model: mlflow.tracking_uri is not set"),
        ("models:/chat@production", "./mlruns", 1, "problem  model: mlflow.tracking_uri must begin with http://"),
        ("chat", "http://registry.test", 1, "problem  model: model.name must be models:/name/version"),
    ],
)
def test_a_model_of_a_registry_is_examined_without_asking_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, address: str, code: int, text: str
):
    for variable, value in {"MODEL__SOURCE": "mlflow", "MODEL__NAME": name, "MLFLOW_TRACKING_URI": address}.items():
        monkeypatch.setenv(variable, value)

    assert text in examine(code)


def test_limits_of_the_machine_are_looked_at(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Room on the disk, memory, open files, the clock, a GPU that is asked for, a folder that executes nothing."""
    limits = {resource.RLIMIT_NOFILE: (64, 256), resource.RLIMIT_FSIZE: (1_000_000, resource.RLIM_INFINITY)}
    monkeypatch.setattr(resource, "getrlimit", limits.__getitem__)
    monkeypatch.setattr(storage, "TOO_LITTLE_BYTES", 10**18)
    monkeypatch.setattr(machine, "ENOUGH_MEMORY", 10**18)
    wrong = SimpleNamespace(now=lambda zone: datetime(2001, 1, 1, tzinfo=UTC), fromtimestamp=datetime.fromtimestamp)
    monkeypatch.setattr(machine, "datetime", wrong)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    blocks = {"f_frsize": 4096, "f_blocks": 9, "f_bfree": 5, "f_bavail": 5}
    volume = SimpleNamespace(**blocks, f_files=9, f_favail=0, f_flag=os.ST_NOEXEC)
    monkeypatch.setattr(os, "statvfs", lambda path: volume)
    monkeypatch.setenv("MODEL__DEVICE", "cuda")

    said = examine(1)

    for text in (
        "problem  data folder: its disk has",
        "problem  data folder: its disk has no room for another file",
        "warning  memory:",
        "warning  limits: 256 files and connections may be open at once. To do: raise the hard limit to 4096",
        "warning  limits: files may not grow beyond 1 MB",
        "problem  clock: the clock says 2001-01-01 00:00 UTC",
        "warning  compiler: there is no C++ compiler",
        "warning  temporary folder: nothing in it",
    ):
        assert text in said, text
    assert machine.NVIDIA_DEVICE.exists() or "problem  model: there is no NVIDIA GPU here" in said
    assert "llm-service: " in said.splitlines()[-1]


@pytest.mark.parametrize(
    ("torch", "visible", "said"),
    [
        (
            "2.13.0+cpu",
            None,
            "warning  GPU: NVIDIA H200, which torch 2.13.0+cpu, built for processors, cannot use. To do:",
        ),
        ("2.13.0", "-1", "warning  GPU: NVIDIA H200, hidden by CUDA_VISIBLE_DEVICES. To do: unset it"),
        ("2.13.0", None, "ok       GPU: NVIDIA H200."),
    ],
    ids=["torch of processors", "hidden", "used"],
)
def test_a_gpu_that_models_cannot_use_is_a_warning(
    folder: Path, monkeypatch: pytest.MonkeyPatch, torch: str, visible: str | None, said: str
):
    (folder / "gpus/0000:01:00.0").mkdir(parents=True)
    (folder / "gpus/0000:01:00.0/information").write_text("Model: \t\t NVIDIA H200\nIRQ:   \t\t 18\n")
    monkeypatch.setattr(machine, "NVIDIA_DEVICE", folder)
    monkeypatch.setattr(machine, "NVIDIA_GPUS", folder / "gpus")
    monkeypatch.setattr(machine, "version", lambda name: torch)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    assert said in examine(0)


@pytest.fixture
def other_program(folder: Path) -> Iterator[socket.socket]:
    """A server on the port of the service that answers nothing."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", int(os.environ["APP__PORT"])))
        server.listen()
        yield server


def test_a_port_that_another_program_uses_is_a_problem(other_program: socket.socket, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(network, "_WAIT_SECONDS", 0.1)

    assert "cannot be used: Address already in use. To do: end the program" in examine(1)


@pytest.mark.parametrize("host", ["203.0.113.7", "no such host.invalid"])
def test_an_address_that_is_not_this_machines_is_a_problem(folder: Path, monkeypatch: pytest.MonkeyPatch, host: str):
    monkeypatch.setenv("APP__HOST", host)

    assert "problem  network: " in examine(1)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://anna:canary@127.0.0.1:1/llm?password=canary",
        "postgresql://anna:can@ary@127.0.0.1:1/llm",
        "postgresql://anna:canary@127.0.0.1:port/llm",
        "mysql://anna:canary@127.0.0.1/llm",
    ],
)
def test_no_secret_is_printed_whatever_is_wrong(folder: Path, monkeypatch: pytest.MonkeyPatch, url: str):
    for name in ("SECURITY__API_KEY", "HF_TOKEN", "OPENAI_API_KEY"):
        monkeypatch.setenv(name, "canary-0123456789")
    monkeypatch.setenv("DATABASE_URL", url)

    said = examine(1) + examine(1, "--json")

    assert "database" in said
    assert "canary" not in said
    assert "ary@" not in said
    assert "Traceback" not in said


def test_a_defect_of_one_examination_is_a_finding_and_hides_no_other(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Its message may quote anything, so only its kind is said."""

    def fail(*_: object) -> None:
        raise ValueError("canary")

    monkeypatch.setattr(shutil, "disk_usage", fail)

    said = examine(1)

    assert "problem  storage: it cannot be examined (ValueError)" in said
    assert "ok       database:" in said
    assert "canary" not in said


def test_on_a_terminal_it_is_a_table(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("app.cli.doctor.sys", SimpleNamespace(stdout=SimpleNamespace(isatty=lambda: True)))

    said = examine(0)

    assert "Examination" in said
    assert "LlamaForCausalLM" in said
