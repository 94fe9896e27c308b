"""Which templates would name modules that no template names."""

import difflib
import json
import re
from collections.abc import Collection, Iterable

from mora_jax.io._names import pairs, split_index, to_kernel

SHOWN = 6
"""At most so many templates are proposed."""


def suggestion(kernels: Iterable[str], modules: Collection[str]) -> str:
    """The end of a message: the `names` that would do.

    Args:
      kernels: Paths of kernels that no template fits, with places in stacks.
      modules: The base's modules in PyTorch, if they are known.
    """
    found: dict[str, str] = {}
    guessed = False
    for kernel in kernels:
        module = _likeliest(kernel, modules)
        guessed |= module is None
        found.setdefault(*_templates(module or _guess(kernel), kernel))
    shown = json.dumps(dict(list(found.items())[:SHOWN]))
    doubt = ", with what PyTorch calls the modules on the left" * guessed
    return f"templates name it, as in names={shown}{doubt}"


def suggestion_for(modules: Collection[str], kernels: Iterable[str]) -> str:
    """The same for modules that no template fits, and paths of a model's kernels."""
    ours = {kernel.rpartition("/")[0].replace("/", "."): kernel for kernel in kernels}
    if not ours:  # as of a checkpoint that was read by the same names
        ours = {name: name.replace(".", "/") + "/kernel" for name in modules}
    found: dict[str, str] = {}
    for module in modules:
        name = _likeliest(module.replace(".", "/") + "/kernel", ours)
        if name is not None:
            found.setdefault(*_templates(module, ours[name]))
    if not found:
        return "templates name them: give names={module: path of its kernel}"
    shown = json.dumps(dict(list(found.items())[:SHOWN]))
    return f"templates name them, as in names={shown}"


def _likeliest(kernel: str, modules: Iterable[str]) -> str | None:
    """The module that is most like the kernel, of the same numbers and last name."""
    path, index = split_index(kernel)
    path = path.rpartition("/")[0]
    numbers = sorted([*re.findall(r"\d+", path), *map(str, index)])
    last = path.rpartition("/")[2]

    def same_kind(module: str) -> bool:
        other = module.rpartition(".")[2]
        return sorted(re.findall(r"\d+", module)) == numbers and (
            other.startswith(last) or last.startswith(other)
        )

    def alike(module: str) -> float:
        names = module.replace(".", "/")
        return difflib.SequenceMatcher(None, path, names, autojunk=False).ratio()

    return max(filter(same_kind, modules), key=alike, default=None)


def _guess(kernel: str) -> str:
    """The module that a model named like the kernel would have in PyTorch."""
    path, index = split_index(kernel)
    parts = re.sub(r"_(\d+)(?=/)", r"/\1", path).split("/")[:-1] or [path]
    parts[1:1] = map(str, index)
    known = pairs(None)
    for root in ("model.", "transformer.", "bert."):
        if to_kernel(module := root + ".".join(parts), known) is not None:
            return module
    return ".".join(parts)


def _templates(module: str, kernel: str) -> tuple[str, str]:
    """A module and a kernel with `{fields}` where they agree.

    Those are numbers and, below a number, whole names: all layers of a model then have
    one template.
    """
    for number, field in zip(
        dict.fromkeys(re.findall(r"\d+", module)), "nmk", strict=False
    ):
        once = rf"(?<!\d){number}(?!\d)"
        if all(len(re.findall(once, text)) == 1 for text in (module, kernel)):
            module, kernel = (
                re.sub(once, f"{{{field}}}", text) for text in (module, kernel)
            )
    root, number, names = module.rpartition("}.")
    ours, bracket, index = kernel.partition("[")
    parts, theirs = ours.split("/"), names.split(".")
    shared = [name for name in theirs if number and name in parts]
    for name, field in zip(reversed(shared), ("name", "block", "part"), strict=False):
        parts, theirs = (
            [f"{{{field}}}" if part == name else part for part in each]
            for each in (parts, theirs)
        )
    if any(parts.count(each) > 1 for each in parts):
        return module, kernel
    return root + number + ".".join(theirs), "/".join(parts) + bracket + index
