"""Survey of a model before it is planned: its layers, and the uses of its arrays."""

import dataclasses
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend.core import Jaxpr

from mora_jax._common.axes import Places, interleaved, order_in_model, stack_places
from mora_jax._common.messages import patterns, warn
from mora_jax._common.trees import split_static
from mora_jax._common.types import Shape
from mora_jax._flax.calls import LayerCall
from mora_jax._flax.layer_rules import folded_kernels, planning_rules, rules_of
from mora_jax._jax.tracing import intercepted
from mora_jax._jax.walk import primitive_names
from mora_jax._plan.spec import SUFFIX, AdapterSpec
from mora_jax._trace_check import MarkedCall, Uses, difference, follow, mark
from mora_jax._tree.plan import Plan
from mora_jax.products import Product

NOT_USED = "the call that was traced does not use it"
DROPPED = "no output of the call that was traced depends on it"
REBUILT = "code that rebuilds the params (nn.map_variables) must keep the M beside it"

Programs = Callable[["Survey | None"], Jaxpr]
"""The program of a call; marked for a survey, which gets the arrays of the model."""


def program_of(function: Callable[..., Any], tree: Any, *args: Any) -> Jaxpr:
    """The program of `function(tree, *args)`; all but arrays and shapes is static."""
    arrays, join = split_static(args)
    make = jax.make_jaxpr(lambda tree, own: jax.tree.leaves(function(tree, *join(own))))
    return make(tree, arrays).jaxpr


@dataclasses.dataclass
class Survey:
    """Knowledge of a model's arrays by their paths; `plan` of both APIs fills it in."""

    by_names: bool = False  # True if nothing is known of the layers
    # The products of kernels, other arrays of known layers, and the classes of modules.
    products: dict[str, Product] = dataclasses.field(default_factory=dict)
    non_kernels: set[str] = dataclasses.field(default_factory=set)
    classes: dict[str, type] = dataclasses.field(default_factory=dict)
    # Of a kernel, or of what scales one, the choices of the axes that a lifted
    # transformation takes off, so that its layer has the shape that it has.
    places: dict[str, list[Places]] = dataclasses.field(default_factory=dict)
    # Of a parameter that scales a kernel the kernel's axes that it has.
    scales: dict[str, range] = dataclasses.field(default_factory=dict)
    uses: Uses = dataclasses.field(default_factory=Uses)  # in calls that were traced
    ran: set[str] = dataclasses.field(default_factory=set)  # kernels whose layers did
    traced: bool = False  # True if one was
    # Of a kernel that no `nnx.Param` holds the name of the class that does.
    no_params: dict[str, str] = dataclasses.field(default_factory=dict)
    # The paths of each module and array of an NNX model that has several.
    shared: list[list[str]] = dataclasses.field(default_factory=list)
    # The first inputs of a call, which the model holds.
    leaves: Mapping[str, Any] = dataclasses.field(default_factory=dict, init=False)
    # True if a library, such as qwix, computed the products of a call.
    intercepted: bool = dataclasses.field(default=False, init=False)

    def record_call(self, name: str, call: LayerCall, adapter: Any) -> jax.Array:
        """A layer's output, with marks; `name` and `adapter` are its kernel's."""
        self.intercepted |= intercepted()
        if name not in self.leaves:  # the kernel of another layer, at its path
            return call.method(*call.args, **call.kwargs)
        self.ran.add(name)
        product, x = call.read()
        rule, module = call.rule, call.module
        if (kernel := rule.kernel_of(module)) is not None:
            self._see(name, tuple(kernel.shape))
        planning_rule = planning_rules(module)[rule.name(module)]
        planned = product if rule is planning_rule else planning_rule.product(module)
        # Of several methods with one kernel (an embedding and its tied head) the first
        # registered decides. If it needs a call, that call may come later.
        self.products[name] = planned or self.products.get(name, product)
        method = f"{type(module).__name__}.{rule.method}"
        scale = self._scale(name, call)
        marked = MarkedCall(name, product.claim, method, scale, x.dtype, name + SUFFIX)
        call = call.with_input(mark(x, marked, end=False))
        y = call.method(*call.args, **call.kwargs)
        if not hasattr(y, "shape"):
            raise ValueError(
                f"{name}: {marked.method} must return the product of its input and its "
                f"kernel, as its rule says, got {type(y).__name__}: exclude a class "
                "that hands its kernel to another module, which cannot be taught"
            )
        return mark(y, marked, end=True, companion=adapter and adapter.m)

    def _see(self, name: str, shape: Shape) -> None:
        """Take note of the shape of a kernel, or of a scale, as its layer has it."""
        if (whole := tuple(self.leaves[name].shape)) == shape:
            return
        places = stack_places(whole, shape)
        self.places[name] = [p for p in self.places.get(name, places) if p in places]
        if not self.places[name]:
            raise ValueError(f"{name} of shape {whole} is used as one of shape {shape}")

    def _scale(self, name: str, call: LayerCall) -> float | str | None:
        """The scale of the kernel at `name`, for its `MarkedCall`."""
        rule, ndim = call.rule, len(self.products[name].axes)
        with jax.ensure_compile_time_eval():  # a number is one, and no part of a trace
            scale = rule.scale_of(call.module)
        if isinstance(rule.scale, str):
            path = "/".join([*name.split("/")[:-1], rule.scale])
            self.scales[path] = range(ndim - jnp.ndim(scale), ndim)
            self._see(path, jnp.shape(scale))
            return path
        if scale is None:
            return None
        unknown = isinstance(scale, Tracer) or np.iscomplexobj(scale)
        numbers = () if unknown else np.unique(scale)
        return float(numbers[0]) if len(numbers) == 1 else ""

    def record_read(self, name: str, cls: type, kernel: Any, adapter: Any) -> jax.Array:
        """The kernel at `name` as any methods of its layer's class read it, marked."""
        product = folded_kernels(cls)[name.rpartition("/")[2]]
        self.products[name] = product
        self._see(name, tuple(kernel.shape))
        call = MarkedCall(name, product.claim, cls.__name__, companion=name + SUFFIX)
        return mark(kernel, call, end=True, companion=adapter and adapter.m)

    def trace(self, programs: Programs, plan: Plan | None = None) -> Jaxpr:
        """Follow arrays through a program with marks, and M's if there is a plan."""
        try:
            program = programs(self)
        except Exception as error:
            *_, (frame, _) = traceback.walk_tb(error.__traceback__)
            if frame.f_globals.get("__name__", "").startswith("mora_jax."):
                raise
            programs(None)  # raises what is wrong with the model or its inputs
            kernels = "its kernels" if plan is None else patterns(plan)
            told = f"the model fails with an M beside {kernels}: {type(error).__name__}"
            remedy = "exclude kernels whose params code takes apart"
            which = "as nn.WeightNorm and nn.map_variables do"
            raise ValueError(f"{told}: {error}; {remedy}, {which}") from error
        specs = {} if plan is None else dict(plan)
        for name in specs.keys() & self.places:
            known, spec = self.places[name], specs[name]
            own = [places for places in known if places in spec.stacks(len(places))]
            self.places[name] = own or known
        for name in [n for n, places in self.places.items() if len(places) > 1]:
            # As many layers as features: shapes do not tell which is which.
            choices = self.places[name]
            for self.places[name] in [[choice] for choice in (*choices, choices[0])]:
                follow(program, list(self.leaves), self._axes(specs), uses := Uses())
                if name not in uses.faults:
                    break
        self.traced = True
        follow(program, list(self.leaves), self._axes(specs), self.uses)
        return program

    def _axes(self, specs: Mapping[str, AdapterSpec]) -> dict[str, Sequence[int]]:
        """Numbers of the axes of arrays, as layers see them; of stack axes negative."""
        found = {n: range(len(product.axes)) for n, product in self.products.items()}
        axes: dict[str, Any] = found | self.scales
        for name in axes.keys() & self.leaves:
            if more := self.leaves[name].ndim - len(axes[name]):
                (places, *_) = self.places.get(name, [range(more)])
                axes[name] = interleaved(range(-more, 0), axes[name], places)
        for name, spec in specs.items():
            m = range(-spec.axes.count("s"), len(spec.operator.m_shape))
            axes[name + SUFFIX] = [m[k] for k in order_in_model(spec.axes, len(m))]
        return axes

    def fault(self, name: str) -> str:
        """Reason why an adapter of a kernel would not be what a merge is, or ""."""
        uses, m = self.uses, name + SUFFIX
        if name in uses.outside:
            table = name in self.products and self.products[name].takes_indices
            kind, tied = ("embedding", " (a tied head?)") if table else ("kernel", "")
            by = f", by {uses.outside[name]}" if uses.outside[name] else ""
            where = f"outside of its layer's known methods{tied}{by}"
            remedy = "where the adapter would have no effect; exclude it"
            told = f"the model also reads this {kind} {where}, {remedy}"
            if name in uses.called:
                return told
            cls, is_known = self._class(name)
            teach = f", or teach its class{cls} with mora_jax.register_layer"
            return f"{told}{'' if is_known else teach}; {REBUILT}"
        if fault := uses.faults.get(name):
            told = f"{fault}, so that adapted and merged model would differ"
            teach = "teach its class by register_layer (scale= if it is scaled)"
            return f"{told}; exclude it, or {teach}"
        read = f"the model reads the M beside this kernel, by {uses.outside.get(m)}"
        return f"{read}; exclude it" if m in uses.outside else ""

    def no_kernel(self, name: str) -> bool:
        """True if the array at `name` is known to be never multiplied."""
        kernels = self.products, self.uses.multiplied, self.uses.unseen
        is_kernel = any(name in them for them in kernels)
        return name in self.non_kernels or (name in self.uses.reached and not is_kernel)

    def not_used(self, name: str) -> bool:
        """True if calls were traced, and none of them uses the array at `name`."""
        known = self.uses.reached, self.uses.unseen, self.ran
        return self.traced and not any(name in names for names in known)

    def unproven(self, names: Iterable[str]) -> tuple[tuple[str, str], ...]:
        """(name, reason) for the kernels in `names` that the trace does not prove."""
        return tuple((name, why) for name in names if (why := self._why_unproven(name)))

    def _why_unproven(self, name: str) -> str:
        if not self.traced:
            return "no call was traced; nnx.plan takes the inputs of one"
        if why := self.uses.unseen.get(name):
            return why
        if name not in self.uses.reached:
            return NOT_USED
        known = name in self.products
        return "" if known else f"nothing is known of its class{self._class(name)[0]}"

    def why_unknown(self, name: str) -> str:
        """The reason why nothing is known of the use of the array at `name`."""
        cls, is_known = self._class(name)
        if self.traced and name not in self.uses.reached:
            runs = "plan with inputs for which its layer runs, or exclude it"
            return f"{NOT_USED}: {runs}"
        if self.traced and is_known:
            return f"its layer, a{cls}, gets it alone: {REBUILT}, or exclude it"
        calls = "" if self.traced else ", and plan with inputs of a call"
        teach = f"teach its class{cls} with mora_jax.register_layer{calls}"
        return f"it is not known how a layer uses it: {teach}"

    def _class(self, name: str) -> tuple[str, bool]:
        """The class of an array's layer, for a message, and if it has rules."""
        # Of the innermost module that is known: a kernel may lie deeper, as in a list.
        while name:
            name = name.rpartition("/")[0]
            if cls := self.classes.get(name):
                return f" {cls.__name__}", bool(rules_of(cls))
        return "", False


def reads_numbers(trace: Callable[..., Jaxpr], *given: Any) -> bool:
    """True if a call may read numbers of NumPy arrays among its inputs.

    `trace(*given)` is its program. The same program with the numbers hidden has the
    same primitives, or Python saw them.
    """

    def hidden(leaf: Any) -> Any:
        if not isinstance(leaf, np.ndarray):
            return leaf
        # As JAX itself takes the array: int64 as int32, unless 64 bits are enabled.
        dtype = jax.dtypes.canonicalize_dtype(leaf.dtype)
        return jax.ShapeDtypeStruct(leaf.shape, dtype)

    try:
        without = trace(*jax.tree.map(hidden, given))
    except Exception:
        # JAX raises where Python asks a tracer for a number, and the model may raise.
        return True
    return primitive_names(trace(*given)) != primitive_names(without)


def check_call(plan_of: Callable[[], Plan], programs: Programs, main: bool) -> str:
    """Raise unless a call with M's computes what it does without, and the deltas.

    `programs` traces the call, with marks and M's if it is given a survey. The `main`
    one has to use all adapters. The result is "", or a warning that no trace is made.
    """
    try:
        base = programs(None)
    except Exception as error:
        # Python needs numbers, such as of a loop that stops at a token.
        told = f"this call of the model cannot be traced ({type(error).__name__})"
        return f"{told}, so it is not proven what it does with adapted kernels"
    plan, survey = plan_of(), Survey()
    ms, adapted = {name + SUFFIX for name in plan}, survey.trace(programs, plan)
    if survey.intercepted:  # by a Linen model itself, which then quantizes its products
        return ""
    for name in plan:
        if fault := survey.fault(name):
            raise ValueError(f"{name}: {fault}")
    if found := difference(base, adapted, [name in ms for name in survey.leaves]):
        told = "the model computes something else with an M beside its kernels"
        code = "Code that counts the arrays of a module or asks for the type of a layer"
        remedy = "exclude the kernels of such modules"
        raise ValueError(f"{told}, even if M = 0: {found}. {code} does so; {remedy}")
    new = {*survey.unproven(plan)} - {*plan.unproven}  # the user knows these
    if new := sorted(pair for pair in new if main or pair[1] != NOT_USED):
        told = "; ".join(f"{name}: {why}" for name, why in new)
        warn(f"a call of the model is not proven: {told}")
    return ""
