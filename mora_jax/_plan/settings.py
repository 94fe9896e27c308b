"""Settings of adapters: the record that files hold, and what a user may choose."""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from mora_jax._common import checks
from mora_jax._common.messages import did_you_mean, warn
from mora_jax._common.types import FIRST
from mora_jax.operators._registry import OperatorSpec, parse_spec


class FrozenMapping(Mapping[Any, Any]):
    """Frozen mapping, as are the mappings in it; equal content has an equal hash."""

    # Python's `MappingProxyType` cannot be pickled, and plans know nothing of Flax.
    def __init__(self, content: Mapping[Any, Any]):
        self._content = {
            key: FrozenMapping(value) if isinstance(value, Mapping) else value
            for key, value in content.items()
        }

    def __getitem__(self, key: Any) -> Any:
        return self._content[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._content)

    def __len__(self) -> int:
        return len(self._content)

    def __hash__(self) -> int:
        return hash(frozenset(self._content.items()))

    def __repr__(self) -> str:
        return repr(self._content)


DEFAULT_RANK = 8
"""The budget of a kernel for which neither a rank nor a square_rank is given."""

Check = Callable[[str, Any], Any]
"""Function of a setting's name and value that raises, or returns what is stored."""


def setting(
    default: Any,
    check: Check,
    *,
    meaning: bool = False,
    compare: bool = True,
    since: str = FIRST,
) -> Any:
    """Field of a record, whose value `check` checks.

    Args:
      default: The default, also for files that lack the setting.
      check: A function of the setting's name and value, as `Check` says.
      meaning: True if the setting decides which delta an M stands for.
      compare: False if records that differ in it alone are equal.
      since: The version from which on files hold the setting.
    """
    metadata = {"check": check, "meaning": meaning, "since": since}
    return dataclasses.field(default=default, compare=compare, metadata=metadata)


def carried(default: Any) -> Any:
    """Field of a record that `==` ignores."""
    return dataclasses.field(default=default, compare=False)


def check_settings(record: Any) -> None:
    """Check the fields that `setting` made, and store what their checks return."""
    for name, check in _checks(type(record)):
        # The records are frozen, also for their own `__post_init__`.
        object.__setattr__(record, name, check(name, getattr(record, name)))


@functools.cache  # plans make a record for each of thousands of kernels
def _checks(cls: Any) -> list[tuple[str, Check]]:
    fields = ((f.name, f.metadata.get("check")) for f in dataclasses.fields(cls))
    return [(name, check) for name, check in fields if check]


def _optional(check: Check) -> Check:
    return lambda name, value: None if value is None else check(name, value)


def _operator(name: str, value: Any) -> OperatorSpec:
    parse_spec(value)
    # Frozen, so that configs can be hashed.
    return FrozenMapping(value) if isinstance(value, Mapping) else value


_rate = functools.partial(
    checks.check_number, fits=lambda number: 0 <= number < 1, must="be in [0, 1)"
)
_STARTS = "zeros", "gaussian", "embedding"


def _one_of(*choices: str) -> Check:
    return functools.partial(checks.check_choice, choices=choices)


def _start(name: str, value: Any) -> str:
    if isinstance(value, str) and value == "gradient":
        raise ValueError(
            f"{name} must be one of {_STARTS}, got 'gradient'; "
            "mora_jax.gradient_start(loss, mora_jax.init(plan)) starts adapters so"
        )
    return checks.check_choice(name, value, _STARTS)


_execution = _one_of("auto", "activation", "fold")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    """Settings of one adapter that are neither its operator nor its place.

    They are as in `MoRAConfig`, but `scale` is a number. Files hold all of them.
    """

    alpha: float = setting(1.0, checks.check_number, meaning=True)
    scale: float = setting(1.0, checks.above_zero, meaning=True)
    dropout: float = setting(0.0, _rate)
    # As `gradient_start` says it; no adapter starts so of itself.
    init: str = setting("zeros", _one_of(*_STARTS, "gradient"), compare=False)
    param_dtype: DTypeLike = setting(
        jnp.float32, checks.check_param_dtype, compare=False
    )
    execution: str = setting("auto", _execution)

    def __post_init__(self) -> None:
        check_settings(self)

    def to_json(self) -> dict[str, Any]:
        """{name: value as JSON holds it} of all settings."""
        values = {name: getattr(self, name) for name in SETTINGS}
        return values | {"param_dtype": jnp.dtype(self.param_dtype).name}


SETTINGS = {f.name: f.metadata["meaning"] for f in dataclasses.fields(AdapterSettings)}
"""{name of a setting: True if it decides which delta an M stands for}."""


@dataclasses.dataclass(frozen=True)
class KernelConfig:
    """Settings that a user chooses for a kernel; `MoRAConfig` explains them."""

    rank: int | None = setting(None, _optional(checks.positive_integer))
    operator: OperatorSpec = setting("auto", _operator)
    alpha: float = setting(1.0, checks.above_zero)
    scale: str = setting("fine-tuning", _one_of("paper", "fine-tuning"))
    square_rank: int | None = setting(None, _optional(checks.positive_integer))
    multiple_of: int | None = setting(None, _optional(checks.positive_integer))
    init: str = setting("zeros", _start)
    dropout: float = setting(0.0, _rate)
    param_dtype: DTypeLike | None = setting(
        jnp.float32, _optional(checks.check_param_dtype)
    )
    execution: str = setting("auto", _execution)
    seed: int = setting(0, lambda _, value: checks.check_seed(value))

    def __post_init__(self) -> None:
        check_settings(self)
        if self.rank is not None and self.square_rank is not None:
            raise ValueError(
                "give either rank (a budget) or square_rank (the width of M), "
                f"not both, got rank={self.rank} and square_rank={self.square_rank}"
            )

    @property
    def budget(self) -> int:
        """The rank, or the default rank if none was given."""
        return DEFAULT_RANK if self.rank is None else self.rank


NEW_HEAD = r"((.*/)?((pre_)?classifier|qa_outputs|score)(_\d+)?)/(.*)"
"""Heads that a base lacks, whose kernels and biases are trained from their start."""
HEAD = r"((.*/)?(([^/]*_)?(head|router)|(router_)?logits(_dense)?|cls)(_\d+)?)/(.*)"
"""Heads that belong to the base; their last group is the path inside them."""

DEFAULT_TARGETS = (rf"(?i)(?!{NEW_HEAD}|{HEAD}|.*(embed|conv)[^/]*/)(.*/)?kernel",)

PATTERNS = "regular expressions that match whole paths"
NAMES_ELSEWHERE = {
    "r": "rank",
    "lora_rank": "rank",
    "lora_alpha": "alpha, which multiplies the delta itself, as LoRA's lora_alpha / r",
    "use_rslora": "alpha, which multiplies the delta itself: lora_alpha / sqrt(r)",
    "use_dora": "nothing: a DoRA's delta is not linear in what is trained",
    "lora_dropout": "dropout",
    "target_modules": f"targets, {PATTERNS}",
    "exclude_modules": f"exclude, {PATTERNS}",
    "modules_to_save": f"train, {PATTERNS}",
    "bias": f"train, {PATTERNS}, such as '.*/bias'",
    "trainable_token_indices": "train, for all rows of an embedding",
    "module_path": f"targets, {PATTERNS}; in mora_jax.qwix.MoRARule it is module_path",
    "weight_qtype": "a setting of mora_jax.qwix.MoRARule",
    "layers_to_transform": "targets, as in r'.*layers_(0|1)/.*kernel'",
    "target_parameters": f"targets, {PATTERNS}",
    "task_type": "an argument of mora_jax.io.export",
    "rank_pattern": "overrides, as in {'.*/q_proj/kernel': {'rank': 16}}",
    "alpha_pattern": "overrides, as in {'.*/q_proj/kernel': {'alpha': 2.0}}",
    "init_lora_weights": "init, 'zeros' or 'gaussian'",
    "input_damping": "a function: mora_jax.input_damping(call, mora_jax.init(plan))",
    "directions": "a function: mora_jax.directions(loss, plan, batches)",
    "gradient_bases": "a function: mora_jax.gradient_bases(grads, plan)",
    "gradient_start": "a function: mora_jax.gradient_start(loss, mora_jax.init(plan))",
}
"""{name of a setting in other libraries: its name here}."""

_KERNEL_SETTINGS = [field.name for field in dataclasses.fields(KernelConfig)]


def setting_hint(name: str, known: Iterable[str]) -> str:
    """The name here of an unknown setting, as the end of a message."""
    if name in NAMES_ELSEWHERE:
        return f": here that is {NAMES_ELSEWHERE[name]}"
    return did_you_mean(name, known)


def _check_overrides(name: str, overrides: Any) -> FrozenMapping:
    """Return `overrides` frozen, if they map patterns to settings of kernels."""
    if not isinstance(overrides, Mapping):
        raise TypeError(f"{name} must map patterns to settings, got {overrides!r}")
    allowed = sorted([*_KERNEL_SETTINGS, "axes"])
    for pattern in checks.patterns_of(name, overrides):
        settings, where = overrides[pattern], f"{name}[{pattern!r}]"
        if not isinstance(settings, Mapping):
            raise TypeError(f"{where} must be a mapping, got {settings!r}")
        if unknown := sorted(settings.keys() - allowed, key=str):
            hint = setting_hint(str(unknown[0]), allowed)
            raise ValueError(f"{where} must use {allowed}, got {unknown}{hint}")
        rank, square_rank = settings.get("rank"), settings.get("square_rank")
        if rank is not None and square_rank is not None:
            raise ValueError(
                f"{where} must give either rank or square_rank, not both, "
                f"got rank={rank} and square_rank={square_rank}"
            )
        axes = settings.get("axes")
        if axes is not None and not (isinstance(axes, str) and axes):
            raise ValueError(
                f"{where}: axes must be a text with a letter for each axis of the "
                f"kernel, 'i', 'o' or 's', got {axes!r}"
            )
        # Values that no kernel could have are errors now, and not where they apply.
        KernelConfig(**{k: v for k, v in settings.items() if k != "axes"})
    return FrozenMapping(overrides)


@dataclasses.dataclass(frozen=True)
class MoRAConfig(KernelConfig):
    r"""The settings of an adaptation; frozen and hashable.

    Attributes:
      rank: The budget r, 8 by default. A plan trains at most the parameters of LoRAs of
        rank r. Blocks of its kernels share that; no other M has more than a LoRA of its
        own kernel: q <= sqrt((in + out) r).
      operator: The fixed maps around M: "block_diagonal", "rotation", "sharing" or
        "low_rank", which is a LoRA. "auto" is "block_diagonal" below a rank of 128 and
        "sharing" from there on. To reproduce papers there are "decoupling",
        "signed_decoupling", "signed_sharing", "truncation", "orthogonal" and
        "hadamard". A mapping has further settings too:
        {"name": "sharing", "compress_groups": "contiguous"}.
      alpha: The factor of the delta itself, lora_alpha / r of PEFT and qwix, above 0: 1
        is usual, and above 4 a `MoRAWarning` is given.
      scale: A factor of each delta beside alpha. "fine-tuning" takes the one with which
        the learning rate of full fine-tuning suits M, whatever its operator, its width
        and the kernel's shape: see `Operator.fine_tuning_scale`. "paper" takes 1.
      square_rank: q itself, instead of `rank`, for an operator that is named; or the
        number of blocks that have an M each.
      multiple_of: The number whose multiple q is rounded down to, and blocks up. None
        takes what suits the layer's widths and the chip, see `square_rank`; it may use
        as little as a quarter of the budget, as `print(plan)` tells. 1 uses all of it.
      init: The start of M. "zeros" leaves the model's outputs as they are. "gaussian",
        of standard deviation 1/sqrt(q), is AiDotNet's, and changes them. "embedding" is
        "zeros" by the A of a LoRA and a normal B, as PEFT starts one of an embedding;
        there plans of models choose it.
      dropout: The rate of dropout on the adapter's input; the layer itself sees all.
      param_dtype: The dtype of M. None takes each kernel's dtype, for tools that want
        one dtype, as Tunix's samplers do. Else keep float32: 16 bits lose small steps.
      execution: The way a dense layer computes. "activation" adds alpha D(C(x) M) to
        its output; "fold" multiplies by W + alpha C M D, which it computes in each
        step; "auto" takes what was faster in measurements, by shape, rows and dtype.
        Other layers, stacks in one product, and layers under dropout never fold.
      targets: Regular expressions that match the whole path of a kernel, such as
        `.*/(q_proj|v_proj)/kernel`. By default these are the kernels of dense layers.
      exclude: Regular expressions for paths to leave out.
      overrides: {pattern: {setting: value}} for some targets; later patterns win. The
        settings are all fields except `targets`, `exclude`, `overrides` and `train`,
        and "axes", the meaning of a kernel's axes, a letter each: "i" for input
        features, "o" for output features and "s" for a stack.
      seed: The seed of the random operators.
      train: Regular expressions that match the paths of arrays of the base that are
        trained themselves: norms, biases, a head. The adapters hold copies of them, in
        `param_dtype` or in the array's own dtype, whichever is wider.

    Raises:
      TypeError, ValueError: A setting that no kernel could have, or both `rank` and
        `square_rank`.

    Example::

      >>> overrides = {".*/q_proj/kernel": {"rank": 16}}
      >>> config = MoRAConfig(rank=4, overrides=overrides)
      >>> config.settings("layer/q_proj/kernel")[0].rank
      16
    """

    targets: str | Iterable[str] = setting(DEFAULT_TARGETS, checks.patterns_of)
    exclude: str | Iterable[str] = setting((), checks.patterns_of)
    overrides: Mapping[str, Mapping[str, Any]] = setting(
        FrozenMapping({}), _check_overrides
    )
    train: str | Iterable[str] = setting((), checks.patterns_of)

    def __new__(cls, *args: Any, **settings: Any) -> "MoRAConfig":
        """Refuse settings that this class does not have, before `__init__` does."""
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := [name for name in settings if name not in known]:
            hint = setting_hint(unknown[0], known)
            raise TypeError(f"MoRAConfig has no setting {unknown[0]!r}{hint}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        super().__post_init__()
        if "all-linear" in self.targets:
            rule = "targets must be regular expressions, got 'all-linear'"
            hint = "leave targets out, since all dense layers are the default"
            raise ValueError(f"{rule}: {hint}")
        if not self.targets:
            raise ValueError("targets must hold at least one pattern, got none")
        overridden = [s["alpha"] for s in self.overrides.values() if "alpha" in s]
        for alpha in (self.alpha, *overridden):
            if alpha > 4:
                told = f"alpha={alpha:g} multiplies the delta itself, and 1 is usual"
                warn(f"{told}: what LoRA calls lora_alpha is alpha=lora_alpha / r here")

    def settings(self, path: str) -> tuple[KernelConfig, str | None]:
        """The settings of one kernel, and its axes where an override names them."""
        patterns = tuple(p for p in self.overrides if re.fullmatch(p, path))
        return self._overridden(patterns)

    @functools.lru_cache(maxsize=64)  # noqa: B019  (most kernels share a record)
    def _overridden(self, patterns: Iterable[str]) -> tuple[KernelConfig, str | None]:
        values = {name: getattr(self, name) for name in _KERNEL_SETTINGS}
        for settings in map(self.overrides.__getitem__, patterns):
            # Either of the two replaces the other one, and later patterns win.
            if settings.get("rank") is not None:
                values["square_rank"] = None
            elif settings.get("square_rank") is not None:
                values["rank"] = None
            values |= settings
        axes = values.pop("axes", None)
        return KernelConfig(**values), axes


# `__new__` takes anything, so help() is led to the signature of `__init__`.
MoRAConfig.__new__.__wrapped__ = MoRAConfig.__init__  # type: ignore[attr-defined]


def check_config(config: Any, call: str = "MoRAConfig(rank=8)") -> MoRAConfig:
    """Return `config`, or the default config for None; `call` is for the message."""
    if config is None:
        return MoRAConfig()
    if isinstance(config, MoRAConfig):
        return config
    got, hint = type(config).__name__, f"the call is {call}, where config may be None"
    if hasattr(config, "shape"):
        got = f"an array of shape {tuple(config.shape)}"
    fields = {field.name for field in dataclasses.fields(MoRAConfig)}
    settings = {"rank": config} if isinstance(config, int) else config
    if isinstance(settings, Mapping) and set(settings) <= fields | set(NAMES_ELSEWHERE):
        values = ", ".join(f"{name}={value!r}" for name, value in settings.items())
        hint = f"write MoRAConfig({values})"
    raise TypeError(f"config must be a MoRAConfig, got {got}: {hint}")
