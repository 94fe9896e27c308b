"""The tensors of a checkpoint that are a model's leaves, found by names."""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from mora_jax._common.suggestions import nearest_paths
from mora_jax._common.types import Shape
from mora_jax.io._errors import AdapterFileError
from mora_jax.io._families import BUFFERS, TIED
from mora_jax.io._json import read_json, short
from mora_jax.io._names import (
    Names,
    Tensor,
    canonical,
    join_index,
    pairs,
    to_module,
    to_tensors,
)
from mora_jax.io._suggest import suggestion
from mora_jax.io.checkpoints._checkpoint import Checkpoint
from mora_jax.io.checkpoints._leaf import Part


class Source:
    """The tensors of a checkpoint, found by the names that PyTorch may give them.

    Attributes:
      tied: True if a tensor may stand for the one that it is tied to.
      taken: {tensor: the leaf that has it}.
      missing: The leaves without a tensor, with their indices.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        names: Names,
        what: str = "",
        misfit: str = "",
        tied: bool = True,
    ) -> None:
        self.checkpoint, self.known = checkpoint, pairs(names)
        self.what, self.misfit = what, misfit
        self.tied = tied and _may_be_tied(checkpoint)
        self._by_canonical: dict[str, list[str]] = defaultdict(list)
        for name in checkpoint.place:
            self._by_canonical[canonical(name)].append(name)
        self.taken: dict[str, str] = {}
        self.missing: list[str] = []

    def stack(self, leaf: str, shape: Shape) -> dict[Shape, Part]:
        """Return {index in a leaf's stack: its tensor}; others are noted as missing.

        A leaf that is not stacked has the index ().
        """
        depths = (k for k in range(len(shape) + 1) if self._find(leaf, (0,) * k))
        depth, stack = next(depths, 0), {}
        if 0 in shape[:depth]:
            self.missing.append(leaf)
        for index in np.ndindex(shape[:depth]):
            if tensor := self._find(leaf, index):
                self._take(tensor.name, join_index(leaf, index))
                file = self.checkpoint.place[tensor.name]
                part = Part.of(file, tensor, shape[depth:])
                # All layers have one order of axes.
                if part is None or part[2:] != next(iter(stack.values()), part)[2:]:
                    transposed = " transposed" * (tensor.axes == "oi")
                    stored = self.checkpoint.entry(tensor.name).shape
                    text = f"{tensor.name!r} of shape {stored}{transposed}"
                    raise AdapterFileError(self.misfit.format(leaf, shape, text))
                stack[index] = part
            else:
                self.missing.append(join_index(leaf, index))
        return stack

    def _find(self, leaf: str, index: Shape) -> Tensor | None:
        """Return the tensor of one layer of a leaf, as the files call it."""
        for tensor in to_tensors(join_index(leaf, index), self.known):
            if tensor.name in self.checkpoint.place:
                return tensor
            twins = _tied_to(tensor.name) if self.tied else ()
            for name in (canonical(tensor.name), *twins):
                if len(names := self._by_canonical.get(name, ())) == 1:
                    return tensor._replace(name=names[0])
        return None

    def _take(self, tensor: str, leaf: str) -> None:
        """Note that a leaf has the tensor. Only tied ones serve two leaves."""
        if tensor in self.taken and not (self.tied and _tied_to(tensor)):
            raise AdapterFileError(
                f"{self.taken[tensor]!r} and {leaf!r} are both {tensor!r} in the base"
            )
        self.taken[tensor] = leaf

    def check_missing(self) -> None:
        """Raise if a leaf lacks a tensor."""
        if not self.missing:
            return
        leaf, place = self.missing[0], self.checkpoint.place
        name = next((tensor.name for tensor in to_tensors(leaf, self.known)), "")
        text = f"the base has no tensor for the {self.what} {leaf!r}"
        if _tied_to(name) and not self.tied:
            text += (
                ", or has it only as another one that it is tied to, and here no "
                "tensors are tied"
            )
        text += f", which would be {name!r}" if name else ""
        text += nearest_paths(name or leaf, place)
        unknown = [
            name
            for name in self.missing
            if to_module(name, self.known) is None and not name.endswith("/bias")
        ]
        if unknown:
            free = [n.removesuffix(".weight") for n in place if n not in self.taken]
            text += f"; {suggestion(unknown, free)}"
        raise AdapterFileError(text)

    def check_left(self, leaves: Iterable[str], skip: str | Sequence[str]) -> None:
        """Raise if a tensor lacks a leaf and is not known to be superfluous.

        `skip` holds regular expressions for tensors that are passed over.
        """
        several = isinstance(skip, Iterable) and not isinstance(skip, str)
        patterns: list[Any] = list(skip) if several else [skip]
        if not all(isinstance(pattern, str) for pattern in patterns):
            raise TypeError(
                f"skip must be a regular expression or several of them, got {skip!r}"
            )
        place, settled = self.checkpoint.place, set(self.taken)
        for pattern in patterns:
            rule = f"skip must match names of tensors in the base, got {pattern!r}"
            try:
                skipped = {name for name in place if re.fullmatch(pattern, name)}
            except re.error as error:
                raise ValueError(f"{rule}: {error}") from None
            if not skipped:
                raise ValueError(rule + nearest_paths(pattern, place))
            settled |= skipped
        left = [name for name in place if not (name in settled or self._is_idle(name))]
        if left:
            others = f" and {len(left) - 1} more" if len(left) > 1 else ""
            raise AdapterFileError(
                f"like has no leaf for {short(left[0])}{others} in the base"
                f"{nearest_paths(left[0].replace('.', '/'), leaves)}; "
                "skip=[...] leaves out tensors whose names it matches"
            )

    def _is_idle(self, name: str) -> bool:
        """Return True for a buffer, and if a taken tensor that is tied is the same."""
        twins = (n for twin in _tied_to(name) for n in self._by_canonical.get(twin, ()))
        return BUFFERS.fullmatch(name) is not None or any(
            twin in self.taken and self._are_equal(name, twin) for twin in twins
        )

    def _are_equal(self, *names: str) -> bool:
        a, b = map(self.checkpoint.entry, names)
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        pieces = (self.checkpoint.place[name].chunks(name) for name in names)
        return all(left == right for left, right in zip(*pieces, strict=True))

    def stand_for_two(self, tensors: Iterable[str]) -> bool:
        """Return True if a tensor is there, and not the one that may be tied to it."""
        there = self._by_canonical.keys()
        lone = (t for t in tensors if canonical(t) in there and _tied_to(t))
        return self.tied and any(there.isdisjoint(_tied_to(t)) for t in lone)


def _tied_to(name: str) -> tuple[str, ...]:
    """Return the canonical names of the tensors that may be tied to one."""
    name = canonical(name)
    return tuple(
        other for pair in TIED if name in pair for other in pair if other != name
    )


def _may_be_tied(checkpoint: Checkpoint) -> bool:
    """Return True if the model's config, if there is one, allows tied tensors.

    A model of more than texts has another config in it, for its language model.
    """
    config = None if checkpoint.config is None else read_json(checkpoint.config)
    configs = [config, config.get("text_config")] if isinstance(config, dict) else []
    known = (config for config in configs if isinstance(config, dict))
    return all(config.get("tie_word_embeddings", True) for config in known)
