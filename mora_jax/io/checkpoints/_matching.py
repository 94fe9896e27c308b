"""The tensors of a checkpoint that are a model's leaves, found by names."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

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

Stack = dict[Shape, Tensor]
"""{index in a leaf's stack: its tensor}; the index is () if the leaf is not stacked."""


class Source:
    """The tensors of a checkpoint, found by the names that PyTorch may give them.

    Attributes:
      checkpoint: The checkpoint.
      known: The templates.
      what: The kind of leaves in messages.
      tied: True if a tensor may stand for the one that it is tied to.
      taken: {tensor: the leaf that has it}.
      missing: The leaves without a tensor, with their indices.
    """

    def __init__(
        self, checkpoint: Checkpoint, names: Names, what: str, tied: bool | None = None
    ) -> None:
        self.checkpoint, self.known, self.what = checkpoint, pairs(names), what
        self.tied = may_be_tied(checkpoint) if tied is None else tied
        self._by_canonical: dict[str, list[str]] = defaultdict(list)
        for name in checkpoint.place:
            self._by_canonical[canonical(name)].append(name)
        self.taken: dict[str, str] = {}
        self.missing: list[str] = []

    def stack(self, leaf: str, shape: Shape) -> Stack:
        """Return the tensors of a leaf that are there; others are noted as missing."""
        depths = (k for k in range(len(shape) + 1) if self._find(leaf, (0,) * k))
        sizes, stack = shape[: next(depths, 0)], {}
        if 0 in sizes:
            self.missing.append(leaf)
        for index in np.ndindex(sizes):
            part = join_index(leaf, index)
            if tensor := self._find(leaf, index):
                stack[index] = tensor
                self._take(tensor.name, part)
            else:
                self.missing.append(part)
        return stack

    def _find(self, leaf: str, index: Shape) -> Tensor | None:
        """Return the tensor of one layer of a leaf, as the files call it."""
        for tensor in to_tensors(join_index(leaf, index), self.known):
            if name := self._name_of(tensor.name):
                return tensor._replace(name=name)
        return None

    def _name_of(self, tensor: str) -> str | None:
        """Return the name in the files of a tensor, or of its tied twin."""
        if tensor in self.checkpoint.place:
            return tensor
        name = canonical(tensor)
        for other in (name, *(_tied_to(name) if self.tied else ())):
            if len(names := self._by_canonical.get(other, ())) == 1:
                return names[0]
        return None

    def _take(self, tensor: str, leaf: str) -> None:
        """Note that a leaf has the tensor. Only tied ones serve two leaves."""
        tied = self.tied and _tied_to(canonical(tensor))
        if tensor in self.taken and not tied:
            raise AdapterFileError(
                f"{self.taken[tensor]!r} and {leaf!r} are both {tensor!r} in the base"
            )
        self.taken[tensor] = leaf

    def check_missing(self) -> None:
        """Raise if a leaf lacks a tensor."""
        if not self.missing:
            return
        leaf, place = self.missing[0], self.checkpoint.place
        tensor = next(to_tensors(leaf, self.known), None)
        text = f"the base has no tensor for the {self.what} {leaf!r}"
        if tensor and not self.tied and _tied_to(canonical(tensor.name)):
            text += (
                ", or has it only as another one that it is tied to, and here no "
                "tensors are tied"
            )
        if tensor:
            text += f", which would be {tensor.name!r}"
        text += nearest_paths(tensor.name if tensor else leaf, place)
        unknown = [
            name
            for name in self.missing
            if to_module(name, self.known) is None and not name.endswith("/bias")
        ]
        if unknown:
            free = [name for name in place if name not in self.taken]
            modules = [name.removesuffix(".weight") for name in free]
            text += f"; {suggestion(unknown, modules)}"
        raise AdapterFileError(text)

    def check_left(self, leaves: Iterable[str], skip: str | Sequence[str]) -> None:
        """Raise if a tensor lacks a leaf and is not known to be superfluous."""
        several = skip if isinstance(skip, Iterable) else [skip]
        patterns = [skip] if isinstance(skip, str) else list(several)
        if not all(isinstance(pattern, str) for pattern in patterns):
            raise TypeError(
                f"skip must be a regular expression or several of them, got {skip!r}"
            )
        left = set(self.checkpoint.place)
        for pattern in patterns:
            rule = f"skip must match names of tensors in the base, got {pattern!r}"
            try:
                names = {n for n in self.checkpoint.place if re.fullmatch(pattern, n)}
            except re.error as error:
                raise ValueError(f"{rule}: {error}") from None
            if not names:
                raise ValueError(rule + nearest_paths(pattern, self.checkpoint.place))
            left -= names
        left -= self.taken.keys()
        names = [
            name
            for name in self.checkpoint.place
            if name in left and not BUFFERS.fullmatch(name) and not self._is_copy(name)
        ]
        if names:
            others = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise AdapterFileError(
                f"like has no leaf for {short(names[0])}{others} in the base"
                f"{nearest_paths(names[0].replace('.', '/'), leaves)}; "
                "skip=[...] leaves out tensors whose names it matches"
            )

    def _is_copy(self, name: str) -> bool:
        """Return True if a tensor equals the taken one that it is tied to."""
        return any(
            other in self.taken and self._are_equal(name, other)
            for twin in _tied_to(canonical(name))
            for other in self._by_canonical.get(twin, ())
        )

    def _are_equal(self, *names: str) -> bool:
        a, b = map(self.checkpoint.entry, names)
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        pieces = (self.checkpoint.place[name].chunks(name) for name in names)
        return all(left == right for left, right in zip(*pieces, strict=True))


def find_tensors(
    checkpoint: Checkpoint,
    shapes: Mapping[str, Shape],
    names: Names,
    skip: str | Sequence[str] = (),
) -> dict[str, Stack]:
    """Return the tensors of each leaf of a model.

    Args:
      checkpoint: The base.
      shapes: {path of a leaf: its shape}.
      names: As in `load_base`.
      skip: As in `load_base`.

    Raises:
      AdapterFileError: A leaf lacks a tensor, two leaves have the same, or a tensor
        lacks a leaf.
      ValueError: `names` are unknown, or `skip` matches no tensor.
    """
    source = Source(checkpoint, names, "leaf of like")
    stacks = {name: source.stack(name, shape) for name, shape in shapes.items()}
    source.check_missing()
    source.check_left(shapes, skip)
    return stacks


def _tied_to(name: str) -> tuple[str, ...]:
    """Return the tensors that may be tied to one, by canonical names."""
    return tuple(
        other for pair in TIED if name in pair for other in pair if other != name
    )


def may_be_tied(checkpoint: Checkpoint) -> bool:
    """Return True if the model's config, if there is one, allows tied tensors.

    A model of more than texts has another config in it, for its language model.
    """
    config = None if checkpoint.config is None else read_json(checkpoint.config)
    if not isinstance(config, dict):
        return True
    configs = [c for c in (config, config.get("text_config")) if isinstance(c, dict)]
    return all(c.get("tie_word_embeddings", True) for c in configs)


def stands_for_two(checkpoint: Checkpoint, tensor: str) -> bool:
    """Return True if the base has a tensor, and not the one that may be tied to it."""
    there, name = set(map(canonical, checkpoint.place)), canonical(tensor)
    twins = _tied_to(name)
    if name not in there or not twins or there.intersection(twins):
        return False
    return may_be_tied(checkpoint)
