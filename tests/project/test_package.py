"""The package as a whole: names, layering, what importing it costs."""

import ast
import functools
import inspect
import re
from graphlib import TopologicalSorter

import pytest
from processes import ROOT, python

import mora_jax

PACKAGE = ROOT / "mora_jax"
NAMES = ["__version__", *re.findall(r"^  (\w+)  ", mora_jax.__doc__, re.MULTILINE)]
NAMESPACES = [name for name in NAMES if inspect.ismodule(getattr(mora_jax, name))]


def test_every_public_name_is_documented():
    """With an example, where it is not a namespace, a warning or a base class."""
    plain = *NAMESPACES, "__version__", "Operator", "LeftOutWarning", "MoRAWarning"
    for name in NAMES:
        text = getattr(mora_jax, name).__doc__
        assert text and (name in plain or ">>>" in text), name


def test_help_names_every_module_that_is_public():
    """Also those that are imported by their own names, since they need more."""
    public = {path.stem for path in PACKAGE.iterdir() if path.name[0] not in "_."}
    named = {f"mora_jax.{name}" for name in public - set(NAMES) - {"cli", "py"}}
    assert named and all(name in mora_jax.__doc__ for name in named)


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_what_a_namespace_has_is_documented(namespace):
    module, ours = getattr(mora_jax, namespace), {}
    for name, value in inspect.getmembers(module, callable):
        if not name.startswith("_") and value.__module__.startswith("mora_jax"):
            ours[name] = inspect.getdoc(value)
    assert module.__doc__ and ours and all(ours.values()), ours


def modules():
    """{module: its file} of all that we have."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


class Imports(ast.NodeVisitor):
    """Collects what a file imports anywhere: also in functions, not for types alone."""

    def __init__(self, path):
        self.found = set()
        self.visit(ast.parse(path.read_text()))

    def visit_If(self, node):
        checks_types = "TYPE_CHECKING" in ast.unparse(node.test)
        for child in node.orelse if checks_types else (*node.body, *node.orelse):
            self.visit(child)

    def visit_ImportFrom(self, node):
        self.found |= {f"{node.module}.{alias.name}" for alias in node.names}

    def visit_Import(self, node):
        self.found |= {alias.name for alias in node.names}


@functools.cache
def imports():
    """{module: what it imports, where a name in a module of ours is that module}."""
    files = modules()

    def module_of(name):
        module = name.rpartition(".")[0]
        return module if name not in files and module in files else name

    return {m: set(map(module_of, Imports(path).found)) for m, path in files.items()}


def ours(module):
    """The modules of ours that a module imports."""
    return imports()[module] & imports().keys()


def reached(module):
    """All modules that importing `module`, and calling what is in it, can import."""
    found, new = set(), {module}
    while new:
        found |= new
        new = {name for old in new for name in imports().get(old, ())} - found
    return found


def test_imports_run_one_way():
    assert len(imports()) > 15
    graph = {module: ours(module) for module in imports()}
    list(TopologicalSorter(graph).static_order())  # raises a CycleError with the way


FLOORS = [
    "_common",
    "_jax",
    "_trace_check",
    "operators",
    "products _mesh",
    "_plan",
    "_layer",
    "_tree",
    "_flax",
    "linen sharding",
    "nnx",
    "diagnostics io mixing serving",
    "qwix remora",
    "cli maxtext vllm",
]
"""The rooms from the ground up. A room may import its own floor and those below it."""


def floor_of(module):
    """The number of a module's floor; the package itself is above all of them."""
    name = module.removeprefix("mora_jax").removeprefix(".")
    floors = {room: k for k, rooms in enumerate(FLOORS) for room in rooms.split()}
    rooms = [room for room in floors if f"{name}.".startswith(f"{room}.")]
    return floors[max(rooms, key=len)] if name else len(FLOORS)


def test_no_room_knows_what_is_above_it():
    for module in imports():
        above = {name for name in ours(module) if floor_of(name) > floor_of(module)}
        assert not above, module


def test_a_spec_is_a_record():
    """It needs operators, and nothing that computes with them, traces or knows Flax."""
    found = reached("mora_jax._plan.spec")
    packages = {name.partition(".")[0] for name in found}
    assert "mora_jax._plan.settings" in found and not packages & {"flax", "optax"}
    above = "_layer", "_tree", "_trace_check", "_flax", "products", "linen", "nnx"
    above = tuple(f"mora_jax.{room}." for room in above)
    assert not [name for name in found if name.startswith(above)]


def test_checkpoints_know_nothing_of_mora():
    """They could be a package of their own, for any model of Flax."""
    room = {m for m in imports() if m.startswith("mora_jax.io.checkpoints.")}
    files = "checkpoints", "_files", "_json", "_names", "_tensors"
    general = "_common", "_jax", *(f"io.{name}" for name in files)
    general = tuple(f"mora_jax.{name}." for name in general)
    assert "mora_jax.io.checkpoints._load_base" in room
    for module in room:
        assert "_mora" not in modules()[module].read_text().replace("mora_jax", "")
        below = reached(module) & imports().keys()
        assert not [name for name in below if not f"{name}.".startswith(general)]


def test_the_trace_check_knows_no_mora():
    """It could be a package of its own, for any LoRA."""
    found = {name for name in reached("mora_jax._trace_check") if name in imports()}
    rooms = {name.split(".")[1] for name in found if "." in name}
    assert rooms == {"_trace_check", "_common", "_jax"}, found
    texts = [path.read_text() for path in (PACKAGE / "_trace_check").glob("*.py")]
    words = {word for text in texts for word in re.findall(r"[A-Za-z_]+", text)}
    assert not words & {"M", "MoRA", "adapter", "adapters", "adapted", "SUFFIX"}
    assert not any(word.endswith("_mora") for word in words)


def test_qwix_has_one_door_to_each_api():
    doors = {"mora_jax.nnx._held", "mora_jax.linen._bound"}
    for module in (m for m in imports() if m.startswith("mora_jax.qwix")):
        apis = {m for m in ours(module) if re.match(r"mora_jax\.(nnx|linen)\b", m)}
        assert apis <= doors, module


@pytest.mark.parametrize("room", ["operators", "products", "_mesh", "_plan", "_layer"])
def test_what_computes_does_not_know_flax(room):
    inside = [m for m in imports() if m.startswith(f"mora_jax.{room}")]
    assert inside
    for module in inside:
        packages = {name.partition(".")[0] for name in imports()[module]}
        assert not packages & {"flax", "optax"}, module


def test_importing_needs_the_core_alone():
    """No optional dependency, array or warning; and it has the listed names alone."""
    code = """
import sys
asked = set()
class Finder:
    def find_spec(name, *args):
        asked.add(name.partition(".")[0])
sys.meta_path.insert(0, Finder)
import mora_jax, jax
optional = set("safetensors transformers tqdm matplotlib torch typer".split())
assert not asked & optional, asked & optional
assert not jax.live_arrays()
print(*dir(mora_jax))
"""
    assert python("-W", "error", "-c", code).split() == sorted(NAMES)


def test_typed():
    assert (PACKAGE / "py.typed").exists()


def test_rooms():
    """Few private rooms, and no two files of one name but for what two shells share."""
    assert len([*PACKAGE.glob("_*/__init__.py")]) <= 8
    names = [path.name for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"]
    twice = {name for name in names if names.count(name) > 1}
    assert twice <= {"_model.py"}, twice
