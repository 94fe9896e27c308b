"""Computing here what another platform would compute."""

import contextlib
from collections.abc import Iterator

import jax

from mora_jax._jax.platform import chosen_platform


@contextlib.contextmanager
def as_if_on(platform: str) -> Iterator[None]:
    """Compute within, on the default platform, as another one would.

    So the tests compute here what a chip would compute. Nothing that was traced before
    is used within, nor afterwards what was traced within.

    Args:
      platform: One of `TUNING`.
    """
    jax.clear_caches()
    token = chosen_platform.set(platform)
    try:
        yield
    finally:
        chosen_platform.reset(token)
        jax.clear_caches()
