"""An object store in memory, whose URLs begin with mem://.

As on a real one, objects are there whole once their writing ends, directories are but
the beginnings of names, and nothing is renamed but by a copy. `states` gives what was
there after each change, which is what a process that is killed in between leaves.
"""

# pyright: reportAssignmentType=false, reportIncompatibleMethodOverride=false
import contextlib
import io
import types
from pathlib import Path

from etils import epath

OBJECTS: dict[str, bytes] = {}
history: list[dict[str, bytes]] = []
failures: set[str] = set()
"""Names of objects whose writing fails."""


def put(name, data):
    """Store an object, or remove it if `data` is None."""
    if data is None:
        OBJECTS.pop(name)
    else:
        OBJECTS[name] = data
    history.append(dict(OBJECTS))


@contextlib.contextmanager
def states():
    """A list of the store's contents, one for each change within."""
    start, found = len(history), [dict(OBJECTS)]
    yield found
    found += history[start:]


def restore(state):
    """Have the store hold what a state of it did."""
    OBJECTS.clear()
    OBJECTS.update(state)


def upload(directory, url):
    """Copy the files of a local directory."""
    for path in Path(directory).iterdir():
        put((epath.Path(url) / path.name).key, path.read_bytes())


class _Writer(io.BytesIO):
    def __init__(self, name):
        super().__init__()
        self.name = name

    def write(self, data):
        if self.name.rpartition("/")[2] in failures:
            raise OSError(5, "the network is gone")
        return super().write(data)

    def __exit__(self, *error):  # fsspec's files are stored on errors, too
        put(self.name, self.getvalue())
        return super().__exit__(*error)


@epath.register_path_cls("mem://")
class MemoryPath(epath.Path):
    @property
    def key(self):
        return "/".join(self.parts)

    def __fspath__(self):
        return str(self)

    def _data(self):
        if self.key not in OBJECTS:
            raise FileNotFoundError(2, "no such object", str(self))
        return OBJECTS[self.key]

    def is_file(self):
        return self.key in OBJECTS

    def is_dir(self):
        return any(self.iterdir())

    def exists(self):
        return self.is_file() or self.is_dir()

    def iterdir(self):
        start = self.key + "/"
        below = [name.removeprefix(start) for name in OBJECTS if name.startswith(start)]
        yield from (self / n for n in dict.fromkeys(n.partition("/")[0] for n in below))

    def glob(self, pattern):
        return (path for path in self.iterdir() if path.match(pattern))

    def open(self, mode="r", **kwargs):
        return _Writer(self.key) if mode == "wb" else io.BytesIO(self._data())

    def stat(self):
        return types.SimpleNamespace(length=len(self._data()))

    def mkdir(self, mode=None, parents=False, exist_ok=False):
        if self.is_file():
            raise FileExistsError(17, "is an object", str(self))

    def unlink(self, missing_ok=False):
        if self.is_file() or not missing_ok:
            self._data()
            put(self.key, None)

    def replace(self, target):
        if target.name in failures:
            raise OSError(5, "the network is gone")
        put(target.key, self._data())
        self.unlink()
        return target

    def copy(self, dst, overwrite=False):
        raise NotImplementedError

    listdir = rename = resolve = rmdir = rmtree = walk = copy
