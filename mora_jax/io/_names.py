"""Names of PyTorch's modules and tensors, and the kernels that they are here."""

import dataclasses
import difflib
import itertools
import json
import re
from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from mora_jax._common.axes import sizes
from mora_jax._common.suggestions import did_you_mean
from mora_jax._common.types import Shape
from mora_jax._plan.spec import AdapterSpec
from mora_jax.io._families import FAMILIES, LIBRARIES, TABLES, Pair

Names = str | Mapping[str, str] | None
"""A family, a library, {module: kernel} as templates, or None for all families."""


def pairs(names: Names) -> tuple[Pair, ...]:
    """Return the pairs that `names` stands for, if they are well-formed."""
    if names is None:
        return tuple(dict.fromkeys(itertools.chain(*FAMILIES.values())))
    if isinstance(names, str):
        known = FAMILIES | LIBRARIES
        family = names if names in known else names.rstrip("0123456789")  # qwen3
        if family not in known:
            raise ValueError(
                f"names must be one of {list(known)} or a mapping, got {names!r}"
                + did_you_mean(names, known)
            )
        return known[family]
    texts = [*names, *names.values()] if isinstance(names, Mapping) else [None]
    if not all(isinstance(text, str) for text in texts):
        raise TypeError(f"names must be a family or map texts to texts, got {names!r}")
    for module, kernel in names.items():
        fields, others = sorted(_fields(module)), sorted(_fields(kernel))
        if fields != others or len(set(fields)) < len(fields):
            raise ValueError(
                f"names must have the same {{fields}} on both sides, once each, "
                f"got {module!r} and {kernel!r}"
            )
    return tuple(Pair(*pair) for pair in names.items())


_FIELD = re.compile(r"\{(\w+)\}")


def _fields(template: str) -> list[str]:
    """Return the names of a template's fields."""
    fields, text = _FIELD.findall(template), _FIELD.sub("", template)
    if not all(map(str.isidentifier, fields)) or re.search("[{}]", text):
        raise ValueError(
            "names must have braces around the names of fields alone, as in {n}, "
            f"got {template!r}"
        )
    return fields


def translate(text: str, source: str, target: str) -> str | None:
    """Return `text` in the words of `target`; None if `source` does not fit it."""
    # Every second part of the escaped template is the name of a field.
    parts = re.split(r"\\\{(\w+)\\\}", re.escape(source))
    parts[1::2] = [rf"(?P<{field}>[^./\[\],]+)" for field in parts[1::2]]
    match = re.fullmatch("".join(parts), text)
    return target.format(**match.groupdict()) if match else None


def to_kernels(module: str, known: tuple[Pair, ...]) -> Iterator[tuple[str, str]]:
    """Yield the kernels that a module may be, and the axes of its weight."""
    for pair in known:
        if kernel := translate(module, pair.module, pair.kernel):
            yield kernel, "io" if is_table(module, kernel) else pair.axes


def to_kernel(module: str, known: tuple[Pair, ...]) -> tuple[str, str] | None:
    """Return the likeliest of `to_kernels`."""
    return next(to_kernels(module, known), None)


def to_module(kernel: str, known: tuple[Pair, ...]) -> tuple[str, str] | None:
    """Return the module of a kernel, and the axes of the module's weight."""
    for pair in known:
        if module := translate(kernel, pair.kernel, pair.module):
            return module, pair.axes
    return None


def is_table(module: str, kernel: str) -> bool:
    """Return True if the module of a kernel looks up rows of its weight."""
    path, _, _ = kernel.partition("[")
    return module.rpartition(".")[2] in TABLES or path.endswith("embedding")


class Tensor(NamedTuple):
    """A name that PyTorch may have for the tensor of an array.

    `axes` is the order of its axes if the array's are "io", or "o" if it has one, and
    `order` has the array's axes with the inputs first, if they are not in order.
    """

    name: str
    axes: str
    order: tuple[int, ...] = ()


def to_tensors(leaf: str, known: tuple[Pair, ...]) -> Iterator[Tensor]:
    """Yield the tensors that the array at `leaf`, a path, may be, likeliest first."""
    # A template is of a module's weight and, at the same place, of its bias, or it
    # names one of the two itself. Without one the array is named as its tensor is.
    path, bracket, _ = leaf.partition("[")
    parent, _, last = path.rpartition("/")
    for pair in known:
        if module := translate(leaf, pair.kernel, pair.module):
            same = is_table(module, leaf) or pair.axes == pair.kernel_axes
            named = module.endswith((".weight", ".bias"))
            name = module if named else f"{module}.weight"
            mixed = pair.kernel_axes not in ("io", "oi")
            order = np.argsort(list(pair.kernel_axes), kind="stable") if mixed else ()
            yield Tensor(name, "io" if same else "oi", tuple(map(int, order)))
        if last == "bias":  # beside a kernel that has a name of its own
            bias = re.sub(r"/[^/\[{]+(\[.*)?$", r"/bias\1", pair.kernel)
            if module := translate(leaf, bias, pair.module):
                yield Tensor(f"{module}.bias", "o")
    if parent and not bracket and last in _LEAVES:
        name = "bias" if last == "bias" else "weight"
        yield Tensor(f"{parent.replace('/', '.')}.{name}", _LEAVES[last])


_LEAVES = {"kernel": "oi", "embedding": "io", "scale": "o", "weight": "o", "bias": "o"}
"""{Flax's name of a leaf: the order of the axes of its tensor in PyTorch}."""


def canonical(tensor: str) -> str:
    """Return the part of a tensor's name that is the same in all files of a model."""
    # A GPT-2 was saved as "transformer.wte.weight" or as "wte.weight", and BERT's norms
    # had gammas and betas once.
    roots = r"^((base_model|model|transformer|bert|language_model)\.)+"
    name = re.sub(roots, "", tensor)
    name = re.sub(r"(?<=LayerNorm\.)gamma$", "weight", name)
    return re.sub(r"(?<=LayerNorm\.)beta$", "bias", name)


def join_index(path: str, index: Shape) -> str:
    """Return a kernel's path with an index in its stack: "layers/fc/kernel[3]"."""
    return f"{path}[{','.join(map(str, index))}]" if index else path


def split_index(kernel: str) -> tuple[str, Shape]:
    """Undo `join_index`."""
    path, bracket, index = kernel.partition("[")
    numbers = index.removesuffix("]").split(",") if bracket else []
    if not all(number.isdecimal() and number.isascii() for number in numbers):
        raise ValueError(f"an index in a stack must be numbers, got {kernel!r}")
    return path, tuple(map(int, numbers))


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


def modules_of(path: str, spec: AdapterSpec, known: tuple[Pair, ...]) -> list[Module]:
    """Return the modules of a kernel; one that the names lack is called ""."""
    modules = []
    first, *others = sizes(spec.kernel_shape, spec.axes, "o")
    inner = spec.axes.replace("s", "")
    # PyTorch has one axis where a kernel has heads, and tables are as they are here.
    table_axes = re.sub(r"(.)\1+", r"\1", inner)
    for index in np.ndindex(spec.stack_shape):
        places = [join_index(path, index)]
        if others and inner.startswith("o") and not to_module(places[0], known):
            # The first axis may tell modules apart.
            parts = [join_index(path, (*index, k)) for k in range(first)]
            places = parts if any(to_module(part, known) for part in parts) else places
        width = spec.out_features // len(places)
        for k, place in enumerate(places):
            name, axes = to_module(place, known) or ("", "oi")
            table = name != "" and is_table(name, path)
            order = table_axes if table else axes
            outputs = slice(k * width, (k + 1) * width)
            modules.append(Module(name, order, table, index, outputs, place))
    return modules


def suggestion(kernels: Collection[str], modules: Collection[str]) -> str:
    """Return the `names` that would fit, as the end of a message.

    `kernels` are paths with indices in their stacks, and `modules` are PyTorch's that
    may be the kernels. If none of them is like a kernel, names are guessed.
    """
    found = [(m, kernel) for kernel in kernels if (m := _likeliest(kernel, modules))]
    # All layers of a model have one template.
    templates: dict[str, str] = {}
    for module, kernel in found or [(_guess(kernel), kernel) for kernel in kernels]:
        templates.setdefault(*_template(module, kernel))
    shown = json.dumps(dict(list(templates.items())[:8]))
    return f"templates name them, as in names={shown}, with PyTorch's names on the left"


def _likeliest(kernel: str, modules: Collection[str]) -> str | None:
    """Return the module most like a kernel, with its numbers and its last name."""
    guess = _guess(kernel)
    last, numbers = guess.rpartition(".")[2], sorted(re.findall(r"\d+", guess))
    alike = []
    for module in modules:
        end, own = module.rpartition(".")[2], sorted(re.findall(r"\d+", module))
        if own == numbers and (end.startswith(last) or last.startswith(end)):
            alike.append(module)
    return next(iter(difflib.get_close_matches(guess, alike, 1, 0)), None)


def _guess(kernel: str) -> str:
    """Return the name that a kernel's module has in PyTorch if models' names agree."""
    path, index = split_index(kernel)
    parts = re.sub(r"_(\d+)(?=/)", r"/\1", path).split("/")[:-1] or [path]
    parts[1:1] = map(str, index)  # layers/up/kernel[3] is layers.3.up
    name, known = ".".join(parts), pairs(None)
    roots = ("model.", "transformer.", "bert.")
    return next((r + name for r in roots if to_kernel(r + name, known)), name)


def _template(module: str, kernel: str) -> tuple[str, str]:
    """Return a module and a kernel with `{fields}` instead of shared numbers."""
    fields = iter("nmk")
    for number in dict.fromkeys(re.findall(r"\d+", module)):
        texts, whole = (module, kernel), rf"(?<!\d){number}(?!\d)"
        once = all(len(re.findall(whole, text)) == 1 for text in texts)
        if once and (field := next(fields, "")):
            module, kernel = (re.sub(whole, f"{{{field}}}", text) for text in texts)
    return module, kernel
