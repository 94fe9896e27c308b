"""The page on checkpoints: a trainer of Tunix that stores the plan, and compares it."""

from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import python_blocks

import mora_jax
from mora_jax import MoRAConfig, io

if find_spec("tunix") is None:
    pytest.skip("tunix is not installed", allow_module_level=True)

PAGE = Path(__file__).parents[2] / "docs/checkpoints.md"

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:orbax"),
]


def trainer(model, directory):
    """The page's trainer with a checkpoint after each step."""
    import orbax.checkpoint as ocp
    from tunix.sft import peft_trainer  # pyright: ignore

    scope = {"mora_jax": mora_jax}
    (block,) = [block for block in python_blocks(PAGE) if "tunix" in block]
    exec(block, scope)
    config = peft_trainer.TrainingConfig(
        eval_every_n_steps=100,
        max_steps=2,
        checkpoint_root_directory=str(directory),
        checkpointing_options=ocp.CheckpointManagerOptions(save_interval_steps=1),
    )
    made = scope["Trainer"](model, optax.sgd(0.1), config)
    made = made.with_gen_model_input_fn(lambda batch: {"x": batch.input_tokens})
    return made.with_loss_fn(lambda model, x: jnp.mean(model(x) ** 2))


def wrapped(**settings):
    model = nnx.Sequential(nnx.Linear(16, 16, rngs=nnx.Rngs(0)))
    return mora_jax.nnx.wrap(model, MoRAConfig(rank=2, **settings))


def test_a_trainer_refuses_a_checkpoint_of_another_adapter(tmp_path):
    from tunix.sft import peft_trainer  # pyright: ignore

    x = np.asarray(jax.random.normal(jax.random.key(0), (2, 16)))
    batch = peft_trainer.TrainingInput(input_tokens=x, input_mask=x)
    model = wrapped(operator="orthogonal", seed=1)
    first = trainer(model, tmp_path)
    first.train([batch, batch])
    first.close()
    again = wrapped(operator="orthogonal", seed=1)
    assert trainer(again, tmp_path).train_steps == 2
    np.testing.assert_array_equal(again(x), model(x))
    other = wrapped(operator="orthogonal", seed=2)
    with pytest.raises(io.AdapterFileError, match="made for operator.seed 1, not 2"):
        trainer(other, tmp_path)
