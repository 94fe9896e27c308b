"""Local paths, and the URLs that `etils.epath` opens."""

import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard
from urllib.request import url2pathname

if TYPE_CHECKING:
    from etils import epath

    Location = Path | epath.Path
else:
    Location = Any

PACKAGES = {"gs": "gcsfs", "s3": "s3fs", "az": "adlfs"}
"""{scheme: the package with which epath opens its URLs}."""


def as_path(argument: str, value: object) -> Location:
    """Return the path that a user's argument names, a `str` or a path object.

    `~` is the home directory, and `file://` begins a local path. epath opens the other
    URLs: `gs://`, `s3://`, `az://` and the schemes that `epath.register_path_cls` has
    registered.

    Returns:
      A `pathlib.Path` for a local path, since saving locks and renames it; otherwise an
      `epath.Path`.

    Raises:
      TypeError: The value is neither text nor a path.
      ValueError: The scheme of a URL is unknown, or the value is empty or malformed.
      ImportError: The package that opens such URLs is not installed.
    """
    if not isinstance(value, str | os.PathLike):
        raise TypeError(
            f"{argument} must be a path or a URL, got {value!r:.80} "
            f"of type {type(value).__name__}"
        )
    if _is_remote(value):
        return value  # type: ignore[return-value]
    text = os.fspath(value)
    if not isinstance(text, str) or not text:
        raise ValueError(f"{argument} must be a path or a URL, got {text!r}")
    url = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):(/+)", text)
    if url is None:
        try:
            return Path(text).expanduser()
        except RuntimeError:
            raise ValueError(
                f"{argument} begins with '~', and there is no such home directory, "
                f"got {text!r}; write './{text}' for a file of that name"
            ) from None
    if url[1] == "file":
        local = re.fullmatch("file:(?://(?:localhost)?)?(/[^/].*)", text)
        if local is None:
            raise ValueError(
                f"{argument} must be like 'file:///folder/name' for a file of this "
                f"machine, got {text!r}"
            )
        return Path(url2pathname(local[1]))
    if len(url[2]) == 1:
        raise ValueError(
            f"{argument} must be a URL with '//', given as text because pathlib takes "
            f"one '/' out of URLs, got {text!r}"
        )
    return _remote(argument, text, url[1])


def is_local(path: Location) -> TypeGuard[Path]:
    """Return True if `path` is local, so that it can be locked and renamed."""
    return type(path) is type(Path())


def size(path: Location) -> int:
    """Return the number of bytes of a file."""
    stat: Any = path.stat()
    return stat.st_size if hasattr(stat, "st_size") else stat.length


def parts(path: Location) -> tuple[str, ...]:
    """Return the names that lead to a path, by which two paths can be compared."""
    if is_local(path):
        return path.resolve().parts
    return tuple(name for name in os.fspath(path).split("/") if name)


def _is_remote(value: Any) -> bool:
    """Return True if `value` is of a class of epath and not local."""
    epath = sys.modules.get("etils.epath")  # whoever has such an object imported it
    if epath is None or not isinstance(value, epath.Path):
        return False
    return "://" in os.fspath(value) or type(value) is not type(epath.Path("."))


def _remote(argument: str, text: str, scheme: str) -> Location:
    where = f"{argument} is the URL {text!r}, which"
    try:
        from etils import epath
    except ImportError as error:
        raise ImportError(f"{where} needs etils: pip install mora-jax[io]") from error
    try:
        if scheme == "hf":  # each file that is written there would make a commit
            raise KeyError(scheme)
        path = epath.Path(text)
        path.exists()
    except KeyError:
        known = ", ".join(f"{name}://" for name in PACKAGES)
        advice = "; download it first" * (scheme in ("http", "https", "hf"))
        raise ValueError(
            f"{argument} must be a local path or a URL of {known} or of a scheme that "
            f"is registered with epath, got {text!r}{advice}"
        ) from None
    except ImportError as error:
        package = PACKAGES.get(scheme)
        advice = f"; pip install {package}" if package else ""
        raise ImportError(f"{where} cannot be opened: {error}{advice}") from error
    return path
