"""The README says what is so."""

import json
import re
from pathlib import Path
from typing import get_type_hints

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import mora_jax
from mora_jax.config import MoRAConfig
from mora_jax.layers import registered
from mora_jax.products import Contraction, Convolution, Lookup, Product

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BENCHMARKS = (ROOT / "benchmarks/README.md").read_text()
KINDS = {
    "dense": (Contraction, "yes, but no head, router, embedding"),
    "convolution": (Convolution, "if `targets` name it"),
    "embedding": (Lookup, "if `targets` name it"),
}


def kind(equation):
    """The class of product that a rule gives."""
    if callable(equation) and not isinstance(equation, Product):
        equation = get_type_hints(equation)["return"]
    if isinstance(equation, Product):
        return type(equation)
    return equation if equation in (Convolution, Lookup) else Contraction


def classes(api):
    """{product: its layers among Flax's own that are known}."""
    found = {product: [] for product, _ in KINDS.values()}
    for cls, rules in registered().items():
        if getattr(api, cls.__name__, None) is not cls:
            continue
        first, *others = rules.values()
        names = [cls.__name__, *(f"{cls.__name__}.{rule.method}" for rule in others)]
        assert first.method == "__call__"
        found[kind(first.equation)] += [f"`{name}`" for name in names]
    return found


def test_table_of_layers_is_the_registry():
    linen, other = classes(nn), classes(nnx)
    rows = ["| | Linen | NNX | by default |", "|---|---|---|---|"]
    for name, (product, default) in KINDS.items():
        cells = ", ".join(linen[product]), ", ".join(other[product])
        rows.append(f"| {name} | {cells[0]} | {cells[1]} | {default} |")
    table = "\n".join(rows)
    assert table in README, f"README.md should hold this table:\n{table}"


def test_defaults_are_as_the_table_says():
    class Net(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.dense = nnx.Linear(8, 8, rngs=rngs)
            self.stem = nnx.Conv(8, 8, (3,), rngs=rngs)
            self.table = nnx.Embed(8, 8, rngs=rngs)
            self.head = nnx.Linear(8, 8, rngs=rngs)

    chosen = mora_jax.nnx.plan(Net(), MoRAConfig(rank=2))
    assert [spec.name for spec in chosen.specs] == ["dense/kernel"]


def test_table_of_costs_is_as_measured():
    report = json.loads((ROOT / "benchmarks/train_step.json").read_text())
    steps = [row for row in report["results"] if row["kind"] == "step"]
    for row in steps:
        assert (
            "| {method} | {time:.2f} | {temporary_MB:,.0f} MB | {arithmetic:.2f} | "
            "{compile_seconds:.0f} s |".format(**row)
        ) in README
    assert report["machine"]["device"] == "cpu"
    assert {(row["tokens"], row["rank"]) for row in steps} == {(512, 8)}


def test_table_beside_pytorch_is_as_measured():
    report = json.loads((ROOT / "benchmarks/torch_step.json").read_text())
    for row in report["results"]:
        assert "| {method} | {seconds:.2f} | {time:.2f} |".format(**row) in README


def results(name):
    """Of a benchmark whose figures are kept."""
    return json.loads((ROOT / "benchmarks" / name).read_text())["results"]


def table_of(results, corner, row, column, cell):
    """Results as Markdown, with a row and a column for each of two names."""
    cells = {(row(r), column(r)): cell(r) for r in results if cell(r)}
    rows, columns = (list(dict.fromkeys(keys)) for keys in zip(*cells, strict=True))
    lines = [[corner, *columns], ["---"] * (1 + len(columns))]
    lines += [[r, *(cells[r, c] for c in columns)] for r in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def test_table_of_tokens_and_ranks_is_as_measured():
    table = table_of(
        sorted(results("sweep.json"), key=lambda r: (r["tokens"], r["rank"])),
        "method",
        lambda r: r["method"],
        lambda r: f"8 x {r['tokens'] // 8}, r={r['rank']}",
        lambda r: r["kind"] == "step" and f"{r['time']:.2f}",
    )
    assert table in BENCHMARKS, f"benchmarks/README.md should hold:\n{table}"


def test_table_of_single_layers_is_as_measured():
    table = table_of(
        results("one_layer.json"),
        "kernel",
        lambda r: f"{r['kernel']}, {r['rows']} rows".replace("x", " x "),
        lambda r: r["method"].removesuffix(", activation").removesuffix(", fold"),
        lambda r: (
            f"{r['time']:.2f} ({r['model']:.2f})"
            if r["auto"] or r["method"].startswith("LoRA")
            else ""
        ),
    )
    assert table in BENCHMARKS, f"benchmarks/README.md should hold:\n{table}"


def test_exponents_are_as_measured():
    for row in results("growth.json"):
        if row["axis"] != "kernels" or row["quantity"] in ("time", "memory"):
            exponent = round(row["exponent"], 2) + 0.0  # no -0.00
            assert f" {exponent:.2f} ({row['arithmetic'][0]:g}" in BENCHMARKS


def test_table_of_big_models_is_as_measured():
    rows = [row for row in results("scale.json") if row["kind"] == "step"]
    columns = "parameters", "optimizer state", "temporaries", "traffic"
    shown = {("8b", 8), ("70b", 64), ("405b", 256)}
    for row in rows:
        mesh = row["mesh"].removeprefix("data 1 x fsdp ").replace("model ", "")
        cells = [f"{row['model'].upper()}, {row['devices']} ({mesh})", row["method"]]
        cells += [f"{row[column] / 1e9:.2f}" for column in columns]
        if (row["model"], row["devices"]) in shown:
            assert f"| {' | '.join(cells)} |" in BENCHMARKS
    assert shown <= {(row["model"], row["devices"]) for row in rows}


def example(title):
    """The first block of code under a heading."""
    section = README.split(f"## {title}\n")[1].split("\n## ")[0]
    code = re.findall(r"```python\n(.*?)```", section, re.DOTALL)[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    return code


X = jax.random.normal(jax.random.key(0), (4, 16))


def test_linen_example():
    model = nn.Sequential([nn.Dense(16), nn.relu, nn.Dense(16)])
    variables = model.init(jax.random.key(1), X)
    scope = dict(model=model, variables=variables, batch=X, steps=3)
    scope["loss_fn"] = lambda y: jnp.mean(y**2)
    exec(example("Linen"), scope)
    y = scope["apply"](scope["adapters"], variables, X)
    np.testing.assert_allclose(
        model.apply({"params": scope["merged"]}, X), y, atol=1e-5
    )
    assert jnp.mean(y**2) < jnp.mean(model.apply(variables, X) ** 2)


def test_nnx_example():
    layers = [nnx.Linear(16, 16, rngs=nnx.Rngs(k)) for k in range(2)]
    model = nnx.Sequential(layers[0], nnx.relu, layers[1])
    scope = dict(model=model, batches=[X] * 3)
    scope["loss_fn"] = lambda model, batch: jnp.mean(model(batch) ** 2)
    exec(example("NNX"), scope)
    assert type(scope["merged"].layers[0]) is nnx.Linear
    np.testing.assert_allclose(scope["merged"](X), scope["model"](X), atol=1e-5)
    assert scope["loss"] < jnp.mean(model(X) ** 2)


def test_files_example(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    params = {"fc": {"kernel": jnp.ones((16, 16))}}
    plan = mora_jax.plan(params)
    adapters = mora_jax.init(plan)
    scope = dict(mora_jax=mora_jax, adapters=adapters, variables={"params": params})
    exec(example("Files"), scope | {"plan": plan})
    assert sorted(path.name for path in (tmp_path / "airports").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_devices_example():
    sizes, names = (2, 2, 2), ("data", "fsdp", "model")
    mesh = jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * 3)
    where = NamedSharding(mesh, PartitionSpec("fsdp", "model"))
    params = {"fc": {"kernel": jax.device_put(jnp.ones((16, 16)), where)}}
    scope = dict(mora_jax=mora_jax, jax=jax, params=params)
    scope["plan"] = mora_jax.plan(params)
    exec(example("On many devices"), scope)
    (m,) = jax.tree.leaves(scope["adapters"])
    assert m.sharding.is_fully_replicated and m.sharding.mesh == mesh
    merged = mora_jax.merge(params, scope["adapters"], scope["plan"])
    assert merged["fc"]["kernel"].sharding.is_equivalent_to(where, 2)


def test_other_code_compiles():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 5
    for block in blocks:
        compile(re.sub("^  ", "", block, flags=re.MULTILINE), "README", "exec")


@pytest.mark.parametrize("path", re.findall(r"\]\(([^)#]+)\)", README))
def test_links_to_files(path):
    if not path.startswith("http"):
        assert (ROOT / path).exists()
