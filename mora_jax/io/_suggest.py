"""Templates to propose for modules and kernels that no template fits."""

import difflib
import itertools
import json
import re
from collections.abc import Collection, Iterable

from mora_jax.io._names import pairs, split_index, to_kernel

SHOWN = 6
"""The most templates that are proposed."""


def suggestion(kernels: Collection[str], modules: Iterable[str]) -> str:
    """Return the `names` that would fit, as the end of a message.

    `kernels` are paths with indices in their stacks, and `modules` are PyTorch's that
    may be the kernels. If none of them is like a kernel, names are guessed.
    """
    found = [(m, kernel) for kernel in kernels if (m := _likeliest(kernel, modules))]
    # All layers of a model have one template.
    templates: dict[str, str] = {}
    for module, kernel in found or [(_guess(kernel), kernel) for kernel in kernels]:
        templates.setdefault(*_template(module, kernel))
    shown = json.dumps(dict(itertools.islice(templates.items(), SHOWN)))
    return f"templates name them, as in names={shown}, with PyTorch's names on the left"


def _likeliest(kernel: str, modules: Iterable[str]) -> str | None:
    """Return the module most like a kernel, with its numbers and its last name."""
    path, index = split_index(kernel)
    path, _, _ = path.rpartition("/")
    last, numbers = path.rpartition("/")[2], re.findall(r"\d+", f"{path}{index}")
    alike = {}
    for module in modules:
        end, own = module.rpartition(".")[2], re.findall(r"\d+", module)
        same_end = end.startswith(last) or last.startswith(end)
        if same_end and sorted(own) == sorted(numbers):
            names = module.replace(".", "/")
            matcher = difflib.SequenceMatcher(None, path, names, autojunk=False)
            alike[module] = matcher.ratio()
    return max(alike, key=alike.__getitem__, default=None)


def _guess(kernel: str) -> str:
    """Return the name that a kernel's module has in PyTorch if models' names agree."""
    path, index = split_index(kernel)
    parts = re.sub(r"_(\d+)(?=/)", r"/\1", path).split("/")[:-1] or [path]
    parts[1:1] = map(str, index)
    name, known = ".".join(parts), pairs(None)
    roots = ("model.", "transformer.", "bert.")
    return next((r + name for r in roots if to_kernel(r + name, known)), name)


def _template(module: str, kernel: str) -> tuple[str, str]:
    """Return a module and a kernel with `{fields}` instead of what they share.

    They share numbers and, after a number, whole names.
    """
    _, *behind = re.split(r"\.\d+\.", module)
    numbers, names = re.findall(r"\d+", module), behind[-1].split(".") if behind else []
    for words, character, fields in (
        (numbers, r"\d", iter("nmk")),
        (reversed(names), r"[^./\[]", iter(("name", "block", "part"))),
    ):
        for word in dict.fromkeys(words):
            texts = module, kernel
            whole = rf"(?<!{character}){re.escape(word)}(?!{character})"
            once = all(len(re.findall(whole, text)) == 1 for text in texts)
            if once and (field := next(fields, "")):
                module, kernel = (re.sub(whole, f"{{{field}}}", t) for t in texts)
    return module, kernel
