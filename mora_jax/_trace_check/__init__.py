"""The trace check: what a model does with each of its kernels, read from a program.

An adapter is right if its kernel reaches the output of the model only through the
product that the rule of its layer describes. While a model is traced, `mark` writes
into the program where calls of known layers begin and end. `follow` then walks through
the program, from the kernels to the outputs. `docs/trace-check.md` shows it on an
example, and says what it proves and what it cannot.
"""

from mora_jax._trace_check.marks import Call as Call
from mora_jax._trace_check.marks import mark as mark
from mora_jax._trace_check.trails import Uses as Uses
from mora_jax._trace_check.walk import follow as follow
