"""Rules of a provider: settings for the modules that match a pattern."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import qwix

from mora_jax._common.checks import patterns_of
from mora_jax._plan.settings import KernelConfig, MoRAConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoRARule(qwix.QuantizationRule, KernelConfig):
    """`qwix.QuantizationRule` with adapters for the modules that it matches.

    Their kernels have settings of `mora_jax.MoRAConfig` as well: rank, operator, alpha,
    scale, square_rank, multiple_of, init, dropout, param_dtype, seed.

    Example::

      >>> import mora_jax
      >>> rule = mora_jax.qwix.MoRARule(module_path=".*mlp", rank=4, weight_qtype="nf4")
      >>> rule.rank, rule.operator
      (4, 'auto')
    """

    # qwix computes the products, so a rule lacks this setting.
    execution: ClassVar[str] = "auto"  # type: ignore[misc]

    def __post_init__(self) -> None:
        super().__post_init__()
        MoRAConfig(alpha=self.alpha)  # warns of an alpha as LoRA has it
        check_rule(self)


def check_rules(rules: Any) -> None:
    """Raise unless a provider can go by these rules."""
    is_list = isinstance(rules, Sequence)
    if not is_list or not all(isinstance(r, qwix.QuantizationRule) for r in rules):
        rule = (
            "rules must be a list of qwix.QuantizationRules, as in MoRAProvider([rule])"
        )
        raise TypeError(f"{rule}, got {rules!r:.80}")
    for rule in rules:
        check_rule(rule)
    if not any(isinstance(rule, MoRARule) for rule in rules):
        raise ValueError(f"rules must hold a MoRARule, got {rules}")


def check_rule(rule: qwix.QuantizationRule) -> None:
    """Raise unless qwix understands the pattern of a rule."""
    pattern: Any = rule.module_path
    if not isinstance(pattern, str):
        raise TypeError(
            f"module_path must be a regular expression, got {pattern!r}; for several "
            "modules write '.*(q_proj|v_proj)'"
        )
    patterns_of("module_path", pattern)
