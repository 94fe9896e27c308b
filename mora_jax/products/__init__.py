"""How layers multiply their input with their kernel: one file for each kind."""

from mora_jax.products._base import Delta as Delta
from mora_jax.products._base import Product as Product
from mora_jax.products.contraction import ATTEND as ATTEND
from mora_jax.products.contraction import DENSE as DENSE
from mora_jax.products.contraction import Contraction as Contraction
from mora_jax.products.convolution import Convolution as Convolution
from mora_jax.products.lookup import Lookup as Lookup
