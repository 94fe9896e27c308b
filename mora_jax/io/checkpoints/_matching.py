"""Which tensors of a checkpoint are which leaves of a model."""

import functools
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from mora_jax._common.types import Shape
from mora_jax._tree.paths import nearest_paths
from mora_jax.io._errors import AdapterFileError
from mora_jax.io._families import BUFFERS, TIED, Pair
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


def find_tensors(
    checkpoint: Checkpoint,
    shapes: Mapping[str, Shape],
    names: Names,
    skip: str | Sequence[str] = (),
) -> dict[str, Stack]:
    """The tensors of each leaf.

    Args:
      checkpoint: The base.
      shapes: {path of a leaf: its shape}.
      names: As in `load_base`.
      skip: As in `load_base`.

    Raises:
      AdapterFileError: A leaf has no tensor, two leaves have the same, or a tensor has
        no leaf.
      ValueError: `names` are unknown, or `skip` matches no tensor.
    """
    source = _Source(checkpoint, pairs(names))
    found = {name: source.stack(name, shape) for name, shape in shapes.items()}
    source.check_missing()
    source.check_left(shapes, skip)
    return found


def finder_of(
    checkpoint: Checkpoint, known: tuple[Pair, ...]
) -> Callable[[str], Tensor | None]:
    """A function of one layer of a leaf to its tensor, never one that it is tied to."""
    source = _Source(checkpoint, known)
    source.tied = False
    return source.find


class _Source:
    """The tensors of a checkpoint, found by what PyTorch may call them.

    Attributes:
      place: {tensor: the file that holds it}.
      known: The templates.
      tied: Whether a tensor may stand for the one that it is tied to.
      by_canonical: {canonical name: the names in the files}.
      taken: {tensor: the leaf that has it}.
      missing: The leaves without a tensor, with their indices.
    """

    def __init__(self, checkpoint: Checkpoint, known: tuple[Pair, ...]) -> None:
        self.place, self.known, self.checkpoint = checkpoint.place, known, checkpoint
        self.by_canonical: dict[str, list[str]] = defaultdict(list)
        for name in self.place:
            self.by_canonical[canonical(name)].append(name)
        self.taken: dict[str, str] = {}
        self.missing: list[str] = []

    @functools.cached_property
    def tied(self) -> bool:
        return may_be_tied(self.checkpoint)

    def stack(self, leaf: str, shape: Shape) -> Stack:
        """The tensors of a leaf that are there; they are taken, others are missing."""
        depths = [k for k in range(len(shape)) if self.find(join_index(leaf, (0,) * k))]
        stack, found = shape[: depths[0]] if depths else (), {}
        if 0 in stack:
            self.missing.append(leaf)
        for index in np.ndindex(stack):
            one = join_index(leaf, index)
            if tensor := self.find(one):
                found[index] = tensor
                self.take(tensor.name, one)
            else:
                self.missing.append(one)
        return found

    def find(self, leaf: str) -> Tensor | None:
        """The tensor of one layer of a leaf, as the files call it."""
        for tensor in to_tensors(leaf, self.known):
            if name := self.name_of(tensor.name):
                return tensor._replace(name=name)
        return None

    def name_of(self, tensor: str) -> str | None:
        """The name in the files of a tensor, or of the one that it is tied to."""
        if tensor in self.place:
            return tensor
        name = canonical(tensor)
        twins = _tied_to(name)
        for other in (name, *(twins if twins and self.tied else ())):
            if len(found := self.by_canonical.get(other, ())) == 1:
                return found[0]
        return None

    def take(self, tensor: str, leaf: str) -> None:
        """Note that a leaf has the tensor. Only tied ones serve two leaves."""
        if tensor in self.taken and not _tied_to(canonical(tensor)):
            raise AdapterFileError(
                f"{self.taken[tensor]!r} and {leaf!r} in like are both {tensor!r}"
            )
        self.taken[tensor] = leaf

    def check_missing(self) -> None:
        """Raise if a leaf has no tensor."""
        if not self.missing:
            return
        leaf = self.missing[0]
        tensor = next(to_tensors(leaf, self.known), None)
        text = f"the base has no tensor for the leaf {leaf!r} of like"
        if tensor:
            text += f", which would be {tensor.name!r}"
            if _tied_to(canonical(tensor.name)) and not self.tied:
                text += " (its config.json says that no tensors are tied)"
        text += nearest_paths(tensor.name if tensor else leaf, self.place)
        unknown = [
            name
            for name in self.missing
            if to_module(name, self.known) is None and not name.endswith("/bias")
        ]
        if unknown:
            free = [name for name in self.place if name not in self.taken]
            modules = [name.removesuffix(".weight") for name in free]
            text += f"; {suggestion(unknown, modules)}"
        raise AdapterFileError(text)

    def check_left(self, leaves: Iterable[str], skip: str | Sequence[str]) -> None:
        """Raise if a tensor has no leaf and is not known to be superfluous."""
        several = skip if isinstance(skip, Iterable) else [skip]
        patterns = [skip] if isinstance(skip, str) else list(several)
        if not all(isinstance(pattern, str) for pattern in patterns):
            raise TypeError(
                f"skip must be a regular expression or several of them, got {skip!r}"
            )
        for pattern in patterns:
            rule = f"skip must match names of tensors in the base, got {pattern!r}"
            try:
                found = any(re.fullmatch(pattern, name) for name in self.place)
            except re.error as error:
                raise ValueError(f"{rule}: {error}") from None
            if not found:
                raise ValueError(rule + nearest_paths(pattern, self.place))
        left = [
            name
            for name in self.place
            if name not in self.taken
            and not BUFFERS.fullmatch(name)
            and not any(re.fullmatch(pattern, name) for pattern in patterns)
            and not self.is_copy(name)
        ]
        if left:
            more = f" and {len(left) - 1} more" if len(left) > 1 else ""
            raise AdapterFileError(
                f"like has no leaf for {short(left[0])}{more} in the base"
                f"{nearest_paths(left[0].replace('.', '/'), leaves)}; "
                "skip=[...] leaves out tensors whose names it matches"
            )

    def is_copy(self, name: str) -> bool:
        """Whether a tensor is equal to one that a leaf has and that it is tied to."""
        for twin in _tied_to(canonical(name)):
            for other in self.by_canonical.get(twin, ()):
                if other in self.taken and self._are_equal(name, other):
                    return True
        return False

    def _are_equal(self, name: str, other: str) -> bool:
        one, two = self.place[name], self.place[other]
        a, b = one.entries[name], two.entries[other]
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        pieces = zip(one.chunks(name), two.chunks(other), strict=True)
        return all(left == right for left, right in pieces)


def _tied_to(name: str) -> list[str]:
    """The tensors that may be tied to one, by canonical names."""
    return [other for pair in TIED if name in pair for other in pair if other != name]


def may_be_tied(checkpoint: Checkpoint) -> bool:
    """Whether the model's config, if there is one, allows tied tensors.

    A model of more than texts has another config in it, for its language model.
    """
    config = None if checkpoint.config is None else read_json(checkpoint.config)
    if not isinstance(config, dict):
        return True
    found = (config, config.get("text_config"))
    settings = [one for one in found if isinstance(one, dict)]
    return all(one.get("tie_word_embeddings", True) for one in settings)


def stands_for_two(checkpoint: Checkpoint, tensor: str) -> bool:
    """Whether the base has a tensor, and not the one that may be tied to it."""
    there, name = set(map(canonical, checkpoint.place)), canonical(tensor)
    twins = _tied_to(name)
    if name not in there or not twins or there.intersection(twins):
        return False
    return may_be_tied(checkpoint)
