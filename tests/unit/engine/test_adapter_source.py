"""Where adapters may lie: below the roots, whatever paths and links say."""

from pathlib import Path

import pytest

from app.engine.adapter_source import CONFIG, PICKLED_WEIGHTS, WEIGHTS, find_adapter_files
from app.errors import InvalidRequest


def make_adapter(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True)
    for name in names or (CONFIG, WEIGHTS):
        (folder / name).write_text("{}")
    return folder


def refusal(source: str, *roots: Path) -> str:
    with pytest.raises(InvalidRequest) as refused:
        find_adapter_files(source, roots)
    return refused.value.message


def test_an_adapter_is_found_by_a_relative_path_or_an_absolute_one(tmp_path: Path) -> None:
    """In the first root that has it; its own path is told relative to that root."""
    roots = tmp_path / "one", tmp_path / "two"
    roots[0].mkdir()
    folder = make_adapter(roots[1] / "team" / "adapter")

    for source in ("team/adapter", "team/adapter/", str(folder)):
        found = find_adapter_files(source, roots)
        assert ("team/adapter", folder / CONFIG, folder / WEIGHTS) == (found.folder, found.config, found.weights)


@pytest.mark.parametrize("source", ["../outside", "inside/../../outside", "..", "inside/.."])
def test_a_path_that_goes_up_is_refused(tmp_path: Path, source: str) -> None:
    make_adapter(tmp_path / "outside")
    make_adapter(tmp_path / "root" / "inside")

    assert refusal(source, tmp_path / "root") == "source must not hold '..'"


@pytest.mark.parametrize(
    "source",
    [
        *("/etc", "missing", "a" * 5000, "inside/adapter_config.json", "~", "//etc", "a\0b"),
        *("https://example.com/adapter", "file:///etc", "hf://owner/adapter", "owner/adapter@main"),
    ],
)
def test_what_is_not_below_a_root_looks_like_what_is_not_there(tmp_path: Path, source: str) -> None:
    make_adapter(tmp_path / "root" / "inside")

    assert refusal(source, tmp_path / "root") == "source names no folder below adapters.roots"


def test_an_absolute_path_outside_of_the_roots_is_refused(tmp_path: Path) -> None:
    """Also one whose name begins with that of a root."""
    (tmp_path / "root").mkdir()
    for name in ("outside", "root-2"):
        assert "no folder below" in refusal(str(make_adapter(tmp_path / name)), tmp_path / "root")


def test_a_link_out_of_the_roots_is_refused(tmp_path: Path) -> None:
    """Of the folder, of one above it, and of each file."""
    outside, root = make_adapter(tmp_path / "outside" / "adapter"), tmp_path / "root"
    root.mkdir()
    (root / "folder").symlink_to(outside)
    (root / "above").symlink_to(outside.parent)
    (root / "circle").symlink_to(root / "circle")

    for source in ("folder", "above/adapter", str(root / "folder"), "circle"):
        assert "no folder below" in refusal(source, root)
    for name, other in ((CONFIG, WEIGHTS), (WEIGHTS, CONFIG)):
        folder = make_adapter(root / name, other)
        (folder / name).symlink_to(outside / name)
        assert refusal(name, root) == f"source holds no file {name} below adapters.roots"


def test_a_link_to_another_folder_of_the_roots_is_followed(tmp_path: Path) -> None:
    """As the hub's cache stores files; and a root may be a link itself."""
    blobs = make_adapter(tmp_path / "real" / "blobs")
    snapshot = tmp_path / "real" / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    for name in (CONFIG, WEIGHTS):
        (snapshot / name).symlink_to(blobs / name)
    (tmp_path / "root").symlink_to(tmp_path / "real")

    assert blobs / WEIGHTS == find_adapter_files("snapshots/main", [tmp_path / "root"]).weights


def test_pickled_weights_are_refused_by_name(tmp_path: Path) -> None:
    make_adapter(tmp_path / "root" / "old", CONFIG, PICKLED_WEIGHTS)

    assert "adapter_model.bin, which is pickled and never read" in refusal("old", tmp_path / "root")


def test_without_roots_no_adapter_is_loaded(tmp_path: Path) -> None:
    assert "adapters.roots" in refusal(str(make_adapter(tmp_path / "adapter")))
