"""Warnings, which point to the line that called this library."""

import sys
import traceback
import warnings


class MoRAWarning(UserWarning):
    """A warning of what is allowed but most likely not meant: the class of all ours.

    Example::

      >>> import mora_jax, warnings
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
    # From this function outwards. An `__init__` that `dataclasses` wrote is in no file
    # of ours, but has the globals of its module.
    stack = traceback.walk_stack(sys._getframe())
    modules = [frame.f_globals.get("__name__", "") for frame, _ in stack]
    ours = [k for k, name in enumerate(modules) if f"{name}.".startswith("mora_jax.")]
    warnings.warn(message, category, stacklevel=ours[-1] + 2)
