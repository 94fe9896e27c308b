"""What programs load: a LoRA near enough, for servers of a rank that they take."""

import json

import numpy as np
import pytest
from adapter_files import made, run, single, specs_of
from base_files import sharded
from helpers import random_like
from safetensors.numpy import load_file

import mora_jax
from mora_jax import MoRAConfig, MoRAWarning, io, make_operator

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def base(tmp_path):
    return sharded(tmp_path / "base")


def adapted(base, operator):
    """Adapters of a base's kernels, which are far from zero."""
    config = MoRAConfig(rank=2, operator=operator)
    plan = mora_jax.plan(io.Checkpoint(base).shapes(), config)
    return random_like(mora_jax.init(plan))


def updates(directory):
    """What the LoRA in a directory adds to each module's weight."""
    tensors, found = load_file(directory / TENSORS), {}
    for name in tensors:
        if name.endswith("lora_A.weight"):
            module = name.removeprefix("base_model.model.").partition(".lora_A")[0]
            b = tensors[name.replace("lora_A", "lora_B")]
            found[module] = b.astype(np.float64) @ tensors[name]
    return found


@pytest.mark.law
@pytest.mark.parametrize("server", ["vllm", "sglang"])
@pytest.mark.parametrize("operator", ["signed_sharing", "rotation"])
def test_a_lora_of_the_fewest_singular_values(tmp_path, base, server, operator):
    adapters = adapted(base, operator)
    out = tmp_path / "law"
    done = io.export(out, adapters, server, base_model="hub/model")
    deltas = mora_jax.delta_weight(adapters)
    config = json.loads((out / CONFIG).read_text())
    assert config["r"] == done.rank
    assert config["base_model_name_or_path"] == "hub/model"
    rank_of = dict.fromkeys(done.lost, done.rank) | config["rank_pattern"]
    for module, update in updates(out).items():
        delta = deltas
        for key in (*module.split("."), "kernel"):
            delta = delta[key]
        delta = np.asarray(delta, np.float64).T
        tails = np.linalg.svd(delta, compute_uv=False)[::-1] ** 2
        tails = np.sqrt(np.cumsum(tails)[::-1] / tails.sum())
        rank, lost = rank_of[module], np.linalg.norm(delta - update)
        assert abs(lost / np.linalg.norm(delta) - done.lost[module]) < 1e-5
        if operator == "rotation":
            assert 0 < done.lost[module] <= 0.1 < tails[rank - 1]
        else:
            assert done.lost[module] == 0
    room = next(size for size in (1, 8, 16, 32, 64) if size >= done.rank)
    expected = {
        "vllm": "vllm serve hub/model --enable-lora "
        f"--max-lora-rank {room} --lora-modules law={out}",
        "sglang": "python -m sglang.launch_server --model-path hub/model --enable-lora "
        f"--max-lora-rank {done.rank} --lora-paths law={out}",
    }
    assert done.command == expected[server]


@pytest.mark.parametrize("server", ["vllm", "sglang"])
@pytest.mark.parametrize("operator", ["signed_sharing", "rotation"])
def test_what_no_server_takes_is_refused(tmp_path, base, monkeypatch, server, operator):
    """The message names what holds all of it, and the rank that servers take."""
    monkeypatch.setattr("mora_jax.io.peft._export.RANKS", (1, 8))
    adapters = adapted(base, operator)
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="needs rank .* servers take 8 .*") as told:
        io.export(out, adapters, server)
    for remedy in ("io.merge_checkpoint(base, ", "mora-jax merge BASE ", "rank=8"):
        assert remedy in str(told.value)
    assert not out.exists()
    rough = io.export(out, adapters, server, rank=8, max_error=0.9)
    assert rough.rank == 8 and 0 < max(rough.lost.values()) <= 0.9
    assert io.export(tmp_path / "peft", adapters, "peft").rank > 8


def test_peft_has_a_line_that_loads_it(tmp_path, base):
    done = io.export(tmp_path / "a b", adapted(base, "rotation"), "peft")
    place = str(tmp_path / "a b")
    assert done.command == f"peft.PeftModel.from_pretrained(model, {place!r})"


TASKS = {"GPT2LMHeadModel": "CAUSAL_LM", "LlamaForCausalLM": "CAUSAL_LM"}
TASKS |= dict.fromkeys(("BertForMaskedLM", "BertModel"))


@pytest.mark.law
@pytest.mark.parametrize("model", TASKS)
def test_the_task_is_the_base_s(tmp_path, base, model):
    """PEFT takes no model that lacks the methods of its task."""
    adapters = adapted(base, "signed_sharing")
    (base / "config.json").write_text(json.dumps({"architectures": [model]}))
    for name, base_model in enumerate((str(base), "hub/model", "")):
        out = tmp_path / str(name)
        io.export(out, adapters, "peft", base_model=base_model)
        task = TASKS[model] if base_model == str(base) else None
        assert json.loads((out / CONFIG).read_text())["task_type"] == task
        io.export(out, adapters, "peft", task_type="SEQ_CLS", force=True)
        assert json.loads((out / CONFIG).read_text())["task_type"] == "SEQ_CLS"


def test_the_command_writes_and_tells(tmp_path, base):
    adapters = adapted(base, "signed_sharing")
    mora_jax.save(tmp_path / "a", adapters)
    out = tmp_path / "o o"
    told = "--for", "vllm", "--base-model", base
    printed = run("export", tmp_path / "a", out, *told)
    assert f"{len(specs_of(adapters))} adapters as a LoRA of rank" in printed
    assert f"vllm serve {base} --enable-lora" in printed and f"'o o={out}'" in printed
    assert updates(out).keys()
    again = "export", tmp_path / "a", out, "--for", "vllm"
    assert "directory must be new or empty" in run(*again, code=1)
    assert "vllm serve '<BASE: its directory, or its name " in run(*again, "--force")


def test_the_command_is_of_paths_that_a_server_knows(tmp_path, base, monkeypatch):
    """`~` and `file://` are ours."""
    adapters = adapted(base, "signed_sharing")
    monkeypatch.setenv("HOME", str(tmp_path))
    done = io.export("~/a", adapters, "vllm", base_model=str(base))
    assert done.command.startswith(f"vllm serve {base} ")
    assert done.command.endswith(f" a={tmp_path / 'a'}")
    url = (tmp_path / "b").as_uri()
    done = io.export(url, adapters, "sglang", base_model="~/hub")
    assert f"--model-path {tmp_path / 'hub'} " in done.command
    assert done.command.endswith(f" b={tmp_path / 'b'}")


@pytest.mark.parametrize("program", ["peft", "vllm"])
def test_an_embedding_may_be_the_head(tmp_path, program):
    """A LoRA would change what is looked up, and not a head that is tied to it."""
    path = "model", "embed_tokens", "embedding"
    plan = single(make_operator("sharing", 40, 24, 6), path=path)
    told = "not a head that is tied .* io.merge_checkpoint changes both"
    with pytest.warns(MoRAWarning, match=told):
        assert io.export(tmp_path / "lora", made(plan), program).rank == 6


@pytest.mark.usefixtures("unchecked")
def test_bad_input(tmp_path, base):
    adapters = adapted(base, "rotation")
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="program must be one of"):
        io.export(out, adapters, "tgi")
    with pytest.raises(ValueError, match="max_error must be from 0 to 1"):
        io.export(out, adapters, "vllm", max_error=2)
    with pytest.raises(ValueError, match="adapters hold no adapter"):
        io.export(out, {}, "vllm")
    with pytest.raises(TypeError, match="rank must be a positive integer"):
        io.export(out, adapters, "peft", rank="all")
    for wrong in (None, 3, [base]):
        with pytest.raises(TypeError, match="base_model must be .*, got"):
            io.export(out, adapters, "peft", base_model=wrong)
    with pytest.raises(TypeError, match="task_type must be .*, got 3"):
        io.export(out, adapters, "peft", task_type=3)
    assert not out.exists()
