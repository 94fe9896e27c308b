r"""The trace check: what a model does with each of its kernels, read from a program.

A delta that is trained beside a kernel, by an array called its companion, can be merged
into it if the kernel reaches the output of the model only through the product that its
layer is claimed to compute. While a model is traced, `mark` writes into the program
where calls of known layers begin and end. `follow` then walks through the program, from
the kernels to the outputs. `docs/trace-check.md` shows it on an example, and says what
it proves and what it cannot.

Why this is enough: say that a kernel W reaches the outputs through the calls of its
layer alone, and that call k returns :math:`y_k = x_k W + b_k` (or another product that
is linear in W), where b_k does not depend on W. By induction over the calls in the
order of the program, x_k and b_k depend on W through :math:`y_1 \dots y_{k-1}` only. If
those are the same beside the kernel and merged into it, then so are x_k, b_k, and
:math:`(x_k W + b_k) + x_k \Delta W = x_k (W + \Delta W) + b_k`.
"""

from mora_jax._trace_check.kernels import Uses, follow
from mora_jax._trace_check.marks import Claim, MarkedCall, difference, mark
