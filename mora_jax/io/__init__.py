"""Adapters as files.

This library's format::

  save                  write adapters, and what they mean, to a directory
  load                  read them again, everything checked
  read_metadata         the metadata that `save` was given
  plan_to_json          a plan as text, for checkpoints that other libraries write
  plan_arrays           the directions of a plan, which a text cannot hold
  plan_from_json        the plan again, compared with the model's
  check_run             compare a model with the run whose checkpoints are there
  AdapterFileError      raised for a file that is damaged or does not fit

PEFT's formats::

  load_peft             read a LoRA of PEFT, or the paper's authors' adapters
  export                write adapters as a plain LoRA, for PEFT, vLLM or SGLang
  Export                the result of `export`
  Names                 the type of `names`: PyTorch's modules as kernels

Whole checkpoints::

  load_base             the params of a Flax model, from a base in safetensors
  Checkpoint            a base in safetensors, whose headers are in memory
  merge_checkpoint      merge adapters into a base, from file to file
"""

from mora_jax.io._files import AdapterFileError as AdapterFileError
from mora_jax.io._merge_files import merge_checkpoint as merge_checkpoint
from mora_jax.io._names import Names as Names
from mora_jax.io.checkpoints._checkpoint import Checkpoint as Checkpoint
from mora_jax.io.checkpoints._load_base import load_base as load_base
from mora_jax.io.native._adapter import load as load
from mora_jax.io.native._adapter import read_metadata as read_metadata
from mora_jax.io.native._adapter import save as save
from mora_jax.io.native._plan_json import plan_arrays as plan_arrays
from mora_jax.io.native._plan_json import plan_from_json as plan_from_json
from mora_jax.io.native._plan_json import plan_to_json as plan_to_json
from mora_jax.io.native._run import check_run as check_run
from mora_jax.io.peft._export import Export as Export
from mora_jax.io.peft._export import export as export
from mora_jax.io.peft._read import load_peft as load_peft
