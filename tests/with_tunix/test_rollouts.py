"""Adapters for a server after each step: the example, with a stand-in for vLLM."""

import functools
import http.server
import json
import threading
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import chex
import jax
import numpy as np
import pytest
from flax import nnx
from meshes import make_mesh
from tunix_models import tiny

from mora_jax import MoRAConfig, io
from mora_jax import nnx as mora

if find_spec("tunix") is None:
    pytest.skip("tunix is not installed", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore")  # what Tunix uses is deprecated

WORDS = SimpleNamespace(
    encode=lambda text, **_: [int(word) for word in text.split()],
    decode=lambda ids, **_: " ".join(map(str, ids)),
    **{"bos_id": lambda: 1, "eos_id": lambda: 2, "pad_id": lambda: 0},
)
"""A tokenizer of 32 words."""
PROMPTS = ["5 6 7", "8 9"], ["6 7", "9 3 4"], ["3", "4 5"]
UPDATE = ["/v1/load_lora_adapter", "/reset_prefix_cache"]


@nnx.jit
def log_probabilities(model, ids):
    """Of all next tokens, of one row without padding."""
    length = ids.shape[1]
    mask = np.tril(np.ones((1, length, length), bool))
    return jax.nn.log_softmax(model(ids, np.arange(length)[None], None, mask)[0])


class StandIn(http.server.ThreadingHTTPServer):
    """A vLLM as far as the example asks; the `actor` says how likely its answers are.

    Attributes:
      asked: The path and the content of each request.
      files: The files of each adapter that was loaded, {name: bytes}.
      reason: The reason for which adapters are refused, or "".
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.asked, self.files, self.actor, self.reason = [], [], None, ""
        self.random = np.random.default_rng(0)

    def answer(self, path, content):
        self.asked.append((path, content))
        if path == "/v1/load_lora_adapter":
            folder = Path(content["lora_path"])
            self.files.append({f.name: f.read_bytes() for f in folder.iterdir()})
            return (400, self.reason) if self.reason else (200, "Success")
        if path == "/reset_prefix_cache":
            return 200, json.dumps({"success": True})
        choices = [
            self.choice(k, ids, content) for k, ids in enumerate(content["prompt"])
        ]
        return 200, json.dumps({"choices": choices[::-1]})

    def choice(self, index, prompt, content):
        length = self.random.integers(1, content["max_tokens"])
        said = [*self.random.integers(3, 32, length - 1).tolist(), WORDS.eos_id()]
        rows = log_probabilities(self.actor, np.array([prompt + said]))[0]
        places = len(prompt) - 1 + np.arange(length)
        numbers = np.asarray(rows)[places, said].tolist()
        answer = {"index": index, "token_ids": said}
        return answer | {"logprobs": {"token_logprobs": numbers}}


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        content = self.rfile.read(int(self.headers["Content-Length"]))
        code, text = self.server.answer(self.path, json.loads(content))
        self.send_response(code)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format, *_):
        """Print nothing."""


@pytest.fixture
def server():
    with StandIn() as found:
        threading.Thread(target=found.serve_forever).start()
        yield found
        found.shutdown()


def files_of(folder, model):
    """The files that the server should be given of a model."""
    io.export(folder, mora.adapters(model), "vllm", "tunix", native=True)
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_server_gets_the_adapters_after_each_step(tmp_path, server):
    """And nothing of the base; answers are scored by the adapters that gave them."""
    from examples import tunix_grpo, tunix_rollouts

    base, mesh = tiny("qwen2")[0], make_mesh(fsdp=1, tp=1)
    place = jax.NamedSharding(mesh, jax.P())
    nnx.update(base, jax.device_put(nnx.state(base), place))
    before = jax.tree.map(np.asarray, nnx.state(base))
    server.actor = actor = mora.wrap(base, MoRAConfig(rank=2))
    first, gaps = files_of(tmp_path / "first", actor), []

    def reward(prompts, completions, **_):
        rollout = learn.rl_cluster.rollout
        assert rollout.sent == sum(map(len, server.files[-1].values()))
        gaps.append(rollout.gap)
        return [len(text.split()) for text in completions]

    engine = functools.partial(
        tunix_rollouts.Rollout, url=server.url, folder=tmp_path / "policy"
    )
    learn = tunix_grpo.learner(actor, mesh, WORDS, reward, 3, 1e-2, 2, engine)
    with mesh:
        learn.train([{"prompts": np.array(prompts)} for prompts in PROMPTS])
    paths = [path for path, _ in server.asked]
    assert paths == [*UPDATE, "/v1/completions"] * 3 + UPDATE
    loads = [content for path, content in server.asked if path == UPDATE[0]]
    assert all(load["load_inplace"] for load in loads)
    asked = [content for path, content in server.asked if path == "/v1/completions"]
    for content, (one, other) in zip(asked, PROMPTS, strict=True):
        ids = [WORDS.encode(text) for text in (one, one, other, other)]
        assert content["prompt"] == ids and content["model"] == loads[0]["lora_name"]
    assert server.files[0] == first
    weights = [files["adapter_model.safetensors"] for files in server.files]
    assert len({*weights}) == 4
    trained = learn.rl_cluster.actor_trainer.model
    assert server.files[-1] == files_of(tmp_path / "last", trained)
    assert len(gaps) == 3 and max(gaps) < 1e-4
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, nnx.state(base)), before)


def test_a_server_that_refuses_says_why(tmp_path, server):
    from examples.tunix_rollouts import Rollout

    server.reason = "the file is damaged"
    actor = mora.wrap(tiny("qwen2")[0], MoRAConfig(rank=2))
    with pytest.raises(RuntimeError, match="v1/load_lora_adapter: the file is damaged"):
        Rollout(actor, WORDS, url=server.url, folder=tmp_path / "policy")
