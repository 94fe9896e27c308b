"""Products: how layers multiply their input with their kernel.

Kinds::

  Product               the class of them all
  Contraction           an einsum: dense layers, attention, tied heads
  Convolution           a convolution
  Lookup                an embedding
  Blocks                a dense layer for each block of neighbouring features
  Folded                any use of a kernel, such as experts that are bare arrays
  DENSE                 the equation of a dense layer
  ATTEND                the equation of a head that is tied to an embedding

For a product of your own::

  KernelDelta           the delta of a kernel, as the product sees it
  Claim                 the primitives by which a trace recognises the product
"""

from mora_jax._trace_check import Claim
from mora_jax.products._product import Convolution, Folded, KernelDelta, Lookup, Product
from mora_jax.products.contraction import ATTEND, DENSE, Blocks, Contraction

__all__ = ["ATTEND", "DENSE", "Blocks", "Claim", "Contraction", "Convolution"]
__all__ += ["Folded", "KernelDelta", "Lookup", "Product"]
