"""What a request may have loaded: no path, link, address or name that leads elsewhere."""

from pathlib import Path

import pytest

from app.config import ModelConfig
from app.config.model import ModelHosting
from app.engine.source_policy import check_source
from app.errors import Forbidden, ModelLoadFailed


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a root that holds a model, and one beside it that is nobody's business."""
    for name in ("models/chat", "models/org/deep", "secret/chat"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "models"


def check(name: str, source: str = "local", revision: str | None = None, **rules: object) -> ModelConfig:
    config = ModelConfig.model_validate({"name": name, "source": source, "revision": revision})
    return check_source(config, ModelHosting.model_validate({"roots": [Path("models")], **rules}))


@pytest.mark.parametrize("name", ["chat", "models/chat", "org/deep", "./chat"])
def test_a_folder_below_a_root_may_be_loaded(root: Path, name: str):
    assert str(root / ("org/deep" if "deep" in name else "chat")) == check(name).name


def test_a_folder_may_be_named_by_its_whole_path(root: Path):
    assert str(root / "chat") == check(str(root / "chat")).name


@pytest.mark.parametrize(
    "name",
    [
        *(
            "../secret/chat",
            "chat/../../secret/chat",
            "models/../secret/chat",
            "/etc",
            "secret/chat",
            "/",
            ".",
            "models",
        ),
        *("file:///etc", "https://example.com/model", "hf://owner/model", "..", "~/model"),
    ],
)
def test_a_path_that_leads_out_of_the_roots_is_refused(root: Path, name: str):
    with pytest.raises((Forbidden, ModelLoadFailed)) as refusal:
        check(name)

    assert "/" not in name or len(name) == 1 or name not in refusal.value.message


@pytest.mark.parametrize("link", ["folder", "file", "below"])
def test_a_link_out_of_the_roots_is_refused(root: Path, link: str):
    outside = root.parent / "secret" / "chat"
    if link == "folder":
        (root / "linked").symlink_to(outside)
    else:
        folder = root / "linked" / ("deeper" if link == "below" else "")
        folder.mkdir(parents=True)
        (folder / "config.json").symlink_to(outside / "config.json")

    with pytest.raises(Forbidden, match=r"outside of the folders|a link that leads out"):
        check("linked")


def test_a_link_within_the_roots_is_how_the_hubs_cache_stores_files(root: Path):
    (root / "linked").mkdir()
    (root / "linked" / "config.json").symlink_to(root / "chat" / "config.json")

    assert str(root / "linked") == check("linked").name


def test_without_roots_no_folder_may_be_loaded(root: Path):
    with pytest.raises(Forbidden, match=r"model\.roots"):
        check("chat", roots=[])


def test_a_folder_that_is_not_there_is_not_found(root: Path):
    with pytest.raises(ModelLoadFailed, match="no such folder") as failure:
        check("absent")

    assert {"reason": "not_found"} == failure.value.details


@pytest.mark.parametrize("name", ["google/gemma-2-2b-it", "gpt2", "Qwen/Qwen3-0.6B"])
def test_a_hub_id_may_be_loaded(name: str):
    assert name == check(name, "hub", "main").name


@pytest.mark.parametrize(
    "name", ["a/b/c", "../b", "a/..", "/a", "https://huggingface.co/a/b", "a/b@main", "a b", "-a/b", ".a", "a/", "a\n"]
)
def test_a_name_that_is_no_hub_id_is_refused(name: str):
    with pytest.raises(Forbidden):
        check(name, "hub")


@pytest.mark.parametrize("revision", ["../main", "-x", "a b", "--upload", "refs/../../x", "a\n"])
def test_a_revision_that_is_no_name_is_refused(revision: str):
    with pytest.raises(Forbidden, match="revision"):
        check("a/b", "hub", revision)


@pytest.mark.parametrize("name", ["models:/chat/3", "models:/chat@production", "models:/my chat@a-b"])
def test_a_registry_uri_may_be_loaded(name: str):
    assert name == check(name, "mlflow").name


@pytest.mark.parametrize(
    "name", ["models:/chat", "models://chat/1", "runs:/1/model", "models:/../1", "models:/chat/x", "http://a/b", "chat"]
)
def test_a_name_that_is_no_registry_uri_is_refused(name: str):
    with pytest.raises(Forbidden):
        check(name, "mlflow")


@pytest.mark.parametrize(
    ("name", "source", "allowed"),
    [
        ("google/gemma-2-2b-it", "hub", True),
        ("google2/gemma", "hub", False),
        ("chat", "local", True),
        ("org/deep", "local", False),
        ("models:/chat/3", "mlflow", False),
    ],
)
def test_only_what_a_pattern_allows_may_be_loaded(root: Path, name: str, source: str, allowed: bool):
    patterns = ["google/*", "ch?t"]
    if allowed:
        check(name, source, allowed=patterns)
    else:
        with pytest.raises(Forbidden, match=r"model\.allowed"):
            check(name, source, allowed=patterns)
