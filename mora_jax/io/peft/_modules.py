"""The modules of PEFT's files, with the config that they have there."""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from mora_jax._common.messages import warn
from mora_jax.io._files import CONFIG, TENSORS, AdapterFileError
from mora_jax.io._json import short
from mora_jax.io._tensors import Arrays
from mora_jax.operators.sharing import REFERENCE_GROUPS

PREFIX = "base_model.model."  # so begin the names of tensors in PEFT
Config = Mapping[str, Any]  # as `checked` returns it


class MatrixPair(NamedTuple):
    """PEFT's two matrices of a module, A (in, r) and B (r, out).

    The delta is `factor` A B, and the reference has M for both. A `table` is an
    embedding, and others have weights with the `axes` "oi" (Linear) or "io" (Conv1D).
    """

    module: str
    table: bool
    a: np.ndarray
    b: np.ndarray
    rank: int
    factor: float
    axes: str = "oi"


def turned(pair: MatrixPair, kernel: str, axes: str, here: str) -> MatrixPair:
    """A module for its kernel or the other way round: A and B of a table may turn."""
    # A warning of heads that are tied to a table ends with what happens to them `here`.
    if not pair.table:
        return pair
    lookup = f"the lookup of {pair.module}, and not a head that is tied to it"
    warn(f"{kernel}: PEFT and servers adapt {lookup}; {here}")
    out_first = axes.strip("s").startswith("o")
    return pair._replace(a=pair.b.T, b=pair.a.T) if out_first else pair


Rule = tuple[str, Callable[[Any], bool]]  # for values: in words, and as a check


def _by_name(words: str, fits: Callable[[Any], bool]) -> Rule:
    # PEFT takes regular expressions; a stranger's may take forever to match.
    is_name = re.compile(r"[\w.-]+").fullmatch
    return (
        f"names of modules, each with {words}",
        lambda v: isinstance(v, dict) and all(is_name(k) and fits(v[k]) for k in v),
    )


_BOOL: Rule = "true or false", lambda v: isinstance(v, bool)
_UNSET: Rule = "unset, since it is not known here", lambda v: not v
_RANK: Rule = "a positive integer", lambda v: type(v) is int and 0 < v < 2**31
# JSON may hold integers that are too large for a float.
_NUMBER: Rule = "a number", lambda v: type(v) in (int, float) and abs(v) < 2**99
_FACTOR: Rule = "a number other than 0", lambda v: _NUMBER[1](v) and v != 0

# Starts that change the base, to which such an adapter belongs and not to the model's.
_OF_ANOTHER_BASE = re.compile("pissa.*|olora|corda|loftq|lora_ga")

_BIASES = "none", "all", "lora_only"
_RULES: dict[str, Rule] = {
    "peft_type": ("'LORA'", lambda v: v == "LORA"),
    "use_dora": ("false: DoRA is another method", lambda v: not v),
    "use_mora": _BOOL,
    "use_rslora": _BOOL,
    "r": _RANK,
    "rank_pattern": _by_name(*_RANK),
    "lora_alpha": _FACTOR,
    "alpha_pattern": _by_name(*_FACTOR),
    "bias": (f"one of {_BIASES}", _BIASES.__contains__),
    "lora_dropout": ("in [0, 1)", lambda v: _NUMBER[1](v) and 0 <= v < 1),
    "init_lora_weights": (
        "a start that leaves the base as it is; PEFT's save_pretrained with "
        "path_initial_model_for_weight_conversion makes a plain LoRA of another",
        lambda v: not (isinstance(v, str) and _OF_ANOTHER_BASE.fullmatch(v)),
    ),
}
_TYPES = *REFERENCE_GROUPS, 6
_REFERENCE_RULES: dict[str, Rule] = {
    "bias": ("'none'", lambda v: v == "none"),
    "mora_type": ("1, 2, 3, 4 or 6", lambda v: type(v) is int and v in _TYPES),
    "lora_alpha": _NUMBER,  # which it does not use
    "alpha_pattern": _by_name(*_NUMBER),
}
_METHODS = "lora_bias", "layer_replication", "trainable_token_indices", "arrow_config"
_METHODS += "target_parameters", "alora_invocation_tokens"
"""Settings of PEFT that make another method of LoRA, beside all called `use_*`."""

_DEFAULTS = {"use_mora": False, "use_rslora": False, "bias": "none"}
_DEFAULTS |= {"lora_dropout": 0.0, "rank_pattern": {}, "alpha_pattern": {}}


def checked(content: Any) -> dict[str, Any]:
    """A config with PEFT's defaults, if it is the reference's or a LoRA's."""
    if not isinstance(content, dict):
        raise AdapterFileError(f"{CONFIG} must be an object, got {short(content)}")
    config = _DEFAULTS | {key: v for key, v in content.items() if v is not None}
    others = *_METHODS, *(key for key in config if key.startswith("use_"))
    rules = dict.fromkeys(others, _UNSET) | _RULES
    if config["use_mora"] is True:
        rules |= _REFERENCE_RULES
    for key, (words, is_right) in rules.items():
        if not is_right(value := config.get(key)):
            rule = f"{key} in {CONFIG} must be {words}"
            raise AdapterFileError(f"{rule}, got {short(value)}")
    return config


_LORA = re.compile(re.escape(PREFIX) + r"(.+)\.lora_(embedding_)?([AB])(?(2)|\.weight)")


def modules_in(arrays: Arrays, config: Config) -> tuple[list[MatrixPair], list[str]]:
    """The modules that a file adapts, and the names of all other tensors."""
    found: dict[tuple[str, bool], dict[str, np.ndarray]] = defaultdict(dict)
    modules, others = [], []
    for key, array in arrays.items():
        if named := _LORA.fullmatch(key):
            found[named[1], bool(named[2])][named[3]] = array
        elif key.startswith(PREFIX) and ".lora_" not in key:
            others.append(key)
        else:
            rule = f"tensors in {TENSORS} must be like {PREFIX}*.lora_A"
            raise AdapterFileError(f"{rule}, got {short(key)}")
    for (name, table), two in found.items():
        if len(two) < 2 or any(array.ndim != 2 for array in two.values()):
            rule = f"{TENSORS} must have lora_A and lora_B of {name}"
            raise AdapterFileError(f"{rule}, two matrices")
        rank = _own(config, "r", "rank_pattern", name)
        alpha = _own(config, "lora_alpha", "alpha_pattern", name)
        factor = alpha / (math.sqrt(rank) if config["use_rslora"] else rank)
        modules.append(MatrixPair(name, table, two["A"].T, two["B"].T, rank, factor))
    return modules, others


def _own(config: Config, setting: str, pattern: str, module: str) -> Any:
    """The setting of a module: by its name or, as in PEFT, by an end of that."""
    own = config[pattern]
    ends = (key for key in own if f".{module}".endswith(f".{key}"))
    return own.get(next(ends, ""), config[setting])
