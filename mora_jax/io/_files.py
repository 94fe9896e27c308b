"""Files and directories that are there whole or not at all."""

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

from mora_jax.io._errors import AdapterFileError

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
"""What an adapter's directory holds, in PEFT's format and in ours."""

TEMPORARY = ".mora-jax-"
"""How the names of unfinished files and directories begin."""


def read_bytes(path: Path, limit: int | None = None) -> bytes:
    """A file's content.

    Raises:
      AdapterFileError: no such file, or one of more than `limit` bytes.
    """
    try:
        size = path.stat().st_size
        if limit is not None and size > limit:
            raise AdapterFileError(
                f"{path.name} must be at most {limit:,} bytes long, got {size:,}"
            )
        if not path.is_file():
            raise AdapterFileError(f"{path} is no regular file")
        return path.read_bytes()
    except FileNotFoundError:
        raise AdapterFileError(f"there is no {path.name} in {path.parent}") from None
    except NotADirectoryError:
        raise AdapterFileError(f"{path.parent} is no directory") from None


def write_file(path: Path, chunks: Iterable[bytes]) -> None:
    """Make or replace `path`: a reader sees the old content or the new.

    Raises:
      OSError: what the file system says; the old content stays.
    """
    unfinished = _unfinished(path)
    try:
        with unfinished.open("xb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A directory to fill, which becomes `path` at the end, or is removed on an error.

    What was at `path` is replaced. Only in that case there is an instant without
    either, between two renames.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished, old = _unfinished(path), _unfinished(path)
    unfinished.mkdir()
    try:
        yield unfinished
        sync(unfinished)
        with contextlib.suppress(FileNotFoundError):
            os.rename(path, old)
        os.rename(unfinished, path)
    except BaseException:
        if old.exists() and not path.exists():
            os.rename(old, path)
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _unfinished(path: Path) -> Path:
    return path.with_name(f"{TEMPORARY}{uuid.uuid4().hex}")


def sync(directory: Path) -> None:
    """Have the names in `directory` written to the disk."""
    if os.name == "nt":  # it has no way to ask for that
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_unfinished(directory: Path) -> None:
    """Clear what killed processes left."""
    for path in directory.glob(f"{TEMPORARY}*"):
        with contextlib.suppress(OSError):
            path.unlink()


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold `directory` against other writers, where the platform can."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
