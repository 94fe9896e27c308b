r"""An adapter: what is trained beside a kernel, together with what it means."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.typing import DTypeLike
from jaxtyping import Float, Shaped

from mora_jax._common.axes import to_model, without
from mora_jax._common.checks import as_jax_array, check_leaf
from mora_jax._common.types import ArrayLike
from mora_jax._jax.tracing import undisturbed
from mora_jax._layer.equation import Delta, delta_kernel
from mora_jax._plan.spec import SUFFIX, AdapterSpec, TrainedArray
from mora_jax.operators._base import Operator
from mora_jax.operators._pytree import by_layer
from mora_jax.products.contraction import Contraction


class Adapter:
    r"""The trained array of one kernel, and its meaning, which is static.

    A pytree whose one leaf is `m`, so that gradients, optimizer states and what any
    function of trees makes of adapters know what they are, too. It stands beside its
    kernel, as `<kernel>_mora`. A trained copy of an array of the base is one as well,
    with a `TrainedArray` for its spec, at the path of that array.

    Attributes:
      m: M, (*stack, *operator.m_shape); or what a function of trees puts there.
      spec: An `AdapterSpec` (operator, kernel's axes, alpha, ...), or `TrainedArray`.

    Example::

      >>> import jax, jax.numpy as jnp, mora_jax
      >>> params, config = {"kernel": jnp.ones((16, 8))}, mora_jax.MoRAConfig(rank=2)
      >>> adapter = mora_jax.init(mora_jax.plan(params, config))["kernel_mora"]
      >>> adapter
      Adapter(block_diagonal, float32[4, 4, 2])
      >>> jax.tree.map(jnp.shape, adapter)
      Adapter(block_diagonal, (4, 4, 2))
      >>> adapter(jnp.ones((3, 16))).shape, adapter.delta().shape
      ((3, 8), (16, 8))
    """

    # Not a frozen dataclass: a step takes and returns hundreds of adapters, and those
    # would take twice the time of a class with slots. The spec is in a tuple, since the
    # comparison of tuples begins with identity: whenever a compiled function is called,
    # JAX compares the spec of each adapter.
    __slots__ = ("m", "_static")
    m: Any

    def __init__(self, m: Any, spec: Any) -> None:
        self.m, self._static = m, (spec,)

    @property
    def spec(self) -> Any:
        """The meaning of M."""
        return self._static[0]

    @property
    def of_kernel(self) -> bool:
        """True for the adapter of a kernel, False for an array that trains itself."""
        return isinstance(self.spec, AdapterSpec)

    def replace(self, **changes: Any) -> "Adapter":
        """The adapter with another `m`, `spec`, or both."""
        return Adapter(**{"m": self.m, "spec": self.spec, **changes})

    def __eq__(self, other: object) -> bool:
        """True for adapters of one delta: equal specs, and equal numbers in M.

        Raises:
          TypeError: An M is traced, or a part of it is on another host, so that its
            numbers are not known here.
        """
        if not isinstance(other, Adapter):
            return NotImplemented
        return self._static == other._static and _same_m(self.m, other.m)

    def __hash__(self) -> int:
        return hash((self.m, self._static))

    def __repr__(self) -> str:
        operator = getattr(self.spec, "operator", None)
        name, m = getattr(operator, "label", "trained"), self.m
        is_array = hasattr(m, "shape") and hasattr(m, "dtype")
        return f"Adapter({name}, {f'{m.dtype}{[*m.shape]}' if is_array else repr(m)})"

    @property
    def operator(self) -> Operator:
        """C and D."""
        return self._kernel_spec("an operator").operator

    def __call__(self, x: Shaped[ArrayLike, "..."]) -> Float[Array, "..."]:
        r"""The delta's product with an input, :math:`\alpha s\, D(C(x) M)`.

        Args:
          x: (*stack, *batch, *in), with the input axes of the kernel.

        Raises:
          TypeError, ValueError: `x` is not an array that fits, or the array is trained.
        """
        self._kernel_spec("a product")
        x = as_jax_array("x", x)
        spec = check_adapter(f"kernel{SUFFIX}", self).spec
        # check_adapter also lets an M without numbers pass, a shape and a dtype.
        as_jax_array(f"kernel{SUFFIX}", self.m)
        contraction = Contraction.from_axes(spec.axes, x.ndim)
        contraction.check_input(tuple(x.shape), spec.kernel_shape)
        dtype = jnp.result_type(x, self.m)
        delta = Delta.of(spec, self.m, dtype=dtype, x=x)
        return undisturbed(contraction.delta)(delta, x.astype(dtype))

    def delta(self) -> Float[Array, "..."]:
        r"""The kernel's delta, :math:`\alpha s\, C M D`, with the kernel's shape.

        It is in float32, or in float64 where M is.

        Raises:
          TypeError, ValueError: M does not fit, or the adapter is a trained array.
        """
        self._kernel_spec("a delta")
        checked = check_adapter(f"kernel{SUFFIX}", self)
        # check_adapter also lets an M without numbers pass, a shape and a dtype.
        as_jax_array(f"kernel{SUFFIX}", self.m)
        return delta_of(checked)

    def in_model(self) -> Any:
        """M with stack axes where the kernel has them, as a model holds it."""
        moved = isinstance(self.spec, AdapterSpec) and not self.spec.stacked_in_front
        return to_model(self.m, self.spec.axes) if moved else self.m

    @classmethod
    def of_model(cls, m: Any, spec: Any, given: Sequence[Array] = ()) -> "Adapter":
        """The adapter of an M that a model holds, for a stack or for a layer of it.

        `given` are the arrays that its operator has for each layer.
        """
        if not isinstance(spec, AdapterSpec) or "s" not in spec.axes:
            return cls(m, spec)
        shape = tuple(getattr(m, "shape", ()))
        for taken in spec.stacks(len(spec.shape) - len(shape)):
            axes, own = "".join(without(spec.axes, taken)), {}
            if given:
                arrays = [to_model(array, axes, back=True) for array in given]
                own["operator"] = by_layer(spec.operator)[1](arrays)
            one = spec.one_of(taken, **own)
            if one.shape_in_model == shape:
                return cls(to_model(m, axes, back=True), one)
        return cls(m, spec)  # which is refused for its shape

    def _kernel_spec(self, what: str) -> AdapterSpec:
        if not isinstance(self.spec, AdapterSpec):
            kind = type(self.spec).__name__
            raise TypeError(f"an adapter of a kernel has {what}, got one of a {kind}")
        return self.spec


def _same_m(one: Any, other: Any) -> bool:
    """True for equal arrays of one dtype, and for other equal things."""
    if isinstance(one, Tracer) or isinstance(other, Tracer):
        raise TypeError(
            "Adapter == Adapter needs the numbers of both M's, which are not known "
            "under jit; compare them outside, or their arrays by jnp.array_equal"
        )
    for m in (one, other):
        if isinstance(m, jax.Array) and not (
            m.is_fully_addressable or m.is_fully_replicated
        ):
            raise TypeError(
                "Adapter == Adapter needs the numbers of both M's, and this process "
                f"holds only parts of {m.dtype}{[*m.shape]}; compare the arrays by "
                "jnp.array_equal under jit"
            )
    arrays = jax.Array | np.ndarray | np.generic
    if isinstance(one, arrays) and isinstance(other, arrays):
        return one.dtype == other.dtype and bool(np.array_equal(one, other))
    if isinstance(one, arrays) or isinstance(other, arrays):
        return False
    return bool(one == other)


def _unflatten(static: Any, children: Any) -> Adapter:
    adapter = object.__new__(Adapter)
    (adapter.m,) = children
    adapter._static = static
    (spec,) = static
    # A traced program also serves adapters of another base. Its results must not say
    # that they are of this one.
    if isinstance(adapter.m, Tracer) and getattr(spec, "base_digest", None):
        adapter._static = (spec.with_base(None),)
    return adapter


jax.tree_util.register_pytree_with_keys(
    Adapter,
    lambda own: (((jax.tree_util.GetAttrKey("m"), own.m),), own._static),
    _unflatten,
    lambda own: ((own.m,), own._static),
)


def check_adapter(name: str, adapter: Adapter) -> Adapter:
    """The adapter `name` with a spec that fits M, an array or its shape, checked."""
    m, spec = adapter.m, adapter.spec
    if isinstance(spec, TrainedArray):
        check_leaf(m, f"{name} in the adapters", spec.shape)
        return adapter
    if not isinstance(spec, AdapterSpec):
        kind = type(spec).__name__
        raise TypeError(f"{name} must have an AdapterSpec for its spec, got {kind}")
    shape = getattr(m, "shape", None)
    axes = len(spec.operator.m_shape)
    if shape is not None and len(shape) != len(spec.shape) and len(shape) >= axes:
        stack = tuple(shape[: len(shape) - axes])
        try:
            spec = spec.with_stack(stack)
        except ValueError:
            if by_layer(spec.operator)[0]:
                raise
            # Otherwise the shape is named below.
    check_leaf(m, name, spec.shape)
    return adapter if spec is adapter.spec else adapter.replace(spec=spec)


def delta_of(adapter: Adapter, *dtypes: DTypeLike) -> Array:
    """The delta of a checked adapter in float32, or in float64 where any dtype is."""
    return delta_kernel(adapter.spec, wide(adapter.m, *dtypes))


def wide(array: ArrayLike, *dtypes: DTypeLike) -> Array:
    """`array` in float32, or in float64 where it or any of `dtypes` is."""
    # Others are not promoted, since JAX does not promote 8 bits.
    array = jnp.asarray(array)
    doubles = [dtype for dtype in (array.dtype, *dtypes) if dtype == jnp.float64]
    return array.astype(jnp.result_type(jnp.float32, *doubles))
