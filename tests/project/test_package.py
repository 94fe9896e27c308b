"""The package as a whole: names, layering, what importing it costs."""

import ast
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


def imports():
    """{module: modules of ours that it imports at its top level}."""
    graph = {module: set() for module in modules()}
    for module, path in modules().items():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    below = f"{node.module}.{alias.name}"
                    graph[module].add(below if below in graph else node.module)
    return {module: found & graph.keys() for module, found in graph.items()}


def imported(path):
    """The packages that a file imports anywhere."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    found = {n.module or "" for n in nodes if isinstance(n, ast.ImportFrom)}
    found |= {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
    return {name.partition(".")[0] for name in found}


def test_imports_run_one_way():
    graph = imports()
    assert len(graph) > 15
    list(TopologicalSorter(graph).static_order())  # raises a CycleError with the way


APIS = "linen", "nnx"
SHELLS = "mora_jax.qwix", "mora_jax.gemma", "mora_jax.diagnostics"
"""What is built on them: for other libraries, and to compare models."""
ROOMS = {
    "operators": ("_mesh", "_layer", "_plan", "products", "_flax"),
    "products": ("_mesh", "_layer", "_plan", "_flax"),
    "_mesh": ("_layer", "_plan", "_flax"),
    "_layer": ("_flax",),
}
"""What each room must not know, besides Flax and what is built on it."""


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_do_not_know_what_is_above_them(room):
    above = tuple(f"mora_jax.{name}" for name in (*APIS, "io", "cli", *ROOMS[room]))
    inside = f"mora_jax.{room}"
    found = {m: others for m, others in imports().items() if m.startswith(inside)}
    assert found
    for module, others in found.items():
        assert not [other for other in others if other.startswith(above)], module
        assert not imported(modules()[module]) & {"flax", "optax"}, module


def test_the_core_does_not_know_the_two_apis():
    apis = tuple(f"mora_jax.{name}" for name in APIS)
    for module, found in imports().items():
        if module != "mora_jax" and not module.startswith((*apis, *SHELLS)):
            assert not [other for other in found if other.startswith(apis)], module


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
