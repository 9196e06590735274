"""Where a model's files are: a folder of the operator's, or one that the hub's client downloads them to."""

import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download

from app.ipc.messages import ModelSpec
from app.worker.loading.load_progress import OnBytes, download_bar
from app.worker.loading.model_files import LoadError, NoModelError

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
HUB_IGNORED_FILES = ["*/*", "consolidated*"]
"""Other formats of the same weights."""


def find_folder(
    spec: ModelSpec,
    files: Sequence[str] = HUB_FILES,
    ignored: Sequence[str] = HUB_IGNORED_FILES,
    *,
    hub_token: str | None = None,
    on_bytes: OnBytes = lambda done, total: None,
) -> tuple[Path, str | None]:
    """Return the folder of the files and their commit, after a download where needed.

    Args:
        files, ignored: patterns of what is downloaded.
        hub_token: in place of the environment's.
        on_bytes: is called as the download goes on.
    Raises: LoadError: there is no such folder, or the name is no id.  What the hub's client raises.
    """
    if spec.source == "local":
        folder = Path(spec.name).expanduser().resolve()
        if not folder.is_dir():
            raise NoModelError(f"there is no folder {folder}")
        revision = spec.revision
    else:
        if not HUB_ID.fullmatch(spec.name) or ".." in spec.name:
            raise LoadError("its name is not a hub id like owner/model")
        folder = Path(
            snapshot_download(
                spec.name,
                revision=spec.revision,
                allow_patterns=list(files),
                ignore_patterns=list(ignored),
                token=hub_token,
                tqdm_class=download_bar(on_bytes),
            )
        )
        revision = folder.name
    return folder, revision
