"""Files and directories that are there whole or not at all."""

import contextlib
import errno
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from mora_jax.io._errors import AdapterFileError
from mora_jax.io._paths import Location, is_local, size

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
"""What an adapter's directory holds, in PEFT's format and in ours."""

TEMPORARY = ".mora-jax-"
"""How the names of unfinished files and directories begin."""

Writer = Callable[[str, Iterable[bytes]], None]
"""Writes one file of a directory: its name and its content, piece by piece."""


def read_bytes(path: Location, limit: int | None = None) -> bytes:
    """A file's content.

    Raises:
      AdapterFileError: There is no such file, or it has more than `limit` bytes.
    """
    try:
        if limit is not None and (found := size(path)) > limit:
            raise AdapterFileError(
                f"{path.name} must be at most {limit:,} bytes long, got {found:,}"
            )
        if is_local(path) and path.exists() and not path.is_file():
            raise AdapterFileError(f"{path} is no regular file")
        return path.read_bytes()
    except FileNotFoundError:
        raise AdapterFileError(f"there is no {path.name} in {path.parent}") from None
    except NotADirectoryError:
        raise AdapterFileError(f"{path.parent} is no directory") from None
    except IsADirectoryError:
        raise AdapterFileError(f"{path} is no regular file") from None


def read_if_of_size(path: Location, expected: int) -> bytes | None:
    """A file's content if there is such a file of that many bytes."""
    with contextlib.suppress(FileNotFoundError, IsADirectoryError):
        if size(path) == expected:
            return path.read_bytes()
    return None


def write_file(path: Location, chunks: Iterable[bytes]) -> None:
    """Make or replace `path`: a reader sees the old content or the new.

    An object store does that by itself, once all chunks have come.

    Raises:
      OSError: What the file system says; then the old content stays.
    """
    if is_local(path):
        _write_local(path, chunks)
        return
    with path.open("wb") as file:
        for chunk in chunks:
            file.write(chunk)


def _write_local(path: Path, chunks: Iterable[bytes]) -> None:
    unfinished = _unfinished(path)
    with naming(path):
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


def new_directory(
    path: Location,
) -> contextlib.AbstractContextManager[Writer]:
    """A directory to fill, whose files are removed again on an error.

    A local directory is `path` only at the end, and replaces what was there. Only in
    that case there is an instant without either, between two renames.

    An object store has no directories to rename. There what was at `path` is removed
    first, and a process that is killed leaves the files that it had written: write the
    one that readers look for last.
    """
    return _renamed(path) if is_local(path) else _in_place(path)


@contextlib.contextmanager
def _renamed(path: Path) -> Iterator[Writer]:
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished, old = _unfinished(path), _unfinished(path)
        unfinished.mkdir()
        try:
            yield lambda name, chunks: write_file(unfinished / name, chunks)
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


@contextlib.contextmanager
def _in_place(path: Location) -> Iterator[Writer]:
    path.mkdir(parents=True, exist_ok=True)
    for file in sorted(entries(path), key=lambda file: file.suffix != ".json"):
        if file.is_file():
            file.unlink(missing_ok=True)
    written: list[Location] = []

    def write(name: str, chunks: Iterable[bytes]) -> None:
        written.append(path / name)
        write_file(path / name, chunks)

    try:
        yield write
    except BaseException:
        for file in written:
            with contextlib.suppress(Exception):
                file.unlink(missing_ok=True)
        raise


def _unfinished(path: Path) -> Path:
    return path.with_name(f"{TEMPORARY}{uuid.uuid4().hex}")


@contextlib.contextmanager
def naming(path: Location) -> Iterator[None]:
    """Have errors of the file system name `path`, not an unfinished file."""
    try:
        yield
    except OSError as error:
        named = None if error.filename is None else os.fspath(error.filename)
        if error.errno is not None and (named is None or TEMPORARY in named):
            raise OSError(error.errno, error.strerror, os.fspath(path)) from None
        if TEMPORARY in str(error):
            text = re.sub(rf"{re.escape(TEMPORARY)}[\w.]*", path.name, str(error))
            raise OSError(text) from None
        raise


def make_directory(path: Location) -> None:
    """Make `path` a directory unless it is one.

    Raises:
      NotADirectoryError: It is a file, or below one.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        reason = os.strerror(errno.ENOTDIR)
        raise NotADirectoryError(errno.ENOTDIR, reason, os.fspath(path)) from None


def sync(directory: Location) -> None:
    """Have the names in `directory` written to the disk."""
    if os.name == "nt" or not is_local(directory):  # they have no way to ask for that
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def entries(directory: Location) -> list[Location]:
    """What is in a directory; an object store has none where it has no objects."""
    return list(directory.iterdir()) if directory.exists() else []


def unfinished_files(directory: Location) -> list[Location]:
    """What killed processes left."""
    return [path for path in entries(directory) if path.name.startswith(TEMPORARY)]


@contextlib.contextmanager
def locked(directory: Location) -> Iterator[None]:
    """Hold `directory` against other writers, where the platform can."""
    try:
        import fcntl
    except ImportError:  # Windows
        fcntl = None
    if fcntl is None or not is_local(directory):
        yield
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
