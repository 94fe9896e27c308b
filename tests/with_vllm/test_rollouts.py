"""Reinforcement learning with answers of vLLM, which gets M's in each step."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not here"
)

LINE = r"step (\d): mean reward (\S+), (\S+) MB sent .* within (\S+)"


def test_answers_come_from_the_model_that_learns():
    """vLLM's log-probabilities are JAX's in each step, and the reward rises."""
    done = subprocess.run(
        [sys.executable, "-m", "examples.rollouts_vllm", "--steps", "3"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"},
    )
    assert done.returncode == 0, done.stderr[-5000:]
    steps = re.findall(LINE, done.stdout)
    assert [int(number) for number, *_ in steps] == [1, 2, 3]
    rewards, sizes, gaps = zip(*(map(float, step[1:]) for step in steps), strict=True)
    assert rewards[0] < rewards[2]
    assert max(gaps) < 1e-4
    assert max(sizes) < 10  # for 538 MB of the model
