"""The part of `compare` on meshes: training steps of a Llama on eight TPUs.

They are the steps of `mesh_steps`, with layers scanned and rematerialised. The roofline
of a device leaves out the time of collectives; what they bring to a device is counted
in bytes.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.chips import topologies
from benchmarks.chips.roofline import measure
from benchmarks.common.harness import Row, show
from benchmarks.mesh.mesh_steps import MESHES, METHODS, RANK, Case, make_step

TOPOLOGIES = {"v5e": "v5e:2x4", "v5p": "v5p:2x2x2"}
"""The eight chips of a mesh, by the name of the chip."""
KINDS = "all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all"


@dataclasses.dataclass(frozen=True)
class MeshLlama:
    """A model on a mesh of eight devices, and a batch.

    Attributes:
        model: A name in `mesh_steps.SHAPES`.
        layers: The number of layers.
        sequences: The size of the batch.
        tokens: The length of a sequence.
    """

    model: str
    layers: int
    sequences: int = 4
    tokens: int = 2048

    def __str__(self) -> str:
        data, fsdp, model = MESHES[8]
        size = f"{self.layers} layers of {self.model}"
        batch = f"{self.sequences} x {self.tokens:,} tokens"
        return f"{size}, {batch}, r = {RANK}, data {data} x fsdp {fsdp} x model {model}"

    def case(self, method: str) -> Case:
        """The step of a method."""
        sizes = self.tokens, self.layers, self.sequences
        return Case(self.model, 8, method, *sizes)


def rows_of(llama: MeshLlama, chip: str, operators: Sequence[str]) -> Iterator[Row]:
    """A row for the frozen step, for LoRA and for each operator.

    Raises:
        SystemExit: Something in a program is not understood, such as a loop whose
            length is not known: its figures would be wrong.
    """
    devices, base = topologies.devices(TOPOLOGIES[chip]), None
    for method in ("frozen", "lora", *operators):
        step = make_step(llama.case(method), devices)
        check_dtypes(step.frozen)
        program, seconds = step.compile({})
        found = measure(program, chip)
        if found.notes:
            raise SystemExit(f"{llama}, {method}: {found.notes}")
        base = base or found.seconds
        received = {kind: found.received.get(kind, 0.0) / 1e9 for kind in KINDS}
        yield {
            "kind": "meshes",
            "case": str(llama),
            "chip": TOPOLOGIES[chip],
            "method": METHODS[method],
            "compile_seconds": seconds,
            "time": found.seconds / base,
            "milliseconds": 1e3 * found.seconds,
            "temporary_MB": found.temporary / 1e6,
            "received_GB": received,
            "all_received_GB": sum(found.received.values()) / 1e9,
        }


def check_dtypes(params: Any) -> None:
    """Raise SystemExit unless the frozen parameters are bfloat16."""
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(params)}
    if dtypes != {jnp.dtype(jnp.bfloat16)}:
        raise SystemExit(f"the frozen parameters must be bfloat16, got {dtypes}")


def report(rows: Sequence[Row]) -> None:
    """Print a table for each case and mesh."""
    columns = {
        "method": "{method}",
        "time": "{time:.3f}",
        "ms": "{milliseconds:,.1f}",
        "temporary MB": "{temporary_MB:,.0f}",
        **{kind: f"{{received_GB[{kind}]:.2f}}" for kind in KINDS},
        "all": "{all_received_GB:.2f}",
    }
    cases = dict.fromkeys((row["chip"], row["case"]) for row in rows)
    for chip, case in cases:
        here = [row for row in rows if (row["chip"], row["case"]) == (chip, case)]
        show(columns, here, f"{chip}, {case}: GB that a device receives, by collective")
