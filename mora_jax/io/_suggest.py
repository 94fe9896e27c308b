"""Templates to propose for modules and kernels that no template fits."""

import difflib
import json
import re
from collections.abc import Collection, Iterable

from mora_jax.io._names import pairs, split_index, to_kernel

SHOWN = 6
"""The most templates that are proposed."""


def suggestion(kernels: Iterable[str], modules: Collection[str]) -> str:
    """The `names` that would fit, as the end of a message.

    Args:
      kernels: Paths of kernels that no template fits, with indices in their stacks.
      modules: The base's modules in PyTorch, if they are known.
    """
    found: dict[str, str] = {}
    guessed = False
    for kernel in kernels:
        module = _likeliest(kernel, modules)
        guessed |= module is None
        found.setdefault(*_templates(module or _guess(kernel), kernel))
    shown = json.dumps(dict(list(found.items())[:SHOWN]))
    doubt = ", with PyTorch's names of the modules on the left" * guessed
    return f"templates name it, as in names={shown}{doubt}"


def suggestion_for(modules: Collection[str], kernels: Iterable[str]) -> str:
    """The same for modules that no template fits, and paths of a model's kernels."""
    paths = {kernel.rpartition("/")[0].replace("/", "."): kernel for kernel in kernels}
    if not paths:  # such as those of a checkpoint that was read by the same names
        paths = {name: name.replace(".", "/") + "/kernel" for name in modules}
    found: dict[str, str] = {}
    for module in modules:
        name = _likeliest(module.replace(".", "/") + "/kernel", paths)
        if name is not None:
            found.setdefault(*_templates(module, paths[name]))
    if not found:
        return "templates name them: give names={module: path of its kernel}"
    shown = json.dumps(dict(list(found.items())[:SHOWN]))
    return f"templates name them, as in names={shown}"


def _likeliest(kernel: str, modules: Iterable[str]) -> str | None:
    """The module that is most like the kernel, with its numbers and its last name."""
    path, index = split_index(kernel)
    path = path.rpartition("/")[0]
    numbers = sorted([*re.findall(r"\d+", path), *map(str, index)])
    last = path.rpartition("/")[2]

    def same_kind(module: str) -> bool:
        end = module.rpartition(".")[2]
        return sorted(re.findall(r"\d+", module)) == numbers and (
            end.startswith(last) or last.startswith(end)
        )

    def alike(module: str) -> float:
        names = module.replace(".", "/")
        return difflib.SequenceMatcher(None, path, names, autojunk=False).ratio()

    return max(filter(same_kind, modules), key=alike, default=None)


def _guess(kernel: str) -> str:
    """The name that a kernel's module has in PyTorch if the models' names agree."""
    path, index = split_index(kernel)
    parts = re.sub(r"_(\d+)(?=/)", r"/\1", path).split("/")[:-1] or [path]
    parts[1:1] = map(str, index)
    known = pairs(None)
    for root in ("model.", "transformer.", "bert."):
        if to_kernel(module := root + ".".join(parts), known) is not None:
            return module
    return ".".join(parts)


def _templates(module: str, kernel: str) -> tuple[str, str]:
    """A module and a kernel with `{fields}` in place of what they share.

    They share numbers and, after a number, whole names. All layers of a model then have
    the same template.
    """
    for number, field in zip(
        dict.fromkeys(re.findall(r"\d+", module)), "nmk", strict=False
    ):
        pattern = rf"(?<!\d){number}(?!\d)"
        if all(len(re.findall(pattern, text)) == 1 for text in (module, kernel)):
            module, kernel = (
                re.sub(pattern, f"{{{field}}}", text) for text in (module, kernel)
            )
    root, number, names = module.rpartition("}.")
    path, bracket, index = kernel.partition("[")
    in_kernel, in_module = path.split("/"), names.split(".")
    shared = [name for name in in_module if number and name in in_kernel]
    for name, field in zip(reversed(shared), ("name", "block", "part"), strict=False):
        in_kernel, in_module = (
            [f"{{{field}}}" if part == name else part for part in parts]
            for parts in (in_kernel, in_module)
        )
    if any(in_kernel.count(part) > 1 for part in in_kernel):
        return module, kernel
    return root + number + ".".join(in_module), "/".join(in_kernel) + bracket + index
