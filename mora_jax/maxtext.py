"""MoRA in MaxText 0.2.5: its own trainer and checkpoints, with M's in its models.

MaxText makes models, and writes checkpoints, by functions that no setting chooses.
Importing this replaces the latter, and `adapt` the former.
"""

# pyright: reportMissingImports=false

import functools
import inspect
import string
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from maxtext.common import checkpointing
from maxtext.layers import embeddings, linears, moe, normalizations
from maxtext.utils import lora_utils, model_creation_utils

from mora_jax._flax.layer_rules import register_layer
from mora_jax._plan.settings import MoRAConfig, check_config
from mora_jax._plan.spec import SUFFIX
from mora_jax.nnx import plan, wrap
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


def adapt(config: MoRAConfig | None = None) -> None:
    """Give adapters to the models that MaxText makes from now on with LoRA enabled.

    Call it before MaxText's own `train`, with `lora.enable_lora=True` in MaxText's
    config, whose other settings of LoRA are not looked at.

    Args:
      config: As in `mora_jax.nnx.plan`, without `train` and `dropout`.

    Raises:
      TypeError, ValueError: `config` is not such a config.
    """
    config = check_config(config, "adapt(config)")
    if config.train or config.dropout:
        raise ValueError(f"train and dropout must be left out, got {config}")
    plans: dict[Any, Any] = {}

    @_replaces(model_creation_utils, "create_model", "config", "mesh")
    def _(own: Any, settings: Any, *args: Any, **kwargs: Any) -> Any:
        model, rngs = own(settings, *args, **kwargs), kwargs.get("rngs")
        if not settings.lora.enable_lora or rngs is None:  # of Linen
            return model
        if settings not in plans:
            shape = settings.micro_batch_size_to_train_on, settings.max_target_length
            ids = jax.ShapeDtypeStruct(shape, jnp.int32)
            targets: Any = {"decoder_target_tokens": ids, "decoder_target_mask": ids}
            plans[settings] = plan(model, config, ids, ids, ids, **targets)
        return wrap(model, plans[settings], rngs=rngs)

    @_replaces(lora_utils, "apply_lora_to_model", "model")
    def _(_own: Any, model: Any, *_: Any) -> Any:
        return model  # it has been adapted


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
    if restored and config and config.lora.enable_lora and config.load_parameters_path:
        _, base = own(None, *args, **kwargs)  # or it would go on from a new one
    return restored, base
