r"""MoRA in vLLM: M's are served as they are, beside LoRAs and the base.

.. math:: y \mathrel{+}= D(C(x) M)

vLLM calls `register` in each of its processes, by the entry point of this package.
From then on it loads what `io.export(..., "vllm", native=True)` writes as it loads any
LoRA. Its C and D are maps of numbers, so that nothing here needs operators or JAX.
"""

# pyright: reportMissingImports=false

import functools
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load
from torch.nn.functional import linear
from vllm.config import CUDAGraphMode
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.logger import init_logger
from vllm.lora.layers import base_linear, classifier, column_parallel_linear
from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase
from vllm.lora.utils import parse_fine_tuned_lora_name
from vllm.model_executor.models.utils import is_pp_missing_parameter
from vllm.platforms import current_platform

from mora_jax._common.methods import leads_to
from mora_jax._common.squares import KEY, VERSION, read_checked

logger = init_logger("vllm.mora_jax")  # vLLM shows what loggers below its own say

Layer = base_linear.BaseLinearLayerWithLoRA
Head = classifier.ClassificationHeadWithLoRA
APPLY = "_apply_lora_to_output"  # the method of layers that adds LoRAs, and M's
INSTEAD = "merge the adapter, or export it as a LoRA (without native=True)"


class Map(NamedTuple):
    """C or D, from `ins` to `outs` numbers: a matrix, or sums of few numbers each."""

    weight: torch.Tensor  # (outs, ins), or (outs, t) of the numbers that `indices` name
    indices: torch.Tensor | None  # (outs, t), those that each output is a sum of

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(rows, ins) to (rows, outs)."""
        if self.indices is None:
            return linear(x, self.weight)
        return (x[:, self.indices] * self.weight).sum(-1)


class Square(NamedTuple):
    """The adapter of one module."""

    shape: tuple[int, int]  # (in_features, out_features)
    m: torch.Tensor  # (n, p, s), or (1, p, s) where one M multiplies all rows of C(x)
    compress: Map  # C, from in_features to the rows of p
    decompress: Map  # D, from rows of s to out_features
    # V, (in_features, k), and what C, M and D make of it, (k, out_features): an input's
    # part along V is not seen.
    damped: tuple[torch.Tensor, torch.Tensor] | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(rows, in_features) to (rows, out_features)."""
        n, p, _ = self.m.shape
        h = self.compress(x).view(len(x), -1, p)
        h = h @ self.m[0] if n == 1 else torch.einsum("tnp,nps->tns", h, self.m)
        y = self.decompress(h.flatten(1))
        if self.damped is None:
            return y
        v, outputs = self.damped
        return y - (x @ v) @ outputs


class Part(NamedTuple):
    """Adapter on one device, of a layer's outputs from the `start`-th on.

    Of several devices each has the features `ins` and `outs`. It computes with zeros
    for other inputs, since sums over devices come after the layer, and with all of M.
    """

    start: int
    square: Square
    ins: torch.Tensor | None
    outs: torch.Tensor | None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(rows, inputs here) to (rows, outputs here)."""
        if self.ins is None:
            return self.square(x)
        whole = x.new_zeros(len(x), self.square.shape[0])
        whole[:, self.ins] = x
        return self.square(whole)[:, self.outs]


class Squares(LoRAModel):
    """An adapter without LoRAs.

    `squares` has the adapters of modules, and `placed` their parts by vLLM's layers.
    `ran` names the layers whose outputs they were added to, and `told` is True once the
    others were reported.
    """

    squares: dict[str, Square]
    placed: dict[str, list[Part]]
    ran: set[str]
    told: bool


def read(
    directory: str, named: Callable[[str], str], dtype: torch.dtype
) -> dict[str, Square]:
    """Read adapters by their modules, as `named` calls them.

    Raises:
      ValueError: the files are not as they were exported, or do not fit each other.
    """
    modules, data = read_checked(directory)
    device, found = current_platform.device_type, {}
    tensors = {name: array.to(device) for name, array in load(data).items()}
    if not all(array.isfinite().all() for array in tensors.values()):
        raise ValueError(f"{directory} must hold finite numbers")

    @functools.cache
    def fixed(name: str, ins: int) -> Map:
        weight, indices = tensors[f"{name}.weight"], tensors.get(f"{name}.index")
        if indices is None:
            _check(weight.shape[1] == ins, name, weight)
            return Map(weight.to(dtype), None)
        _check(indices.shape == weight.shape, name, indices)
        _check(0 <= indices.min() and indices.max() < ins, name, indices)
        return Map(weight.to(dtype), indices.long())

    for module, entry in modules.items():
        try:
            ins, outs, m = entry["in"], entry["out"], tensors[f"{module}.m"]
            n, p, s = m.shape
            c = fixed(entry["compress"], ins)
            rows = len(c.weight) // p
            d = fixed(entry["decompress"], rows * s)
            _check(rows * p == len(c.weight) and n in (1, rows), "M", m)
            _check(len(d.weight) == outs, "D", d.weight)
            square = Square((ins, outs), m.to(dtype), c, d)
            if "damped" in entry:
                v = tensors[f"{entry['damped']}.v"].to(dtype)
                _check(len(v) == ins, "V", v)
                square = square._replace(damped=(v, square(v.T)))
        except Exception as error:  # of whatever a stranger's file makes of torch
            raise ValueError(f"{directory}, {module}: {error!r}") from error
        found[named(module)] = square
    return found


def _check(fits: Any, name: str, array: torch.Tensor) -> None:
    if not fits:
        raise ValueError(f"{name} of shape {tuple(array.shape)} must fit the others")


def place(manager: Any, squares: Mapping[str, Square]) -> dict[str, list[Part]]:
    """The parts of adapters that this process computes, by vLLM's layers."""
    config, left, placed = manager.lora_config, dict(squares), {}
    if config.fully_sharded_loras or base_linear.envs.VLLM_LORA_ENABLE_DUAL_STREAM:
        raise ValueError("M's are served without fully sharded LoRAs or dual streams")
    if manager.device.type not in ("cpu", "cuda"):
        raise ValueError(f"M's are served on CPUs and GPUs, got {manager.device.type}")
    for name, layer in manager.modules.items():
        modules = manager.packed_modules.get(name, [name])
        own = {k: m for k, m in enumerate(modules) if m in left}
        if own:
            reason = _why_not(manager, name, layer)
            if reason is not None:
                raise ValueError(
                    f"{own[min(own)]} must be a linear layer of a text model whose "
                    f"outputs vLLM adds LoRAs to by the usual method, got a "
                    f"{type(layer).__name__}, which {reason}: {INSTEAD}"
                )
        for k, m in own.items():
            part = _part(layer, k, len(modules), m, left.pop(m))
            placed.setdefault(name, []).append(part)
    lost = [name for name in left if not is_pp_missing_parameter(name, manager.model)]
    if lost:
        names = ", ".join(sorted(lost)[:3])
        raise ValueError(f"the base has no linear layer for {names}")
    return placed


def _why_not(manager: Any, name: str, layer: Any) -> str | None:
    """The reason why M's of a layer would not be added, or None if they are."""
    language = manager.mm_mapping.language_model[0] if manager.supports_mm else ""
    if not isinstance(layer, Layer):
        return "is not of a linear layer"
    if not name.startswith(language):
        return "is of another part of the model"
    if not is_served(type(layer)):
        return f"adds LoRAs by a method of its own and not by {Layer.__name__}.{APPLY}"
    if isinstance(layer, Head):
        if manager._pooling_task != "classify":
            return f"vLLM leaves out of the task {manager._pooling_task!r}"
        return None
    packed = manager.packed_modules.get(name, [name])
    if len(packed) > 1 and len(packed) != len(layer.output_slices):
        return f"has {len(layer.output_slices)} slices for {len(packed)} modules"
    for holder, held in _modules_in(manager.model):
        if held is layer.base_layer and holder is not layer:
            return f"{type(holder).__name__} calls without LoRAs"
        if held is layer and hasattr(holder, "process_weights_after_loading"):
            return f"{type(holder).__name__} may use by its kernel, without LoRAs"
    return None


def is_served(cls: type) -> bool:
    """Return True if layers of this class add M's, by the code that they would run.

    The method that adds LoRAs must be one that `register` has wrapped, and `forward`
    must lead to it. A subclass that overrides the one, or that no longer calls it, is
    found so, whatever its name.
    """
    return hasattr(getattr(cls, APPLY, None), KEY) and leads_to(cls, "forward", APPLY)


def _modules_in(root: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, Any]]:
    """Pairs of a module and one that it holds, in dicts and lists as well.

    Torch registers no module that stands in a plain dict, as vLLM's poolers do.
    """
    left, seen = [root], {id(root)}
    while left:
        holder = left.pop()
        own = [*holder._modules.values()]
        for value in vars(holder).values():
            if isinstance(value, Mapping):
                own.extend(value.values())
            elif isinstance(value, list | tuple):
                own.extend(value)
        for held in own:
            if isinstance(held, torch.nn.Module):
                yield holder, held
                if id(held) not in seen:
                    seen.add(id(held))
                    left.append(held)


def _part(layer: Any, k: int, count: int, name: str, square: Square) -> Part:
    """The part of the k-th of `count` modules that are one layer."""
    columns = isinstance(layer, column_parallel_linear.ColumnParallelLinearWithLoRA)
    devices, base = layer.tp_size, layer.base_layer
    copies = getattr(base, "num_kv_head_replicas", 1)
    widths = layer.output_slices if count > 1 else (sum(layer.output_slices),)
    inputs = base.input_size  # of all devices together
    shards = (devices, devices // copies) if columns else (1,)
    sizes = {(inputs, widths[k] * n) for n in shards}
    if square.shape not in sizes:
        rule = f"{name} must have {' or '.join(map(str, sizes))} inputs and outputs"
        raise ValueError(f"{rule}, got {square.shape}: this adapter is of another base")
    start = sum(widths[:k])
    if devices == 1:
        return Part(start, square, None, None)
    # vLLM cuts numbers of features as it would cut a LoRA's A and B.
    a, b = torch.arange(inputs)[None], torch.arange(square.shape[1])[:, None]
    a = layer.slice_lora_a([a] * count)[k] if count > 1 else layer.slice_lora_a(a)
    b = layer.slice_lora_b([b] * count)[k] if count > 1 else layer.slice_lora_b(b)
    return Part(start, square, a[0], b[:, 0])


@torch.library.custom_op("mora_jax::add_squares", mutates_args={"y"})
def add_squares(x: torch.Tensor, y: torch.Tensor, name: str) -> None:
    """Add to a layer's outputs y what the adapter of each token makes of x.

    To torch.compile it is one operation, since the adapters change after compiling, and
    one at which graphs are cut: it runs between two recorded ones, as attention does.
    """
    if not is_forward_context_available():
        return
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("a recorded graph cannot follow M's: use --enforce-eager")
    known: Any = get_forward_context().no_compile_layers
    manager, module = known[name]
    _add(x, y, manager, module, manager.modules[module].punica_wrapper.rows)


def _add(
    x: torch.Tensor,
    y: torch.Tensor,
    manager: Any,
    module: str,
    rows_of: Mapping[int, torch.Tensor],
) -> None:
    """Add the parts of one layer, given the rows of each adapter."""
    for lora_id, rows in rows_of.items():
        adapter = manager.get_adapter(lora_id)
        if not isinstance(adapter, Squares) or module not in adapter.placed:
            continue
        adapter.ran.add(module)
        for part in adapter.placed[module]:
            added = part(x[rows].to(part.square.m.dtype))
            y[rows, part.start : part.start + added.shape[1]] += added.to(y.dtype)


def _started(old: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    """After `LoRAModelManager.__init__`: `add_squares` finds layers by their names."""
    old(self, *args, **kwargs)
    config = kwargs["vllm_config"]
    compiled = config.compilation_config
    if compiled.splitting_ops:
        compiled.splitting_ops.append("mora_jax::add_squares")
    if compiled.cudagraph_mode.has_full_cudagraphs():
        cut = "PIECEWISE" if compiled.splitting_ops else "NONE"
        compiled.cudagraph_mode = CUDAGraphMode[cut]
    # What was compiled without this plug-in must not be found again.
    config.additional_config = {**config.additional_config, KEY: VERSION}
    for name, layer in self.modules.items():
        layer.mora_name = f"{KEY}.{name}"
        compiled.static_forward_context[layer.mora_name] = self, name
        if isinstance(layer, Head):  # it runs after the model, without its context
            layer.mora_manager = self
            layer.mora_module = name


def _mapped(old: Any, self: Any, mapping: Any, *args: Any) -> None:
    """After `PunicaWrapperBase._update_base_metadata`: the rows of each adapter."""
    # Once in a step and on the host, since to look for them on a GPU makes it wait.
    old(self, mapping, *args)
    self.rows = _rows(mapping.index_mapping, self.device)
    self.prompt_rows = _rows(mapping.prompt_mapping, self.device)


def _rows(mapping: Any, device: Any) -> dict[int, torch.Tensor]:
    """{adapter: its rows}, given the adapter of each row."""
    ids = np.array(mapping)
    return {
        lora_id: torch.from_numpy((ids == lora_id).nonzero()[0]).to(device)
        for lora_id in {*mapping}
    }


def _changed(old: Any, self: Any, mapping: Any) -> None:
    """Before `LoRAModelManager.set_adapter_mapping`: a look at the batch that ran."""
    last = self._last_mapping
    for lora_id in {*last.index_mapping} if last is not None else ():
        adapter = self.get_adapter(lora_id)
        if isinstance(adapter, Squares):
            _report_idle(adapter)
    old(self, mapping)


def _report_idle(adapter: Squares) -> None:
    """Log the layers that were not called, so that their M's were not added.

    A module may compute with the kernel of a layer and never call it, as Mamba's does
    with `conv1d`.
    """
    idle = sorted(adapter.placed.keys() - adapter.ran)
    if adapter.ran and idle and not adapter.told:
        adapter.told = True
        logger.warning(
            "vLLM added the M's of %s to no output, since it does not call these "
            "layers: the answers are not those of the merged model. To use them, %s",
            ", ".join(idle[:3]) + ", ..." * (len(idle) > 3),
            INSTEAD,
        )


def _added(old: Any, self: Any, lora: LoRAModel) -> None:
    """`LoRAModelManager._add_adapter`; an adapter of another base is refused."""
    if not isinstance(lora, Squares):
        return old(self, lora)
    lora.placed = place(self, lora.squares)
    self._registered_adapters[lora.id] = lora


def _applied(old: Any, self: Any, x: torch.Tensor, output: torch.Tensor) -> Any:
    """A layer's outputs with LoRAs, by `_apply_lora_to_output`, and with M's."""
    y = old(self, x, output)
    rows = x.view(-1, x.shape[-1]), y.view(-1, y.shape[-1])
    torch.ops.mora_jax.add_squares(*rows, self.mora_name)
    return y


def _classified(old: Any, self: Any, x: torch.Tensor, output: torch.Tensor) -> Any:
    """Scores of a classifier's head, which has one row for each prompt of the batch."""
    y = old(self, x, output)
    _add(
        x.view(-1, x.shape[-1]),
        y.view(-1, y.shape[-1]),
        manager=self.mora_manager,
        module=self.mora_module,
        rows_of=self.punica_wrapper.prompt_rows,
    )
    return y


def _loaded(old: Any, cls: Any, lora_dir: str, *args: Any, **kwargs: Any) -> Any:
    """`LoRAModel.from_local_checkpoint`, of our files as well."""
    config = json.loads(pathlib.Path(lora_dir, "adapter_config.json").read_bytes())
    if KEY not in config:
        return old(cls, lora_dir, *args, **kwargs)

    def named(module: str) -> str:
        tensor, mapper = f"base_model.model.{module}", kwargs.get("weights_mapper")
        return parse_fine_tuned_lora_name(f"{tensor}.lora_A.weight", mapper)[0]

    model = Squares(kwargs["lora_model_id"], config["r"], {})
    model.squares = read(lora_dir, named, kwargs["dtype"])
    model.ran = set()
    model.told = False
    return model


def register() -> None:
    """Teach vLLM to load M's. Further calls do nothing."""
    if hasattr(LoRAModel, KEY):
        return

    def around(old: Any, new: Callable[..., Any]) -> Any:
        @functools.wraps(old)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            return new(old, *args, **kwargs)

        setattr(wrapped, KEY, VERSION)  # `is_served` looks for it
        return wrapped

    for cls, name, new in (
        (LoRAModelManager, "__init__", _started),
        (PunicaWrapperBase, "_update_base_metadata", _mapped),
        (LoRAModelManager, "_add_adapter", _added),
        (LoRAModelManager, "set_adapter_mapping", _changed),
        (Layer, APPLY, _applied),
        (Head, APPLY, _classified),
    ):
        setattr(cls, name, around(getattr(cls, name), new))
    # At last: a vLLM that lacks one of the methods above loads no M.
    load_lora = around(LoRAModel.from_local_checkpoint.__func__, _loaded)
    LoRAModel.from_local_checkpoint = classmethod(load_lora)
    setattr(LoRAModel, KEY, VERSION)
