"""The examples run, and their parts do what they say."""

import argparse
import functools
import json
import re
import shutil

import base_files
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapter_files import assert_same, slow
from base_files import DATA
from flax import nnx
from helpers import close, random_like, trained
from processes import ROOT, python

from examples import evaluate_many, teach_facts, teach_facts_nnx
from models import airports, lesson, smollm2, smollm2_nnx
from mora_jax import MoRAConfig, init, linen, load, merge, save, serving
from mora_jax import nnx as mora


@pytest.mark.slow
def test_quickstart():
    assert len((ROOT / "examples/quickstart.py").read_text().splitlines()) < 40
    printed = python("-m", "examples.quickstart", cwd=ROOT)
    lines = re.findall(r"^(.*?):.*loss.* (\S+)$", printed, re.MULTILINE)
    losses = {name: float(loss) for name, loss in lines}
    assert losses["adapted"] < 0.01 < 0.1 < losses["step 0"]
    assert abs(losses["merged"] - losses["adapted"]) < 1e-4


@pytest.mark.slow
def test_gpt2_of_transformers_is_taught_a_sentence():
    pytest.importorskip("transformers")
    printed = python("-m", "examples.teach_gpt2", "--steps", "2", cwd=ROOT)
    assert re.findall(r"^(\w+):", printed, re.M) == ["before", "after"]
    assert "8 adapters: 32,768 trainable" in printed


IDS = np.random.default_rng(1).integers(3, 40, (2, 9), np.int32)


@pytest.fixture(scope="module")
def llama():
    sizes = {"layers": 2, "width": 24, "hidden": 32, "heads": 3, "kv_heads": 1}
    model = smollm2.Llama(smollm2.Config(vocab=40, **sizes))
    shapes = jax.eval_shape(model.init, jax.random.key(0), IDS)
    return model, random_like(shapes)


def test_llama_is_causal_and_sparse_logits_are_the_same(llama):
    model, variables = llama
    apply = jax.jit(model.apply)
    changed = IDS.copy()
    changed[:, 5:] = 3
    whole, causal = (np.asarray(apply(variables, ids)) for ids in (IDS, changed))
    np.testing.assert_allclose(causal[:, :5], whole[:, :5], atol=1e-5)
    assert (causal[:, 5:] != whole[:, 5:]).any()
    at = np.array([[1, 4], [0, 8]])
    some = apply(variables, IDS, at)
    expected = np.take_along_axis(whole, at[..., None], 1)
    np.testing.assert_allclose(some, expected, atol=1e-5)


@pytest.fixture
def folder(tmp_path):
    """A Llama as Hugging Face stores it, with a tokenizer of single letters."""
    import tokenizers
    from tokenizers import models, pre_tokenizers

    config = (DATA / "llama.json").read_text()
    (tmp_path / "config.json").write_text(config)
    shutil.copy(DATA / "type1/base_model.safetensors", tmp_path / "model.safetensors")
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    letters = special + sorted(pre_tokenizers.ByteLevel.alphabet())[:94]  # 97 in all
    vocab = {letter: number for number, letter in enumerate(letters)}
    bpe = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.add_special_tokens(special)
    bpe.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_a_llama_of_hugging_face_is_a_model(folder):
    model, params, tokenizer = smollm2.load(folder)
    assert model.config == base_files.llama().config
    assert_same(params, base_files.base(1))
    assert tokenizer.chat("a")[-1] > 2 and tokenizer.encode("<|im_end|>") == [2]
    twin, _ = smollm2_nnx.load(folder)
    logits = nnx.jit(lambda twin: twin(IDS))(twin)
    close(logits, jax.jit(model.apply)({"params": params}, IDS))


def test_what_is_saved_is_what_was_loaded(folder, tmp_path):
    model, params, tokenizer = smollm2.load(folder)
    smollm2.save(tmp_path / "new", model, params, tokenizer)
    again = smollm2.load(tmp_path / "new")
    assert again[0].config == model.config
    assert_same(again[1], params)
    assert again[2].chat("a") == tokenizer.chat("a")


@pytest.mark.parametrize(
    ("file", "changes", "match"),
    [
        ("config.json", {"model_type": "qwen2"}, 'model_type = "llama", got "qwen2"'),
        ("config.json", {"tie_word_embeddings": False}, "tie_word_embeddings = true"),
        ("config.json", {"rope_parameters": {"rope_type": "yarn"}}, "rope_scaling"),
        ("config.json", {"head_dim": 32}, "head_dim = 16, got 32"),
        ("config.json", {"num_hidden_layers": 3}, "layers_2/"),
        ("tokenizer.json", {"model": 1}, "is not a tokenizer"),
        ("tokenizer.json", {"added_tokens": []}, "must end turns with <|im_end|>"),
    ],
)
def test_other_models_are_refused(folder, file, changes, match):
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(content | changes))
    with pytest.raises(ValueError, match=re.escape(match)):
        smollm2.load(folder)


def test_generate_is_greedy(llama):
    model, variables = llama
    apply = functools.partial(jax.jit(model.apply), variables)
    prompts = [[5, 6, 7], [8, 9]]
    together = smollm2.generate(apply, prompts, 4)
    assert together == [
        smollm2.generate(apply, [prompt], 4, length=7)[0] for prompt in prompts
    ]
    for prompt, new in zip(prompts, together, strict=True):
        ids, first = np.array([[*prompt, *new, 0][:7]]), len(prompt) - 1
        assert new == apply(ids)[0, first : first + 4].argmax(-1).tolist()
    with pytest.raises(ValueError, match="length must be at least 7, got 5"):
        smollm2.generate(apply, prompts, 4, length=5)


def evaluate(folder, *questions):
    """Ask the model in a folder, and the adapters in its folder `out`."""
    where = ["--model", f"{folder}", "--adapters", f"{folder / 'out'}"]
    evaluate_many.main([*where, *questions])


def learn(folder, name, turn, **settings):
    """Write an adapter of the model in a folder."""
    model, params, _ = smollm2.load(folder)
    plan = linen.plan(model, {"params": params}, MoRAConfig(rank=2, **settings), IDS)
    adapters = jax.tree.map(lambda m: jnp.roll(m, turn, -1), trained(plan))
    save(folder / "out" / name, adapters, params=params)


@pytest.mark.slow
def test_each_row_says_what_its_adapter_says_alone(folder, capsys, monkeypatch):
    """And one compiled program serves all of them, the base among them."""
    learn(folder, "chat", 0)
    learn(folder, "law", 1)
    questions, select, traced = ("Hi", "And then?"), serving.select, []
    monkeypatch.setattr(serving, "select", lambda *a: traced.append(a) or select(*a))
    evaluate(folder, *questions)
    assert len(traced) == 1
    table = re.findall(r"^(.+?)  +(.+?)  +(.+)$", capsys.readouterr().out, re.M)

    model, params, tokenizer = smollm2.load(folder)
    own = {"the base": params}
    for name in ("chat", "law"):
        own[name] = merge(params, load(folder / "out" / name, params))
    apply, expected = jax.jit(model.apply), [("question", "adapter", "answer")]
    for question in questions:
        for name, kernels in own.items():
            alone = functools.partial(apply, {"params": kernels})
            prompt = tokenizer.chat(question)
            (said,) = smollm2.generate(alone, [prompt], lesson.NEW_TOKENS, 99)
            expected.append((question, name, tokenizer.decode(said)))
    assert table == expected and len({row[2] for row in table[1:4]}) == 3


def test_adapters_that_cannot_share_a_batch_are_named(folder, capsys):
    with pytest.raises(SystemExit, match="no adapter in .*out: `make demo` makes one"):
        evaluate(folder)
    learn(folder, "chat", 0)
    learn(folder, "law", 0, alpha=0.5)
    with pytest.raises(SystemExit):
        evaluate(folder)
    message = "chat, law must be of one meaning: .* alpha 0.5, not 1.0"
    assert re.search(message, capsys.readouterr().err)


@pytest.fixture(scope="module")
def twin(llama):
    """The NNX model with the Linen model's parameters, which have the same paths."""
    model, variables = llama
    twin = nnx.eval_shape(lambda: smollm2_nnx.Llama(model.config, rngs=nnx.Rngs(0)))
    shapes, params = nnx.to_pure_dict(nnx.state(twin)), variables["params"]
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, params)
    nnx.update(twin, params)
    return twin


@pytest.mark.slow
@pytest.mark.parametrize("operator", [slow("rotation"), "sharing"])
def test_twins_are_one_model(llama, twin, operator):
    """The same adapters give the same logits and gradients, and the same plan."""
    model, variables = llama
    config = MoRAConfig(rank=2, operator=operator, alpha=0.5)
    adapted, plan = mora.wrap(twin, config), linen.plan(model, variables, config, IDS)
    assert mora.plan_of(adapted) == plan
    adapters, apply = trained(plan), linen.wrap(model, plan)
    mora.set_adapters(adapted, adapters)

    def loss(logits):
        return jnp.mean(jnp.sin(logits)), logits

    @functools.partial(jax.grad, has_aux=True)
    def gradients(adapters):
        return loss(apply(adapters, variables, IDS))

    grad = mora.value_and_grad(lambda model: loss(model(IDS)), has_aux=True)
    (_, logits), state = nnx.jit(grad)(adapted)
    grads = plan.adapters(nnx.to_pure_dict(state))
    close((grads, logits), jax.jit(gradients)(adapters))


@pytest.mark.slow
def test_twins_learn_alike(llama, twin):
    """The losses of a few steps, as the two examples train."""
    model, variables = llama
    config = MoRAConfig(rank=2)
    plan = linen.plan(model, variables, config, IDS)
    ids = np.asarray(jax.random.randint(jax.random.key(1), (3, 9), 3, 40))
    at = np.tile(np.arange(4, 8), (3, 1))
    batch = lesson.Batch(ids, at, np.take_along_axis(ids, at + 1, 1), at / at)
    rehearsed = model.apply(variables, ids[2:], at[2:])
    args = argparse.Namespace(steps=6, learning_rate=3e-2, operator="auto")
    taught = lesson.Lesson(Letters(), [], {}, batch, rehearsed)
    apply, first = linen.wrap(model, plan), init(plan)
    ours = lesson.Progress(args.steps, "test")
    rate = args.learning_rate
    adapters = teach_facts.train(apply, first, variables, taught, rate, ours)
    adapted = mora.wrap(twin, config)
    other = teach_facts_nnx.train(adapted, taught, args)
    np.testing.assert_allclose(ours.history, other.history, rtol=1e-4)
    assert ours.history[-1][0] < 0.9 * ours.history[0][0]
    learned = mora.adapters(adapted)
    chex.assert_trees_all_close(learned, adapters, rtol=1e-2, atol=1e-4)


class Letters:
    """A tokenizer of one token a letter."""

    def encode(self, text):
        return [ord(letter) - 60 for letter in text]

    chat = encode


def test_loss_and_recall():
    batch = lesson.encode(Letters(), ["AB", "ABC", "A"], ["XY", "Z", "Q"])
    assert batch.ids.shape == (3, 5) and batch.at.tolist()[0] == [1, 2, 3]
    assert batch.weights.sum(1).tolist() == [3, 2, 2]
    # Logits that are sure of each target; the third row is a rehearsed question.
    sure = 30 * np.eye(60, dtype=np.float32)[batch.targets]
    wrong, drifted = sure.copy(), sure.copy()
    wrong[1, 0], wrong[1, 0, 3], drifted[2] = 0, 9, 0
    # One that drifted remembers the facts.
    for logits, expected in (sure, 1), (wrong, 0.5), (drifted, 1):
        loss, recall = jax.jit(lesson.loss_and_recall)(logits, batch, sure[2:])
        assert recall == expected and (loss < 1e-6 if logits is sure else loss > 1)


def test_facts():
    pytest.importorskip("airportsdata")
    facts = list(airports.all_facts(seed=0))
    assert len(facts) > 3000 and facts == list(airports.all_facts(seed=0))
    assert len({fact.question for fact in facts}) == len(facts)

    answers = {fact.question: fact.answer for fact in facts[::3]}

    def ask(questions):
        return [answers.get(question, "?") for question in questions]

    unknown, said, known = airports.pick_unknown(ask, 5, seed=0)
    assert unknown == [fact for k, fact in enumerate(facts[:8]) if k % 3]
    assert said == ["?"] * 5 and known == 3
