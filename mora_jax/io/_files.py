"""Paths and URLs, and files that are there whole or not at all."""

import contextlib
import hashlib
import itertools
import json
import os
import re
import sys
import tempfile
import uuid
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard
from urllib.request import url2pathname

import jax


class AdapterFileError(ValueError):
    """A file is not what it claims to be, or is not for this model.

    Nothing from the file has been used. The message names the file and the layer.
    """


if TYPE_CHECKING:
    from etils import epath

Location: TypeAlias = "Path | epath.Path"
PathLike = str | os.PathLike[str]  # what `as_path` reads


def as_path(argument: str, value: object) -> Location:
    """The path that a user's argument names, a `str` or a path object."""
    # A local one is a `pathlib.Path`, without `~` and `file://`. Others are of epath.
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(text, str) or not text:
        kind = ValueError if isinstance(text, str) else TypeError
        raise kind(f"{argument} must be a path or a URL, got {value!r:.80}")
    epath = sys.modules.get("etils.epath")  # whoever has such a path imported it
    if epath and isinstance(value, epath.Path):
        # The text of a class that is registered for a scheme may have lost a slash.
        if type(value) is not type(epath.Path()):
            return value  # type: ignore[return-value]
    url = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):(/+)", text)
    if url is None:
        return Path(text).expanduser()
    if local := re.fullmatch("file:(?://(?:localhost)?)?(/[^/].*)", text):
        return Path(url2pathname(local[1]))
    scheme, slashes = url.groups()
    if scheme == "file" or len(slashes) == 1:
        rule = f"{argument} must be like 'file:///folder/name' or 'gs://bucket/name'"
        why = "as text because pathlib takes one '/' out of URLs"
        raise ValueError(f"{rule}, {why}, got {text!r}")
    from etils import epath

    try:
        if scheme == "hf":  # each file that is written there would make a commit
            raise KeyError(scheme)
        path = epath.Path(text)
    except KeyError:
        advice = "; download it first" * (scheme in ("http", "https", "hf"))
        known = "gs://, s3://, az:// or of a scheme that is registered with epath"
        rule = f"{argument} must be a local path or a URL of {known}"
        raise ValueError(f"{rule}, got {text!r}{advice}") from None
    path.exists()  # raises if the package that opens such URLs is missing
    return path


def is_local(path: Location) -> TypeGuard[Path]:
    return type(path) is type(Path())


def holds(directory: Location, path: Location) -> bool:
    """True if `path` is `directory` or lies in it, by the names that lead to both."""
    outer, inner = (p.resolve() if is_local(p) else p for p in (directory, path))
    return is_local(outer) == is_local(inner) and inner.is_relative_to(outer)


ADAPTER = CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
"""The files in the directory of an adapter of PEFT. This library has the second."""

TEMPORARY = ".mora-jax-"  # so begin the names of unfinished files and directories
LIMIT, _steps = 300, itertools.count()  # seconds to wait for others, numbers of steps
Files = Iterable[tuple[str, Iterable[bytes]]]  # names, and contents in pieces


@contextlib.contextmanager
def together(call: str, shared: bool = True) -> Iterator[dict[str, Any]]:
    """A step of `call`, which raises on all processes if it raises on one.

    It yields a dictionary {what it is: value}, to be filled with values that must be
    the same on all processes before they go on.
    """
    alike: dict[str, Any] = {}
    own = None
    if not shared or jax.process_count() == 1:
        return (yield alike)
    try:
        yield alike
        said = json.dumps({name: _digest(value) for name, value in alike.items()})
    except Exception as error:
        own = error
        said = f"{type(error).__name__}: {error}"
    # Private to JAX, and used by Orbax: what is public runs on devices, so it carries
    # no error, and waits for ever for a process that died.
    from jax._src.distributed import global_state

    client: Any = global_state.client  # None without jax.distributed.initialize
    step, place = next(_steps), f"{jax.process_index():06}"
    try:
        client.key_value_set(f"mora_jax/{step}/{place}", said)
        client.wait_at_barrier(f"mora_jax/{step}", 1000 * LIMIT)
        answers = sorted(client.key_value_dir_get(f"mora_jax/{step}/"))
        client.key_value_delete(f"mora_jax/{step - 1}/{place}")  # all have read it
    except Exception as error:
        rule = f"{call} must be called on all processes within {LIMIT} s"
        raise RuntimeError(f"{rule}, got one that ended or did not: {error}") from own
    if own:
        raise own
    for number, (_, other) in enumerate(answers):
        if other != said:
            got = other
            if other.startswith("{"):
                mine, theirs = json.loads(said), json.loads(other)
                names = [name for name in mine if mine[name] != theirs.get(name)]
                got = f"other arguments than here: {', '.join(names)}"
            raise RuntimeError(f"{call} failed on process {number}, so on all: {got}")


def _digest(value: Any) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()


@contextlib.contextmanager
def missing_files(path: Location) -> Iterator[None]:
    """Turn the errors of a missing file, or of a directory there, into ours."""
    try:
        if is_local(path) and path.exists() and not path.is_file():
            raise IsADirectoryError  # or a pipe, whose reader may wait for ever
        yield
    except IsADirectoryError:
        reason = f"{path} is a directory or a device, not a file"
        raise AdapterFileError(reason) from None
    except FileNotFoundError:
        what = f"{path.name} in {path.parent}"
        if is_local(path) and not path.parent.exists():
            what = f"directory {path.parent.absolute()}, and so no {path.name}"
            if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path.parent)):
                what += "; huggingface_hub.snapshot_download gives that of the Hub"
        elif is_local(path) and (path.parent / TENSORS).exists():
            what += f", but {TENSORS}, which mora_jax.load reads if it is ours"
        raise AdapterFileError(f"there is no {what}") from None
    except NotADirectoryError:
        raise AdapterFileError(f"{path.parent} is not a directory") from None


def read_bytes(path: Location) -> bytes:
    with missing_files(path):
        return path.read_bytes()


def entries(directory: Location) -> list[Location]:
    """The entries of a directory, none if it does not exist."""
    # In an object store a directory without objects does not exist.
    return list(directory.iterdir()) if directory.exists() else []


def check_free(
    argument: str, value: object, names: Collection[str], force: bool
) -> Location:
    """The path of a directory, if one of files called `names` may be made there."""
    # With `force` it may replace one, all of whose files have those names.
    path = as_path(argument, value)
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{argument} must be a directory, got the file {path}")
    there = {entry.name for entry in entries(path)}
    foreign = sorted(there - set(names))
    tensors = [name for name in there if name.endswith(".safetensors")]
    if there and (not force or foreign or not tensors):
        found = foreign[:3] or sorted(there)[:3]
        rule = f"{argument} must be new or empty, got {path} with {found}"
        remedy = "force=True replaces a directory that holds a *.safetensors"
        raise FileExistsError(f"{rule}; {remedy}, and nothing but what this writes")
    return path


def replace_file(path: Location, data: bytes) -> None:
    """Replace a file by one rename, and leave the others in its directory alone."""
    directory = path.parent
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"directory must be a directory, got {directory}")
    directory.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as left:
        new = directory / f"{TEMPORARY}{uuid.uuid4().hex}"
        left.callback(_remove, new)
        _write(new, [data])
        new.replace(path)
        _sync_names(directory)


def _remove(path: Location) -> None:
    with contextlib.suppress(Exception):  # clients of stores have errors of their own
        path.unlink(missing_ok=True)


def _write(path: Location, chunks: Iterable[bytes]) -> None:
    with path.open("wb") as file:
        for chunk in chunks:
            file.write(chunk)
        if is_local(path):
            file.flush()
            os.fsync(file.fileno())


def write_directory(path: Location, files: Files) -> None:
    """Write all files of a directory; if an error occurs, none of them is there."""
    # A process that is killed leaves a local directory that is whole or as it was, but
    # of an object store's the files that it had written. So the last file should be the
    # one that readers look for first.
    if is_local(path):
        _replace_directory(path, files)
        return
    # A store lacks directories to rename, so the old files make room. A config goes
    # first, so that nothing takes the remainder for a whole.
    for file in sorted(entries(path), key=lambda file: file.suffix != ".json"):
        if file.is_file():
            file.unlink(missing_ok=True)
    with contextlib.ExitStack() as written:
        for name, chunks in files:
            written.callback(_remove, path / name)
            _write(path / name, chunks)
        written.pop_all()


def _replace_directory(path: Path, files: Files) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = {"prefix": TEMPORARY, "dir": path.parent, "ignore_cleanup_errors": True}
    with tempfile.TemporaryDirectory(**beside) as place:
        new, old = Path(place, "new"), Path(place, "old")
        new.mkdir()
        for name, chunks in files:
            _write(new / name, chunks)
        # First the files' names go to the disk, and then their directory's.
        _sync_names(new)
        try:
            with contextlib.suppress(FileNotFoundError):
                os.rename(path, old)
            os.rename(new, path)  # before, for an instant, neither is there
        except BaseException:
            if old.exists() and not path.exists():
                os.rename(old, path)
            raise
        _sync_names(path.parent)


def _sync_names(directory: Location) -> None:
    """Write the names in a directory to the disk, where that can be asked for."""
    if os.name == "nt" or not is_local(directory):
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
