"""Adapters as files: ours, the reference's, as plain LoRA, and merged into a base."""

from mora_jax.io._base import Checkpoint as Checkpoint
from mora_jax.io._checkpoint import merge_checkpoint as merge_checkpoint
from mora_jax.io._errors import AdapterFileError as AdapterFileError
from mora_jax.io._lora import save_peft_lora as save_peft_lora
from mora_jax.io._names import FAMILIES as FAMILIES
from mora_jax.io._names import Names as Names
from mora_jax.io._native import load as load
from mora_jax.io._native import read_metadata as read_metadata
from mora_jax.io._native import save as save
from mora_jax.io._peft_read import load_peft_mora as load_peft_mora
from mora_jax.io._peft_write import save_peft_mora as save_peft_mora
from mora_jax.io._plan_json import plan_from_json as plan_from_json
from mora_jax.io._plan_json import plan_to_json as plan_to_json
from mora_jax.io._read import format_of as format_of
from mora_jax.io._read import read_adapter as read_adapter
from mora_jax.io._reference import REFERENCE_GROUPS as REFERENCE_GROUPS
from mora_jax.io._reference import reference_operator as reference_operator
