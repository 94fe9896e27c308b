"""The text of a language model itself, drawn token by token."""

import functools
import operator
import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.errors import TraceContextError
from jax import Array
from jax.core import eval_jaxpr
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Int32, PRNGKeyArray

from mora_jax._common.checks import check_key, check_number, positive_integer
from mora_jax._mesh.places import explicit_sharding
from mora_jax._tree.losses import refuse_traced

SAME = 0.01  # the relative difference up to which two readings of logits are the same


def own_text(
    apply: Callable[[Array], Any],
    beginnings: Any,
    *,
    rows: int = 16,
    length: int = 44,
    temperature: float = 1.0,
    key: PRNGKeyArray | None = None,
) -> Int32[Array, "rows length"]:
    r"""Token ids of texts that a causal language model writes by itself.

    .. math:: t_k \sim \mathrm{softmax}(\mathrm{logits}(t_0 ... t_{k-1}) / T)

    Use them with `input_damping` if you lack text whose behaviour should stay. A model
    that is not causal can take random tokens instead, which preserve nearly as much:
    `jax.random.randint(key, (rows, length), 0, vocabulary)`.

    Each token takes one call of the model on all positions, without a cache. All calls
    are one compiled program, whose arguments are the weights, on one device or many.

    Args:
      apply: A function from ids of shape (rows, length), int32, to logits of shape
        (rows, length, vocabulary), of the model before it is adapted and without
        dropout: `lambda ids: model.apply(variables, ids)`, or an NNX model itself. It
        is traced once, so it need not be compiled. A token with a logit of -inf is
        never drawn.
      beginnings: The tokens that rows begin with: one id, such as a start token; one
        sequence of ids, such as a chat's template up to the user's turn, so that the
        model asks and answers itself (Magpie, https://arxiv.org/abs/2406.08464); or
        several sequences of any lengths, which the rows take in turn.
      rows: The number of texts, at least one for each beginning.
      length: The number of tokens in each text, with its beginning. Texts go on after
        a token that ends them.
      temperature: T; below 1 the model's likely tokens become more likely.
      key: The key of the draws. None is `jax.random.key(0)`: the same ids each time.

    Raises:
      TypeError: An argument is of another kind, `apply` returns anything but an array
        of floating-point logits, or the call is inside of jit, vmap or grad.
      ValueError: Logits have another shape, or are NaN or infinite; a beginning is
        empty, is as long as `length`, or holds an id that the vocabulary lacks; rows
        are fewer than beginnings; `temperature` is not above 0; or the model is not
        causal, has dropout on, or changes its state.

    Example::

      >>> import jax, jax.numpy as jnp, mora_jax
      >>> table = jnp.log(jnp.array([[0.0, 1, 0], [0, 0, 1], [0.5, 0.5, 0]]))
      >>> mora_jax.own_text(lambda ids: table[ids], [0], rows=2, length=8)
      Array([[0, 1, 2, 1, 2, 0, 1, 2],
             [0, 1, 2, 0, 1, 2, 1, 2]], dtype=int32)
    """
    positive_integer("rows", rows)
    positive_integer("length", length)
    t = _checked_temperature(temperature)
    check_key(key)
    refuse_traced("key", key, "own_text")
    _check_apply(apply)
    sequences = _checked_beginnings(beginnings, rows, length)
    program = _traced(apply, rows, length)
    refuse_traced("apply", program.consts, "own_text")
    (logits,) = program.out_avals
    _check_vocabulary(sequences, logits.shape[-1])
    given = np.zeros((rows, length), np.int32)
    starts = np.zeros(rows, np.int32)
    for row in range(rows):
        ids = sequences[row % len(sequences)]
        given[row, : len(ids)] = ids
        starts[row] = len(ids)
    leaders = np.arange(rows, dtype=np.int32) % len(sequences)
    if key is None:
        key = jax.random.key(0)
    draw = jax.jit(functools.partial(_drawn, program.jaxpr))
    ids, seen = draw(program.consts, given, starts, leaders, key, t)
    refuse_traced("apply", (ids, seen), "own_text")
    _check_seen(seen)
    return ids


class _Seen(NamedTuple):
    """Records of a drawing, from which `_check_seen` tells what is wrong with logits.

    Attributes:
      is_finite: True for each position whose logits are numbers, (length,).
      is_apart: True for each position where rows with the same tokens have other
        logits, (length,).
      moved: The root mean square of the differences between the logits of tokens when
        they were drawn, and when all tokens after them were there.
      spread: The root mean square of the standard deviation of logits.
    """

    is_finite: Any
    is_apart: Any
    moved: Any
    spread: Any


def _drawn(
    program: Any,
    weights: Sequence[Any],
    given: Array,
    starts: Array,
    leaders: Array,
    key: Array,
    temperature: Array,
) -> tuple[Array, _Seen]:
    """The ids, and records of their logits.

    Args:
      program: The jaxpr of the model, from weights and ids to logits.
      weights: The arrays that it closes over.
      given: The beginnings, (rows, length), and zeros after them.
      starts: The position of the first token to draw in each row.
      leaders: The first row with the same beginning, for each row.
      key: The key of all draws.
      temperature: A float32.
    """
    rows, length = given.shape

    def step(ids: Array, position: Array) -> tuple[Array, dict[str, Array]]:
        """Draw the tokens at `position`; the last step, past the end, only reads."""
        (logits,) = eval_jaxpr(program, weights, ids)
        sharding = explicit_sharding(logits)
        if sharding is not None:  # or types would have to say where each step is
            logits = jax.sharding.reshard(logits, NamedSharding(sharding.mesh, P()))
        row = jnp.arange(rows)
        before = logits[:, position - 1].astype(jnp.float32)
        largest = before.max(-1, keepdims=True)
        # Differences to the largest, since a small temperature would make it infinite.
        scaled = (before - largest) / temperature
        drawn = jax.random.categorical(jax.random.fold_in(key, position), scaled)
        old = ids.at[:, position].get(mode="clip")
        token = jnp.where(position < starts, old, drawn.astype(ids.dtype))
        ids = ids.at[:, position].set(token, mode="drop")
        spread = before.std(-1, where=jnp.isfinite(before))
        apart = _distance(before, before[leaders]) > SAME * spread
        reading = jnp.take_along_axis(logits[:, :-1], ids[:, 1:, None], -1)[..., 0]
        return ids, {
            "said": before[row, token],
            "reading": reading.astype(jnp.float32),
            "spread": spread,
            "is_apart": (apart & (position <= starts)).any(),
            "is_finite": jnp.isfinite(largest).all(),
        }

    ids, seen = jax.lax.scan(step, jnp.asarray(given), jnp.arange(1, length + 1))
    later = seen["reading"][-1].T
    is_drawn = jnp.arange(1, length)[:, None] >= starts[None]
    moved = later - seen["said"][:-1]
    spread = seen["spread"][:-1]
    return ids, _Seen(
        is_finite=seen["is_finite"],
        is_apart=seen["is_apart"],
        moved=jnp.sqrt((moved**2).mean(where=is_drawn)),
        spread=jnp.sqrt((spread**2).mean(where=is_drawn)),
    )


def _distance(one: Array, other: Array) -> Array:
    """The root mean square of differences along the last axis."""
    # Equal logits may be infinite.
    difference = jnp.where(one == other, 0, one - other)
    return jnp.sqrt((difference**2).mean(-1))


def _check_apply(apply: Any) -> None:
    """Raise unless `apply` is a function, or a module that has its arrays."""
    lacks_arrays = isinstance(apply, nn.Module) and apply.scope is None
    if lacks_arrays or not callable(apply):
        raise TypeError(
            "apply must be a function from ids to logits, such as lambda ids: "
            f"model.apply(variables, ids), got {type(apply).__name__}"
        )


def _traced(apply: Callable[[Array], Any], rows: int, length: int) -> Any:
    """The program of a model from ids to logits, and the arrays that it closes over."""
    # The weights that a compiled function closes over would be constants of a program.
    is_compiled = isinstance(apply, jax.stages.Wrapped)
    function = getattr(apply, "__wrapped__", apply) if is_compiled else apply
    shape = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    try:
        return jax.make_jaxpr(lambda ids: _checked_logits(function(ids), ids))(shape)
    except TraceContextError as error:
        raise ValueError(
            "apply must leave the state of its model as it is, got one that changes it "
            f"({str(error).partition(' (http')[0]}); turn dropout off by model.eval(), "
            "and call the model itself, as lambda ids: model(ids) does, and not "
            "through nnx.jit, after which Flax leaves the model without its arrays"
        ) from error


def _checked_logits(logits: Any, ids: Array) -> Array:
    """The logits that a model returns for `ids`, if they are such."""
    rows, length = ids.shape
    rule = "apply must return an array of floating-point logits"
    if not isinstance(logits, jax.Array | np.ndarray):
        hint = ""
        if hasattr(logits, "logits"):
            hint = "; return the logits alone, as lambda ids: apply(ids).logits does"
        elif isinstance(logits, tuple | list):
            hint = "; return the logits alone, as lambda ids: apply(ids)[0] does"
        raise TypeError(f"{rule}, got {type(logits).__name__}{hint}")
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise TypeError(f"{rule}, got {logits.dtype}")
    if logits.ndim != 3 or logits.shape[:2] != ids.shape or not logits.shape[2]:
        raise ValueError(
            f"apply must return logits of shape (rows, length, vocabulary), which is "
            f"({rows}, {length}, vocabulary) here, got shape {logits.shape}"
        )
    return jnp.asarray(logits)


def _checked_temperature(temperature: Any) -> np.float32:
    """The temperature as a float32."""
    least = float(np.finfo(np.float32).tiny)
    most = float(np.finfo(np.float32).max)
    check_number(
        "temperature",
        temperature,
        fits=lambda number: least <= number <= most,
        must="be a positive float32",
    )
    return np.float32(temperature)


def _checked_beginnings(beginnings: Any, rows: int, length: int) -> list[list[int]]:
    """The beginnings as lists of ids, if rows and length have room for them."""
    refuse_traced("beginnings", beginnings, "own_text")
    parts = [beginnings]
    if _is_sequence(beginnings) and any(map(_is_sequence, beginnings)):
        parts = list(beginnings)
    elif not _is_sequence(beginnings):
        parts = [[beginnings]]
    sequences = [_checked_ids(part) for part in parts]
    longest = max(map(len, sequences))
    if length <= longest:
        raise ValueError(
            "length must be more than the tokens that a row begins with, got "
            f"length={length} and a beginning of {longest}"
        )
    if rows < len(sequences):
        raise ValueError(
            "rows must be at least as many as beginnings, got "
            f"rows={rows} and {len(sequences)} beginnings"
        )
    return sequences


def _is_sequence(value: Any) -> bool:
    if isinstance(value, jax.Array | np.ndarray):
        return value.ndim > 0
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


RULE = "beginnings must be a token id, a sequence of ids, or several such sequences"


def _checked_ids(part: Any) -> list[int]:
    """One beginning as a list of ids."""
    if not _is_sequence(part):
        raise TypeError(f"{RULE}, got {reprlib.repr(part)} beside a sequence")
    if not len(part):
        raise ValueError(f"{RULE}, got an empty one; give the token that starts a text")
    return [_checked_id(value) for value in part]


def _checked_id(value: Any) -> int:
    """One token id as a Python number."""
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        hint = ""
        if isinstance(value, str | bytes):
            hint = "; give the ids that a tokenizer makes of it"
        elif isinstance(value, Mapping):
            hint = "; give its 'input_ids'"
        raise TypeError(f"{RULE}, got {reprlib.repr(value)}{hint}") from None
    if number < 0:
        raise ValueError(f"{RULE}, got the id {number}")
    return number


def _check_vocabulary(sequences: list[list[int]], vocabulary: int) -> None:
    """Raise unless logits are of all tokens that rows begin with."""
    largest = max(map(max, sequences))
    if largest >= vocabulary:
        raise ValueError(
            f"beginnings must hold ids of the vocabulary of {vocabulary} tokens that "
            f"apply returns logits of, got the id {largest}"
        )


def _check_seen(seen: _Seen) -> None:
    """Raise unless logits are numbers, and depend on the tokens before them alone."""
    is_finite = np.asarray(seen.is_finite)
    if not is_finite.all():
        raise ValueError(
            "apply must return logits that are numbers, got NaN or infinity at "
            f"position {is_finite.argmin()}; check the weights, and that length is not "
            "more than the positions which the model has"
        )
    is_apart = np.asarray(seen.is_apart)
    if is_apart.any():
        raise ValueError(
            "apply must give equal logits to rows with equal tokens, got others at "
            f"position {is_apart.argmax()}; turn dropout off"
        )
    moved = float(seen.moved)
    spread = float(seen.spread)
    if not moved <= SAME * spread:
        raise ValueError(
            "apply must be causal, so that logits do not depend on the tokens after "
            f"them, got some that moved by {moved:.2g} when those were drawn, of a "
            f"standard deviation of {spread:.2g}; give the model a causal mask"
        )
