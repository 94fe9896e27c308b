"""Files and directories that are there whole or not at all."""

import contextlib
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator

from mora_jax.io._errors import AdapterFileError
from mora_jax.io._locations import Location, is_local, size

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
"""The files in an adapter's directory, in PEFT's format and in this library's."""

TEMPORARY = ".mora-jax-"
"""The beginning of the names of unfinished files and directories."""

Files = Iterable[tuple[str, Iterable[bytes]]]
"""The names of files, each with its content in pieces."""


# --- Reading ---


@contextlib.contextmanager
def missing_files(path: Location) -> Iterator[None]:
    """Turn the errors of a missing file, or of a directory there, into ours.

    Raises:
      AdapterFileError: The file does not exist, or is a directory or a device.
    """
    try:
        if is_local(path) and path.exists() and not path.is_file():
            raise AdapterFileError(f"{path} is a directory or a device, not a file")
        yield
    except FileNotFoundError:
        raise AdapterFileError(f"there is no {path.name} in {path.parent}") from None
    except NotADirectoryError:
        raise AdapterFileError(f"{path.parent} is not a directory") from None
    except IsADirectoryError:
        raise AdapterFileError(f"{path} is a directory, not a file") from None


def read_bytes(path: Location, limit: int | None = None) -> bytes:
    """Return the content of a file.

    Raises:
      AdapterFileError: The file does not exist, or it has more than `limit` bytes.
    """
    with missing_files(path):
        if limit is not None and (length := size(path)) > limit:
            raise AdapterFileError(
                f"{path.name} must be at most {limit:,} bytes long, got {length:,}"
            )
        return path.read_bytes()


def entries(directory: Location) -> list[Location]:
    """Return the entries of a directory, none if it does not exist.

    In an object store a directory without objects does not exist.
    """
    return list(directory.iterdir()) if directory.exists() else []


# --- Writing ---


@contextlib.contextmanager
def unfinished_file(directory: Location, data: bytes) -> Iterator[Location]:
    """Write a file under a temporary name, which is to be renamed within.

    If it still has that name at the end, it is removed.
    """
    path = _temporary(directory)
    try:
        _write(path, [data])
        yield path
    finally:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def _write(path: Location, chunks: Iterable[bytes]) -> None:
    with path.open("wb") as file:
        for chunk in chunks:
            file.write(chunk)
        if is_local(path):
            file.flush()
            os.fsync(file.fileno())


def write_directory(path: Location, files: Files) -> None:
    """Write all files of a directory; if an error occurs, none of them is there.

    A local directory gets the name `path` only at the end, when it replaces what was
    there. If something was there, neither exists for an instant between two renames.

    An object store lacks directories to rename. What was at `path` is removed first,
    and a process that is killed leaves the files that it had written. So the last file
    should be the one that readers look for first.
    """
    with naming(path):
        if not is_local(path):
            for file in sorted(entries(path), key=lambda file: file.suffix != ".json"):
                if file.is_file():
                    file.unlink(missing_ok=True)
            _fill(path, files)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished, old = _temporary(path.parent), _temporary(path.parent)
        unfinished.mkdir()
        try:
            _fill(unfinished, files)
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


def _fill(directory: Location, files: Files) -> None:
    """Write files; if an error occurs, they are removed again."""
    written: list[Location] = []
    try:
        for name, chunks in files:
            written.append(directory / name)
            _write(directory / name, chunks)
    except BaseException:
        for file in written:
            with contextlib.suppress(Exception):
                file.unlink(missing_ok=True)
        raise


def _temporary(directory: Location) -> Location:
    return directory / f"{TEMPORARY}{uuid.uuid4().hex}"


@contextlib.contextmanager
def naming(path: Location) -> Iterator[None]:
    """Make errors of the file system name `path` and not an unfinished file."""
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


def sync(directory: Location) -> None:
    """Write the names in `directory` to the disk.

    Windows and object stores offer nothing of the kind.
    """
    if os.name == "nt" or not is_local(directory):
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(directory: Location) -> Iterator[None]:
    """Keep other writers out of `directory`, if the platform has locks."""
    try:
        import fcntl
    except ImportError:  # Windows lacks it
        fcntl = None
    if fcntl is None or not is_local(directory):
        yield
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems lack locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
