"""Which models of a registry are downloaded at all, and which of their files."""

from typing import Any

import pytest

from app.errors import ModelRefused
from app.registry.client import MlflowClient, RegistryServer
from app.registry.flavor import ArtifactFile, plan_files, store_path
from tests.unit.registry.stub import MLMODEL, Registry

ROOT = "0/models/m-1/artifacts"


async def plan(registry: Registry) -> list[ArtifactFile]:
    async with MlflowClient(RegistryServer(tracking_uri=registry.address)) as client:
        return await plan_files(ROOT, registry.files["MLmodel"], client.list_folder)


async def test_only_weights_tokenizer_and_configuration_are_downloaded(registry: Registry):
    """What MLflow stores beside them is for its own loader; the tokenizer is the one that MLflow would load."""
    registry.files |= {
        "python_env.yaml": b"",
        "model/tokenizer.json": b"beside the weights",
        "model/training_args.bin": b"pickled",
        "model/modeling_custom.py": b"code",
        "model/consolidated.safetensors": b"another format",
        "model/checkpoint-1/model.safetensors": b"older",
        "model/.gitattributes": b"",
        "model/.hidden.json": b"{}",
        "model/the license.md": b"",
        "components/tokenizer/config.json": b"{}",
    }

    files = await plan(registry)

    assert [
        ("config.json", "model/config.json"),
        ("model.safetensors", "model/model.safetensors"),
        ("tokenizer.json", "components/tokenizer/tokenizer.json"),
    ] == [(file.name, file.path.removeprefix(f"{ROOT}/")) for file in files]


def described(**transformers: Any) -> bytes:
    lines = "".join(f"    {name}: {value}\n" for name, value in ({"model_binary": "model"} | transformers).items())
    return f"flavors:\n  transformers:\n{lines}".encode()


@pytest.mark.parametrize(
    ("mlmodel", "words"),
    [
        (
            b"flavors:\n  python_function: {loader_module: x}\n  sklearn: {}",
            "this model has 'python_function', 'sklearn'",
        ),
        (
            b"flavors:\n  pytorch: {model_data: data}",
            "only the flavor transformers is loaded; this model has 'pytorch'",
        ),
        (b"flavors: {}", "this model has none"),
        (b"flavors:\n  transformers: []", "only the flavor transformers"),
        (described(code="code"), "'transformers'.code brings Python code"),
        (MLMODEL.replace("3.11.7}", "3.11.7, code: code}").encode(), "'python_function'.code brings Python code"),
        (described(peft_adaptor="peft"), "it is an adapter for another model"),
        (b"flavors:\n  transformers: {source_model_revision: abc}", "holds no weights but names a model of the hub"),
        (b"flavors:\n  transformers: {task: text-generation}", "model_binary must name the folder"),
        (described(model_binary="../other"), "leads elsewhere or is no plain one: '../other'"),
        (described(model_binary="/etc"), "leads elsewhere or is no plain one: '/etc'"),
        (described(model_binary="[a]"), "model_binary must name the folder"),
        (b"flavors: [", "is not valid YAML"),
        (b"!!python/object/apply:os.system ['true']", "is not valid YAML"),
        (b"\xff\xfe\x00", "is not valid YAML"),
        (b"[" * 5000, "is not valid YAML"),
        (b"nothing", "names no flavors"),
    ],
)
async def test_a_model_of_another_flavor_or_with_code_is_refused(registry: Registry, mlmodel: bytes, words: str):
    registry.files["MLmodel"] = mlmodel

    with pytest.raises(ModelRefused, match=r"\.$") as refusal:
        await plan(registry)

    assert words in refusal.value.message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"code/helper.py": b""}, "It has a folder code, whose Python code is never run"),
        ({"model/model.safetensors": None, "model/pytorch_model.bin": b""}, "model/pytorch_model.bin: pickled weights"),
        ({"model/model.safetensors": None, "model/weights.PKL": b""}, "model/weights.PKL: pickled weights"),
        ({"model/model.safetensors": None}, "model: it has no weights in the safetensors format"),
        ({f"model/{number}.json": b"" for number in range(501)}, "It has 504 files; at most 500"),
    ],
)
async def test_files_that_cannot_be_loaded_are_refused(registry: Registry, change: dict[str, bytes | None], words: str):
    files = registry.files | change
    registry.files = {name: content for name, content in files.items() if content is not None}

    with pytest.raises(ModelRefused, match=r"\.$") as refusal:
        await plan(registry)

    assert words in refusal.value.message


@pytest.mark.parametrize(
    "name",
    [
        *("../x.json", "/etc/x.json", "..", ".", "", "a/../x.json", "a/x.json", "a\\x.json", "C:x.json", "x\0.json"),
        *("%2e%2e.json", "x\n.json", f"{'x' * 300}.json", "x\u202e.json", "http:x.json", "x?.json", "~x.json"),
    ],
)
@pytest.mark.parametrize("folder", ["", "model", "components/tokenizer"])
async def test_a_name_that_leads_out_of_the_folder_is_refused(registry: Registry, folder: str, name: str):
    registry.listed[folder] = [{"path": name, "is_dir": False, "file_size": 1}]
    if folder != "model":
        registry.listed[folder] += [{"path": "x.safetensors", "is_dir": False, "file_size": 1}]

    with pytest.raises(ModelRefused, match="leads elsewhere or is no plain one") as refusal:
        await plan(registry)

    assert refusal.value.message.isprintable()


async def test_a_file_of_unknown_length_is_refused(registry: Registry):
    registry.listed["model"] = [{"path": "model.safetensors", "is_dir": False}]

    with pytest.raises(ModelRefused, match=r"does not say how long 'model\.safetensors' is"):
        await plan(registry)


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("s3://bucket/model", "they are in s3"),
        ("file:///etc", "they are in file"),
        ("http://169.254.169.254/x", "they are in http"),
        ("/etc/passwd", "they are in another place"),
        ("mlflow-artifacts://169.254.169.254/x", "they are in mlflow-artifacts"),
        ("mlflow-artifacts:/0/../../etc", "leads elsewhere"),
        ("mlflow-artifacts:/0/%2e%2e/etc", "leads elsewhere"),
        ("mlflow-artifacts:/0//x", "leads elsewhere"),
        ("mlflow-artifacts:/0/x?y", "leads elsewhere"),
    ],
)
def test_files_that_the_registry_does_not_serve_itself_are_refused(uri: str, words: str):
    """No address that the registry names is contacted."""
    with pytest.raises(ModelRefused, match=words):
        store_path(uri)


def test_the_path_of_a_model_is_the_one_in_the_store():
    assert "0/models/m-1/artifacts" == store_path("mlflow-artifacts:/0/models/m-1/artifacts")
