"""Templates to propose for modules and kernels that no template fits."""

import difflib
import json
import re
from collections.abc import Collection, Iterable

from mora_jax.io._names import pairs, split_index, to_kernel

SHOWN = 6
"""The most templates that are proposed."""


def suggestion(kernels: Iterable[str], modules: Collection[str]) -> str:
    """Return the `names` that would fit, as the end of a message.

    `kernels` are paths that no template fits, with indices in their stacks, and
    `modules` the base's modules in PyTorch, if they are known.
    """
    likeliest = {kernel: _likeliest(kernel, modules) for kernel in kernels}
    doubt = ", with PyTorch's names of the modules on the left"
    shown = _shown((module or _guess(k), k) for k, module in likeliest.items())
    return f"templates name it, as in {shown}{doubt * (None in likeliest.values())}"


def suggestion_for(modules: Collection[str], kernels: Iterable[str]) -> str:
    """Return the same for modules that no template fits, and paths of kernels."""
    own = {m: m.replace(".", "/") + "/kernel" for m in modules}
    paths = {kernel.rpartition("/")[0].replace("/", "."): kernel for kernel in kernels}
    paths = paths or own  # a checkpoint that was read by the same names has none
    likeliest = {m: _likeliest(kernel, paths) for m, kernel in own.items()}
    known = [(m, paths[name]) for m, name in likeliest.items() if name]
    if not known:
        return "templates name them: give names={module: path of its kernel}"
    return f"templates name them, as in {_shown(known)}"


def _shown(pairs: Iterable[tuple[str, str]]) -> str:
    """Return templates of modules and kernels as an argument."""
    templates: dict[str, str] = {}
    for pair in pairs:
        templates.setdefault(*_templates(*pair))
    return f"names={json.dumps(dict(list(templates.items())[:SHOWN]))}"


def _likeliest(kernel: str, modules: Iterable[str]) -> str | None:
    """Return the module most like a kernel, with its numbers and its last name."""
    path, index = split_index(kernel)
    path, _, _ = path.rpartition("/")
    numbers = sorted([*re.findall(r"\d+", path), *map(str, index)])
    last = path.rpartition("/")[2]

    def same_kind(module: str) -> bool:
        end = module.rpartition(".")[2]
        same_end = end.startswith(last) or last.startswith(end)
        return same_end and sorted(re.findall(r"\d+", module)) == numbers

    def alike(module: str) -> float:
        names = module.replace(".", "/")
        return difflib.SequenceMatcher(None, path, names, autojunk=False).ratio()

    return max(filter(same_kind, modules), key=alike, default=None)


def _guess(kernel: str) -> str:
    """Return the name that a kernel's module has in PyTorch if models' names agree."""
    path, index = split_index(kernel)
    parts = re.sub(r"_(\d+)(?=/)", r"/\1", path).split("/")[:-1] or [path]
    parts[1:1] = map(str, index)
    name, known = ".".join(parts), pairs(None)
    roots = ("model.", "transformer.", "bert.")
    return next((r + name for r in roots if to_kernel(r + name, known)), name)


def _templates(module: str, kernel: str) -> tuple[str, str]:
    """Return a module and a kernel with `{fields}` instead of what they share.

    They share numbers and, after a number, whole names. All layers of a model then have
    the same template.
    """
    numbers = dict.fromkeys(re.findall(r"\d+", module))
    for number, field in zip(numbers, "nmk", strict=False):
        pattern = rf"(?<!\d){number}(?!\d)"
        if all(len(re.findall(pattern, text)) == 1 for text in (module, kernel)):
            module, kernel = (
                re.sub(pattern, f"{{{field}}}", text) for text in (module, kernel)
            )
    root, number, names = module.rpartition("}.")
    path, bracket, index = kernel.partition("[")
    in_kernel, in_module = path.split("/"), names.split(".")
    shared = [name for name in in_module if number and name in in_kernel]
    shared = dict.fromkeys(reversed(shared))
    fields = dict(zip(shared, ("{name}", "{block}", "{part}"), strict=False))
    in_kernel, in_module = (
        [fields.get(name, name) for name in names] for names in (in_kernel, in_module)
    )
    if any(in_kernel.count(name) > 1 for name in in_kernel):
        return module, kernel
    return root + number + ".".join(in_module), "/".join(in_kernel) + bracket + index
