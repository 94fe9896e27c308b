"""Text that Tunix's models write by themselves."""

from importlib.util import find_spec

import jax.numpy as jnp
import numpy as np
import pytest
from tunix_models import tiny

from mora_jax import own_text

if find_spec("tunix") is None:
    pytest.skip("tunix is not installed", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore")  # what Tunix uses is deprecated


@pytest.mark.parametrize("name", ["qwen2", "gemma3"])
def test_each_token_is_the_likeliest_after_those_before(name):
    """At a small temperature; the logits come with a cache, which is refused."""
    model, _ = tiny(name)
    positions = jnp.broadcast_to(jnp.arange(8), (3, 8))
    mask = jnp.tril(jnp.ones((3, 8, 8), bool))

    def apply(ids):
        return model(ids, positions, None, mask)[0]

    settings = {"rows": 3, "length": 8, "temperature": 1e-6}
    ids = own_text(apply, [[1], [2, 3], [4]], **settings)
    likeliest = np.argmax(apply(ids), -1)
    np.testing.assert_array_equal(ids[::2, 1:], likeliest[::2, :-1])
    np.testing.assert_array_equal(ids[1, 2:], likeliest[1, 1:-1])
    with pytest.raises(TypeError, match="^apply must .*tuple; .*logits alone"):
        own_text(lambda ids: model(ids, positions, None, mask), 1, **settings)
    with pytest.raises(ValueError, match="^apply must be causal"):
        own_text(lambda ids: model(ids, positions, None, mask | True)[0], 1, **settings)
