"""The record of a run, in a file beside the checkpoints that another library writes.

Such checkpoints hold arrays alone. The record says what their M's mean, and has digests
of the base's kernels, so that a run that goes on from them can be compared with it.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from mora_jax._common.messages import warn
from mora_jax._common.types import Path
from mora_jax._layer.adapter import Adapter
from mora_jax._plan.spec import AdapterSpec, Specs
from mora_jax._tree.base_digest import kernel_digests
from mora_jax._tree.paths import Found, named_leaves
from mora_jax.io import _files
from mora_jax.io._files import AdapterFileError, Location, together
from mora_jax.io.native import _records
from mora_jax.io.native._records import Record
from mora_jax.nnx._held import parameters, plan_of

FORMAT = "mora_jax run"
FILE = "mora_jax_run.json"
"""The name of the file, in the directory that holds a directory for each step."""

Digests = Mapping[Path, tuple[str, ...]]
"""{path of a kernel: digests, as `kernel_digests` gives them}."""


class Difference(NamedTuple):
    """A setting that two runs differ in: its two values, and the kernels."""

    setting: str
    there: Any
    here: Any
    kernels: list[str]

    def __str__(self) -> str:
        name = self.setting
        kernels = _count(self.kernels)
        return (
            f"{name}={self.there!r} there and {name}={self.here!r} here, at {kernels}"
        )


def check_run(directory: _files.PathLike, model: nnx.Module) -> None:
    """Compare an adapted model with the run whose checkpoints are in a directory.

    For trainers that store the numbers of M's alone, such as Tunix's. Call it before
    the trainer is made, with the base's weights in the model. If the directory holds
    checkpoints, the model must have the settings and the base that they were trained
    with. Else this begins a new run: it writes `mora_jax_run.json` into the directory,
    which the next call compares. All processes of a program must call it together.

    Args:
      directory: The directory in which the trainer makes one directory for each step.
      model: An adapted model, as `nnx.wrap` makes it.

    Raises:
      ValueError: The model lacks adapters, so that the trainer would train the base.
      io.AdapterFileError: The model has other adapters than the checkpoints, or another
        base; or the record is damaged. The message says which setting or kernel.
      RuntimeError: Another process failed, as in `save`.

    Example::

      >>> import tempfile, mora_jax
      >>> from flax import nnx
      >>> base = nnx.Linear(16, 16, rngs=nnx.Rngs(0))
      >>> model = mora_jax.nnx.wrap(base, mora_jax.MoRAConfig(alpha=2.0))
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     mora_jax.io.check_run(directory, model)
    """
    path = _files.as_path("directory", directory)
    specs = plan_of(model).parts
    digests = base_digests(specs, parameters(model))
    remedy = "put the weights of that base into the model before this call"
    with together("check_run") as alike:
        alike["the adapters and their base"] = run_text(specs, digests)
        if jax.process_index() == 0:
            stored = read_run(path) if _holds_steps(path) else None
            if stored is not None:
                check_settings(stored, specs, path)
                check_bases(stored, digests, path, remedy)
            elif _holds_steps(path):
                warn_of_no_record(path)
            write_run(path, specs, digests)


def _holds_steps(directory: Location) -> bool:
    """True if a directory has one for a step that Orbax has finished."""
    names = [e.name for e in _files.entries(directory) if e.is_dir()]
    finished = [name for name in names if "orbax-checkpoint-tmp" not in name]
    return any(re.search(r"\d$", name) for name in finished)


# --- What is written ---


def base_digests(specs: Specs, params: Any) -> Digests:
    """Digests of the adapted kernels in the base's params.

    All processes that share params must call this together. A kernel that is not one
    array there, such as a quantized one, is left out.
    """
    leaves = named_leaves(params)
    found = {}
    for path, spec in specs.items():
        _, kernel = leaves.get("/".join(path), (path, None))
        if isinstance(spec, AdapterSpec) and isinstance(kernel, jax.Array | np.ndarray):
            found[path] = kernel_digests(spec, kernel)
    return found


def run_text(specs: Specs, digests: Digests) -> str:
    """The record of a run, as text."""
    found = Found()
    for path, spec in sorted(specs.items()):
        if path in digests:
            spec: Any = dataclasses.replace(spec, base_digest=digests[path])
        found[path] = Adapter(None, spec)
    return _records.text_of(found, {"format": FORMAT})


def write_run(directory: Location, specs: Specs, digests: Digests) -> None:
    """Write the record of a run, whole or not at all, unless it is there already."""
    data = run_text(specs, digests).encode()
    file = directory / FILE
    if not file.exists() or file.read_bytes() != data:
        _files.replace_file(file, data)


# --- What is compared ---


def read_run(directory: Location) -> Record | None:
    """The record of the run in a directory; None without one."""
    file = directory / FILE
    if not file.exists():
        return None
    hint = "mora_jax writes it beside the checkpoints of another library"
    text = _files.read_bytes(file).decode(errors="replace")
    return _records.parse_record(text, FORMAT, {}, str(file), hint)


def warn_of_no_record(directory: Location) -> None:
    """Warn that nothing is known of the checkpoints in a directory."""
    warn(
        f"{directory} holds checkpoints and lacks {FILE}, so that they cannot be "
        "compared with this run: make sure that it has the same MoRAConfig and base; "
        "from now on it is taken for their run"
    )


def check_settings(stored: Record, specs: Specs, directory: Location) -> None:
    """Raise if adapters differ from the record of a run, or are of other arrays."""
    here = _parts(_own_record(specs))
    there = _parts(stored)
    if lacking := sorted(there.keys() - here.keys()):
        raise AdapterFileError(
            f"the checkpoints in {directory} have adapters that this run lacks, "
            f"at {_count(lacking)}; give MoRAConfig the same targets, exclude and "
            "train as then, or another directory to a new run"
        )
    if more := sorted(here.keys() - there.keys()):
        raise AdapterFileError(
            f"this run has adapters that the checkpoints in {directory} lack, "
            f"at {_count(more)}; give MoRAConfig the same targets, exclude and train "
            "as then, or another directory to a new run"
        )
    if differences := _differences(there, here):
        told = "; ".join(map(str, differences))
        raise AdapterFileError(
            f"the checkpoints in {directory} were trained with other settings than "
            f"this run has: {told}; {_remedy(differences, there)}, or give another "
            "directory to a new run"
        )


def check_bases(
    stored: Record, digests: Digests, directory: Location, remedy: str
) -> None:
    """Raise if the base is known to be another one than the record of a run has."""
    others = []
    for layer in stored["layers"]:
        there = layer.get("base_digest")
        here = digests.get(tuple(layer["path"]))
        if there and here and tuple(there) != here:
            others.append(("/".join(layer["path"]), there, here))
    if others:
        name, there, here = others[0]
        pairs = zip(there, here, strict=True)
        then, now = next(pair for pair in pairs if pair[0] != pair[1])
        raise AdapterFileError(
            f"the checkpoints in {directory} were trained on another base: "
            f"{_count([name for name, *_ in others])} hold other weights than then, "
            f"with the SHA-256 {then:.8} there and {now:.8} here; {remedy}, or give "
            "another directory to a new run"
        )


def _own_record(specs: Specs) -> Record:
    text = run_text(specs, {})
    return _records.parse_record(text, FORMAT, {}, "this run", "")


def _parts(record: Record) -> dict[str, dict[str, Any]]:
    """{path of an array of the base: what the record says of its adapter}."""
    found = {"/".join(part["path"]): _settings(part) for part in record["layers"]}
    for part in record["trained"]:
        name = f"{'/'.join(part['path'])} (trained itself)"
        found[name] = {"shape": part["shape"]}
    return found


def _settings(layer: Record) -> dict[str, Any]:
    """The settings in the record of a layer that decide its delta, and its budget."""
    operator = dict(layer["operator"])
    settings = {"operator": operator.pop("name"), "rank": layer.get("rank")}
    for name in ("kernel_shape", "axes", "square_rank", "operator_check"):
        settings[name] = layer[name]
    for name, value in operator.items():
        settings[name if name == "seed" else f"operator.{name}"] = value
    for name in ("alpha", "scale"):
        settings[name] = layer["settings"][name]
    return settings


def _differences(
    there: Mapping[str, dict[str, Any]], here: Mapping[str, dict[str, Any]]
) -> list[Difference]:
    """The settings in which two runs with adapters of the same arrays differ."""
    found: dict[tuple[str, str, str], Difference] = {}
    for kernel, then in there.items():
        now = here[kernel]
        for name in _differing(then, now):
            key = name, repr(then.get(name)), repr(now.get(name))
            new = Difference(name, then.get(name), now.get(name), [])
            found.setdefault(key, new).kernels.append(kernel)
    return list(found.values())


def _differing(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The names of settings of a kernel that a user would have to change."""
    differ = [n for n in {**then, **now} if then.get(n) != now.get(n)]
    if "operator_check" in differ and np.shape(then["operator_check"]) == (4,):
        # Chips round differently; other random numbers differ by more.
        checks = then["operator_check"], now["operator_check"]
        if np.allclose(*checks, 1e-3, 1e-3):
            differ.remove("operator_check")
    if len(differ) > 1:  # what differs explains that the operator does
        differ = [name for name in differ if name != "operator_check"]
    if "square_rank" not in differ:  # two budgets that buy the same q
        differ = [name for name in differ if name != "rank"]
    elif "rank" in differ and then["rank"] and now["rank"]:
        differ.remove("square_rank")
    else:
        differ = [name for name in differ if name != "rank"]
    # The user did not choose what follows from another operator or another q.
    if "operator" in differ:
        kept = [name for name in ("rank", "square_rank", "alpha") if name in differ]
        if "seed" in differ and "seed" in then and "seed" in now:
            kept.append("seed")
        return ["operator", *kept]
    if {"rank", "square_rank"} & set(differ):
        differ = [name for name in differ if name != "scale"]
    return differ


def _remedy(differences: list[Difference], there: Mapping[str, Any]) -> str:
    """The line that gives this run the settings of the other one."""
    names = {difference.setting for difference in differences}
    stored = {kernel: there[kernel] for each in differences for kernel in each.kernels}
    if names & {"kernel_shape", "axes"}:
        return "give the same model as then"
    if "operator_check" in names:
        return "use the versions of mora_jax and JAX that trained them"
    # The record holds digests of arrays that were given, and not the arrays.
    if any("operator.digests" in settings for settings in stored.values()):
        return "give the model the operator, directions and input damping of then"
    chosen: dict[str, list[Any]] = {}
    for difference in differences:
        name = difference.setting
        if name.startswith("operator."):
            name = "operator"
        value = _as_config(name, there[difference.kernels[0]])
        chosen.setdefault(name, []).append(value)
    told = ", ".join(f"{name}={values[0]!r}" for name, values in chosen.items())
    for_all = len(stored) == len(there)
    for_all &= all(value == values[0] for values in chosen.values() for value in values)
    where = "" if for_all else ", in overrides where it is not for all kernels"
    return f"to go on with them give MoRAConfig({told}){where}"


def _as_config(name: str, stored: Mapping[str, Any]) -> Any:
    """The value of a setting of MoRAConfig that gives what a record holds."""
    if name == "operator":
        start = "operator."
        own = {k.removeprefix(start): stored[k] for k in stored if k.startswith(start)}
        return {"name": stored["operator"], **own} if own else stored["operator"]
    if name == "scale":
        return "paper" if stored["scale"] == 1 else "fine-tuning"
    return stored[name]


def _count(kernels: Iterable[str]) -> str:
    """Kernels in a message: their number, and the first one's path."""
    first, *others = kernels
    if not others:
        return f"{first!r}"
    return f"{1 + len(others)} kernels such as {first!r}"
