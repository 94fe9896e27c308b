"""The modules of PEFT's files, with the config that they have there."""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from mora_jax._common.warnings import warn
from mora_jax._plan.spec import AdapterSpec
from mora_jax.io._files import CONFIG, TENSORS, AdapterFileError
from mora_jax.io._json import short
from mora_jax.io.peft._reference import REFERENCE_GROUPS

PREFIX = "base_model.model."
"""The beginning of the names of tensors in PEFT."""


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


def rows_looked_up(
    spec: AdapterSpec, module: str, a: np.ndarray, b: np.ndarray, here: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return A and B of an embedding for its kernel, or the other way round.

    A warning of heads that are tied to it ends with what happens to them `here`.
    """
    warn(
        f"{spec.name}: PEFT and servers adapt the lookup of {module}, and not a head "
        f"that is tied to it; {here}"
    )
    outputs_first = spec.axes.strip("s").startswith("o")
    return (b.T, a.T) if outputs_first else (a, b)


# --- Reading ---

Rules = dict[str, tuple[str, Callable[[Any], bool]]]
"""{setting: the rule for its values in words, and a check}."""


def _is_rank(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**31


def _is_number(value: Any) -> bool:
    # JSON from a file has no other numbers, but integers too large for a float.
    return type(value) in (int, float) and abs(value) < 2**99


def _are_by_name(values: Any, is_right: Callable[[Any], bool]) -> bool:
    # PEFT takes regular expressions; a stranger's may take forever to match.
    return isinstance(values, dict) and all(
        re.fullmatch(r"[\w.-]+", key) and is_right(v) for key, v in values.items()
    )


# Starts that change the base, to which such an adapter belongs and not to the model's.
_OF_ANOTHER_BASE = re.compile("pissa.*|olora|corda|loftq|lora_ga")

_RULES: Rules = {
    "peft_type": ("'LORA'", lambda v: v == "LORA"),
    "use_dora": ("false: DoRA is another method", lambda v: not v),
    "use_mora": ("true or false", lambda v: isinstance(v, bool)),
    "use_rslora": ("true or false", lambda v: isinstance(v, bool)),
    "r": ("a positive integer", _is_rank),
    "rank_pattern": (
        "names of modules with positive integers",
        lambda v: _are_by_name(v, _is_rank),
    ),
    "lora_alpha": ("a number", _is_number),
    "alpha_pattern": (
        "names of modules with numbers",
        lambda v: _are_by_name(v, _is_number),
    ),
    "lora_dropout": ("in [0, 1)", lambda v: _is_number(v) and 0 <= v < 1),
    "init_lora_weights": (
        "a start that leaves the base as it is; PEFT's save_pretrained with "
        "path_initial_model_for_weight_conversion makes a plain LoRA of another",
        lambda v: not (isinstance(v, str) and _OF_ANOTHER_BASE.fullmatch(v)),
    ),
}
_OF_REFERENCE: Rules = {
    "bias": ("'none'", lambda v: v == "none"),
    "mora_type": (
        "1, 2, 3, 4 or 6",
        lambda v: type(v) is int and v in (*REFERENCE_GROUPS, 6),
    ),
}
_METHODS = "lora_bias", "layer_replication", "trainable_token_indices", "arrow_config"
_METHODS += "target_parameters", "alora_invocation_tokens"
"""Settings of PEFT that make another method of LoRA, beside all called `use_*`."""

_DEFAULTS = {"use_mora": False, "use_rslora": False, "bias": "none"}
_DEFAULTS |= {"lora_dropout": 0.0, "rank_pattern": {}, "alpha_pattern": {}}


def checked(content: Any) -> dict[str, Any]:
    """Return a config with PEFT's defaults, if it is the reference's or a LoRA's."""
    if not isinstance(content, dict):
        raise AdapterFileError(f"{CONFIG} must be an object, got {short(content)}")
    config = _DEFAULTS | {key: v for key, v in content.items() if v is not None}
    others = *_METHODS, *(key for key in config if key.startswith("use_"))
    unset = "unset, since it is not known here", lambda v: not v
    rules = dict.fromkeys(others, unset) | _RULES
    if config["use_mora"] is True:
        rules |= _OF_REFERENCE
    for key, (rule, is_right) in rules.items():
        if not is_right(value := config.get(key)):
            raise AdapterFileError(
                f"{key} in {CONFIG} must be {rule}, got {short(value)}"
            )
    return config


_FACTOR = re.compile(
    re.escape(PREFIX) + r"(.+)\.lora_(embedding_)?([AB])(?(2)|\.weight)"
)


def modules_in(
    arrays: Mapping[str, np.ndarray], config: Mapping[str, Any]
) -> tuple[list[MatrixPair], list[str]]:
    """Return the modules that a file adapts, and the names of all other tensors."""
    found: dict[tuple[str, bool], dict[str, np.ndarray]] = defaultdict(dict)
    modules, others = [], []
    for key, array in arrays.items():
        if named := _FACTOR.fullmatch(key):
            found[named[1], bool(named[2])][named[3]] = array
        elif key.startswith(PREFIX) and ".lora_" not in key:
            others.append(key)
        else:
            raise AdapterFileError(
                f"tensors in {TENSORS} must be like {PREFIX}*.lora_A.weight, "
                f"got {short(key)}"
            )
    for (name, table), two in found.items():
        if len(two) < 2 or any(array.ndim != 2 for array in two.values()):
            raise AdapterFileError(
                f"{TENSORS} must have lora_A and lora_B of {name}, two matrices"
            )
        rank = _own(config, "r", "rank_pattern", name)
        alpha = _own(config, "lora_alpha", "alpha_pattern", name)
        factor = alpha / (math.sqrt(rank) if config["use_rslora"] else rank)
        a, b = two["A"].T, two["B"].T
        modules.append(MatrixPair(name, table, a, b, rank, factor))
    return modules, others


def _own(config: Mapping[str, Any], setting: str, pattern: str, module: str) -> Any:
    """Return what a module has: by names or, as in PEFT, by ends of names."""
    own = config[pattern]
    ends = (key for key in own if f".{module}".endswith(f".{key}"))
    return own.get(next(ends, ""), config[setting])
