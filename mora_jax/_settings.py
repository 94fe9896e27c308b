"""How settings are called, here and elsewhere, and how patterns are read."""

import difflib
import re
from collections.abc import Iterable
from typing import Any

PATTERNS = "regular expressions that match whole paths"
NAMES_ELSEWHERE = {
    "r": "rank",
    "lora_rank": "rank",
    "lora_alpha": "alpha, which multiplies the update itself, as LoRA's lora_alpha / r",
    "lora_dropout": "dropout",
    "target_modules": f"targets, {PATTERNS}",
    "exclude_modules": f"exclude, {PATTERNS}",
    "rank_pattern": "overrides, as in {'.*/q_proj/kernel': {'rank': 16}}",
    "alpha_pattern": "overrides, as in {'.*/q_proj/kernel': {'alpha': 2.0}}",
    "init_lora_weights": "init, 'zeros' or 'gaussian'",
}
"""What other libraries call a setting, and what it is called here."""


def meant(name: str, known: Iterable[str]) -> str:
    """What a setting that does not exist was meant to be, as the end of a message."""
    if name in NAMES_ELSEWHERE:
        return f": here that is {NAMES_ELSEWHERE[name]}"
    (close,) = difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)
    return f"; the nearest is {close!r}"


def patterns_of(field: str, patterns: Any) -> tuple[str, ...]:
    """One regular expression or several, as a tuple."""
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
            f"{field} holds {pattern!r}, which is no regular expression: {error}"
        ) from error
