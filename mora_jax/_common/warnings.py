"""Warnings, which point to the line that called this library."""

import sys
import warnings
from pathlib import Path
from types import FrameType

_HERE = str(Path(__file__).parents[1])


class MoRAWarning(UserWarning):
    """A warning of what is allowed but most likely not meant.

    All warnings of this library are of this class, so that they can be filtered, or
    turned into errors.

    Example::

      >>> import warnings
      >>> import mora_jax
      >>> with warnings.catch_warnings():
      ...     warnings.simplefilter("ignore", mora_jax.MoRAWarning)
      ...     config = mora_jax.MoRAConfig(alpha=16.0)
      >>> config.alpha
      16.0
    """


class LeftOutWarning(MoRAWarning):
    """A warning of arrays that multiply inputs and get no adapter, perhaps by mistake.

    The default targets are the dense layers of known classes. `print(plan)` lists what
    they leave out. An array that `exclude` names is left out without a warning.
    """


def warn(message: str, category: type[MoRAWarning] = MoRAWarning) -> None:
    """Warn at the line that called this library."""
    frame: FrameType | None = sys._getframe()
    level = outermost = 0
    while frame is not None:
        level += 1
        if frame.f_code.co_filename.startswith(_HERE):
            outermost = level
        frame = frame.f_back
    warnings.warn(message, category, stacklevel=outermost + 1)
