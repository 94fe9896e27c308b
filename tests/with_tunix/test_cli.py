"""Tunix's own command line with M's, by the lines that the page has."""

import json
from importlib.util import find_spec
from pathlib import Path

import jax
import pytest
from flax import nnx
from helpers import python_blocks
from meshes import make_mesh
from processes import ROOT, python
from tunix_models import qwen_as_transformers, tiny

from mora_jax import nnx as mora

if find_spec("tunix") is None:
    pytest.skip("tunix is not installed", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore")  # what Tunix uses is deprecated
OFFLINE = Path(__file__).with_name("offline.py")
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
MODULES = ".*q_proj|.*gate_proj"
KERNELS = {"attn/q_proj/w", "mlp/gate_proj/kernel"}
PROMPTS = """
import grain

def create_dataset():
    return grain.MapDataset.source([{"prompts": f"w{k} w{k + 1}"} for k in range(16)])
"""
REWARD = """
def words(prompts, completions, **_):
    return [len(set(text.split())) / 4 for text in completions]
"""


def lines():
    """The lines of the page."""
    (found,) = [b for b in python_blocks(ROOT / "docs/tunix.md") if "runpy" in b]
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint and a tokenizer as Hugging Face has them, and the page's lines."""
    from safetensors.numpy import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers

    found = tmp_path_factory.mktemp("cli")
    save_file(qwen_as_transformers(tiny("qwen2")[0]), found / "model.safetensors")
    words = [*SPECIAL.values(), "<unk>", *(f"w{k}" for k in range(28))]
    vocabulary = {word: k for k, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(found / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **SPECIAL}
    settings |= {"unk_token": "<unk>", "chat_template": TEMPLATE}
    (found / "tokenizer_config.json").write_text(json.dumps(settings))
    (found / "with_mora.py").write_text(lines())
    (found / "prompts.py").write_text(PROMPTS)
    (found / "reward.py").write_text(REWARD)
    return found


def run(folder, launcher, program, config, *arguments):
    """{path: [class, whether it moved, axes of its mesh]}, and all losses."""
    model = {"model_name": "qwen2.5-tiny", "model_id": "Qwen/Qwen2.5-tiny"}
    model |= {"model_source": "huggingface", "model_download_path": str(folder)}
    model |= {"intermediate_ckpt_dir": str(folder / "none"), "model_display": False}
    tokenizer = {"tokenizer_type": "huggingface", "tokenizer_path": str(folder)}
    tokenizer |= {"add_bos": True, "add_eos": True}
    adapted = {
        "mesh": {"shape": "(2,2)", "axis_names": "('fsdp','tp')"},
        "lora_config": {"module_path": MODULES, "rank": 2, "alpha": 2.0},
    }
    if program == "peft_main":
        config = config | {"model_config": model | adapted}
    else:  # other roles have the actor's mesh
        actor = {"actor_model_config": adapted, "reference_model_config": {}}
        config = config | {"model_config": model} | actor
    path, report = folder / "config.yaml", folder / "report.json"
    path.write_text(json.dumps(config | {"tokenizer_config": tokenizer}))
    report.unlink(missing_ok=True)
    words = ["python", *launcher, f"tunix.cli.{program}", path, *arguments]
    python(OFFLINE, report, *words, cwd=folder, JAX_NUM_CPU_DEVICES="4")
    found = json.loads(report.read_text())
    return found["changes"], found["losses"]


SFT = {"dataset_name": "Helsinki-NLP/opus-100", "max_target_length": 16}
SFT |= {"batch_size": 4, "num_train_epochs": None, "tfds_download": False}
SFT |= {"optimizer_config": {"opt_type": "adamw", "learning_rate": 0.1}}
SFT |= {"training_config": {"eval_every_n_steps": 100, "max_steps": 2}}


def check(changes):
    """M's of the named modules moved, and nothing else; all is on one mesh."""
    adapters = {path for path, (kind, *_) in changes.items() if kind == "MoRAParam"}
    assert {path.split("/", 2)[2] for path in adapters} == {
        f"{k}_mora" for k in KERNELS
    }
    assert {path for path, (_, moved, _) in changes.items() if moved} == adapters
    assert all(place == {"fsdp": 2, "tp": 2} for *_, place in changes.values())


def test_the_lines_of_the_page_train_adapters(folder):
    steps = "training_config.eval_every_n_steps=100", "training_config.max_steps=6"
    steps += ("batch_size=8",)
    changes, losses = run(folder, ["with_mora.py"], "peft_main", SFT, *steps)
    check(changes)
    assert len(losses) == 9  # of three batches: before, and in two rounds
    assert sum(losses[6:]) < 0.99 * sum(losses[:3])


def test_without_them_tunix_trains_loras(folder):
    changes, _ = run(folder, ["-m"], "peft_main", SFT)
    kinds = {kind for kind, moved, _ in changes.values() if moved}
    assert kinds == {"LoRAParam"}


@pytest.mark.slow
def test_they_serve_grpo_as_well(folder):
    """The model that is not adapted is the reference."""
    config = {"batch_size": 4, "data_module": "prompts"}
    config |= {"apply_chat_template_to_dataset": False, "rollout_engine": "vanilla"}
    config |= {"reward_functions": [str(folder / "reward.py")]}
    config |= {"verl_compatible": False, "offload_to_cpu": False}
    config |= {"grpo_config": {"num_generations": 2, "beta": 0.08}}
    config |= {"rollout_config": {"total_generation_steps": 4, "max_prompt_length": 8}}
    config["rl_training_config"] = {
        "actor_optimizer_config": SFT["optimizer_config"],
        "eval_every_n_steps": 100,
        "max_steps": 2,
    }
    changes, losses = run(folder, ["with_mora.py"], "grpo_main", config)
    check(changes)
    assert len(losses) == 2


def test_keys_are_settings(monkeypatch):
    """All kernels by default, on the mesh that is given, and no quantized base."""
    from tunix.cli.utils import model as models  # pyright: ignore

    monkeypatch.setattr(models, "apply_lora_to_model", None)  # to be put back
    exec(lines(), {})
    (base, kernels), mesh = tiny("qwen2"), make_mesh(fsdp=2, tp=2)
    config = {"rank": 2, "alpha": 2.0, "operator": "sharing", "param_dtype": None}
    model = models.apply_lora_to_model(base, mesh, config)
    plan = mora.plan_of(model)
    assert {path.split("/", 3)[-1] for path in plan} == kernels
    assert {spec.operator.name for spec in plan.specs.values()} == {"sharing"}
    assert all(x.sharding.mesh == mesh for x in jax.tree.leaves(nnx.state(model)))
    with pytest.raises(TypeError, match="no setting 'weight_qtype'"):
        models.apply_lora_to_model(base, mesh, config | {"weight_qtype": "nf4"})
