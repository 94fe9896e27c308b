"""Products: how layers multiply their input with their kernel.

Kinds::

  Product               the class of them all
  Contraction           an einsum: dense layers, attention, tied heads
  Convolution           a convolution
  Lookup                an embedding
  Folded                any use of a kernel, such as experts that are bare arrays
  DENSE                 the equation of a dense layer
  ATTEND                the equation of a head that is tied to an embedding

For a product of your own::

  KernelDelta           the delta of a kernel, as the product sees it
  Claim                 the primitives by which a trace recognises the product
"""

from mora_jax._trace_check import Claim as Claim
from mora_jax.products._product import Convolution as Convolution
from mora_jax.products._product import Folded as Folded
from mora_jax.products._product import KernelDelta as KernelDelta
from mora_jax.products._product import Lookup as Lookup
from mora_jax.products._product import Product as Product
from mora_jax.products.contraction import ATTEND as ATTEND
from mora_jax.products.contraction import DENSE as DENSE
from mora_jax.products.contraction import Contraction as Contraction
