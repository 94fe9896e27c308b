"""The suite of tasks: their data, how rates are chosen, and its report.

Nothing is downloaded, and no model is trained.
"""

import io
import itertools
import json
import math
import sys
import tarfile
import types

import numpy as np
import pytest

from benchmarks.quality import bigbench, language, puzzles, suite, tasks, teaching
from models.lesson import batch

CAPITALS = {"examples": [{"input": "The capital of Peru is ", "target": ["Lima", "x"]}]}
CHOICES = {"no": 0, "yes": 1.0, "perhaps": 0.5}
INTENTS = {"examples": [{"input": "Go?", "target_scores": CHOICES}] * 2}


def archive(path, members):
    """A tar file with a task.json of each task; content that is no text is JSON."""
    with tarfile.open(path, "w:gz") as file:
        for name, content in members.items():
            text = content if isinstance(content, bytes) else json.dumps(content)
            data = text if isinstance(text, bytes) else text.encode()
            info = tarfile.TarInfo(f"a-1.0/a/benchmark_tasks/{name}/task.json")
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def test_tasks_that_are_asked_for_are_kept(tmp_path):
    """The first of several answers, or the best choice; nothing else is written."""
    folder = tmp_path / "kept"
    folder.mkdir()
    members = {"odd/../../capitals": INTENTS, "capitals": CAPITALS, "a/go": INTENTS}
    members["unread"] = b"{"
    made = archive(tmp_path / "a.tar.gz", members)
    bigbench.keep(made, ["capitals", "a/go"], folder)
    assert {path.name for path in folder.iterdir()} == {"capitals.json", "a.go.json"}
    assert len(list(tmp_path.iterdir())) == 2
    assert bigbench.read("capitals", folder) == [("The capital of Peru is", "Lima")]
    assert bigbench.read("a/go", folder) == 2 * [("Go?", "yes")]
    with pytest.raises(FileNotFoundError):
        bigbench.read("unread", folder)


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"\xff",
        b"[" * 100_000,
        [],
        {"examples": []},
        {"examples": "many"},
        {"examples": [CAPITALS["examples"][0], "text"]},
        {"examples": [{"target": "Lima"}]},
        {"examples": [{"input": 3, "target": "Lima"}]},
        {"examples": [{"input": "a"}]},
        {"examples": [{"input": "a", "target": " "}]},
        {"examples": [{"input": "a", "target": [1]}]},
        {"examples": [{"input": "a", "target_scores": ["yes"]}]},
        {"examples": [{"input": "a", "target_scores": {"yes": "1"}}]},
        {"examples": [{"input": "a", "target_scores": {"yes": 0, "no": 0}}]},
    ],
)
def test_a_malformed_task_is_an_error_that_names_it(content, tmp_path):
    made = archive(tmp_path / "a.tar.gz", {"capitals": content})
    with pytest.raises(ValueError, match="capitals"):
        bigbench.keep(made, ["capitals"], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar.gz"]


def test_a_task_that_is_too_large_or_missing_is_an_error(tmp_path, monkeypatch):
    made = archive(tmp_path / "a.tar.gz", {"capitals": CAPITALS})
    with pytest.raises(ValueError, match="intents"):
        bigbench.keep(made, ["capitals", "intents"], tmp_path)
    monkeypatch.setattr(bigbench, "LARGEST", 20)
    with pytest.raises(ValueError, match=r"capitals.* 20 "):
        bigbench.keep(made, ["capitals"], tmp_path)


def test_a_task_that_is_a_link_is_not_read(tmp_path):
    made = tmp_path / "a.tar.gz"
    with tarfile.open(made, "w:gz") as file:
        link = tarfile.TarInfo("a/benchmark_tasks/capitals/task.json")
        link.type = tarfile.SYMTYPE
        link.linkname = "/etc/hostname"
        file.addfile(link)
    with pytest.raises(ValueError, match="capitals"):
        bigbench.keep(made, ["capitals"], tmp_path)


def test_the_archive_is_downloaded_once_and_deleted(tmp_path, monkeypatch):
    downloads = []

    def download(folder):
        downloads.append(folder)
        members = {"capitals": CAPITALS, "a/go": INTENTS}
        return archive(folder / "a.tar.gz", members)

    monkeypatch.setattr(bigbench, "download", download)
    folder = tmp_path / "kept"
    for _ in range(2):
        bigbench.fetch(["capitals", "a/go"], folder)
    assert len(downloads) == 1 and not downloads[0].exists()
    assert {path.name for path in folder.iterdir()} == {"capitals.json", "a.go.json"}


def test_pip_checks_the_archive_before_it_runs_what_is_in_it(tmp_path, monkeypatch):
    def pip(command):
        wanted = (tmp_path / "requirements.txt").read_text()
        assert wanted == f"bigbench==1.0.0 --hash=sha256:{bigbench.SHA256}\n"
        assert "--require-hashes" in command
        return types.SimpleNamespace(returncode=codes.pop())

    codes = [1, 0]
    monkeypatch.setattr(bigbench.subprocess, "run", pip)
    assert bigbench.download(tmp_path) == tmp_path / "bigbench-1.0.0.tar.gz"
    with pytest.raises(SystemExit, match="bigbench==1.0.0"):
        bigbench.download(tmp_path)


@pytest.fixture
def characters(monkeypatch):
    """A tokenizer with a token for each byte, and no model."""
    tokens = lambda text: list(text.encode())  # noqa: E731
    tokenizer = types.SimpleNamespace(encode=tokens, chat=tokens)
    base = language.Base(None, None, tokenizer)  # type: ignore[arg-type]
    monkeypatch.setattr(language, "base", lambda: base)
    tasks.task_of.cache_clear()
    yield
    tasks.task_of.cache_clear()


@pytest.fixture
def tense(characters, monkeypatch):
    """A task with 60 short examples, some of them twice, and three long ones."""
    rows = [bigbench.Example(f"number {k:02}", f"{k:02}") for k in range(60)]
    rows += rows[:9] + [bigbench.Example(f"{k} " + 50 * "a", "b") for k in range(3)]
    monkeypatch.setattr(tasks, "read", lambda name: rows)
    return tasks.task_of("tense", 8)


def test_held_out_examples_are_not_learned_from(tense):
    """They are the same in each run, in whole batches, at most a third."""
    assert tense.learned is not None
    held_out = {prompt for prompt, _ in tense.held_out}
    learned = {prompt for prompt, _ in tense.learned}
    assert len(held_out) == len(tense.held_out) == 16
    assert len(learned) == len(tense.learned) == 60 - 16
    assert not held_out & learned
    tasks.task_of.cache_clear()
    assert tasks.task_of("tense", 8) == tense


def test_longer_examples_are_left_out_and_said(tense, capsys):
    assert tense.size == (16, 4)
    assert tense.left_out == pytest.approx(3 / 63)
    tasks.task_of.cache_clear()
    tasks.task_of("tense", 8)
    printed = capsys.readouterr().out
    assert "16 examples are held out" in printed
    assert "4.8% are longer and left out" in printed


def test_a_stream_has_all_examples_once_in_an_epoch(tense):
    first, again, other = (
        list(itertools.islice(tense.stream(seed, 8), 11)) for seed in (0, 0, 1)
    )
    rows = [bytes(row) for part in first for row in part.ids.astype(np.uint8)]
    assert len(set(rows[:44])) == 44 == len(set(rows[44:]))
    assert {part.ids.shape for part in first} == {(8, 16)}
    assert {part.targets.shape for part in first} == {(8, 4)}
    for one, same, another in zip(first, again, other, strict=True):
        np.testing.assert_array_equal(one.ids, same.ids)
        assert (one.ids != another.ids).any()


def test_too_few_examples_are_an_error():
    with pytest.raises(ValueError, match="at least 24 .* got 23"):
        tasks.split([("a", "b")] * 23, 8)


@pytest.mark.slow
@pytest.mark.parametrize("name", puzzles.SIZES)
def test_problems_are_short_and_new(name, characters, monkeypatch):
    pytest.importorskip("reasoning_gym")
    monkeypatch.setattr(tasks, "LONGEST", (80, 20))
    task = tasks.task_of(name, 4)
    assert len(task.held_out) == 128 and task.left_out < 0.1
    assert all(prompt and answer for prompt, answer in task.held_out)
    known = {prompt for prompt, _ in task.held_out}
    stream = puzzles.stream(name, 0, 4, lambda pair: pair[0] not in known)
    made = [pair for pairs in itertools.islice(stream, 5) for pair in pairs]
    assert len(made) == 20 and not known & {prompt for prompt, _ in made}
    assert next(task.stream(0, 4)).ids.shape == (4, task.size[0])
    with pytest.raises(ValueError, match="at least 4 of 8 .* got 0"):
        next(puzzles.stream(name, 0, 4, lambda pair: False))


def test_padding_does_not_count_for_damped_inputs():
    taught = batch([[1, 2, 3], [4]], [[5, 6], [7]])
    found = language.damping_inputs("inputs", taught)
    np.testing.assert_array_equal(found.ids, taught.ids)
    np.testing.assert_array_equal(found.counted, [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    for text in "inputs", "other":
        with pytest.raises(ValueError, match=f"text .* got '{text}'"):
            language.damping_inputs(text, None)


def run(method, task, losses, seed=0, divergence=0.1):
    """A finished run, with the losses of held-out answers after each quarter."""
    return {
        "method": method,
        "task": task,
        "seed": seed,
        "rate": 1e-3,
        "steps": 40,
        "parameters": 7,
        "seconds": 0.5,
        "scores": [
            None if loss is None else {"loss": loss, "right": 0.5} for loss in losses
        ],
        "forgetting": {"divergence": divergence, "same": 1.0, "text": 4.0},
    }


def test_a_method_beside_lora():
    """Ratios over the runs that both have, and the steps to LoRA's last loss."""
    lora = [
        run("lora", "a", [8.0, 4.0, 2.0, 2.0, 1.0]),
        run("lora", "b", [8.0, 4.0, 4.0, 4.0, 2.0]),
        run("lora", "c", [8.0, 4.0, 4.0, 4.0, 2.0]),
    ]
    other = [
        run("other", "a", [8.0, 2.0, 0.5, 0.5, 0.5], divergence=0.3),
        run("other", "b", [8.0, 8.0, 8.0, 8.0, 8.0], divergence=0.1),
    ]
    found = suite.summary(other, lora)
    assert found["loss"] == pytest.approx(math.sqrt(0.5 * 4))
    assert found["steps"] == pytest.approx(math.sqrt(15 / 40))  # and all 40 of b
    assert (found["never"], found["runs"]) == (1, 2)
    assert found["divergence"] == pytest.approx(0.2)
    own = suite.summary(lora, lora)
    assert own["loss"] == own["steps"] == 1.0 and own["never"] == 0
    assert suite.summary(other, [])["loss"] is None
    ranks = suite.mean_ranks({"lora": lora, "other": other, "same": lora})
    assert ranks == {"lora": (2.5 + 1.5) / 2, "other": 2.0, "same": 2.0}
    assert suite.mean_ranks({"lora": lora[:1], "other": other[1:]})["lora"] is None
    broken = run("other", "a", [8.0, 4.0, None])
    assert suite.final(broken) == math.inf == suite.steps_to(broken, 1.0)
    assert suite.summary(lora, [broken])["steps"] is None
    assert suite.steps_to(lora[0], 8.0) == 1.0
    learned = run("lora", "a", [8.0, 0.0, 0.0])
    assert suite.final(learned) == suite.LEAST
    table = suite.by_task({"lora": lora, "other": other, "full": [broken]})
    assert [row["task"] for row in table] == ["a", "b", "c"]
    assert table[0]["lora"] == "1.000 (50%)" and table[2]["other"] is None


def test_the_suite_from_its_options_to_its_file(monkeypatch, tmp_path, capsys):
    """The rate is the best on the ladder's tasks, an M's is full fine-tuning's."""
    computed = []

    def compute(cell):
        computed.append(cell)
        best = 8e-3 if cell["method"] == "lora" else 1e-4
        loss = 1 + math.log2(cell["rate"] / best) ** 2
        found = run(cell["method"], cell["task"], [9.0, 8.0, 7.0, 6.0, loss])
        return {k: found[k] for k in ("parameters", "seconds", "scores", "forgetting")}

    def main(*options):
        computed.clear()
        out = ["--out", str(tmp_path / "suite.json")]
        monkeypatch.setattr(sys, "argv", ["suite", *out, *options])
        suite.main()
        return json.loads((tmp_path / "suite.json").read_text())

    monkeypatch.setattr(suite, "compute", compute)
    monkeypatch.setattr(suite.jax.config, "update", lambda *_: None)
    damped = "block_diagonal, damped 0"
    options = ["--methods", "lora", damped, "--tasks", "tense", "gcd", "--seeds", "2"]
    first = main(*options)
    learned = {(c["method"], c["task"], c["rate"]) for c in computed if c["seed"]}
    rates = {"lora": 8e-3, damped: 1e-4}
    assert learned == {(m, t, rates[m]) for m in rates for t in ("tense", "gcd")}
    assert {c["task"] for c in computed} == {"tense", "gcd", *suite.LADDER}
    assert {c["method"]: c.get("text") for c in computed} == {
        "lora": None,
        "full": None,
        damped: "own",
    }
    tried = {c["method"] for c in computed if c["task"] in suite.LADDER}
    assert tried == {"lora", "full"}
    printed = capsys.readouterr().out
    assert suite.LADDER[0] in printed and "| LoRA |" in printed
    assert (tmp_path / "suite.png").exists()

    reported = main(*options, "--report", str(tmp_path / "suite.jsonl"))
    assert not computed and reported["results"] == first["results"]
    main(*options, "--text", "random", "--methods", damped)
    assert {c["text"] for c in computed} == {"random"}
    quick = main("--quick", "--out", str(tmp_path / "suite.json"))
    assert {c["task"] for c in computed} == {"qa_wikidata", "chain_sum"}
    assert quick["settings"]["steps"] == 8
    with pytest.raises(SystemExit, match="holds no finished run"):
        main("--methods", "full", "--report", str(tmp_path / "suite.jsonl"))


def test_methods_and_tasks_are_known():
    assert set(suite.METHODS) <= set(teaching.METHODS)
    assert len(suite.TASKS) == 12 and not set(suite.TASKS) & set(suite.LADDER)
