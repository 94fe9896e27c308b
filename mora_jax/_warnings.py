"""What users are warned of, and where the warning points."""

import sys
import warnings
from pathlib import Path

_HERE = str(Path(__file__).parent)


class MoRAWarning(UserWarning):
    """Something that was asked for is not done in full, or is seldom meant."""


class LeftOutWarning(MoRAWarning):
    """Arrays that multiply inputs get no adapter, since nobody named them."""


def warn(message: str, category: type[MoRAWarning] = MoRAWarning) -> None:
    """Warn at the line outside of this library that called it."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_HERE):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level - 1)
