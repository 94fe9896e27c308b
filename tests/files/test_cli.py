"""The command line: what it prints, writes and refuses."""

import json
import os
import re
import shutil
import sys
from importlib.metadata import entry_points, version

import cloud
import jax
import numpy as np
import pytest
from adapter_files import (
    PARAMS,
    PLAN,
    UP_PROJ,
    config_of,
    contents,
    made,
    run,
    single,
    specs_of,
    unflatten,
)
from base_files import DATA, sharded
from safetensors.numpy import load_file

import mora_jax
from mora_jax import make_operator, save
from mora_jax.io._files import TENSORS

TYPE6 = DATA / "type6"
BASE = TYPE6 / "base_model.safetensors"


def test_help_and_version():
    overview = run("--help")
    for command in ("inspect", "merge", "export"):
        assert command in overview
        assert "--names" in run(command, "--help")
    assert run("--version") == f"mora-jax {version('mora-jax')}\n"


def test_inspect(tmp_path):
    save(tmp_path, made(PLAN), {"task": "x"})
    told = run("inspect", tmp_path)
    assert told.startswith("format: mora\nmetadata: {'task': 'x'}\n")
    assert mora_jax.summary(made(PLAN)) in told
    told = run("inspect", TYPE6, "--base", BASE, "--all")
    assert told.startswith("format: peft-mora\nmetadata: {}\n")
    assert told.count("/kernel  ") == 14
    assert "the base is needed" in run("inspect", TYPE6, code=1)
    assert "'foo'" in run("inspect", tmp_path, "--names", "foo", code=1)


def test_merge(tmp_path):
    out = tmp_path / "out"
    args = "merge", BASE, TYPE6, out
    assert "14 kernels merged" in run(*args)
    merged = load_file(out / BASE.name)
    for name, expected in load_file(TYPE6 / "merged_weights.safetensors").items():
        np.testing.assert_allclose(merged[name], expected, atol=1e-5)
    before = contents(out)
    told = run(*args, code=1)
    assert "force=True" in told
    assert contents(out) == before
    run(*args, "--force")
    assert contents(out) == before


@pytest.mark.parametrize("command", ["merge", "vllm", "mora"])
def test_no_command_writes_where_its_adapter_is(tmp_path, command):
    """Neither over it, nor over what holds it, nor between its files."""
    home = tmp_path / "runs" / "a"
    shutil.copytree(TYPE6, home)
    before = contents(home)
    for out in (home, tmp_path / "runs", home / "out", f"{home}/../a", home.as_uri()):
        args = {
            "merge": (BASE, home, out),
        }.get(command, (home, out, "--base", BASE, "--for", command))
        name = "merge" if command == "merge" else "export"
        error = run(name, *args, "--force", code=1)
        assert "must not be the adapter's directory" in error
    assert contents(home) == before


def test_export(tmp_path):
    """From the reference's to ours, and to a LoRA."""
    base, ours, lora = ("--base", BASE), tmp_path / "ours", tmp_path / "lora"
    run("export", TYPE6, ours, "--for", "mora", *base)
    one = load_file(TYPE6 / TENSORS)
    for name, m in load_file(ours / TENSORS).items():
        module = name.removesuffix("/kernel_mora").replace("/", ".")
        name = f"base_model.model.{module}.lora_A.weight"
        assert (one[name].T == m).all()
    args = "export", ours, lora, "--for", "peft"
    told = run(*args, "--rank", 8, code=1)
    assert "max_error=0.1" in told and re.search(r"rank=\d\d", told)
    assert not lora.exists()
    args = *args, "--max-error", 1
    told = run(*args, "--rank", 8, "--base-model", "hub/model")
    assert re.search(r"14 adapters as a LoRA of rank 8\nit lacks at most \d", told)
    assert f"peft.PeftModel.from_pretrained(model, '{lora}')" in told
    config = config_of(lora)
    assert (config["r"], config["peft_type"]) == (8, "LORA")
    assert config["base_model_name_or_path"] == "hub/model"
    told = run(*args, "--rank", 8, code=1)
    assert "new or empty" in told
    run(*args, "--rank", 9, "--force")
    assert config_of(lora)["r"] == 9
    before = contents(lora)
    run("export", ours, lora, "--for", "mora", "--force", code=1)
    assert contents(lora) == before
    run("export", lora, tmp_path / "x", "--for", "mora")
    kinds = {s.operator.name for s in specs_of(mora_jax.load(tmp_path / "x")).values()}
    assert kinds == {"low_rank"}
    save(tmp_path / "a", made(PLAN), {"task": "x"}, params=PARAMS)
    args = "export", tmp_path / "a", tmp_path / "copy", "--for", "mora"
    run(*args)
    assert contents(tmp_path / "copy") == contents(tmp_path / "a")
    assert "new or empty" in run(*args, code=1)
    run("export", ours, tmp_path / "copy", "--for", "mora", "--force")
    assert contents(tmp_path / "copy") == contents(ours)


def test_a_lora_of_as_many_singular_values_as_needed(tmp_path):
    plan = single(make_operator("rotation", 24, 40, 6), path=UP_PROJ)
    save(tmp_path / "a", made(plan))
    args = "export", tmp_path / "a", tmp_path / "lora", "--for", "peft"
    for rank in ("0", "-1", "1.5", "all"):
        told = run(*args, f"--rank={rank}", code=2)
        assert "Invalid value for '--rank'" in told
    run(*args)
    done = mora_jax.io.export(tmp_path / "b", made(plan), "peft")
    assert contents(tmp_path / "lora") == contents(tmp_path / "b")
    assert 0 < max(done.lost.values()) <= 0.1


def test_help_says_what_a_base_is_for():
    for command in ("inspect", "export"):
        told = " ".join(re.sub("[│\n]", " ", run(command, "--help")).split())
        assert "do not say how large" in told


@pytest.mark.parametrize(
    ("args", "code", "told"),
    [
        ("inspect {here}", 1, "there is no adapter_model.safetensors"),
        ("inspect {ours} --base {here}/x", 1, "there is no x"),
        ("inspect {ours} --base=", 1, "base must be a path"),
        ("{inspect} {{", 1, "--names is not valid"),
        ("{inspect} bert", 1, "templates name them"),
        ("{inspect} lama", 1, "must be one of"),
        ("{inspect} a.json", 1, "a.json"),
        ("{inspect} {here}/list.json", 1, "map"),
        ("{inspect} {here}/twice.json", 1, "a"),
        ("{merge} {here}/list.json --force", 1, "out must be a directory, got the"),
        ("{merge} {here}/list.json/x", 1, "list.json"),
        ("inspect http://host/x", 1, "adapter must be a local path or a URL"),
        ("inspect mem://bucket/none", 1, "no adapter_model.safetensors"),
        ("inspect {ours} --base hf://a/b", 1, "base must be"),
        ("export {ours} ftp://x/y --for mora --base {base}", 1, "out must be"),
        ("merge mem://bucket/none {ours} http://host/x", 1, "there is no none"),
        ("export {ours} /proc/x --for mora --base {base}", 1, "/proc/x"),
        ("merge {here} {ours} http://host/x", 1, "there is no *.safetensors"),
        ("merge {base} {ours}", 2, "Missing argument"),
        ("{merge} x --adapter {ours}", 2, "No such option"),
        ("inspect {here}/none", 1, "there is no directory {here}/none"),
        ("inspect", 2, "Missing argument"),
        ("melt", 2, "No such command"),
        ("export {ours} {here}/x --for pickle", 2, "Invalid value"),
        ("export {ours} {here}/x --for mora --base {base} --rank 3", 1, "rank is of"),
    ],
)
def test_exit_codes(tmp_path, monkeypatch, unchecked, args, code, told):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "twice.json").write_text('{"a": "b", "a": "c"}')
    inspect = f"inspect {TYPE6} --base {BASE} --names"
    merge = f"merge {BASE} {TYPE6}"
    places = {"here": tmp_path, "ours": TYPE6, "base": BASE}
    error = run(*args.format(**places, inspect=inspect, merge=merge).split(), code=code)
    assert told.replace("{here}", str(tmp_path)) in error
    assert sorted(os.listdir()) == ["list.json", "twice.json"]
    if code == 1:
        assert len(error.splitlines()) == 1 and error.startswith("error: ")


def test_installed_command(monkeypatch, capsys):
    """The entry point, and its advice where typer is missing."""
    monkeypatch.setattr(sys, "argv", ["mora-jax", "--help"])
    (command,) = entry_points(group="console_scripts", name="mora-jax")
    with pytest.raises(SystemExit) as end:
        command.load()()
    assert not end.value.code and "merge" in capsys.readouterr().out
    for name in [name for name in sys.modules if name.startswith("mora_jax.cli.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "typer", None)
    assert "pip install 'mora-jax[cli]'" in run("--help", code=1)


# The demo's adapter, whose paths are those of `smollm2` and no family's.


@pytest.fixture
def demo(tmp_path):
    """A directory with it, of three layers with narrow kernels, and not all of them."""
    names = ("self_attn/q_proj", "self_attn/v_proj", "mlp/up_proj")
    kernel = jax.ShapeDtypeStruct((24, 24), np.float32)
    tree = {f"layers_{n}/{name}/kernel": kernel for n in (2, 3, 10) for name in names}
    config = mora_jax.MoRAConfig(rank=2, operator="sharing")
    plan = mora_jax.plan(unflatten(tree), config)
    directory = tmp_path / ("a-long-name-" * 8)
    save(directory, made(plan), {"about": "many words " * 20})
    return directory, plan


TEMPLATES = '{"model.layers.{n}.{block}.{name}": "layers_{n}/{block}/{name}/kernel"}'


def test_the_demos_adapter_is_exported_by_templates(tmp_path, demo):
    directory, plan = demo
    args = "export", directory, tmp_path / "lora", "--for", "peft"
    told = run(*args, code=1)
    assert "templates name them" in told and len(told.splitlines()) == 1
    names = {"model.layers.{n}.{block}.{name}": "layers_{n}/{block}/{name}/kernel"}
    run(*args, "--names", json.dumps(names))
    tensors = load_file(tmp_path / "lora" / TENSORS)
    assert len(tensors) == 2 * len(plan)
    name = "base_model.model.model.layers.10.self_attn.q_proj.lora_A.weight"
    assert name in tensors


def test_the_demos_adapter_is_exported_as_it_is(tmp_path, demo):
    directory, plan = demo
    args = "export", directory, tmp_path / "squares", "--native", "--for"
    names = {"model.layers.{n}.{block}.{name}": "layers_{n}/{block}/{name}/kernel"}
    names = "--names", json.dumps(names)
    assert "must be for 'vllm'" in run(*args, "peft", *names, code=1)
    told = run(*args, "vllm", *names, "--base-model", "hub/model")
    assert f"{len(plan)} adapters as they are" in told
    assert "vllm serve hub/model --enable-lora --max-lora-rank 1" in told
    tensors = load_file(tmp_path / "squares" / TENSORS)
    assert sum(name.endswith(".m") for name in tensors) == len(plan)
    assert "model.layers.10.self_attn.q_proj.m" in tensors


def test_a_merge_finds_tensors_by_templates(tmp_path):
    """On the command line, or in a file."""
    base, out, file = tmp_path / "base", tmp_path / "out", tmp_path / "names.json"
    sharded(base)
    for own in ("l{n}/up_proj", "blocks_{n}/mlp/up"):
        template = f'{{"model.layers.{{n}}.mlp.up_proj": "{own}/kernel"}}'
        tree = {f"{own}/kernel".format(n=n): np.ones((24, 40), "f4") for n in range(2)}
        plan = mora_jax.plan(unflatten(tree))
        save(tmp_path / "a", made(plan))
        args = ["merge", base, tmp_path / "a", out, "--force"]
        assert "templates name them" in run(*args, code=1)
        file.write_text(template)
        for names in (template, file):
            assert "2 kernels merged" in run(*args, "--names", names)
        for number in range(2):
            name = f"model-0000{number + 1}-of-00002.safetensors"
            one, other = (load_file(d / name) for d in (base, out))
            changed = [name for name in one if (one[name] != other[name]).any()]
            assert changed == [f"model.layers.{number}.mlp.up_proj.weight"]


def test_inspect_has_a_row_for_layers_that_differ_in_numbers_alone(demo):
    directory, plan = demo
    told = run("inspect", directory)
    assert mora_jax.summary(plan.adapters(mora_jax.init(plan))).splitlines()[0] in told
    rows = [line for line in told.splitlines() if line.startswith("layers_")]
    assert len(rows) == 3
    (row,) = [r for r in rows if r.startswith("layers_*/self_attn/q_proj/kernel (3)")]
    q = [spec for path, spec in plan.items() if "q_proj" in path]
    assert f"  {sum(spec.parameters for spec in q)}" in row


def test_paths_stay_in_one_piece(demo, monkeypatch):
    """On however narrow a terminal: it may wrap lines, we do not."""
    monkeypatch.setenv("COLUMNS", "30")
    directory, plan = demo
    lora = ["export", directory, f"{directory}-lora", "--for", "peft"]
    told = run("inspect", directory, "--all")
    rows = [line for line in told.splitlines() if line.startswith("layers_")]
    assert len(rows) == len(plan)
    assert all(any(path in row for row in rows) for path in plan)
    assert len(run(*lora, code=1).splitlines()) == 1
    assert f"{directory}-lora" in run(*lora, "--names", TEMPLATES)


def test_urls_are_no_folders(tmp_path, monkeypatch, demo):
    cloud.restore({})
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    a, b = "mem://bucket/a", "mem://bucket/b"
    run("export", demo[0], a, "--for", "mora")
    run("inspect", a)
    run("export", a, b, "--for", "mora")
    assert contents(a) == contents(b)
    lora = "mem://bucket/lora", "--for", "peft"
    run("export", a, *lora, "--names", TEMPLATES)
    assert not list(here.iterdir())


def test_errors_of_every_kind_are_one_line(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("the\nstore is\nclosed")

    cloud.restore({})
    save("mem://bucket/a", made(PLAN))
    monkeypatch.setattr(cloud.MemoryPath, "open", fail)
    error = run("inspect", "mem://bucket/a", code=1)
    assert error == "error: RuntimeError: the store is closed\n"
