"""MaxText as it comes, with adapters in its decoder: nobody here wrote its trainer.

Run by `make test-maxtext`, in an environment of its own, on one device and on eight.
"""

import contextlib
import dataclasses
import inspect
import itertools
from types import SimpleNamespace
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import qwix
from flax import nnx
from flax.core.spmd import logical_axis_rules
from helpers import close, largest, python_blocks, random, random_like
from processes import ROOT, python
from safetensors.numpy import load_file, save_file

import mora_jax
from models import smollm2
from mora_jax import MoRAConfig
from mora_jax import nnx as mora
from mora_jax.io import AdapterFileError
from mora_jax.qwix import MoRAProvider, merge_adapters

from .conftest import EXPERTS, TINY

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.filterwarnings("error::mora_jax.MoRAWarning"),
]
CONFIG = MoRAConfig(rank=4)
PAGE = ROOT / "docs/maxtext-and-keras.md"
IDS = np.arange(128, dtype=np.int32).reshape(8, 16) * 7 % 128
POSITIONS = np.tile(np.arange(16, dtype=np.int32), (8, 1))


@pytest.fixture(scope="module")
def ours(maxtext):
    from mora_jax import maxtext as ours

    yield ours
    ours.unadapt()


@pytest.fixture(scope="module")
def adapt(ours):
    ours.adapt(CONFIG)
    return ours.adapt


@contextlib.contextmanager
def adapted(ours, config=CONFIG, **settings):
    """Another adaptation than that of the fixture; none if config is None."""
    ours.unadapt()
    if config is not None:
        ours.adapt(config, **settings)
    try:
        yield
    finally:
        ours.adapt(CONFIG)


@pytest.fixture(scope="module")
def base(runs, ours):
    """The checkpoint of a model that MaxText has trained a little, and its arrays."""
    with adapted(ours, None):
        _, state = runs.train(
            lora=False,
            run_name="base",
            steps=2,
            init_weights_seed=7,
            enable_checkpointing=True,
        )
    path = runs.folder / "base/checkpoints/1/items"
    return str(path), jax.device_get(nnx.to_pure_dict(state["model"]))


@pytest.fixture(scope="module")
def whole(runs, adapt, base):
    """The losses and the state of a run with adapters on that base."""
    return runs.train(load_parameters_path=base[0])


def test_it_trains_ms_alone(whole, base):
    losses, state = whole
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.8 * losses[0]
    ms = nnx.to_flat_state(nnx.state(state["model"], mora.MoRAParam))
    assert len(ms) == 7 and all(np.abs(m[...]).max() > 0 for _, m in ms)
    assert all(m.shape[1] == 3 for _, m in ms)  # param_scan_axis, as it comes
    plain = nnx.filter_state(
        state["model"], nnx.All(nnx.Param, nnx.Not(mora.MoRAParam))
    )
    of_base = nnx.traversals.flatten_mapping(base[1])
    for path, param in nnx.to_flat_state(plain):
        np.testing.assert_array_equal(param[...], of_base[path])


@pytest.mark.parametrize("ragged", [True, False])
def test_routed_experts_have_an_m_each(runs, ours, ragged):
    """In ragged products under shard_map, and in dense ones of all experts."""
    with adapted(ours, CONFIG, random_base=True):
        check_experts(runs, EXPERTS | {"sparse_matmul": ragged, "steps": 3})


def check_experts(runs, settings):
    losses, state = runs.train(**settings)
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.8 * losses[0]
    model = runs.model(state, **settings)
    ms = mora.adapters(model)["decoder"]["layers"]["MoeBlock_0"]
    assert {name: m.m.shape[:2] for name, m in ms.items()} == {
        f"{name}_mora": (4, 3) for name in ("wi_0", "wi_1", "wo")
    }
    expected, got = logits(runs, model), logits(runs, mora.merge_adapters(model))
    np.testing.assert_allclose(got, expected, atol=1e-4)
    before = nnx.state(runs.start(**settings)[1], mora.MoRAParam)
    zero = runs.model({"model": nnx.merge_state(state["model"], before)}, **settings)
    assert np.abs(logits(runs, zero) - expected).max() > 0.1


def call(model, batch):
    """The model as MaxText's loss calls it."""
    return model(
        decoder_input_tokens=batch["inputs"],
        decoder_positions=batch["inputs_position"],
        decoder_segment_ids=batch["inputs_segmentation"],
        enable_dropout=False,
        decoder_target_tokens=batch["targets"],
        decoder_target_mask=batch["targets_segmentation"],
    )


def placed(config, model):
    """Where MaxText's functions find mesh and rules."""
    stack = contextlib.ExitStack()
    stack.enter_context(jax.set_mesh(model.mesh))
    stack.enter_context(logical_axis_rules(config.logical_axis_rules))
    return stack


def logits(runs, model):
    graph, state = nnx.split(model)
    ones = np.ones_like(IDS)
    batch = {"inputs": IDS, "inputs_position": POSITIONS, "inputs_segmentation": ones}
    batch |= {"targets": IDS, "targets_segmentation": ones}
    with placed(runs.config(), model):
        return jax.jit(lambda state: call(nnx.merge(graph, state), batch))(state)


def test_our_own_loop_has_the_same_losses(runs, whole, base):
    """With optax and our gradients: MaxText's model and batches alone are in it."""
    config, model, loader = runs.start(load_parameters_path=base[0])
    rate = runs.maxtext.maxtext_utils.create_learning_rate_schedule(config)
    decay = {"b1": config.adam_b1, "b2": config.adam_b2, "weight_decay": 0.1}
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, **decay))
    optimizer = mora.adapter_optimizer(model, tx)

    def loss(model, batch):
        entropy = optax.softmax_cross_entropy_with_integer_labels
        return jnp.mean(entropy(call(model, batch), batch["targets"]))

    @nnx.jit
    def step(model, optimizer, batch):
        value, grads = mora.value_and_grad(loss)(model, batch)
        optimizer.update(model, grads)
        return value

    with placed(config, model):
        got = [
            float(step(model, optimizer, loader.load_next_batch())) for _ in range(6)
        ]
    np.testing.assert_allclose(got, whole[0], rtol=1e-5)


class Killed(BaseException):
    pass


def test_a_killed_run_resumes_where_it_was(runs, whole, base, monkeypatch):
    """From M's, moments and step alone: the base is read where it was."""
    train = runs.maxtext.train
    own, steps = train.training_loop_iteration, iter(range(3))

    def iteration(*args):
        if next(steps, None) is None:
            raise Killed
        return own(*args)

    settings = {"run_name": "killed", "load_parameters_path": base[0]}
    settings["enable_checkpointing"] = True
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train, "training_loop_iteration", iteration)
        runs.train(**settings)
    losses, state = runs.train(**settings)
    assert losses == whole[0][3:]
    chex.assert_trees_all_equal(*(nnx.to_pure_dict(s) for s in (state, whole[1])))
    saved = runs.folder / "killed/checkpoints/2/items"
    metadata: Any = ocp.PyTreeCheckpointer().metadata(saved)
    found = jax.tree_util.tree_flatten_with_path(metadata.item_metadata.tree)[0]
    kinds = [str(path[-1]) for path, _ in found]
    assert kinds.count("['kernel_mora']") == 3 * 7 and "['kernel']" not in kinds


def test_the_merged_model_is_a_plain_one_that_computes_the_same(
    runs, whole, base, ours
):
    model = runs.model(whole[1])
    merged = mora.merge_adapters(model)
    expected, got = logits(runs, model), logits(runs, merged)
    np.testing.assert_allclose(got, expected, atol=1e-4)
    plain = runs.model({"model": base[1]}, lora=False)
    kinds = [[type(m) for _, m in nnx.iter_modules(own)] for own in (merged, plain)]
    assert kinds[0] == kinds[1]
    assert np.abs(expected - logits(runs, plain)).max() > 0.1
    # MaxText goes on from it as from any other base.
    path, params = runs.folder / "merged", nnx.state(merged, nnx.Param)
    save = runs.maxtext.checkpointing.save_params_to_path
    save(str(path), {"params": nnx.to_pure_dict(params)})
    loaded = {"lora": False, "load_parameters_path": f"{path}/items"}
    with adapted(ours, None):
        np.testing.assert_array_equal(logits(runs, runs.start(**loaded)[1]), got)


def test_the_merged_model_is_exported_to_hugging_face(
    runs, whole, tmp_path, monkeypatch
):
    """By MaxText's own converter, into the Llama of our examples."""
    from absl import flags

    convert, model = runs.maxtext.to_huggingface, runs.model(whole[1])
    params = nnx.to_pure_dict(nnx.state(mora.merge_adapters(model), nnx.Param))
    save = runs.maxtext.checkpointing.save_params_to_path
    save(str(tmp_path / "merged"), {"params": params})
    no_hub = SimpleNamespace(save_pretrained=lambda *_: None)
    tokenizer = SimpleNamespace(from_pretrained=lambda *_, **__: no_hub)
    monkeypatch.setattr(convert, "AutoTokenizer", tokenizer)
    flags.FLAGS(["", "--override_model_architecture"])
    settings = {"model_name": "llama3.1-8b", "override_model_config": True} | TINY
    settings["load_parameters_path"] = tmp_path / "merged/items"
    settings["base_output_directory"] = tmp_path / "exported"
    given = [f"{name}={value}" for name, value in settings.items()]
    convert.main(["", runs.base, *given])
    (tmp_path / "llama").mkdir()
    tensors = {}
    for file in (tmp_path / "exported").glob("*.safetensors"):
        tensors |= load_file(file)
    head = tensors.pop("lm_head.weight")
    save_file(tensors, tmp_path / "llama/model.safetensors")
    llama = smollm2.Llama(smollm2.Config(128, 3, 32, 64, 4, 2, 10_000.0, 1e-5))
    like = jax.eval_shape(llama.init, jax.random.key(0), IDS)["params"]
    params = mora_jax.io.load_base(tmp_path / "llama", like, smollm2.NAMES)
    _, seen = llama.apply({"params": params}, IDS, capture_intermediates=True)
    (final,) = seen["intermediates"]["norm"]["__call__"]
    np.testing.assert_allclose(final @ head.T, logits(runs, model), atol=1e-4)


def test_a_checkpoint_without_ms_is_refused(maxtext, adapt):
    """MaxText's own function would drop M's, and all moments of a chain."""
    keep = maxtext.checkpointing._filter_lora_trainable_state
    moments = [{"count": 2, "mu": {"params": {"query": {"kernel_mora": 3}}}}, None]
    params = {"params": {"query": {"kernel": 4, "kernel_mora": 5}}}
    state = {"params": params, "opt_state": moments, "step": 1, "nnx_aux": {"key": 6}}
    kept = {"params": {"params": {"query": {"kernel_mora": 5}}}}
    assert keep(state) == {**kept, "opt_state": moments, "step": 1}
    assert inspect.unwrap(keep)(state) == {"step": 1}
    del params["params"]["query"]["kernel_mora"]
    with pytest.raises(ValueError, match="must have M's.*call mora_jax.maxtext.adapt"):
        keep(state)


def test_a_model_is_refused_without_the_module_that_keeps_its_ms():
    """Or a user who wraps it alone would train M's that no checkpoint has."""
    program = """
from flax import nnx
from maxtext.layers.linears import DenseGeneral
import mora_jax
mora_jax.nnx.wrap(DenseGeneral(16, 16, rngs=nnx.Rngs(0)))
"""
    told = python("-c", program, code=1, JAX_PLATFORMS="cpu")
    assert "teach its class DenseGeneral with mora_jax.register_layer" in told


def test_another_version_of_maxtext_is_refused(maxtext, adapt, monkeypatch):
    def create_model(settings, rngs):
        raise NotImplementedError

    creation = maxtext.creation
    monkeypatch.setattr(creation, "create_model", create_model)
    with pytest.raises(ImportError, match="create_model must be MaxText 0.2.5's"):
        adapt(CONFIG)
    monkeypatch.delattr(creation, "create_model")
    with pytest.raises(ImportError, match="create_model must be MaxText 0.2.5's"):
        adapt(CONFIG)


@pytest.mark.parametrize("setting", [{"train": ".*scale"}, {"dropout": 0.1}])
def test_what_its_checkpoints_and_evaluation_do_not_know_is_refused(adapt, setting):
    with pytest.raises(ValueError, match="train and dropout must be left out"):
        adapt(MoRAConfig(rank=4, **setting))
    with pytest.raises(TypeError, match="config must be a MoRAConfig"):
        adapt(4)


# --- What is refused when a run begins or goes on ---

SEEDED = MoRAConfig(rank=4, operator="orthogonal", seed=1)


@pytest.fixture(scope="module")
def kept(runs, ours, base):
    """The settings of a run that has left a checkpoint."""
    settings = {"run_name": "kept", "load_parameters_path": base[0]}
    settings["enable_checkpointing"] = True
    with adapted(ours, SEEDED):
        runs.train(steps=2, **settings)
    return settings


@pytest.mark.parametrize(
    ("setting", "then", "now"),
    [
        ("alpha", 1.0, 2.0),
        ("seed", 1, 2),
        ("rank", 4, 8),
        ("operator", "orthogonal", "sharing"),
    ],
)
def test_a_run_goes_on_with_its_own_settings_alone(
    runs, ours, kept, setting, then, now
):
    other = dataclasses.replace(SEEDED, **{setting: now})
    with adapted(ours, other), pytest.raises(AdapterFileError) as caught:
        runs.start(**kept)
    told = f"{setting}={then!r} there and {setting}={now!r} here"
    remedy = f"MoRAConfig({setting}={then!r})"
    assert all(part in str(caught.value) for part in (told, remedy, "kept/checkpoints"))
    with adapted(ours, SEEDED):
        runs.start(**kept)


def test_a_run_goes_on_with_its_own_kernels_alone(runs, ours, kept):
    fewer = dataclasses.replace(SEEDED, exclude=".*/wo/kernel")
    with adapted(ours, fewer), pytest.raises(AdapterFileError, match="wo/kernel.*targ"):
        runs.start(**kept)


def test_a_run_goes_on_with_its_own_base_alone(runs, ours, kept, base):
    flat = nnx.traversals.flatten_mapping(base[1])
    flat = {k: v for k, v in flat.items() if k[-1] in ("kernel", "scale", "embedding")}
    place = ("decoder", "layers", "mlp", "wo", "kernel")
    flat[place] = flat[place] + 1
    params = nnx.traversals.unflatten_mapping(flat)
    save = runs.maxtext.checkpointing.save_params_to_path
    save(str(runs.folder / "other"), {"params": params})
    other = kept | {"load_parameters_path": str(runs.folder / "other/items")}
    with adapted(ours, SEEDED):
        with pytest.raises(AdapterFileError, match="another base.*mlp/wo/kernel") as e:
            runs.start(**other)
        assert "load_parameters_path" in str(e.value)
        runs.start(**kept)


def test_checkpoints_of_an_earlier_version_warn_and_go_on(runs, ours, kept):
    file = runs.folder / "kept/checkpoints/mora_jax_run.json"
    text = file.read_text()
    file.unlink()
    with adapted(ours, SEEDED):
        with pytest.warns(mora_jax.MoRAWarning, match="cannot be compared"):
            runs.start(**kept)
        assert file.read_text() == text
        runs.start(**kept)  # where a warning would be an error


def test_a_run_needs_a_base(runs, ours, kept):
    """The first one, and one that goes on: its checkpoint has M's alone."""
    with adapted(ours, SEEDED):
        for settings in ({}, kept | {"load_parameters_path": ""}):
            with pytest.raises(ValueError, match="load_parameters_path must .*got ''"):
                runs.start(**settings)
    with adapted(ours, SEEDED, random_base=True):
        runs.start()
        # It may be meant, and still is not the base of that run.
        with pytest.raises(AdapterFileError, match="another base"):
            runs.start(**kept | {"load_parameters_path": ""})


def test_what_would_train_nothing_or_the_base_is_refused(runs, ours, base):
    path = {"load_parameters_path": base[0]}
    with adapted(ours, CONFIG):
        with pytest.raises(ValueError, match="enable_lora must be True.*got False"):
            runs.start(lora=False, **path)
    with adapted(ours, None):
        with pytest.raises(ValueError, match="train nothing: call mora_jax.maxtext.ad"):
            runs.start(**path)
        assert not nnx.state(runs.start(lora=False)[1], mora.MoRAParam)


def test_heads_are_adapted_if_targets_name_them(runs, ours):
    paths = "decoder/logits_dense/kernel", "decoder/layers/mlp/wo/kernel"
    make = runs.maxtext.creation.create_nnx_abstract_model
    for config in (MoRAConfig(rank=4), MoRAConfig(rank=4, exclude=paths[0])):
        with adapted(ours, config):
            plan = mora.plan_of(make(runs.config())[1])
        assert [path in plan for path in paths] == [False, True]
    with adapted(ours, MoRAConfig(rank=4, targets=".*kernel")):
        with pytest.warns(mora_jax.MoRAWarning, match=f"head.*{paths[0]}"):
            plan = mora.plan_of(make(runs.config())[1])
    assert [path in plan for path in paths] == [True, True]


def test_the_page_runs(maxtext, adapt, tmp_path, monkeypatch):
    one = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: one)
    scope, blocks = {"directory": tmp_path}, python_blocks(PAGE)
    for block in itertools.takewhile(lambda block: "import keras" not in block, blocks):
        exec(block, scope)
    adapt(CONFIG)
    assert {path.name for path in (tmp_path / "merged").iterdir()} >= {"items"}
    assert np.abs(scope["model"].decoder.layers.mlp.wo.kernel_mora[...]).max() > 0
    compile(scope["program"], "program", "exec")


class Scanned(nnx.Module):
    """Layers under the scan that MaxText has for models of its users."""

    def __init__(self, nnx_scan, axis):
        self.scan, self.axis = nnx_scan, axis
        self.layers: Any = nnx_scan.create_scanned_layers(
            lambda rngs: nnx.Linear(64, 64, rngs=rngs),
            **{"length": 3, "param_scan_axis": axis, "metadata_axis_name": "layers"},
            rngs=nnx.Rngs(0),
        )

    def __call__(self, x):
        settings: Any = {"length": 3, "param_scan_axis": self.axis}
        settings["apply_fn"] = lambda layer, x: nnx.tanh(layer(x))
        return self.scan.apply_scanned_layers(self.layers, x, **settings)


@pytest.mark.parametrize(("axis", "axes"), [(0, "sio"), (1, "iso")])
def test_layers_under_its_scan(maxtext, axis, axes):
    """By wrap, by qwix, and by the factors that qwix's own LoRA has there."""
    base, x = Scanned(maxtext.nnx_scan, axis), random(0, 2, 64)
    own = qwix.LoraProvider(module_path=".*", rank=4, alpha=4.0)
    ours = MoRAProvider(module_path=".*layers.*", rank=4, operator="rotation")
    lora, model = (
        qwix.apply_lora_to_model(base, provider, x, rngs=nnx.Rngs(0))
        for provider in (own, ours)
    )
    assert mora.plan_of(model)["layers/kernel"].axes == axes
    assert model.layers.kernel_mora.shape[axis] == 3
    mora.set_adapters(model, random_like(mora.adapters(model)))
    close(merge_adapters(model)(x), model(x), 1e-5)
    factors = random_like(nnx.state(lora, nnx.LoRAParam))
    nnx.update(lora, factors)
    adapted = mora.wrap(base, MoRAConfig(rank=4), x)
    plan = mora.plan_of(adapted)
    mora.set_adapters(adapted, mora_jax.from_lora(factors, plan, alpha=1.0))
    close(adapted(x), lora(x), 1e-5)
    assert largest(adapted(x) - base(x)) > 1e-2
    close(mora.merge_adapters(adapted)(x), adapted(x), 1e-5)
