"""Fetch the JavaScript libraries of the chat page from npm into app/web/page/vendor: `python -m scripts.vendor_page`.

Each package has its exact version and the sha512 that npm publishes of it, and is taken only if it has that very
content.  To renew one, change its version, take the new integrity from `npm view PACKAGE@VERSION dist.integrity`, read
what changed, and run this again.  Needs npm; nothing that runs later does.
"""

import base64
import hashlib
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "app/web/page/vendor"
SUMS = "SHA256SUMS.txt"


@dataclass(frozen=True)
class Package:
    """A package of npm, and the one file of it that the page loads."""

    name: str
    version: str
    license: str
    integrity: str
    file: str
    """Its path in the package."""
    stored: str
    """Its name here."""
    suffix: str = ""
    """Lines to add, so that a browser can import it."""


PACKAGES = (
    Package(
        "marked",
        "18.2.1",
        "MIT",
        "sha512-ii4bxCTCqqwpT86XZWgJNs+ZnAIZksmLGYMViWA7PDIXYIeNo1x6cDdX3JOip9NM/cI6p8z57FxliACboTruMA==",
        "lib/marked.esm.js",
        "marked.js",
    ),
    Package(
        "dompurify",
        "3.5.0",
        "MPL-2.0 OR Apache-2.0",
        "sha512-LYC0ZkE8P1V42JsRYTwMdme/2ET8SpOc5AA2eOFjP/IadvRd2fwiT4TVz5vkfy0XUx12aS2UaRkTnfVPNOv9vw==",
        "dist/purify.es.mjs",
        "dompurify.js",
    ),
    Package(
        "@highlightjs/cdn-assets",
        "11.12.0",
        "BSD-3-Clause",
        "sha512-KvOKXODaiFmId9xaq3xc5xCL66wVLUuOngDbO9B/kewbFTqdGbn2nJxNhN3H5R1cgDTVj6R8vH0zgiNDEGjpDw==",
        "es/highlight.min.js",
        "highlight.js",
    ),
    Package(
        "temml",
        "0.13.5",
        "MIT",
        "sha512-aPkDDgunanpLNL0ql32HbolqLep+w8DRcVXRql7rWrMt/PhczdLgL4UBYYVU3BYjCNjkGq4EqwIicu/zWr1iOg==",
        "dist/temml.min.js",
        "temml.js",
        "\nexport default temml;\n",
    ),
)


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    written = {}
    with tempfile.TemporaryDirectory() as folder:
        for package in PACKAGES:
            for name, content in fetch(package, Path(folder)).items():
                FOLDER.joinpath(name).write_bytes(content)
                written[name] = hashlib.sha256(content).hexdigest()
            print(f"{package.name} {package.version} ({package.license})")
    lines = [f"{digest}  {name}\n" for name, digest in sorted(written.items())]
    FOLDER.joinpath(SUMS).write_text("".join(lines), encoding="ascii")
    for old in FOLDER.iterdir():
        if old.name not in {SUMS, *written}:
            old.unlink()


def fetch(package: Package, folder: Path) -> dict[str, bytes]:
    """Return the library and its license, by the names that they have here."""
    spec = f"{package.name}@{package.version}"
    packed = subprocess.run(
        ["npm", "pack", "--silent", "--ignore-scripts", spec],  # noqa: S607
        cwd=folder,
        check=True,
        capture_output=True,
        text=True,
    )
    archive = folder / packed.stdout.split()[-1]
    found = "sha512-" + base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
    if found != package.integrity:
        sys.exit(f"{spec} is not what was reviewed: {found}")
    with tarfile.open(archive) as members:
        return {
            package.stored: _content(members, package.file) + package.suffix.encode(),
            package.stored.replace(".js", ".license.txt"): _content(members, "LICENSE"),
        }


def _content(members: tarfile.TarFile, name: str) -> bytes:
    member = members.extractfile(f"package/{name}")
    if member is None:
        sys.exit(f"there is no {name} in the package")
    # The map is not served.
    return b"\n".join(line for line in member.read().split(b"\n") if not line.startswith(b"//# sourceMappingURL"))


if __name__ == "__main__":
    main()
