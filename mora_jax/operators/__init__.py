"""The operators: the fixed maps C and D around M, one family in each file."""

from mora_jax.operators._base import Operator
from mora_jax.operators._registry import OPERATORS, make_operator, square_rank
from mora_jax.operators.block_diagonal import BlockDiagonal
from mora_jax.operators.damped import Damped
from mora_jax.operators.decoupling import Decoupling, Rotation, SignedDecoupling
from mora_jax.operators.low_rank import LowRank
from mora_jax.operators.orthogonal import Hadamard, Orthogonal, Subspace
from mora_jax.operators.sharing import Sharing, SignedSharing
from mora_jax.operators.truncation import Truncation

__all__ = ["OPERATORS", "BlockDiagonal", "Damped", "Decoupling", "Hadamard", "LowRank"]
__all__ += ["Operator", "Orthogonal", "Rotation", "Sharing", "SignedDecoupling"]
__all__ += ["SignedSharing", "Subspace", "Truncation", "make_operator", "square_rank"]

# In the order in which messages list them; `Subspace` and `Damped` are made, not named.
_NAMED = [BlockDiagonal, Rotation, Sharing, LowRank]
_NAMED += [Decoupling, SignedDecoupling, SignedSharing]
_NAMED += [Truncation, Orthogonal, Hadamard]
OPERATORS.update((cls.name, cls) for cls in _NAMED)
