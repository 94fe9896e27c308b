"""Names of PyTorch's modules and tensors, and the kernels that they are here."""

import dataclasses
import difflib
import functools
import itertools
import json
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping

import numpy as np

from mora_jax._common.axes import sizes
from mora_jax._common.suggestions import did_you_mean
from mora_jax._common.types import Shape
from mora_jax.io._families import FAMILIES, LIBRARIES, Pair

FIELD = r"\{(\w+)\}"

Names = str | Mapping[str, str] | None
"""A family, a library, {module: kernel} as templates, or None for all families."""


@dataclasses.dataclass(frozen=True)
class Module:
    """A module, and its part of a kernel.

    Its weight has the `axes` "oi" or "io", and it may be a `table`, which looks up rows
    of that. It belongs to the layer `index` of the kernel's stack, and has the slice
    `outputs` of the kernel's. Messages call the part `place`.
    """

    name: str
    axes: str
    table: bool
    index: Shape
    outputs: slice
    place: str


class Bijection:
    """PyTorch's modules and kernels here, each found by the other's name.

    A template has the same fields on both sides, so that either name gives the other.
    A name that fits several templates has a pair for each, in their order.
    """

    def __init__(self, templates: Iterable[Pair]) -> None:
        pairs = [each for pair in dict.fromkeys(templates) for each in _with_bias(pair)]
        self._modules = [(_pattern(pair.module), pair) for pair in pairs]
        self._kernels = [(_pattern(pair.kernel), pair) for pair in pairs]

    def of_module(self, name: str) -> Iterator[Pair]:
        return _fitting(name, self._modules)

    def of_kernel(self, path: str) -> Iterator[Pair]:
        """The pairs of a kernel here, a path with the index in its stack if any."""
        return _fitting(path, self._kernels)

    def of_leaf(self, path: str) -> Iterator[Pair]:
        """The pairs of any array: without a template it is named as its tensor is."""
        yield from self.of_kernel(path)
        parent, _, last = path.rpartition("/")
        if parent and last in _LEAVES:
            module = parent.replace("/", ".") + ".bias" * (last == "bias")
            yield Pair(module, path, *_LEAVES[last])

    def modules(self, path: str, shape: Shape, axes: str) -> Iterator[Module]:
        """The modules of a kernel; one that the templates lack is called ""."""
        outs, inner = sizes(shape, axes, "o"), axes.replace("s", "")
        # Tables are as they are here, but with one axis where a kernel has heads.
        table_axes = re.sub(r"(.)\1+", r"\1", inner)
        for index in np.ndindex(sizes(shape, axes, "s")):
            places = [join_index(path, index)]
            if len(outs) > 1 and inner.startswith("o") and not self._has(places):
                # The first axis may tell modules apart.
                parts = [join_index(path, (*index, k)) for k in range(outs[0])]
                places = parts if self._has(parts) else places
            width = math.prod(outs) // len(places)
            for k, place in enumerate(places):
                pair = next(self.of_kernel(place), Pair("", ""))
                order = table_axes if pair.is_table else pair.axes
                outputs = slice(k * width, (k + 1) * width)
                yield Module(pair.module, order, pair.is_table, index, outputs, place)

    def _has(self, paths: Iterable[str]) -> bool:
        return any(pair for path in paths for pair in self.of_kernel(path))


_LEAVES = {"kernel": ("oi", "io"), "embedding": ("io", "io")}
_LEAVES |= dict.fromkeys(("scale", "weight", "bias"), ("o", "o"))
"""{Flax's name of a leaf: the axes of its tensor in PyTorch, and those here}."""


def _with_bias(pair: Pair) -> Iterator[Pair]:
    """Templates of a kernel and, if its last name is fixed, of the bias beside it."""
    yield pair
    bias, fixed = re.subn(r"(^|/)[^/\[{]+(\[.*)?$", r"\1bias\2", pair.kernel)
    if fixed:
        yield Pair(f"{pair.module}.bias", bias, "o", "o")


def _pattern(template: str) -> re.Pattern[str]:
    """A regular expression for texts that a template becomes, with its fields."""
    parts = re.split(FIELD, template)
    if not all(map(str.isidentifier, parts[1::2])) or set("{}") & set("".join(parts)):
        raise ValueError(
            "names must have braces around the names of fields alone, as in {n}, "
            f"got {template!r}"
        )
    parts[::2] = map(re.escape, parts[::2])
    parts[1::2] = [rf"(?P<{field}>[^./\[\],]+)" for field in parts[1::2]]
    return re.compile("".join(parts))


def _fitting(
    text: str, templates: list[tuple[re.Pattern[str], Pair]]
) -> Iterator[Pair]:
    for pattern, pair in templates:
        if match := pattern.fullmatch(text):
            yield pair.filled(match.groupdict())


def bijection(names: Names) -> Bijection:
    """Modules and kernels by the pairs that `names` stands for, if well-formed."""
    if names is None or isinstance(names, str):
        return _known(names)
    texts = [*names, *names.values()] if isinstance(names, Mapping) else [None]
    if not all(isinstance(text, str) for text in texts):
        raise TypeError(f"names must be a family or map texts to texts, got {names!r}")
    for module, kernel in names.items():
        fields, others = (sorted(re.findall(FIELD, t)) for t in (module, kernel))
        if fields != others or len(set(fields)) < len(fields):
            raise ValueError(
                f"names must have the same {{fields}} on both sides, once each, "
                f"got {module!r} and {kernel!r}"
            )
    return Bijection(Pair(*pair) for pair in names.items())


@functools.cache
def _known(names: str | None) -> Bijection:
    if names is None:
        return Bijection(itertools.chain(*FAMILIES.values()))
    known = FAMILIES | LIBRARIES
    family = names if names in known else names.rstrip("0123456789")  # qwen3
    if family not in known:
        raise ValueError(
            f"names must be one of {list(known)} or a mapping, got {names!r}"
            + did_you_mean(names, known)
        )
    return Bijection(known[family])


def join_index(path: str, index: Shape) -> str:
    """A kernel's path with an index in its stack, as "layers/fc/kernel[3]"."""
    return f"{path}[{','.join(map(str, index))}]" if index else path


def split_index(kernel: str) -> tuple[str, Shape]:
    path, bracket, index = kernel.partition("[")
    numbers = index.removesuffix("]").split(",") if bracket else []
    if not all(number.isdecimal() and number.isascii() for number in numbers):
        raise ValueError(f"an index in a stack must be numbers, got {kernel!r}")
    return path, tuple(map(int, numbers))


# --- The names that would fit ---


def suggestion(kernels: Collection[str], modules: Collection[str]) -> str:
    """The `names` that would fit, as the end of a message.

    `kernels` are paths with indices in their stacks, and `modules` are PyTorch's that
    may be the kernels. If none of them is like a kernel, names are guessed.
    """

    def numbers(name: str) -> list[str]:
        return re.findall(r"\d+", name)

    found, guesses = {}, {kernel: _guess(kernel) for kernel in kernels}
    for kernel, guess in guesses.items():
        alike = [m for m in modules if sorted(numbers(m)) == sorted(numbers(guess))]
        ends = {m: sorted(n.rpartition(".")[2] for n in (m, guess)) for m in alike}
        alike = [m for m, (short, long) in ends.items() if long.startswith(short)]
        if close := difflib.get_close_matches(guess, alike, n=1, cutoff=0.0):
            found[kernel] = close[0]
    # All layers of a model have one template.
    templates: dict[str, str] = {}
    for kernel, module in (found or guesses).items():
        fields = iter("nmk")
        for number in dict.fromkeys(numbers(module)):
            texts, whole = (module, kernel), rf"(?<!\d){number}(?!\d)"
            once = all(len(re.findall(whole, text)) == 1 for text in texts)
            if once and (field := next(fields, "")):
                module, kernel = (re.sub(whole, f"{{{field}}}", t) for t in texts)
        templates.setdefault(module, kernel)
    shown = json.dumps(dict(list(templates.items())[:8]))
    return f"templates name them, as in names={shown}, with PyTorch's names on the left"


def _guess(kernel: str) -> str:
    """The name that a kernel's module has in PyTorch if models' names agree."""
    path, index = split_index(kernel)
    parts = re.sub(r"_(\d+)(?=/)", r"/\1", path).split("/")[:-1] or [path]
    parts[1:1] = map(str, index)  # layers/up/kernel[3] is layers.3.up
    name, known = ".".join(parts), bijection(None)
    rooted = (f"{root}.{name}" for root in ("model", "transformer", "bert"))
    return next((name for name in rooted if any(known.of_module(name))), name)
