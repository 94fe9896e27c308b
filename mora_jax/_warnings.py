"""What the library warns with."""


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
