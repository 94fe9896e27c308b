"""What gets no adapter is said, and what a pattern that matches nothing meant."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from helpers import made_for
from twins import built, dense, in_linen

import mora_jax
from mora_jax import LeftOutWarning, MoRAConfig, MoRAWarning, linen
from mora_jax import nnx as mora_nnx

KEY = jax.random.key(0)
ENV = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
IDS = jnp.zeros((2, 3), jnp.int32)
X = jnp.ones((1, 3, 8))
SHAPE = jax.ShapeDtypeStruct((8, 8), jnp.float32)


class Einsum(nnx.Module):
    """Another library's layer, which nobody registered."""

    def __init__(self, equation, shape, rngs):
        self.equation = equation
        self.w = nnx.Param(jax.random.normal(rngs.params(), shape))

    def __call__(self, x):
        return jnp.einsum(self.equation, x, self.w[...])


class Block(nnx.Module):
    def __init__(self, rngs):
        self.attn = Einsum("btd,dhk->bthk", (8, 2, 4), rngs)
        self.mlp = nnx.Linear(8, 8, rngs=rngs)
        self.heads = nnx.LinearGeneral(8, (2, 4), rngs=rngs)  # has a bias of two axes

    def __call__(self, x):
        y = self.heads(x) + self.attn(x)
        return self.mlp(y.reshape(x.shape))


class GPT(nnx.Module):
    """Its attention is of a class that is not known."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(11, 8, rngs=rngs)
        self.pos_table = nnx.Param(jnp.ones((3, 8)))
        self.cls = nnx.Param(jnp.ones((1, 1, 8)))
        self.blocks = nnx.List([Block(rngs) for _ in range(2)])
        self.experts = nnx.Param(jnp.ones((3, 8, 8)))
        self.unused = nnx.Linear(8, 8, rngs=rngs)
        self.lm_head = nnx.Linear(8, 11, rngs=rngs)

    def __call__(self, ids):
        x = self.embed(ids) + self.pos_table[...] + self.cls[...]
        for block in self.blocks:
            x = block(x)
        x = jnp.einsum("btd,edf->betf", x, self.experts[...])
        return self.lm_head(x.mean(1))


SAID = {
    "blocks/*/attn/w (2)": "teach its class Einsum with mora_jax.register_layer",
    "blocks/*/heads/bias (2)": "not multiplied with an input as it is",
    "embed/embedding": "an embedding; targets adapt it if they name it, train",
    "experts": "teach its class GPT with mora_jax.register_layer",
    "lm_head/kernel": "a head or router by its name",
    "pos_table": "not multiplied with an input as it is",
}


@pytest.mark.parametrize("inputs", [(), (IDS,)], ids=["untraced", "traced"])
def test_an_nnx_model_of_unknown_layers(inputs):
    may = "" if inputs else "may "
    match = (
        rf"arrays that {may}multiply inputs get no adapter: blocks/\*/attn/w \(2\): "
        r".*Einsum.*; experts: .*GPT"
    )
    idle = "; unused/kernel: the call that was traced" if inputs else ""
    with pytest.warns(LeftOutWarning, match=f"{match}.*{idle}.*Name them in exclude"):
        plan = mora_nnx.plan(GPT(), None, *inputs)
    assert "blocks/0/mlp/kernel" in plan and "blocks/0/attn/w" not in plan
    _, _, said = str(plan).partition("\nnot proven")[0].partition("\nleft out:\n")
    rows = dict(line.strip().split(": ", 1) for line in said.splitlines())
    for path, why in SAID.items():
        if inputs or path != "pos_table":
            assert why in rows[path], path
    assert ("unused/kernel" in rows) == bool(inputs) != ("unused/kernel" in plan)


def test_what_no_call_was_traced_for_is_not_proven():
    """A model that also reads a kernel itself is refused only with inputs."""

    class Reads(nnx.Module):
        def __init__(self):
            self.layers = nnx.List(
                [nnx.Linear(8, 8, rngs=nnx.Rngs(k)) for k in range(3)]
            )

        def __call__(self, x):
            for layer in self.layers:
                x = layer(x) + x @ layer.kernel[...]
            return x

    text = str(mora_nnx.plan(Reads()))
    assert "not proven" in text
    assert text.endswith("layers/*/kernel (3): no call was traced; nnx.plan takes the "
                         "inputs of one")  # fmt: skip
    assert "also reads this kernel" in message(mora_nnx.plan, Reads(), None, X)


def test_heads_of_one_number_are_left_out_by_default():
    model = nn.Sequential([nn.Dense(8), nn.Dense(1)])
    variables = made_for(model, X)
    plan = linen.plan(model, variables, None, X)
    assert list(plan) == ["layers_0/kernel"]
    assert "layers_1/kernel: too narrow for a square" in str(plan)
    config = MoRAConfig(targets=".*1/kernel", operator="rotation")
    text = message(linen.plan, model, variables, config, X)
    assert "leave it out with exclude, or give it an operator" in text
    config = MoRAConfig(targets=".*1/kernel", operator="sharing")
    assert linen.plan(model, variables, config, X)["layers_1/kernel"].shape == (1, 1)
    both = nnx.Sequential(
        nnx.Linear(1, 8, rngs=nnx.Rngs(0)), nnx.Linear(8, 8, rngs=nnx.Rngs(0))
    )
    assert list(mora_nnx.plan(both)) == ["layers/1/kernel"]


def test_what_a_pattern_names_is_left_out_for_another_reason():
    text = str(linen.plan(*own(), MoRAConfig(targets=".*", exclude=".*w"), IDS))
    assert "layers_1/bias: not multiplied with an input as it is" in text


def test_what_is_excluded_or_registered_is_no_surprise():
    exclude = [".*/attn/w", "experts", "unused/.*"]
    plan = mora_nnx.plan(GPT(), MoRAConfig(exclude=exclude), IDS)
    assert "experts: excluded" in str(plan)
    config = MoRAConfig(targets=".*/mlp/kernel")
    assert "experts: no target" in str(mora_nnx.plan(GPT(), config, IDS))
    assert issubclass(LeftOutWarning, MoRAWarning)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LeftOutWarning)
        mora_nnx.wrap(GPT())


class Own(nn.Module):
    """A layer of Linen that nobody registered."""

    @nn.compact
    def __call__(self, x):
        w = self.param("w", nn.initializers.ones, (8, 8))
        bias = self.param("bias", nn.initializers.ones, (3, 8))
        return x @ w + bias


def own():
    """A model that has one, and its variables."""
    model = nn.Sequential([nn.Embed(11, 8), Own(), nn.Dense(8)])
    return model, made_for(model, IDS)


def test_a_linen_model_of_unknown_layers():
    with pytest.warns(LeftOutWarning, match="layers_1/w: .* its class Own with"):
        plan = linen.plan(*own(), None, IDS)
    assert "layers_1/bias: not multiplied with an input as it is" in str(plan)
    assert list(plan) == ["layers_2/kernel"]


def message(call, *args):
    with pytest.raises(ValueError) as caught:
        call(*args)
    return str(caught.value)


def test_a_model_whose_kernels_are_all_heads_says_so():
    class Classifier(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, name="classifier")(nn.Conv(8, (3,))(x))

    model = Classifier()
    text = message(linen.plan, model, made_for(model, X), None, X)
    assert "Conv_0/kernel: a convolution; targets adapt it" in text
    assert "classifier/kernel: a new head by its name; train=" in text


class Deep(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(5, name="decoder")(nn.Dense(8, name="transform")(x))


class Heads(nn.Module):
    """Names that look like heads and embeddings, of layers that are none, and heads."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8, name="embeddings_project")(x)
        nn.Dense(8, name="pooler")(x)
        x = nn.Dense(8, name="cls_transform")(x)
        x = Deep(name="cls")(x)
        return nn.Dense(3, name="qa_outputs")(x), nn.Dense(7, name="lm_head")(x)


def test_layers_tell_what_names_only_seem_to_say():
    variables = made_for(Heads(), X)
    plan = linen.plan(Heads(), variables, None, X)
    adapted = ["cls/transform/kernel", "cls_transform/kernel"]
    assert [*plan] == [*adapted, "embeddings_project/kernel"]
    rows = dict(str(kind).split(": ", 1) for kind in plan.left_out)
    assert "no output of the call" in rows["pooler/kernel"]
    assert "a head or router" in rows["cls/decoder/kernel"]
    assert "a head or router" in rows["lm_head/kernel"]
    assert "train='qa_outputs/.*' trains all" in rows["qa_outputs/kernel"]
    # Whoever names what has no effect gets it, and a warning.
    config = MoRAConfig(targets="pooler/kernel")
    with pytest.warns(MoRAWarning, match="adapters without an effect: pooler/kernel"):
        assert [*linen.plan(Heads(), variables, config, X)] == ["pooler/kernel"]
    # Without layers names are all there is.
    assert [*mora_jax.plan(variables["params"])] == [
        "cls_transform/kernel",
        "pooler/kernel",
    ]


def test_biases_of_layers_that_do_not_run_are_no_news():
    """Where they have two axes, in either API."""

    class Idle(nn.Module):
        @nn.compact
        def __call__(self, x):
            used, idle = nn.Dense(8, name="used"), nn.DenseGeneral((2, 4), name="idle")
            return idle(used(x)).reshape(x.shape) if self.is_initializing() else used(x)

    class IdleNNX(nnx.Module):
        def __init__(self):
            self.used = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
            self.idle = nnx.LinearGeneral(8, (2, 4), rngs=nnx.Rngs(1))

        def __call__(self, x):
            return self.used(x)

    with pytest.warns(LeftOutWarning, match="no adapter: idle/kernel: the call that"):
        plan = linen.plan(Idle(), made_for(Idle(), X), None, X)
    with pytest.warns(LeftOutWarning, match="no adapter: idle/kernel: the call that"):
        other = mora_nnx.plan(IdleNNX(), None, X)
    for chosen in (plan, other):
        assert "idle/kernel" in str(chosen) and "idle/bias" not in str(chosen)


def one_idle(model, x):
    """A layer that runs, and another one that only initialisation runs."""
    y = model.used(x)
    return model.idle(y) if in_linen(model) and model.is_initializing() else y


IDLE = built(one_idle, X, used=dense(8, 8), idle=dense(8, 8))


def planned(twin, config=None):
    """A plan of each API, with the same warnings and errors."""
    model, net = twin.linen(), twin.nnx(nnx.Rngs(0))
    yield lambda: linen.plan(model, made_for(model, twin.x), config, twin.x)
    yield lambda: mora_nnx.plan(net, config, twin.x)


@pytest.mark.parametrize("targets", [None, ".*kernel", ["used/.*", ".*kernel"]])
def test_a_layer_that_the_call_does_not_use_is_left_out_and_told(targets):
    """In both APIs, by default and where targets also name others."""
    config = MoRAConfig(targets=targets) if targets else None
    told = "get no adapter: idle/kernel: the call that was traced does not use it"
    for call in planned(IDLE, config):
        with pytest.warns(LeftOutWarning, match=told):
            plan = call()
        assert list(plan) == ["used/kernel"] and not plan.unproven
        assert "left out:\n  idle/kernel: the call that" in str(plan)
    for call in planned(IDLE, MoRAConfig(exclude="idle/.*")):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert list(call()) == ["used/kernel"]


@pytest.mark.parametrize("targets", ["idle/kernel", ["used/kernel", "idle/.*"]])
def test_a_pattern_that_names_only_layers_which_do_not_run_is_an_error(targets):
    for call in planned(IDLE, MoRAConfig(targets=targets)):
        text = message(call)
        assert text.startswith("targets: 'idle/") and "'idle/kernel'" in text
        assert "the call that was traced does not use" in text


def test_an_array_that_trains_itself_without_effect_is_told():
    for call in planned(IDLE, MoRAConfig(targets="used/.*", train=".*/bias")):
        with pytest.warns(MoRAWarning, match="train: idle/bias: the call that"):
            assert sorted(call().trained) == ["idle/bias", "used/bias"]


class Normed(nnx.Module):
    """A layer between norms of all kinds."""

    def __init__(self, rngs):
        kinds = nnx.LayerNorm, nnx.RMSNorm, nnx.BatchNorm, nnx.InstanceNorm
        self.norms = nnx.List([kind(8, rngs=rngs) for kind in kinds])
        self.groups = nnx.GroupNorm(8, 4, rngs=rngs)
        self.fc = nnx.Linear(8, 8, rngs=rngs)


def test_a_stack_of_norms_multiplies_no_inputs():
    """Its scales have two axes, as a kernel has, and no call says what they are."""
    stack = nnx.split_rngs(splits=3)(nnx.vmap(Normed))(nnx.Rngs(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error", MoRAWarning)
        model = mora_nnx.wrap(stack)
    plan = mora_nnx.plan(stack)
    assert list(plan) == ["fc/kernel"] == [*mora_nnx.plan_of(model)]
    assert "norms/*/scale (4): not multiplied with an input as it is" in str(plan)
    text = message(mora_nnx.plan, stack, MoRAConfig(targets=".*scale"))
    assert text.startswith("targets: '.*scale' matches no path of a kernel")


def test_a_kernel_that_is_no_param_is_left_out_by_name():
    class Frozen(nnx.Module):
        def __init__(self):
            self.layers = nnx.List([nnx.Linear(8, 8, rngs=nnx.Rngs(k)) for k in (0, 1)])
            self.layers[0].kernel = nnx.BatchStat(self.layers[0].kernel[...])

        def __call__(self, x):
            return self.layers[1](self.layers[0](x))

    for inputs in ((), (X,)):
        plan = mora_nnx.plan(Frozen(), None, *inputs)
        assert list(plan) == ["layers/1/kernel"]
        said = "left out:\n  layers/0/kernel: held by a BatchStat, not an nnx.Param"
        assert said in str(plan)
        config = MoRAConfig(targets=".*0/kernel")
        text = message(mora_nnx.plan, Frozen(), config, *inputs)
        assert "in NNX held by an nnx.Param" in text
        text = message(mora_nnx.plan, Frozen().layers[0], None, *inputs)
        assert text.endswith("kernel: held by a BatchStat, not an nnx.Param")


def test_a_class_without_the_attribute_that_multiplies_is_told():
    class Plain(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x @ self.param("kernel", nn.initializers.ones, (8, 8))

    class PlainNNX(nnx.Module):
        def __init__(self):
            self.kernel = nnx.Param(jnp.ones((8, 8)))

        def __call__(self, x):
            return x @ self.kernel[...]

    for cls in (Plain, PlainNNX):
        mora_jax.register_layer(cls, equation="...i,io->...o", dot_general=True)
    variables = made_for(Plain(), X)
    named = mora_jax.plan(variables["params"])
    apply = linen.wrap(Plain(), named)
    for call in (
        lambda: linen.plan(Plain(), variables, None, X),
        lambda: mora_nnx.plan(PlainNNX(), None, X),
        lambda: mora_nnx.plan(PlainNNX()),
        lambda: mora_nnx.wrap(PlainNNX(), named),
        lambda: apply(mora_jax.init(named), variables, X),
    ):
        with pytest.raises(AttributeError, match="has no attribute .dot_general"):
            call()


def test_a_class_that_hands_its_kernel_on_cannot_be_taught():
    class Hands(nn.Module):
        @nn.compact
        def __call__(self, x):
            return self.param("w", nn.initializers.ones, (8, 8)), None

    class Takes(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x @ Hands()(x)[0]

    mora_jax.register_layer(Hands, equation="...i,io->...o", kernel="w")
    text = message(linen.plan, Takes(), made_for(Takes(), X), None, X)
    assert "Hands_0/w: Hands.__call__ must return the product" in text
    with pytest.raises(ValueError, match="Hands: equation must have two operands"):
        mora_jax.register_layer(Hands, equation="io", kernel="w")


def test_a_model_without_kernels_that_are_known_says_what_it_has():
    model = Einsum("btd,df->btf", (8, 8), nnx.Rngs(0))
    for inputs in ((), (X,)):
        text = message(mora_nnx.plan, model, None, *inputs)
        assert text.startswith("targets: the default matches no path of a kernel")
        assert "w: it is not known how a layer uses it: teach its class Einsum" in text
    text = message(mora_nnx.plan, nnx.LayerNorm(8, rngs=nnx.Rngs(0)))
    assert text.endswith("no array has two or more axes")
    # Axes that only the user knows are not proven.
    config = MoRAConfig(targets="w", overrides={"w": {"axes": "io"}})
    plan = mora_nnx.plan(model, config, X)
    assert plan.unproven == (("w", "nothing is known of its class Einsum"),)


def test_plans_of_shapes_say_what_they_leave_out():
    params = {f"l{k}": {"kernel": SHAPE, "w": SHAPE} for k in range(3)}
    assert str(mora_jax.plan(params)).endswith("\nleft out:\n  l*/w (3): no target")
    packed = {"qvalue": jax.ShapeDtypeStruct((8, 8), jnp.int8), "scale": SHAPE}
    params = {"a": {"kernel": {"array": packed}}, "b": {"kernel": SHAPE}}
    with pytest.warns(LeftOutWarning, match="a/kernel/array/qvalue: quantized"):
        plan = mora_jax.plan(params)
    assert "a/kernel/array/scale: quantized" in str(plan)


@pytest.mark.filterwarnings("ignore:.VariableState. was removed:DeprecationWarning")
def test_what_qwix_quantized_is_named():
    qwix = pytest.importorskip("qwix")
    rule = qwix.QuantizationRule(module_path="layers_0", weight_qtype="int8")
    net, x = nn.Sequential([nn.Dense(16), nn.Dense(16)]), jnp.ones((2, 16))
    variables = made_for(net, x)
    model = qwix.quantize_model(net, qwix.PtqProvider([rule]))
    like = jax.eval_shape(model.init, KEY, x)["params"]
    params = qwix.quantize_params(variables["params"], like)
    of_model = (linen.plan, model, {"params": params}, None, x)
    for call, *args in (of_model, (mora_jax.plan, params)):
        with pytest.warns(LeftOutWarning, match="layers_0/kernel/array/qvalue: quanti"):
            plan = call(*args)
        assert list(plan) == ["layers_1/kernel"]


# --- Patterns that match nothing ---


def test_a_pattern_may_match_biases_beside_kernels():
    """Of two axes or one: what is never multiplied is no kernel."""
    config = MoRAConfig(targets=".*(heads|mlp).*")
    assert sorted(mora_nnx.plan(GPT(), config, IDS)) == [
        f"blocks/{k}/{layer}/kernel" for k in range(2) for layer in ("heads", "mlp")
    ]
    assert len(mora_nnx.plan(GPT(), config)) == 4
    attention = nn.MultiHeadDotProductAttention(2)
    variables = made_for(attention, X)
    config = MoRAConfig(targets="(query|key).*", rank=2)
    assert len(linen.plan(attention, variables, config, X)) == 2


def test_layers_that_do_not_run_are_told_from_those_that_are_not_known():
    text = message(mora_nnx.plan, GPT(), MoRAConfig(targets="experts"), IDS)
    assert text.startswith("experts: it is not known") and "class GPT with" in text

    class Idle(nn.Module):
        @nn.compact
        def __call__(self, x, other=False):
            used, idle = nn.Dense(8, name="used"), nn.Dense(8, name="idle")
            return used(x) if not (other or self.is_initializing()) else idle(used(x))

    variables = made_for(Idle(), X)
    args = Idle(), variables, MoRAConfig(targets="idle/.*"), X
    text = message(linen.plan, *args)
    assert "the call that was traced does not use it" in text
    assert "register_layer" not in text
    assert len(linen.plan(*args, other=True)) == 1


def test_patterns_match_whole_paths():
    names = ("query", "key", "value")
    params = {f"layer_{k}": {n: {"kernel": SHAPE} for n in names} for k in range(2)}
    text = message(mora_jax.plan, params, MoRAConfig(targets="query"))
    assert "patterns match whole paths" in text
    text = message(mora_jax.plan, params, MoRAConfig(targets="qery"))
    assert "the nearest are 'layer_0/query/kernel'" in text


@pytest.mark.slow
def test_a_warning_is_given_once_at_the_users_line(tmp_path):
    """In a process without the type checks that pytest puts around functions."""
    program = tmp_path / "program.py"
    program.write_text(
        "import jax.numpy as jnp, mora_jax\n"
        "from flax import nnx\n"
        "class Own(nnx.Module):\n"
        "  def __init__(self):\n"
        "    self.w = nnx.Param(jnp.ones((8, 8)))\n"
        "    self.known = nnx.Linear(8, 8, rngs=nnx.Rngs(0))\n"
        "model = Own()\n"
        "mora_jax.nnx.wrap(model)\n"
    )
    command = [sys.executable, "-W", "always", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=ENV)
    assert done.stderr.count("LeftOutWarning") == 1
    assert f"{program}:8: LeftOutWarning: arrays that may multiply in" in done.stderr


class Weighted(nn.Module):
    """As transformers' FlaxConvWithWeightNorm, and tokens as Dinov2 has them."""

    @nn.compact
    def __call__(self, x):
        v = self.param("weight_v", nn.initializers.normal(1.0), (16, 16, 3))
        g = self.param("weight_g", nn.initializers.ones, (1, 1, 3))
        token = self.param("mask_token", nn.initializers.zeros, (1, 16))
        x = jnp.where(jnp.arange(8)[:, None] == 0, token, nn.Dense(16, name="fc")(x))
        kernel = (v / jnp.linalg.norm(v, axis=(0, 1)) * g).T
        numbers = ("NWC", "WIO", "NWC")
        return jax.lax.conv_general_dilated(
            x, kernel, (1,), "SAME", (1,), None, numbers
        )


def test_what_is_no_kernel_by_itself_says_so_and_no_more():
    model, x = Weighted(), jnp.ones((2, 8, 16))
    variables = model.init(KEY, x)
    plan = linen.plan(model, variables, None, x)  # without a warning
    assert {part.pattern: part.why for part in plan.left_out} == {
        "weight_v": "not multiplied with an input as it is",
        "weight_g": "a vector, such as a token or a row of scales",
        "mask_token": "a vector, such as a token or a row of scales",
    }
