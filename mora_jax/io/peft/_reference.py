"""The operators of the reference, the code of the paper's authors (peft-mora)."""

from mora_jax._common.checks import positive_integer
from mora_jax.operators import Operator, Rotation, Sharing
from mora_jax.operators.sharing import Grouping

REFERENCE_GROUPS: dict[int, tuple[Grouping, Grouping]] = {
    1: ("strided", "strided"),
    2: ("contiguous", "contiguous"),
    3: ("contiguous", "strided"),
    4: ("strided", "contiguous"),
}
"""How the sharing types of the reference group inputs and outputs."""


def reference_operator(
    mora_type: int, in_features: int, out_features: int, rank: int
) -> Operator:
    """The operator that the authors' code (peft-mora) computes with.

    Types 1 to 4 are sharing. Type 6 is rotation that leaves out inputs if a layer has
    fewer outputs than inputs. The code rounds q to the nearest number, so M may have
    more parameters than a LoRA of that rank, unlike in this library. Its `lora_A` is M
    transposed. It ignores its alpha, so keep alpha at 1.

    Args:
      mora_type: The type in the reference's config: 1, 2, 3, 4 or 6.
      in_features: The number of the layer's input features.
      out_features: The number of the layer's output features.
      rank: The `r` in the reference's config.

    Raises:
      TypeError, ValueError: The type is unknown, or a number is not an integer above 0.

    Example::

      >>> import mora_jax
      >>> operator = mora_jax.io.reference_operator(6, 64, 64, 4)
      >>> operator.name, operator.square_rank, operator.truncate
      ('rotation', 22, True)
    """
    positive_integer("rank", rank)
    positive_integer("in_features", in_features)
    positive_integer("out_features", out_features)
    q = int(((in_features + out_features) * rank) ** 0.5 + 0.5)
    if mora_type == 6:  # a rotation turns pairs of numbers
        return Rotation(in_features, out_features, q // 2 * 2, truncate=True)
    if mora_type in REFERENCE_GROUPS:
        groups = REFERENCE_GROUPS[mora_type]
        return Sharing(in_features, out_features, q, *groups, normalised=False)
    raise ValueError(f"mora_type must be 1, 2, 3, 4 or 6, got {mora_type!r}")
