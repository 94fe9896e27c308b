"""The operators: the fixed maps C and D around M, one noun in each file."""

from mora_jax.operators._base import Operator as Operator
from mora_jax.operators._registry import OPERATORS as OPERATORS
from mora_jax.operators._registry import make_operator as make_operator
from mora_jax.operators._registry import square_rank as square_rank
from mora_jax.operators.block_diagonal import BlockDiagonal as BlockDiagonal
from mora_jax.operators.damped import Damped as Damped
from mora_jax.operators.decoupling import Decoupling as Decoupling
from mora_jax.operators.decoupling import SignedDecoupling as SignedDecoupling
from mora_jax.operators.hadamard import Hadamard as Hadamard
from mora_jax.operators.low_rank import LowRank as LowRank
from mora_jax.operators.orthogonal import Orthogonal as Orthogonal
from mora_jax.operators.rotation import Rotation as Rotation
from mora_jax.operators.sharing import Sharing as Sharing
from mora_jax.operators.sharing import SignedSharing as SignedSharing
from mora_jax.operators.subspace import Subspace as Subspace
from mora_jax.operators.truncation import Truncation as Truncation

# In the order in which messages list them; `Subspace` and `Damped` are made, not named.
_NAMED = [Truncation, Sharing, SignedSharing, Decoupling, SignedDecoupling, Rotation]
_NAMED += [Orthogonal, Hadamard, BlockDiagonal, LowRank]
OPERATORS.update((cls.name, cls) for cls in _NAMED)
