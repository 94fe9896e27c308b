"""Hugging Face PEFT loads our exported LoRAs, and computes what MoRA does."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapter_files import flatten, made, specs_of
from base_files import DATA, NAMES, base, llama
from safetensors.numpy import load_file as load

import mora_jax
from mora_jax import AdapterSpec, MoRAConfig, MoRAWarning, TrainedArray, io, linen
from mora_jax.io._files import TENSORS
from mora_jax.operators import OPERATORS

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")

IDS = np.random.default_rng(0).integers(0, 97, (2, 9), np.int32)


BASE = DATA / "type1" / "base_model.safetensors"


def torch_llama(file=BASE):
    """The same Llama in PyTorch."""
    from safetensors.torch import load_file
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = json.loads((DATA / "llama.json").read_text())
    model = LlamaForCausalLM(LlamaConfig(**settings))
    state = load_file(file)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert missing == ["lm_head.weight"] and not unexpected  # it is tied
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(torch.tensor(IDS, dtype=torch.long)).logits.numpy()


MODEL, PARAMS = llama(), base(1)
TABLE = {"model.embed_tokens": "embed_tokens/embedding"}
BLOCKS = {name for name, operator in OPERATORS.items() if operator.block}


@pytest.mark.parametrize("operator", OPERATORS)
def test_logits(tmp_path, operator):
    config = MoRAConfig(rank=4, operator=operator, alpha=0.5)
    variables = {"params": PARAMS}
    plan = linen.plan(MODEL, variables, config, IDS)
    adapters = made(plan, scale=0.1)
    expected = linen.wrap(MODEL, plan)(adapters, variables, IDS)
    rank = 64 if operator in BLOCKS else None  # all of it
    lost = io.export(tmp_path / "a", adapters, "peft", NAMES, rank=rank).lost
    assert len(lost) == 14 and max(lost.values()) < 1e-5
    model = peft.PeftModel.from_pretrained(torch_llama(), tmp_path / "a")
    np.testing.assert_allclose(logits(model), expected, atol=1e-4)
    base_logits = MODEL.apply(variables, IDS)
    assert float(jnp.abs(expected - base_logits).max()) > 0.1


def test_logits_of_an_adapted_embedding(tmp_path):
    """The head is tied to it: merged, both change; a LoRA changes what is looked up."""
    config = MoRAConfig(
        rank=4, operator="sharing", targets=(".*q_proj/kernel", ".*embedding")
    )
    variables = {"params": PARAMS}
    plan = linen.plan(MODEL, variables, config, IDS)
    adapters = made(plan, scale=0.1)
    expected = linen.wrap(MODEL, plan)(adapters, variables, IDS)
    with pytest.warns(MoRAWarning, match="tied"):
        io.export(tmp_path / "a", adapters, "peft", NAMES | TABLE)
    io.merge_checkpoint(BASE, adapters, tmp_path / "merged", NAMES | TABLE)
    merged = torch_llama(tmp_path / "merged" / BASE.name)
    np.testing.assert_allclose(logits(merged), expected, atol=1e-4)
    merged.lm_head.weight = torch_llama().lm_head.weight
    expected = logits(merged)
    with pytest.warns(UserWarning, match="ensure_weight_tying"):
        model = peft.PeftModel.from_pretrained(torch_llama(), tmp_path / "a")
    np.testing.assert_allclose(logits(model), expected, atol=1e-4)


def trained_by_peft(settings):
    """PEFT's own LoRA on the Llama, with numbers as after training."""
    model = peft.get_peft_model(torch_llama(), peft.LoraConfig(**settings))
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight += 0.1 * torch.randn_like(weight)
    return model.eval()


LINEAR = ["q_proj", "v_proj", "up_proj", "down_proj"]
PEFTS = {
    "plain": {"r": 4, "lora_alpha": 6},
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "patterns": {
        "r": 4,
        "lora_alpha": 6,
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 3},
        "alpha_pattern": {"down_proj": 5},
    },
    "gaussian": {"r": 2, "init_lora_weights": "gaussian"},
    "whole": {"r": 4, "modules_to_save": ["norm"]},
    "some layers": {"r": 4, "layers_to_transform": [1]},
}


@pytest.mark.parametrize("how", PEFTS)
def test_a_lora_of_peft_comes_in_and_goes_out(tmp_path, how):
    """As its logits and as its merged weights are, and again the same bits."""
    names = NAMES | {"model.norm": "norm/scale"}
    names |= {"model.layers.{n}.{norm}": "layers_{n}/{norm}/scale"}
    model = trained_by_peft({"target_modules": LINEAR, **PEFTS[how]})
    model.save_pretrained(tmp_path / "peft")
    adapters = io.load_peft(tmp_path / "peft", PARAMS, names)
    expected, variables = logits(model), {"params": PARAMS}
    paths = {kind: [] for kind in (AdapterSpec, TrainedArray)}
    for path, spec in specs_of(adapters).items():
        paths[type(spec)].append(path)
    targets, train = paths.values()
    config = MoRAConfig(rank=1, targets=targets, train=train)
    plan = linen.plan(MODEL, variables, config, IDS)
    wrapped = linen.wrap(MODEL, plan)(adapters, variables, IDS)
    np.testing.assert_allclose(wrapped, expected, atol=1e-4)
    assert np.abs(expected - np.asarray(MODEL.apply(variables, IDS))).max() > 0.1
    io.export(tmp_path / "ours", adapters, "peft", names)
    one, other = (load(tmp_path / d / TENSORS) for d in ("peft", "ours"))
    assert one.keys() == other.keys()
    assert all((one[name] == other[name]).all() for name in one)
    again = peft.PeftModel.from_pretrained(torch_llama(), tmp_path / "ours")
    np.testing.assert_allclose(logits(again), expected, atol=1e-5)
    io.merge_checkpoint(BASE, adapters, tmp_path / "merged", names)
    merged, weights = load(tmp_path / "merged" / BASE.name), model.merge_and_unload()
    state = weights.state_dict()
    for name, weight in merged.items():
        np.testing.assert_allclose(weight, state[name].numpy(), atol=1e-5)


class Net(torch.nn.Module):
    """Layers with biases."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.norm = torch.nn.Linear(8, 12), torch.nn.LayerNorm(12)
        self.down = torch.nn.Linear(12, 8)

    def forward(self, x):
        return self.down(torch.relu(self.norm(self.up(x))))


BIASES = {
    "none": (".*norm/.*", ["norm"]),
    "lora_only": (".*(norm/.*|up/bias)", ["norm"]),
    "all": (".*bias", []),
}


@pytest.mark.parametrize("bias", BIASES)
def test_trained_biases_go_out_and_come_back(tmp_path, bias):
    """Into PEFT, and from what PEFT writes again."""
    train, saved = BIASES[bias]
    state = {key: jnp.array(value.numpy()) for key, value in Net().state_dict().items()}
    params = {
        "norm": {"scale": state["norm.weight"], "bias": state["norm.bias"]},
        **{
            name: {"kernel": state[f"{name}.weight"].T, "bias": state[f"{name}.bias"]}
            for name in ("up", "down")
        },
    }
    names = {"{name}": "{name}/kernel"}
    plan = mora_jax.plan(params, MoRAConfig(rank=2, operator="low_rank", train=train))
    start = mora_jax.init(plan, params=params)
    adapters = jax.tree.map(lambda m: m + 0.3, start)
    io.export(tmp_path / "a", adapters, "peft", names)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["bias"], config.get("modules_to_save", [])) == (bias, saved)
    model = peft.PeftModel.from_pretrained(Net(), tmp_path / "a").eval()
    merged = mora_jax.merge(params, adapters)
    flat = {path.replace("/", "."): a for path, a in flatten(merged).items()}
    whole = Net()
    whole.load_state_dict(
        {
            re.sub("(kernel|scale)$", "weight", path): torch.tensor(np.asarray(a).T)
            for path, a in flat.items()
        }
    )
    x = torch.randn(3, 8)
    with torch.no_grad():
        np.testing.assert_allclose(model(x), whole(x), atol=1e-5)
        assert float((model(x) - Net()(x)).abs().max()) > 0.1
    model.save_pretrained(tmp_path / "again")
    again = io.load_peft(tmp_path / "again", params, names)
    for left, right in zip(
        jax.tree.leaves(mora_jax.merge(params, again)),
        jax.tree.leaves(merged),
        strict=True,
    ):
        np.testing.assert_allclose(left, right, atol=1e-6)


def test_without_a_task_peft_takes_a_causal_model(tmp_path):
    plan = linen.plan(MODEL, {"params": PARAMS}, MoRAConfig(rank=2), IDS)
    io.export(tmp_path, made(plan, scale=0.1), "peft", NAMES, max_error=1)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["task_type"] is None
    model = peft.PeftModel.from_pretrained(torch_llama(), tmp_path).eval()
    ids = torch.tensor(IDS[:1], dtype=torch.long)
    with torch.no_grad():
        three = {"min_new_tokens": 3, "max_new_tokens": 3}  # also after an end of text
        text = model.generate(input_ids=ids, do_sample=False, **three)
        best = model.merge_and_unload().generate(
            input_ids=ids, do_sample=False, **three
        )
    assert text.shape == (1, 12) and (text == best).all()


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
    ],
)
def test_other_methods_of_peft_are_refused(tmp_path, settings, match):
    trained_by_peft({"target_modules": LINEAR, **settings}).save_pretrained(tmp_path)
    with pytest.raises(io.AdapterFileError, match=match):
        io.load_peft(tmp_path, PARAMS, NAMES)
