"""Files out of packages of the Python index: a real model and real questions where there is no hub."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Unreachable(Exception):
    """A package could not be fetched: the message says why."""


def cache() -> Path:
    """The folder in which files stay, from one time to the next."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "outgrow" / "real"


@contextmanager
def wheel(package: str, digest: str, folder: Path) -> Iterator[zipfile.ZipFile]:
    """The archive of a package of the Python index, fetched into `folder` by pip and removed in the end.

    Args:
        package: with its version, `name==1.0`.
        digest: its SHA-256.

    Raises:
        Unreachable: pip does not give the package, or gives another one.
    """
    print(f"fetching {package} by pip", file=sys.stderr)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    how = ["--no-deps", "--only-binary", ":all:", "--retries", "1", "--timeout", "20"]
    command = [*pip, *how, "--dest", folder, package]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        raise Unreachable(f"pip could not fetch {package}: {' '.join(done.stderr.split())[-200:]}")
    (path,) = wheels
    with path.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if found != digest:
        raise Unreachable(f"{package} has another content than the one tested (sha256 {found})")
    with zipfile.ZipFile(path) as archive:
        yield archive
    path.unlink()
