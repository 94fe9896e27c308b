"""An object store in memory, whose URLs begin with mem://.

As on a real one, objects are there whole once their writing ends, directories are but
the beginnings of names, and nothing is renamed but by a copy. `states` gives what was
there after each change, which is what a process that is killed in between leaves.
"""

# pyright: reportAssignmentType=false, reportIncompatibleMethodOverride=false
import contextlib
import io
import os
import types

from etils import epath

OBJECTS: dict[str, bytes] = {}
history: list[dict[str, bytes]] = []
failures: set[str] = set()
"""Names of objects whose writing fails."""


def put(name, data):
    if data is None:
        OBJECTS.pop(name)
    else:
        OBJECTS[name] = data
    history.append(dict(OBJECTS))


@contextlib.contextmanager
def states():
    """A list of the store's contents, one for each change within."""
    start = len(history)
    found = [dict(OBJECTS)]
    yield found
    found += history[start:]


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

    def _below(self):
        return [name for name in OBJECTS if name.startswith(self.key + "/")]

    def exists(self):
        return self.key in OBJECTS or bool(self._below())

    def is_dir(self):
        return bool(self._below())

    def is_file(self):
        return self.key in OBJECTS

    def iterdir(self):
        skip = len(self.key) + 1
        for name in dict.fromkeys(n[skip:].partition("/")[0] for n in self._below()):
            yield self / name

    def glob(self, pattern):
        return (path for path in self.iterdir() if path.match(pattern))

    def open(self, mode="r", **kwargs):
        if mode == "wb":
            return _Writer(self.key)
        if self.key not in OBJECTS:
            raise FileNotFoundError(2, "no such object", str(self))
        return io.BytesIO(OBJECTS[self.key])

    def stat(self):
        if self.key not in OBJECTS:
            raise FileNotFoundError(2, "no such object", str(self))
        return types.SimpleNamespace(length=len(OBJECTS[self.key]))

    def mkdir(self, mode=None, parents=False, exist_ok=False):
        if self.key in OBJECTS:
            raise FileExistsError(17, "is an object", str(self))

    def unlink(self, missing_ok=False):
        if self.key in OBJECTS:
            put(self.key, None)
        elif not missing_ok:
            raise FileNotFoundError(2, "no such object", str(self))

    def replace(self, target):
        put(target.key, OBJECTS[self.key])
        self.unlink()
        return target

    def copy(self, dst, overwrite=False):
        raise NotImplementedError

    listdir = rename = resolve = rmdir = rmtree = walk = copy


def content(url):
    """{name: bytes} of the objects of a directory."""
    path = epath.Path(url)
    return {child.name: OBJECTS[child.key] for child in path.iterdir()}


def restore(state):
    """Have the store hold what a state of it did."""
    OBJECTS.clear()
    OBJECTS.update(state)


def upload(directory, url):
    """Copy the files of a local directory."""
    for name in os.listdir(directory):
        path = epath.Path(url) / name
        with open(os.path.join(directory, name), "rb") as file:
            put(path.key, file.read())
