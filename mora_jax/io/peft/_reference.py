"""The operators of the reference, the code of the paper's authors (peft-mora)."""

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
    """The operator that the reference computes with, of a type that is in its config.

    Types 1 to 4 are sharing. Type 6 is rotation that leaves out inputs if a layer has
    fewer outputs than inputs.
    """
    # It rounds q to the nearest number, so M may have more parameters than a LoRA of
    # that rank, unlike in this library.
    q = int(((in_features + out_features) * rank) ** 0.5 + 0.5)
    if mora_type == 6:  # a rotation turns pairs of numbers
        return Rotation(in_features, out_features, q // 2 * 2, truncate=True)
    groups = REFERENCE_GROUPS[mora_type]
    return Sharing(in_features, out_features, q, *groups, normalised=False)
