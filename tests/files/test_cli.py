"""The command line: what it prints, writes and refuses."""

import json
import re
import runpy
import sys
from importlib.metadata import entry_points, version

import cloud
import jax
import numpy as np
import pytest
from adapter_files import (
    DATA,
    PLAN,
    TEMPORARY,
    TENSORS,
    config_of,
    digests,
    made,
    run,
    sharded,
)
from flax import traverse_util
from safetensors.numpy import load_file

import mora_jax
from mora_jax import save

TYPE6 = DATA / "type6"
BASE = TYPE6 / "base_model.safetensors"


def test_help_tells_all():
    overview = run("--help")
    for command in ("inspect", "merge", "convert", "diff"):
        assert command in overview
        assert "--names" in run(command, "--help")


def test_inspect(tmp_path):
    save(tmp_path, made(PLAN), PLAN, {"task": "x"})
    report = json.loads(run("inspect", tmp_path, "--json"))
    assert report["format"] == "mora"
    assert report["parameters"] == PLAN.trainable_parameters
    assert report["metadata"] == {"task": "x"}
    assert [layer["path"] for layer in report["layers"]] == list(PLAN)
    values = mora_jax.diagnostics.spectrum(made(PLAN), PLAN)
    for layer in report["layers"]:
        norm = np.linalg.norm(values[layer["path"]])
        np.testing.assert_allclose(layer["norm"], norm, rtol=1e-5)
    table = run("inspect", tmp_path)
    for spec in PLAN.specs:
        assert spec.operator.name in table


def test_inspect_the_references():
    report = json.loads(run("inspect", TYPE6, "--base", BASE, "--json"))
    assert report["format"] == "peft-mora"
    assert len(report["layers"]) == 14
    assert "the base is needed" in run("inspect", TYPE6, code=1)


def test_merge(tmp_path):
    out = tmp_path / "out"
    told = run("merge", "--base", BASE, "--adapter", TYPE6, "--out", out)
    assert "14 kernels merged" in told
    merged = load_file(out / BASE.name)
    for name, expected in load_file(TYPE6 / "merged_weights.safetensors").items():
        np.testing.assert_allclose(merged[name], expected, atol=1e-5)
    before = digests(out)
    args = "merge", "--base", BASE, "--adapter", TYPE6, "--out", out
    told = run(*args, code=1)
    assert "--force" in told and "True" not in told
    assert digests(out) == before
    run(*args, "--force")
    assert digests(out) == before


def test_merge_our_own_with_templates(tmp_path):
    base = sharded(tmp_path / "base")
    plan = mora_jax.plan({"l0": {"up_proj": {"kernel": np.ones((24, 40), np.float32)}}})
    save(tmp_path / "a", made(plan), plan)
    names = tmp_path / "names.json"
    names.write_text('{"model.layers.0.mlp.{p}": "l0/{p}/kernel"}')
    out = tmp_path / "out"
    run(
        "merge",
        "--base",
        base,
        "--adapter",
        tmp_path / "a",
        "--out",
        out,
        "--names",
        names,
    )
    one, other = (
        load_file(d / "model-00001-of-00002.safetensors") for d in (base, out)
    )
    changed = [name for name in one if (one[name] != other[name]).any()]
    assert changed == ["model.layers.0.mlp.up_proj.weight"]


def test_convert(tmp_path):
    """From the reference's to ours and back, and to a LoRA."""
    base = "--base", BASE
    run("convert", TYPE6, tmp_path / "ours", "--to", "mora", *base)
    run("convert", tmp_path / "ours", tmp_path / "back", "--to", "peft-mora")
    one, other = (load_file(d / TENSORS) for d in (TYPE6, tmp_path / "back"))
    assert one.keys() == other.keys()
    assert all((one[name] == other[name]).all() for name in one)
    args = "convert", tmp_path / "ours", tmp_path / "lora", "--to", "peft-lora"
    assert "full rank" in run(*args, code=1)
    told = run(*args, "--rank", 8, code=1)
    assert "--max-error 0.1" in told and re.search(r"--rank \d\d", told)
    assert "max_error" not in told and not (tmp_path / "lora").exists()
    args = *args, "--max-error", 1
    told = run(*args, "--rank", 8)
    assert "cut off" in told and len(told.splitlines()) > 14  # a line for each layer
    config = config_of(tmp_path / "lora")
    assert (config["r"], config["peft_type"]) == (8, "LORA")
    told = run(*args, "--rank", 8, code=1)
    assert "must not exist" in told and "--force" in told and "True" not in told
    run(*args, "--rank", 9, "--force")
    config = config_of(tmp_path / "lora")
    assert config["r"] == 9
    run("convert", tmp_path / "ours", tmp_path / "ours", "--to", "mora", "--force")
    again = "convert", tmp_path / "lora", tmp_path / "x", "--to", "mora", *base
    assert "plain LoRA" in run(*again, code=1)
    save(tmp_path / "a", made(PLAN), PLAN, {"task": "x"})
    run("convert", tmp_path / "a", tmp_path / "copy", "--to", "mora")
    assert digests(tmp_path / "copy") == digests(tmp_path / "a")


def test_diff(tmp_path):
    adapters = made(PLAN)
    save(tmp_path / "a", adapters, PLAN)
    save(tmp_path / "b", jax.tree.map(lambda m: 2 * m, adapters), PLAN)
    rows = json.loads(run("diff", tmp_path / "a", tmp_path / "b", "--json"))
    assert [row["path"] for row in rows] == sorted(PLAN)
    for row in rows:
        assert row["settings"] == "same"
        np.testing.assert_allclose(row["difference"], 1, rtol=1e-2)
    rows = json.loads(run("diff", tmp_path / "a", tmp_path / "a", "--json"))
    assert all(row["difference"] == 0 for row in rows)
    half = jax.tree.map(lambda m: m.astype("bfloat16"), adapters)
    save(tmp_path / "half", half, PLAN)
    rows = json.loads(run("diff", tmp_path / "a", tmp_path / "half", "--json"))
    assert 0 < max(row["difference"] for row in rows) < 0.01
    run("convert", TYPE6, tmp_path / "c", "--to", "mora", "--base", BASE)
    table = run("diff", tmp_path / "a", tmp_path / "c")
    assert "only in" in table


@pytest.mark.parametrize(
    ("args", "code", "told"),
    [
        ("inspect {here}", 1, "there is no adapter_config.json"),
        ("inspect {ours} --base {here}/x", 1, "there is no x"),
        ("inspect {ours} --base=", 1, "base must be a path"),
        ("{inspect} {{", 1, "--names is not valid"),
        ("{inspect} bert", 1, '--names \'{"model.layers.{n}.{block}.{name}": '),
        ("{inspect} lama", 1, "must be one of"),
        ("{inspect} a.json", 1, "a.json"),
        ("{inspect} {here}/list.json", 1, "map"),
        ("{inspect} {here}/twice.json", 1, "a"),
        ("{merge} {here}/list.json --force", 1, "out must be a directory, got the"),
        ("{merge} {here}/list.json/x", 1, "list.json"),
        ("inspect", 2, "Missing argument"),
        ("melt", 2, "No such command"),
        ("convert {ours} {here}/x --to pickle", 2, "Invalid value"),
    ],
)
def test_exit_codes(tmp_path, unchecked, args, code, told):
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "twice.json").write_text('{"a": "b", "a": "c"}')
    inspect = f"inspect {TYPE6} --base {BASE} --names"
    merge = f"merge --base {BASE} --adapter {TYPE6} --out"
    args = args.format(here=tmp_path, ours=TYPE6, inspect=inspect, merge=merge)
    error = run(*args.split(), code=code)
    assert told in error
    if code == 1:
        assert len(error.splitlines()) == 1 and error.startswith("error: ")


def test_installed_command(monkeypatch, capsys):
    """The entry point and the module, and their advice where typer is missing."""
    monkeypatch.setattr(sys, "argv", ["mora-jax", "--help"])
    (command,) = entry_points(group="console_scripts", name="mora-jax")
    starts = (
        command.load(),
        lambda: runpy.run_module("mora_jax.cli", run_name="__main__"),
    )
    for start in starts:
        with pytest.raises(SystemExit) as end:
            start()
        assert not end.value.code and "merge" in capsys.readouterr().out
    for name in [name for name in sys.modules if name.startswith("mora_jax.cli.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "typer", None)
    assert "pip install mora-jax[cli]" in run("--help", code=1)


# The demo's adapter, whose paths are those of `smollm2` and no family's.


def demo(layers):
    """Its plan, with narrow kernels, and not all of them."""

    def kernel(value):
        return {"kernel": np.full((24, 24), value, np.float32)}

    params = {
        f"layers_{n}": {
            "self_attn": {"q_proj": kernel(n), "v_proj": kernel(n)},
            "mlp": {"up_proj": kernel(n)},
        }
        for n in range(layers)
    }
    return mora_jax.plan(params, mora_jax.MoRAConfig(rank=2, operator="sharing"))


TEMPLATES = '{"model.layers.{n}.{block}.{name}": "layers_{n}/{block}/{name}/kernel"}'


def test_the_demos_adapter_converts_with_the_line_that_the_error_gives(tmp_path):
    plan = demo(11)
    save(tmp_path / "a", made(plan), plan)
    args = "convert", tmp_path / "a", tmp_path / "lora", "--to", "peft-lora"
    told = run(*args, code=1)
    assert f"--names '{TEMPLATES}'" in told
    run(*args, "--names", TEMPLATES)
    tensors = load_file(tmp_path / "lora" / TENSORS)
    assert len(tensors) == 2 * len(plan)
    name = "base_model.model.model.layers.10.self_attn.q_proj.lora_A.weight"
    assert name in tensors


def test_a_merge_that_finds_no_tensor_gives_the_templates(tmp_path):
    base = sharded(tmp_path / "base")
    kernel = np.ones((24, 40), np.float32)
    for own, template in (
        ("l{n}/up_proj", '{"model.layers.{n}.mlp.{name}": "l{n}/{name}/kernel"}'),
        (
            "blocks_{n}/mlp/up",
            '{"model.layers.{n}.{name}.up_proj": "blocks_{n}/{name}/up/kernel"}',
        ),
    ):
        tree = {f"{own}/kernel".format(n=n): kernel + n for n in range(2)}
        plan = mora_jax.plan(traverse_util.unflatten_dict(tree, sep="/"))
        save(tmp_path / "a", made(plan), plan)
        args = ["merge", "--base", base, "--adapter", tmp_path / "a"]
        args += ["--out", tmp_path / "out", "--force"]
        assert f"--names '{template}'" in run(*args, code=1)
        assert "2 kernels merged" in run(*args, "--names", template)


def test_inspect_has_a_row_for_layers_that_differ_in_numbers_alone(tmp_path):
    plan = demo(3)
    save(tmp_path / "a", made(plan), plan)
    told = run("inspect", tmp_path / "a")
    rows = [line for line in told.splitlines() if line.startswith("layers_")]
    assert len(rows) == 3
    assert any(row.startswith("layers_*/self_attn/q_proj/kernel (3)") for row in rows)
    assert all(re.search(r"\d to \d", row) for row in rows)
    assert "smallest and largest" in told and "--all" in told
    told = run("inspect", tmp_path / "a", "--all")
    rows = [line for line in told.splitlines() if line.startswith("layers_")]
    assert len(rows) == len(plan) and "--all" not in told
    report = json.loads(run("inspect", tmp_path / "a", "--json"))
    assert [layer["path"] for layer in report["layers"]] == list(plan)
    q = [layer for layer in report["layers"] if "q_proj" in layer["path"]]
    row = next(r for r in run("inspect", tmp_path / "a").splitlines() if "q_proj" in r)
    norms = [layer["norm"] for layer in q]
    assert f"{min(norms):.4g} to {max(norms):.4g}" in row
    assert f"  {sum(layer['parameters'] for layer in q)}  " in row


def test_paths_stay_in_one_piece(tmp_path, monkeypatch):
    """On however narrow a terminal: it may wrap lines, we do not."""
    monkeypatch.setenv("COLUMNS", "30")
    plan = demo(2)
    where = tmp_path / ("a-long-name-" * 8)
    save(where, made(plan), plan, {"about": "many words " * 20})
    for told in (run("inspect", where, "--all"), run("diff", where, where)):
        assert all(any(path in line for line in told.splitlines()) for path in plan)
    told = run("convert", where, f"{where}-lora", "--to", "peft-lora", code=1)
    assert len(told.splitlines()) == 1
    told = run(
        "convert", where, f"{where}-lora", "--to", "peft-lora", "--names", TEMPLATES
    )
    assert f"{where}-lora" in told


def test_version():
    assert run("--version") == f"mora-jax {version('mora-jax')}\n"


def test_urls_are_no_folders(tmp_path, monkeypatch):
    cloud.restore({})
    monkeypatch.chdir(tmp_path)
    plan = demo(1)
    save("mem://bucket/a", made(plan), plan)
    run("inspect", "mem://bucket/a")
    run("convert", "mem://bucket/a", "mem://bucket/b", "--to", "mora")
    assert cloud.content("mem://bucket/a") == cloud.content("mem://bucket/b")
    run("diff", "mem://bucket/a", "mem://bucket/b")
    args = ["--to", "peft-lora", "--names", TEMPLATES]
    run("convert", "mem://bucket/a", "mem://bucket/lora", *args)
    merging = ["merge", "--adapter", "mem://bucket/a", "--out", "http://host/x"]
    for args, told in (
        (["inspect", "http://host/x"], "adapter must be a local path or a URL"),
        (["inspect", "mem://bucket/none"], "there is no adapter_config.json"),
        (["inspect", "mem://bucket/a", "--base", "hf://a/b"], "base must be"),
        (["convert", "mem://bucket/a", "ftp://x/y", "--to", "mora"], "target must be"),
        ([*merging, "--base", "mem://bucket/none"], "there is no none"),
        ([*merging, "--base", tmp_path], "there is no *.safetensors"),
    ):
        error = run(*args, code=1)
        assert told in error and len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_errors_of_every_kind_are_one_line(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("the\nstore is\nclosed")

    cloud.restore({})
    save("mem://bucket/a", made(PLAN), PLAN)
    monkeypatch.setattr(cloud.MemoryPath, "open", fail)
    error = run("inspect", "mem://bucket/a", code=1)
    assert error == "error: RuntimeError: the store is closed\n"
    save(tmp_path / "a", made(PLAN), PLAN)
    where = "/proc/adapter"
    error = run("convert", tmp_path / "a", where, "--to", "mora", "--force", code=1)
    assert where in error and TEMPORARY not in error
