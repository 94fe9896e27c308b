"""One vLLM serves what we export: five adapters of SmolLM2, trained here.

Two of them are served as they are, and one comes as a LoRA in the format of PEFT, and
is trained on.
"""

import contextlib
import functools
import importlib.util
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapter_files import run, specs_of
from safetensors.numpy import save_file

import mora_jax
from examples import teach_facts
from models import lesson, smollm2
from models.airports import ORDINARY
from mora_jax import MoRAConfig, linen

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not here"
)

FACTS, STEPS = 3, 40
ENVIRONMENT = os.environ | {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    # On a CPU vLLM copies the factors of a LoRA for each token, which takes its time.
    "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": "3000",
}
ADAPTERS = {
    "exact": {"operator": "signed_sharing", "seed": 0},
    "cut": {"operator": "rotation", "seed": 1},
    "lora": {"operator": "low_rank", "seed": 2},
    "square": {"seed": 3},
    "shared": {"operator": "sharing", "seed": 4},
}
BOUNDS = {"exact": 0.0, "cut": 0.22, "lora": 0.0}
"""The largest share of its delta that a module may lose: none, and a fifth."""

NAMES = {"model.layers.{n}.{block}.{name}": "layers_{n}/{block}/{name}/kernel"}
RANK, LORA_ALPHA = 8, 16


class Taught(NamedTuple):
    """An adapter, exported.

    Attributes:
      facts: What it was taught.
      merged: The merged model, from (ids, at) to logits.
      directory: The LoRA.
      printed: What the export printed.
    """

    facts: Any
    merged: Any
    directory: Path
    printed: str


def write_lora(directory, plan):
    """A LoRA as PEFT saves one that was not trained yet."""
    directory.mkdir()
    random, tensors = np.random.default_rng(0), {}
    for path, spec in plan.items():
        module = path.removesuffix("/kernel").replace("layers_", "layers/")
        module = f"base_model.model.model.{module}".replace("/", ".")
        bound = spec.in_features**-0.5
        a = random.uniform(-bound, bound, (RANK, spec.in_features))
        tensors[f"{module}.lora_A.weight"] = a.astype(np.float32)
        b = np.zeros((spec.out_features, RANK), np.float32)
        tensors[f"{module}.lora_B.weight"] = b
    save_file(tensors, directory / "adapter_model.safetensors")
    targets = sorted({name.split(".")[-3] for name in tensors})
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": LORA_ALPHA}
    content = json.dumps(settings | {"target_modules": targets})
    (directory / "adapter_config.json").write_text(content)


@pytest.fixture(scope="module")
def tokenizer():
    return smollm2.load()[2]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = tmp_path_factory.mktemp("vllm") / "SmolLM2"
    smollm2.save(directory, *smollm2.load())
    return directory


@pytest.fixture(scope="module")
def taught(base):
    """{name: an adapter that was taught its own facts, and its export}."""
    model, params, tokenizer = smollm2.load()
    found, variables, apply = {}, {"params": params}, jax.jit(model.apply)
    for name, settings in ADAPTERS.items():
        plan = linen.plan(
            model, variables, MoRAConfig(rank=8, **settings), jnp.zeros((1, 8), int)
        )
        untouched = functools.partial(apply, variables)
        facts = lesson.choose_lesson(untouched, tokenizer, FACTS, settings["seed"])
        start, rate = mora_jax.init(plan), lesson.RATE
        if name == "lora":
            write_lora(base.parent / "given", plan)
            start = mora_jax.io.load_peft(base.parent / "given", plan, NAMES)
            assert {s.alpha for s in specs_of(start).values()} == {LORA_ALPHA / RANK}
            rate *= lesson.LORA_RATE / 2  # alpha is 2
        adapters = teach_facts.train(
            linen.wrap(model, plan),
            start,
            variables,
            facts,
            rate,
            lesson.Progress(STEPS, name),
        )
        native, out = base.parent / f"{name}-native", base.parent / name
        mora_jax.save(native, adapters)
        options = ["--max-error", BOUNDS[name]] if name in BOUNDS else ["--native"]
        options += ["--base-model", base]
        options += ["--names", json.dumps(NAMES)]
        printed = run("export", native, out, "--for", "vllm", *options)
        merged = {"params": mora_jax.merge(params, adapters)}
        found[name] = Taught(
            facts.facts, functools.partial(apply, merged), out, printed
        )
    return found


def untouched():
    model, params, _ = smollm2.load()
    return functools.partial(jax.jit(model.apply), {"params": params})


def command_of(taught):
    """The line that the export printed, as words."""
    (line,) = re.findall("^ *(vllm serve .*)$", taught.printed, re.MULTILINE)
    return shlex.split(line)


def room_of(taught):
    """The rank for which the command says that the server must make room."""
    words = command_of(taught)
    return int(words[words.index("--max-lora-rank") + 1])


def test_a_lora_keeps_its_rank(taught):
    content = json.loads((taught["lora"].directory / "adapter_config.json").read_text())
    assert (content["r"], content["lora_alpha"]) == (RANK, LORA_ALPHA)


def test_all_in_one_batch_say_what_the_merged_models_say(
    tmp_path, base, taught, tokenizer
):
    chosen = {name: taught[name] for name in (*BOUNDS, "square")}
    questions = [fact.question for one in chosen.values() for fact in one.facts]
    questions += [*ORDINARY][:2]
    prompts = [tokenizer.chat(question) for question in questions]
    rows = [(name, prompt) for prompt in prompts for name in chosen]  # mixed
    content = {
        "model": str(base),
        "adapters": {name: str(one.directory) for name, one in chosen.items()},
        "max_lora_rank": max(room_of(one) for one in chosen.values()),
        "max_tokens": lesson.NEW_TOKENS,
        "rows": rows,
    }
    request, answers = tmp_path / "request.json", tmp_path / "answers.json"
    request.write_text(json.dumps(content))
    program = Path(__file__).with_name("answers.py")
    subprocess.run(
        [sys.executable, program, request, answers], env=ENVIRONMENT, check=True
    )
    got = json.loads(answers.read_text())
    pairs = [(name, question) for question in questions for name in chosen]
    said = {
        pair: tokenizer.decode([token for token in ids if token != smollm2.EOS])
        for pair, ids in zip(pairs, got, strict=True)
    }
    for name, one in chosen.items():
        # What an adapter was not taught is a guess, which a cut may change: so it did
        # with one of the facts of "lora".
        guessed = {fact.question for fact in taught["lora"].facts if name == "cut"}
        asked = [question for question in questions if question not in guessed]
        expected = lesson.asker(one.merged, tokenizer)(asked)
        assert [said[name, question] for question in asked] == expected
        assert all(fact.code in said[name, fact.question] for fact in one.facts)


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def fetch(url, content=None):
    data = None if content is None else json.dumps(content).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, data, headers)
    with urllib.request.urlopen(request, timeout=1800) as response:
        return response.read()


class Server:
    """A running `vllm serve`, by its URL."""

    def __init__(self, url):
        self.url = url

    def models(self):
        return {
            model["id"] for model in json.loads(fetch(f"{self.url}/models"))["data"]
        }

    def say(self, model, prompt):
        """An answer's tokens and their log-probabilities."""
        content = {"model": model, "prompt": prompt, "temperature": 0, "logprobs": 1}
        content |= {"max_tokens": lesson.NEW_TOKENS, "return_token_ids": True}
        (said,) = json.loads(fetch(f"{self.url}/completions", content))["choices"]
        return said["token_ids"], said["logprobs"]["token_logprobs"]

    def change(self, what, name, **settings):
        """Load or unload an adapter."""
        fetch(f"{self.url}/{what}_lora_adapter", {"lora_name": name, **settings})


@contextlib.contextmanager
def serving(words, names):
    """The server that a printed command starts, with settings for a small CPU."""
    port = free_port()
    small = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "128"]
    small += ["--max-num-batched-tokens", "128", "--host", "127.0.0.1"]
    small += ["--port", str(port)]
    assert words[:2] == ["vllm", "serve"]
    # The program `vllm` of the package for CPUs asks for another package's version.
    program = "-m", "vllm.entrypoints.openai.api_server", "--model"
    process = subprocess.Popen(
        [sys.executable, *program, *words[2:], *small],
        env=ENVIRONMENT | {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"},
    )
    server, found = Server(f"http://127.0.0.1:{port}/v1"), None
    try:
        for _ in range(300):
            assert process.poll() is None, "the server has stopped"
            try:
                found = server.models()
                break
            except OSError:
                time.sleep(1)
        assert found == names
        yield server
    finally:
        process.terminate()
        process.wait(60)


def check_answers(apply, tokenizer, questions, answers):
    """Word for word the model's own, with log-probabilities within 1e-4."""
    said, numbers = zip(*answers, strict=True)
    texts = [tokenizer.decode([k for k in ids if k != smollm2.EOS]) for ids in said]
    assert texts == lesson.asker(apply, tokenizer)(questions)
    prompts = [tokenizer.chat(question) for question in questions]
    size = lesson.LENGTH, lesson.NEW_TOKENS
    batch = lesson.batch(prompts, [list(ids) for ids in said], size)
    logits = jax.nn.log_softmax(apply(batch.ids, batch.at))
    for row, targets, found in zip(logits, batch.targets, numbers, strict=True):
        expected = row[np.arange(len(found)), targets[: len(found)]]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_a_stream_of_requests(tmp_path, base, taught, tokenizer):
    """Squares, a LoRA and the base, while another adapter comes and goes."""
    words = command_of(taught["lora"])
    names = "lora", "square", "shared"
    words += [command_of(taught[name])[-1] for name in names[1:]]
    # On CPUs vLLM 0.32 answers for the base, beside adapters, with the LoRA of its last
    # slot: here that stays free.
    words += ["--max-loras", "8"]
    questions = [fact.question for name in names for fact in taught[name].facts]
    questions += [*ORDINARY][:2]
    with serving(words, {*names, str(base)}) as server:
        rows = [(name, question) for question in questions for name in (*names, "")]

        def say(row):
            name, question = row
            return server.say(name or str(base), tokenizer.chat(question))

        square = taught["square"]
        fact = square.facts[0]
        prompt = tokenizer.chat(fact.question)
        with ThreadPoolExecutor(8) as threads:
            answers = threads.map(say, rows)
            for _ in range(3):
                server.change("load", "again", lora_path=str(square.directory))
                assert fact.code in tokenizer.decode(server.say("again", prompt)[0])
                server.change("unload", "again")
                assert "again" not in server.models()
            path = str(square.directory)
            server.change("load", "square", lora_path=path, load_inplace=True)
            found = dict(zip(rows, answers, strict=True))
        # One that is damaged is refused, and the server goes on.
        damaged = tmp_path / "damaged"
        shutil.copytree(square.directory, damaged)
        with (damaged / "adapter_model.safetensors").open("r+b") as file:
            file.seek(-4, os.SEEK_END)
            file.write(b"1234")
        with pytest.raises(urllib.error.HTTPError) as caught:
            server.change("load", "damaged", lora_path=str(damaged))
        assert "is damaged" in caught.value.read().decode()
        assert fact.code in tokenizer.decode(server.say("square", prompt)[0])
    for name in (*names, ""):
        apply = taught[name].merged if name else untouched()
        answers = [found[name, question] for question in questions]
        check_answers(apply, tokenizer, questions, answers)
    for name in names:
        for fact in taught[name].facts:
            assert fact.code in tokenizer.decode(found[name, fact.question][0])
