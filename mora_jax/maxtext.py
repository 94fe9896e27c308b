"""MoRA in MaxText 0.2.5: its own trainer and checkpoints, with M's in its models.

No setting of MaxText chooses the functions that make models, begin a run and write its
checkpoints. `adapt` replaces the first of them, and importing this module the others.
"""

# pyright: reportMissingImports=false

import dataclasses
import functools
import inspect
import re
import string
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.core.spmd import logical_axis_rules
from flax.traverse_util import flatten_dict, unflatten_dict
from maxtext.common import checkpointing
from maxtext.layers import embeddings, linears, moe, normalizations
from maxtext.utils import (
    lora_utils,
    maxtext_utils,
    model_creation_utils,
    train_utils,
)

from mora_jax._common.messages import patterns, warn
from mora_jax._flax.layer_rules import register_layer
from mora_jax._plan.settings import HEAD, MoRAConfig, check_config
from mora_jax._plan.spec import SUFFIX, Specs
from mora_jax._tree.plan import Plan
from mora_jax.io._files import Location, as_path, together
from mora_jax.io.native import _run
from mora_jax.nnx import MoRAParam, plan, plan_of, wrap
from mora_jax.products import Folded, Lookup


def _replaces(module: Any, name: str, *first: str) -> Callable[[Any], None]:
    """Replace a function of MaxText by one of (MaxText's own, *its arguments)."""
    own = inspect.unwrap(getattr(module, name, _replaces))
    if tuple(inspect.signature(own).parameters)[: len(first)] != first:
        must = f"{module.__name__}.{name} must be MaxText 0.2.5's, of {first}"
        raise ImportError(f"{must}: pip install --no-deps maxtext==0.2.5")
    wrapped = functools.wraps(own)
    return lambda new: setattr(module, name, wrapped(functools.partial(new, own)))


def _equation(layer: Any, *_: Any, **__: Any) -> str:
    ins, outs = len(layer.axis), len(layer.out_features_shape)
    letters = string.ascii_lowercase[: ins + outs]
    return f"...{letters[:ins]},{letters}->...{letters[ins:]}"


register_layer(linears.DenseGeneral, equation=_equation)
register_layer(moe.GateLogit, equation=Folded("io", False))
register_layer(embeddings.Embed, equation=Lookup(), kernel="embedding")
register_layer(normalizations.RMSNorm, equation=Folded("o", False), kernel="scale")
for _name in ("wi_0", "wi_1", "wi", "wo"):
    register_layer(moe.RoutedMoE, equation=Folded("sio"), kernel=_name)


@dataclasses.dataclass(frozen=True)
class _Adaptation:
    """The arguments of `adapt`, and its plans by the settings of MaxText."""

    config: MoRAConfig
    random_base: bool
    plans: dict[Any, Plan]


_adaptation: _Adaptation | None = None  # None before `adapt` and after `unadapt`


def adapt(config: MoRAConfig | None = None, *, random_base: bool = False) -> None:
    """Give adapters to the models that MaxText makes from now on with LoRA enabled.

    Call it before MaxText's own `train`, with `lora.enable_lora=True` in MaxText's
    config, whose other settings of LoRA are not looked at. By default heads
    (`logits_dense`), routers and embeddings get no adapter; `targets` may name them.

    A run writes its settings and digests of its base into `mora_jax_run.json`, beside
    its checkpoints. When it goes on from one, the two are compared.

    MaxText's `train` then raises:

    - ValueError if `lora.enable_lora` is not set, so that all of the base would train;
    - ValueError if `load_parameters_path` is empty, without `random_base`;
    - io.AdapterFileError if a checkpoint to go on from had other settings, or another
      base. The message says which, and how to mend it.

    Args:
      config: As in `mora_jax.nnx.plan`, without `train` and `dropout`.
      random_base: True to train beside a base that MaxText makes at random, for trials.

    Raises:
      TypeError, ValueError: `config` is not such a config.
    """
    global _adaptation
    config = check_config(config, "adapt(config)")
    if config.train or config.dropout:
        raise ValueError(f"train and dropout must be left out, got {config}")
    adaptation = _Adaptation(config=config, random_base=random_base, plans={})

    @_replaces(model_creation_utils, "create_model", "config", "mesh")
    def _(own: Any, settings: Any, *args: Any, **kwargs: Any) -> Any:
        model = own(settings, *args, **kwargs)
        rngs = kwargs.get("rngs")
        if not settings.lora.enable_lora or rngs is None:  # of Linen
            return model
        if settings not in adaptation.plans:
            adaptation.plans[settings] = _planned(model, config, settings)
        return wrap(model, adaptation.plans[settings], rngs=rngs)

    @_replaces(lora_utils, "apply_lora_to_model", "model")
    def _(_own: Any, model: Any, *_: Any) -> Any:
        return model  # it has been adapted

    _adaptation = adaptation


def unadapt() -> None:
    """Let MaxText make its models as it comes, as before `adapt`.

    A process that trained adapters needs it before it trains all of a model.
    """
    global _adaptation
    _adaptation = None
    for module, name in (
        (model_creation_utils, "create_model"),
        (lora_utils, "apply_lora_to_model"),
    ):
        setattr(module, name, inspect.unwrap(getattr(module, name)))


def _planned(model: Any, config: MoRAConfig, settings: Any) -> Plan:
    """The plan of a model, by the call that MaxText trains."""
    shape = settings.micro_batch_size_to_train_on, settings.max_target_length
    ids = jax.ShapeDtypeStruct(shape, jnp.int32)
    targets: Any = {"decoder_target_tokens": ids, "decoder_target_mask": ids}
    made = plan(model, config, ids, ids, ids, **targets)
    heads = [name for name in made if re.fullmatch(HEAD, name, re.IGNORECASE)]
    heads += [name for name in made if name.endswith("/embedding")]
    if heads:
        warn(
            f"targets ask for adapters on a head or an embedding, {patterns(heads)}, "
            "which the default leaves out: exclude them if that is not meant"
        )
    return made


# --- The beginning of a run ---


@_replaces(train_utils, "setup_train_loop", "config")
def _(own: Any, config: Any, *args: Any, **kwargs: Any) -> Any:
    enabled = config.lora.enable_lora
    if enabled and _adaptation is None:
        raise ValueError(
            "lora.enable_lora=True needs adapters in the model, and MaxText's "
            "pre-training makes none, so that it would train nothing: call "
            "mora_jax.maxtext.adapt(mora_jax.MoRAConfig(rank=8)) before it"
        )
    if _adaptation is not None and not enabled:
        raise ValueError(
            "lora.enable_lora must be True after mora_jax.maxtext.adapt, got False, so "
            "that MaxText would train all of the base: set lora.enable_lora=True, or "
            "call mora_jax.maxtext.unadapt() if that is meant"
        )
    if _adaptation is not None and not (_adaptation.random_base or _names_base(config)):
        raise ValueError(
            "load_parameters_path must name the checkpoint of a base, got "
            f"{config.load_parameters_path!r}, so that MaxText would train M's beside "
            "random weights (checkpoints of M's lack the base): set "
            "load_parameters_path=..., or call mora_jax.maxtext.adapt(config, "
            "random_base=True) for a trial"
        )
    return own(config, *args, **kwargs)


def _names_base(config: Any) -> bool:
    """True if MaxText's settings name a checkpoint that it reads a base from."""
    # With LoRA enabled it takes nothing but M's from a full state, in its own layout.
    if config.source_checkpoint_layout == "safetensors_dynamic":
        return bool(config.load_parameters_path or config.load_full_state_path)
    return bool(config.load_parameters_path)


@_replaces(
    maxtext_utils,
    "setup_initial_state",
    *("data_iterator", "config", "mesh", "checkpoint_manager", "init_state_fn"),
)
def _(
    own: Any,
    data_iterator: Any,
    config: Any,
    mesh: Any,
    checkpoint_manager: Any,
    init_state_fn: Callable[[], Any],
    is_training: bool = True,
) -> Any:
    begin = functools.partial(
        own, data_iterator, config, mesh, checkpoint_manager, init_state_fn, is_training
    )
    adapted = _adaptation is not None and config.lora.enable_lora and is_training
    if checkpoint_manager is None or not adapted:
        return begin()
    directory = as_path("checkpoint_dir", checkpoint_manager.directory)
    goes_on = checkpointing.latest_step(checkpoint_manager) is not None
    with logical_axis_rules(config.logical_axis_rules):
        specs = plan_of(nnx.eval_shape(init_state_fn).model).parts
    # MaxText's error about another rank would speak of handlers.
    with together("resuming a run") as alike:
        alike["the adapters"] = _run.run_text(specs, {})
        stored = _stored_run(directory, specs) if goes_on else None
    begun = begin()
    base = nnx.filter_state(begun[0]["model"], nnx.All(nnx.Param, nnx.Not(MoRAParam)))
    digests = _run.base_digests(specs, nnx.to_pure_dict(base))
    with together("resuming a run") as alike:
        alike["the base"] = digests
        if jax.process_index() == 0:  # which writes the checkpoints, too
            if stored is not None:
                remedy = "set load_parameters_path to the base of that run"
                _run.check_bases(stored, digests, directory, remedy)
            _run.write_run(directory, specs, digests)
    return begun


def _stored_run(directory: Location, specs: Specs) -> Any:
    """The record of the run that goes on, if its settings are the same as here."""
    if jax.process_index() != 0:
        return None
    stored = _run.read_run(directory)
    if stored is None:
        _run.warn_of_no_record(directory)
    else:
        _run.check_settings(stored, specs, directory)
    return stored


# --- Checkpoints ---


def _is_m(path: Any) -> bool:
    return str(path[-1]).endswith(SUFFIX)


def _filtered(tree: Any, keeps: Callable[[Any], bool]) -> Any:
    leaves = flatten_dict(tree)
    return unflatten_dict({path: leaves[path] for path in leaves if keeps(path)})


@_replaces(checkpointing, "_filter_lora_trainable_state", "state")
def _(_own: Any, state: Any) -> Any:
    if not _filtered(state, _is_m):
        remedy = "call mora_jax.maxtext.adapt before MaxText makes the model"
        raise ValueError(f"a checkpoint must have M's, got a state without: {remedy}")
    # MaxText's own drops all moments of a chain of optimizers, since it is a list.
    return _filtered(state, lambda p: p[0] in ("step", "opt_state") or _is_m(p))


@_replaces(checkpointing, "_raise_on_weight_mismatch", "want", "have", "config")
def _(own: Any, want: Any, have: Any, config: Any = None) -> None:
    if not config:  # a base, which lacks M's
        want = _filtered(want, lambda path: not _is_m(path))
    own(want, have, config)


@_replaces(checkpointing, "load_state_if_possible", "checkpoint_manager")
def _(own: Any, manager: Any, *args: Any, **kwargs: Any) -> Any:
    restored, base = own(manager, *args, **kwargs)
    config = kwargs.get("maxtext_config")
    if restored and config and config.lora.enable_lora and _names_base(config):
        _, base = own(None, *args, **kwargs)  # or it would go on from a new one
    return restored, base
