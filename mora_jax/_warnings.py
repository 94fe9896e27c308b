"""What users are warned of, and where the warning points."""

import sys
import warnings
from pathlib import Path
from types import FrameType

_HERE = str(Path(__file__).parent)


class MoRAWarning(UserWarning):
    """Something that is allowed, and that is most likely not what was meant.

    A class of its own, so that it can be filtered, or turned into an error.

    Example::

      >>> import warnings
      >>> from mora_jax import MoRAConfig, MoRAWarning
      >>> with warnings.catch_warnings():
      ...     warnings.simplefilter("ignore", MoRAWarning)
      ...     config = MoRAConfig(alpha=16.0)
      >>> config.alpha
      16.0
    """


class LeftOutWarning(MoRAWarning):
    """Arrays that multiply inputs get no adapter, and nobody said that they should not.

    The default targets are the dense layers of known classes. `print(plan)` lists what
    they leave out. An array that `exclude` names is left out without a warning.

    Example::

      >>> from mora_jax import LeftOutWarning, MoRAWarning
      >>> issubclass(LeftOutWarning, MoRAWarning)
      True
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
