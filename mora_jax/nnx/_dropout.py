"""Flax's own dropout, for its keys and its train and eval modes."""

from flax import nnx

from mora_jax.spec import AdapterSpec


def make_dropout(
    spec: AdapterSpec, rngs: nnx.Rngs | None, lifted: tuple[int, ...] = ()
) -> nnx.Dropout:
    """The dropout of one adapter; a stack of them for layers that are scanned.

    Args:
      spec: the adapter.
      rngs: forked, one stream for each layer.
      lifted: sizes of the axes that lifted transformations take off.
    """
    if rngs is None:
        raise ValueError(f"dropout={spec.dropout} needs rngs, got None")

    def make(rngs: nnx.Rngs) -> nnx.Dropout:
        return nnx.Dropout(spec.dropout, rngs=rngs)

    for size in reversed(lifted):
        make = nnx.split_rngs(splits=size)(nnx.vmap(make))
    return make(rngs)
