"""The matrices of PEFT's modules as adapters of kernels."""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from mora_jax._common.checks import check_finite
from mora_jax._common.types import Shape
from mora_jax._common.warnings import warn
from mora_jax._plan.settings import AdapterSettings
from mora_jax._plan.spec import AdapterSpec
from mora_jax.io._files import CONFIG, AdapterFileError
from mora_jax.io._json import short
from mora_jax.io.peft._reference import REFERENCE_GROUPS, reference_operator
from mora_jax.operators import LowRank

PREFIX = "base_model.model."
"""The beginning of the names of tensors in PEFT."""


class Factors(NamedTuple):
    """A module's name, A (in, r) and B (r, out), and True if it is an embedding."""

    module: str
    a: np.ndarray
    b: np.ndarray
    table: bool


ByIndex = dict[Shape, Factors]
"""{index in a kernel's stack, or in its first output axis: the module there}."""

Rule = tuple[str, Callable[[Any], bool]]
"""The rule for the values of a setting, in words, and a check."""


def _is_rank(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**31


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_pattern(is_value: Callable[[Any], bool]) -> Callable[[Any], bool]:
    # PEFT takes regular expressions; a stranger's may take forever to match.
    return lambda value: (
        isinstance(value, dict)
        and all(
            re.fullmatch(r"[\w.-]+", key) and is_value(own)
            for key, own in value.items()
        )
    )


def _is_unset(value: Any) -> bool:
    return not value


_RULES: dict[str, Rule] = {
    "peft_type": ("'LORA'", lambda value: value == "LORA"),
    "use_dora": ("false: DoRA is another method", _is_unset),
    "r": ("a positive integer", _is_rank),
    "rank_pattern": ("names of modules with positive integers", _is_pattern(_is_rank)),
    "lora_dropout": ("in [0, 1)", lambda v: _is_number(v) and 0 <= v < 1),
}
_DEFAULTS = {"bias": "none", "lora_dropout": 0.0, "rank_pattern": {}}


class _Reader:
    """A config, checked by the rules of its kind of adapter."""

    rules: Mapping[str, Rule] = {}
    defaults: Mapping[str, Any] = {}

    def __init__(self, content: Mapping[str, Any]) -> None:
        defaults = {**_DEFAULTS, **self.defaults}
        given = {key: v for key, v in content.items() if v is not None}
        self.config = defaults | given
        for key, (rule, is_right) in {**_RULES, **self.rules}.items():
            if not is_right(value := self.config.get(key)):
                raise AdapterFileError(
                    f"{key} in {CONFIG} must be {rule}, got {short(value)}"
                )

    def setting(self, module: str, setting: str, pattern: str) -> Any:
        """Return what a module has: by names or, as in PEFT, by ends of names."""
        own = self.config[pattern]
        ends = (key for key in own if f".{module}".endswith(f".{key}"))
        return own.get(next(ends, ""), self.config[setting])


def _by_place(spec: AdapterSpec, modules: ByIndex, parts: int) -> list[list[Factors]]:
    """Return the modules of each layer of a stack, `parts` of them."""
    places = {
        index: [(*index, part) for part in range(parts)] if parts > 1 else [index]
        for index in np.ndindex(spec.stack_shape)
    }
    if missing := {i for own in places.values() for i in own} ^ set(modules):
        stack = spec.stack_shape
        raise ValueError(f"the kernel is stacked {stack}, and does not fit {missing}")
    return [[modules[place] for place in own] for own in places.values()]


class Reference(_Reader):
    """Adapters of the paper's authors' code, whose M is stored for A and for B."""

    rules = {
        "bias": ("'none'", lambda value: value == "none"),
        "mora_type": (
            "1, 2, 3, 4 or 6",
            lambda v: type(v) is int and v in (*REFERENCE_GROUPS, 6),
        ),
    }

    def adapter(
        self, spec: AdapterSpec, modules: ByIndex
    ) -> tuple[AdapterSpec, np.ndarray]:
        """Return the spec of a kernel's adapter, and its M, (*stack, q, q)."""
        widths, operators, ms = (spec.in_features, spec.out_features), set(), []
        for (factors,) in _by_place(spec, modules, 1):
            module, m = factors.module, factors.a
            # The layers are LoRA's, and M is transposed.
            if not np.array_equal(m, factors.b):
                raise ValueError(f"lora_A and lora_B of {module} must be the same M")
            rank = self.setting(module, "r", "rank_pattern")
            operator = reference_operator(self.config["mora_type"], *widths, rank)
            operators.add(operator)
            check_finite(m, module)
            if m.shape != operator.m_shape:
                raise ValueError(
                    f"{module} must be of shape {operator.m_shape} for a kernel of "
                    f"{widths[0]} -> {widths[1]} features, got {m.shape}"
                )
            ms.append(m)
        if len(operators) > 1:  # the M's are to be one array
            raise ValueError("a stacked kernel must have one rank in all its layers")
        return _planned(spec, operators.pop(), ms, self.config["lora_dropout"])


# Starts that change the base, to which such an adapter belongs and not to the model's.
_OF_ANOTHER_BASE = re.compile("pissa.*|olora|corda|loftq|lora_ga")


class LoRA(_Reader):
    """A plain LoRA."""

    defaults = {"alpha_pattern": {}, "use_rslora": False, "init_lora_weights": True}
    rules = {
        "lora_alpha": ("a number", _is_number),
        "alpha_pattern": ("names of modules with numbers", _is_pattern(_is_number)),
        "init_lora_weights": (
            "a start that leaves the base as it is; PEFT's save_pretrained with "
            "path_initial_model_for_weight_conversion makes a plain LoRA of another",
            lambda v: not (isinstance(v, str) and _OF_ANOTHER_BASE.fullmatch(v)),
        ),
    }

    def __init__(self, content: Mapping[str, Any]) -> None:
        super().__init__(content)
        # PEFT's other methods come as settings: each of them computes something else.
        others = {"lora_bias", "layer_replication", "trainable_token_indices"}
        others |= {"target_parameters", "alora_invocation_tokens", "arrow_config"}
        others |= {key for key in self.config if key.startswith("use_")}
        for key in sorted(others - {"use_rslora"}):
            if self.config.get(key):
                raise AdapterFileError(f"{key} in {CONFIG} is not known here")

    def adapter(
        self, spec: AdapterSpec, modules: ByIndex
    ) -> tuple[AdapterSpec, np.ndarray]:
        """Return the spec of a kernel's adapter, and its factors in one array."""
        # A kernel may be several modules, of which each has some of the outputs.
        parts = len({index[len(spec.stack_shape) :] for index in modules})
        layers = _by_place(spec, modules, parts)
        alpha = self._alpha(layers[0][0])
        rank = max(sum(f.b.shape[0] for f in layer) for layer in layers)
        ms = [self._joined(spec, layer, alpha, rank) for layer in layers]
        operator = LowRank(spec.in_features, spec.out_features, rank)
        return _planned(spec, operator, ms, self.config["lora_dropout"], alpha)

    def _alpha(self, factors: Factors) -> float:
        rank = self.setting(factors.module, "r", "rank_pattern")
        alpha = self.setting(factors.module, "lora_alpha", "alpha_pattern")
        return alpha / (math.sqrt(rank) if self.config["use_rslora"] else rank)

    def _joined(
        self, spec: AdapterSpec, layer: list[Factors], alpha: float, rank: int
    ) -> np.ndarray:
        """Return A above the transpose of B, of all modules of one layer's kernel."""
        ins, outs = spec.in_features, spec.out_features // len(layer)
        dtype = np.result_type(*(array for f in layer for array in (f.a, f.b)))
        m, column = np.zeros((ins + spec.out_features, rank), dtype), 0
        for k, factors in enumerate(layer):
            module, a, b, table = factors
            if table:
                _warn_of_table(spec, module)
                if spec.axes.endswith("oi"):  # the rows of the table are its outputs
                    a, b = b.T, a.T
            asked = self.setting(module, "r", "rank_pattern")
            if (a.shape, b.shape) != ((ins, asked), (asked, outs)):
                raise ValueError(
                    f"lora_A and lora_B of {module} must be of shape {(asked, ins)} "
                    f"and {(outs, asked)} for a kernel of {ins} -> {outs} features, "
                    f"got {a.T.shape} and {b.T.shape}"
                )
            check_finite(a, module)
            check_finite(b, module)
            columns = slice(column, column + asked)
            m[:ins, columns], column = a, column + asked
            # All layers and parts have one alpha here.
            own = self._alpha(factors)
            rows = slice(ins + k * outs, ins + (k + 1) * outs)
            m[rows, columns] = (b if own == alpha else b * (own / alpha)).T
        return m


def _planned(
    spec: AdapterSpec,
    operator: Any,
    ms: list[np.ndarray],
    dropout: float,
    alpha: float = 1.0,
) -> tuple[AdapterSpec, np.ndarray]:
    m = np.stack(ms).reshape(*spec.stack_shape, *ms[0].shape)
    settings = AdapterSettings(alpha=alpha, dropout=dropout, param_dtype=m.dtype)
    return dataclasses.replace(spec, operator=operator, **vars(settings)), m


def _warn_of_table(spec: AdapterSpec, module: str) -> None:
    warn(
        f"{spec.name}: PEFT adapts the lookup of {module}, and not a head that is tied "
        "to it; here both change"
    )
