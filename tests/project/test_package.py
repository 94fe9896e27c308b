"""The package as a whole: names, layering, what importing it costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mora_jax

ROOT = Path(mora_jax.__file__).parent
NAMES = """
FrozenDense LeftOutWarning MoRAConfig MoRADense MoRAWarning Plan combine delta_weight
diagnostics fold init io linen load make_operator merge mora_apply nnx optimizer plan
products ravel_adapters register_layer save sharding split square_rank summary
trainable_labels trainable_mask unmerge unravel_adapters
""".split()


def test_public_names():
    exported = {
        name
        for name in vars(mora_jax)
        if not name.startswith("_") and not _is_plain_module(name)
    }
    assert exported == set(NAMES)


def _is_plain_module(name):
    """Submodules are attributes of their package; some are public namespaces."""
    value = getattr(mora_jax, name)
    return type(value) is type(sys) and name not in NAMES


def test_everything_public_is_documented():
    for name in NAMES:
        value = getattr(mora_jax, name)
        assert value.__doc__, name
        if not isinstance(value, type(sys)):
            assert ">>>" in value.__doc__, name


def imports():
    """{module: modules of ours that it imports at its top level}."""
    graph = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found = set()
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ImportFrom) and node.module:
                if node.module == "mora_jax":
                    found |= {f"mora_jax.{alias.name}" for alias in node.names}
                elif node.module.startswith("mora_jax."):
                    found.add(node.module)
        graph[module] = found
    return graph


def test_imports_run_one_way():
    """A depth-first walk that meets no module it is still inside of."""
    graph = imports()
    assert len(graph) > 15
    done, inside = set(), []

    def visit(module):
        assert module not in inside, " -> ".join([*inside, module])
        if module in done or module not in graph:
            return
        inside.append(module)
        for other in sorted(graph[module]):
            visit(other)
        inside.pop()
        done.add(module)

    for module in graph:
        visit(module)


def test_core_knows_no_shell():
    graph = imports()
    shells = {"mora_jax.linen", "mora_jax.nnx"}
    for module, found in graph.items():
        if module != "mora_jax" and not module.startswith(tuple(shells)):
            assert not any(other.startswith(tuple(shells)) for other in found), module
    for module in graph:
        if module.startswith("mora_jax.operators"):
            assert all(
                other.startswith(("mora_jax.operators", "mora_jax._"))
                for other in graph[module]
            )


def test_importing_needs_the_core_alone():
    """No optional dependency comes in, no array is made, no warning is given."""
    code = """
import sys, mora_jax
optional = {"safetensors", "transformers", "tqdm", "matplotlib", "torch", "typer"}
assert not optional & set(sys.modules), optional & set(sys.modules)
import jax
assert not jax.live_arrays()
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_typed():
    assert (ROOT / "py.typed").exists()


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: p.name)
def test_modules_stay_small(path):
    assert len(path.read_text().splitlines()) <= 310
