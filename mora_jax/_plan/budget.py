"""The budget of a plan, which the blocks of all its kernels share.

A kernel of 576 x 192 features is cut into whole blocks by the common divisors of both
alone. So its M may have 75% or 112% of the numbers of a LoRA, and nothing in between.
Here kernels of one kind get equally many blocks, and the kinds are balanced, so that a
plan uses nearly all of its budget.
"""

import dataclasses
import math
import re
from collections.abc import Hashable, Mapping

from mora_jax._plan.spec import AdapterSpec
from mora_jax.operators import BlockDiagonal

ENOUGH = 0.97
"""The part of the budget that is enough. For more, blocks would be further from it."""

FURTHEST = 2.0
"""An M has at most so many times the budget of its kernel, and at least the inverse."""

LEVELS = 2000
"""Sums of parameters are told apart in so many levels from none to the budget."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """A number of blocks for each kernel of a kind.

    Attributes:
      blocks: The number of blocks of each kernel.
      parameters: The parameters of all these kernels together.
      distance: Distance of the parameters from the budget of these kernels.
    """

    blocks: int
    parameters: int
    distance: float


@dataclasses.dataclass(frozen=True)
class Chosen:
    """The choices for the first kinds, with their sums."""

    blocks: tuple[int, ...] = ()
    parameters: int = 0
    distance: float = 0.0

    def and_then(self, choice: Choice) -> "Chosen":
        """The same with a choice for the next kind."""
        return Chosen(
            blocks=(*self.blocks, choice.blocks),
            parameters=self.parameters + choice.parameters,
            distance=self.distance + choice.distance,
        )


def balanced(specs: Mapping[str, AdapterSpec]) -> dict[str, AdapterSpec]:
    """Adapters with numbers of blocks that use the budget of all kernels together.

    Kernels of one shape get equally many blocks, if `ENOUGH` of the budget is used so.
    Else kernels of one shape and place in a layer do, such as all value projections.

    Args:
      specs: Adapters by their paths. Each has blocks, as many as its own budget buys.

    Returns:
      The adapters, with at most the parameters of LoRAs of their ranks in sum. They
      are as given if the kernels cannot be cut so that all fit.
    """
    best = Chosen()
    best_kinds: list[list[str]] = []
    for key_of in (_shape, _place):
        by_key: dict[Hashable, list[str]] = {}
        for name, spec in specs.items():
            by_key.setdefault(key_of(name, spec), []).append(name)
        kinds = list(by_key.values())
        budgets = [len(names) * _budget(specs[names[0]]) for names in kinds]
        choices = [
            _choices(specs[names[0]], budget)
            for names, budget in zip(kinds, budgets, strict=True)
        ]
        chosen = _best(choices, sum(budgets))
        if chosen is not None and chosen.parameters > best.parameters:
            best, best_kinds = chosen, kinds
        if best.parameters >= ENOUGH * sum(budgets):
            break
    new = dict(specs)
    for names, blocks in zip(best_kinds, best.blocks, strict=True):
        old = specs[names[0]].operator
        assert isinstance(old, BlockDiagonal)
        if blocks == old.square_rank:
            continue
        cut = BlockDiagonal(old.in_features, old.out_features, blocks, seed=old.seed)
        for name in names:
            new[name] = _with_operator(specs[name], cut)
    return new


def _shape(name: str, spec: AdapterSpec) -> Hashable:
    """The key of kernels of one shape, whose blocks are alike."""
    assert isinstance(spec.operator, BlockDiagonal)
    return spec.kernel_shape, spec.axes, spec.rank, spec.operator.seed


def _place(name: str, spec: AdapterSpec) -> Hashable:
    """The key of kernels of one shape and place in a layer."""
    return _shape(name, spec), re.sub(r"\d+", "*", name)


def _budget(spec: AdapterSpec) -> int:
    """The parameters of a LoRA of the adapter's rank."""
    assert spec.rank is not None
    kernels = math.prod(spec.stack_shape)
    return kernels * spec.rank * (spec.in_features + spec.out_features)


def _choices(spec: AdapterSpec, budget: int) -> list[Choice]:
    """The numbers of blocks that kernels of a kind may have.

    These cut both widths evenly, if one that is near the budget does. Else the number
    stays as it is.

    Args:
      spec: The adapter of one of the kernels.
      budget: The parameters of LoRAs of all of them.
    """
    assert spec.rank is not None
    ins, outs = spec.in_features, spec.out_features
    kernels = budget // (spec.rank * (ins + outs))
    common = math.gcd(ins, outs)
    found = []
    for blocks in range(1, common + 1):
        if common % blocks:
            continue
        parameters = kernels * ins * outs // blocks
        share = parameters / budget
        if 1 / FURTHEST <= share <= FURTHEST:
            distance = budget * math.log(share) ** 2
            found.append(Choice(blocks, parameters, distance))
    if found:
        return found
    parameters = kernels * math.prod(spec.operator.m_shape)
    return [Choice(spec.operator.square_rank, parameters, distance=0.0)]


def _best(kinds: list[list[Choice]], budget: int) -> Chosen | None:
    """A choice for each kind, which together need at most the budget.

    Of those that use `ENOUGH` of it the one with the least distance is best, or else
    the one that uses most. None if nothing fits.
    """
    known = [Chosen()]
    for choices in kinds:
        # Of two with about equally many parameters the nearer one is enough.
        nearest: dict[int, Chosen] = {}
        for one in known:
            for choice in choices:
                new = one.and_then(choice)
                if new.parameters > budget:
                    continue
                level = new.parameters * LEVELS // budget
                if level not in nearest or new.distance < nearest[level].distance:
                    nearest[level] = new
        known = list(nearest.values())
    enough = [one for one in known if one.parameters >= ENOUGH * budget]
    if enough:
        return min(enough, key=lambda one: one.distance)
    return max(known, key=lambda one: one.parameters, default=None)


def _with_operator(spec: AdapterSpec, operator: BlockDiagonal) -> AdapterSpec:
    """The adapter with another operator, and the scale that suits it."""
    scale = spec.scale
    if scale == spec.operator.fine_tuning_scale:
        scale = operator.fine_tuning_scale
    return dataclasses.replace(spec, operator=operator, scale=scale)
