"""The page on checkpoints: a trainer of Tunix that stores the plan, and compares it."""

from importlib.util import find_spec

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import python_blocks, random
from processes import ROOT

import mora_jax
from mora_jax import MoRAConfig, io

if find_spec("tunix") is None:
    pytest.skip("tunix is not installed", allow_module_level=True)

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:orbax"),
]


def trainer(model, directory):
    """The page's trainer with a checkpoint after each step."""
    import orbax.checkpoint as ocp
    from tunix.sft import peft_trainer  # pyright: ignore

    scope, page = {"mora_jax": mora_jax}, ROOT / "docs/checkpoints.md"
    (block,) = [block for block in python_blocks(page) if "tunix" in block]
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


def wrapped(seed):
    model = nnx.Sequential(nnx.Linear(16, 16, rngs=nnx.Rngs(0)))
    config = MoRAConfig(rank=2, operator="orthogonal", seed=seed)
    return mora_jax.nnx.wrap(model, config)


def test_a_trainer_refuses_a_checkpoint_of_another_adapter(tmp_path):
    from tunix.sft import peft_trainer  # pyright: ignore

    x = np.asarray(random(0, 2, 16))
    batch = peft_trainer.TrainingInput(input_tokens=x, input_mask=x)
    model, again = wrapped(seed=1), wrapped(seed=1)
    first = trainer(model, tmp_path)
    first.train([batch, batch])
    first.close()
    assert trainer(again, tmp_path).train_steps == 2
    np.testing.assert_array_equal(again(x), model(x))
    with pytest.raises(io.AdapterFileError, match="made for operator.seed 1, not 2"):
        trainer(wrapped(seed=2), tmp_path)
