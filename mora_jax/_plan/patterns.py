"""Names of settings here and elsewhere, and patterns of paths."""

import re
from collections.abc import Iterable
from typing import Any

from mora_jax._common.suggestions import did_you_mean

PATTERNS = "regular expressions that match whole paths"
NAMES_ELSEWHERE = {
    "r": "rank",
    "lora_rank": "rank",
    "lora_alpha": "alpha, which multiplies the delta itself, as LoRA's lora_alpha / r",
    "lora_dropout": "dropout",
    "target_modules": f"targets, {PATTERNS}",
    "exclude_modules": f"exclude, {PATTERNS}",
    "modules_to_save": f"train, {PATTERNS}",
    "rank_pattern": "overrides, as in {'.*/q_proj/kernel': {'rank': 16}}",
    "alpha_pattern": "overrides, as in {'.*/q_proj/kernel': {'alpha': 2.0}}",
    "init_lora_weights": "init, 'zeros' or 'gaussian'",
}
"""{name of a setting in other libraries: its name here}."""


def setting_hint(name: str, known: Iterable[str]) -> str:
    """The name here of an unknown setting, as the end of a message."""
    if name in NAMES_ELSEWHERE:
        return f": here that is {NAMES_ELSEWHERE[name]}"
    return did_you_mean(name, known)


def patterns_of(field: str, patterns: Any) -> tuple[str, ...]:
    """A regular expression, or several of them, as a tuple."""
    if isinstance(patterns, str):
        patterns = (patterns,)
    if not isinstance(patterns, Iterable):
        hint = "; leave it out for the default" if patterns is None else ""
        raise TypeError(f"{field} must be regular expressions, got {patterns!r}{hint}")
    patterns = tuple(patterns)
    for pattern in patterns:
        check_pattern(field, pattern)
    return patterns


def check_pattern(field: str, pattern: object) -> None:
    """Raise unless `pattern` is a regular expression; `field` is for the message."""
    if not isinstance(pattern, str):
        raise TypeError(f"{field} must hold regular expressions, got {pattern!r}")
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"{field} holds {pattern!r}, which is not a regular expression: {error}"
        ) from error
