"""README and the pages in docs/: their code runs, and what they point at exists."""

import collections
import contextlib
import dataclasses
import importlib
import json
import pkgutil
import re
import warnings
from importlib.util import find_spec
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import python_blocks
from processes import ROOT, python

import mora_jax
from benchmarks.common.harness import method_name
from benchmarks.step import train_step
from mora_jax import MoRAConfig
from mora_jax._flax.layer_rules import RULES
from mora_jax.io.peft._export import RANKS
from mora_jax.operators import OPERATORS

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
REPORT = ROOT / "benchmarks/quality/REPORT.md"
ANSWERS = ROOT / "docs/what-it-learns.md"
TITLES = {
    "full": "every kernel",
    "lora": "LoRA",
    "lora+": "LoRA+",
    "lora-ga": "LoRA-GA",
    "lora-xs": "LoRA-XS, at MoRA's size",
    "miss": "MiSS",
    "signed_miss": "MiSS with signs",
    "rotation": "MoRA, rotation",
    "rotation, start": "rotation, with a start",
    "subspace": "MoRA, directions of a gradient",
    "subspace, start": "the same, with a start",
    "subspace, renewed": "the same, renewed",
    "block_diagonal": "MoRA, blocks (default)",
    "block_diagonal, damped": "the same, inputs damped",
    "lora, damped": "LoRA, inputs damped",
    "rotation, damped": "rotation, inputs damped",
}
"""How tables of what is learned call a method."""
LINKED = [
    *ROOT.glob("*.md"),
    *ROOT.glob("docs/**/*.md"),
    *ROOT.glob("benchmarks/**/*.md"),
]

ELSEWHERE = re.compile(r"^(?:import|from) (gemma|peft|tunix)\b", re.MULTILINE)
"""Packages of other environments: where one is not installed a block is compiled."""
NAMES = re.compile(
    r"(?<![\w./-])(?:mora_jax|optax|diagnostics|io|linen|nnx|operators|products|sharding)"
    r"(?:\.(?!md\b|py\b)\w+)+"
)


def label(page):
    return str(page.relative_to(ROOT))


def prose(page):
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)


ALONE = "start.md"
"""The page each of whose blocks is a program of its own."""


def run(page, directory, **given):
    """Run the blocks of a page in one namespace, which is returned."""
    scope = {"directory": directory, **given}
    with contextlib.chdir(directory):
        for block in python_blocks(page):
            compiled = compile(block, label(page), "exec")
            if page.name == ALONE:
                scope = {}
            if all(map(find_spec, ELSEWHERE.findall(block))):
                exec(compiled, scope)
    return SimpleNamespace(**scope)


NEEDS = {
    "checkpoints.md": "orbax.checkpoint",
    "gemma.md": "gemma",
    "maxtext-and-keras.md": "keras",
    "transformers.md": "transformers",
    "tunix.md": "tunix",
}
"""The packages without which the blocks of a page do not run."""


SLOW = {"checkpoints.md", "many-adapters.md", "quantized.md", "transformers.md"}
SLOW |= {"coming-from.md", "inside.md", "lora.md", "operators.md", "training.md"}
SLOW |= {"what-it-learns.md"}
"""Pages whose blocks take seconds."""


def pages(slow):
    # test_troubleshooting.py runs the page of errors, one by one.
    found = [p for p in PAGES[1:] if python_blocks(p) and p.stem != "troubleshooting"]
    return [page for page in found if (page.name in SLOW) == slow]


@pytest.mark.parametrize("page", pages(slow=False), ids=label)
def test_code_runs(page, tmp_path):
    run_page(page, tmp_path)


@pytest.mark.slow  # as a whole, so that CI runs each page
@pytest.mark.parametrize("page", pages(slow=True), ids=label)
def test_code_that_takes_seconds_runs(page, tmp_path):
    run_page(page, tmp_path)


def run_page(page, directory):
    warns = contextlib.nullcontext()
    if page.name in NEEDS and find_spec(NEEDS[page.name].partition(".")[0]) is None:
        pytest.skip(f"{NEEDS[page.name]} is not installed")
    if page.name == "checkpoints.md":  # and says so
        # Orbax uses old names of JAX when it is imported. Here those are ignored, and
        # `pytest.warns` would show them again.
        importlib.import_module("orbax.checkpoint")
        warns = pytest.warns(mora_jax.MoRAWarning, match="updates batch_stats")
    if page.name in ("gemma.md", "transformers.md"):  # what they import uses old names
        warns = warnings.catch_warnings(action="ignore")
    with warns:
        run(page, directory)


@pytest.mark.slow  # other tests run them too, beside the other blocks
@pytest.mark.parametrize("page", [README, ROOT / "docs/index.md"], ids=label)
def test_first_program_runs_in_a_file_of_its_own(page, tmp_path):
    """It prints what the page shows, except for the digits of its numbers."""
    (tmp_path / "first.py").write_text(python_blocks(page)[0])
    printed = python("first.py", cwd=tmp_path)
    shown = re.findall(r"^```text\n(.*?)^```", page.read_text(), re.M | re.S)[-1]
    number = re.compile(r"\d[\d.,e-]*")
    assert number.sub("0", printed).split() == number.sub("0", shown).split() != []


def test_first_page_has_ten_lines_that_learn(tmp_path):
    """Beside those that import; and the figures are what was measured."""
    page = ROOT / "docs/index.md"
    (program,) = python_blocks(page)
    lines = [line for line in program.splitlines() if line]
    assert len([line for line in lines if not line.startswith("import ")]) == 10
    ran = run(page, tmp_path)
    assert ran.loss(ran.adapters) < 0.1 * ran.loss(mora_jax.init(ran.plan))
    merged = ran.model.apply({"params": ran.params}, ran.x)
    adapted = ran.apply(ran.adapters, ran.variables, ran.x)
    np.testing.assert_allclose(merged, adapted, 1e-5, 1e-5)
    found = one_rate()
    mora, lora = (
        found["pairs, r=8", name] for name in ("block_diagonal, damped 0", "lora")
    )
    text = " ".join(page.read_text().split())
    steps = "MoRA knows 99% of the tokens after {:.1f} steps, LoRA after {:.1f}"
    assert steps.format(mora["steps"], lora["steps"]) in text
    forgot = "MoRA forgot {:.2f} nats a token of ordinary answers, and LoRA {:.2f}"
    assert forgot.format(mora["forgotten"], lora["forgotten"]) in text


def test_code_of_readme_trains_and_merges(tmp_path):
    ran = run(README, tmp_path)
    x, target = ran.x, ran.target

    def loss(y):
        return jnp.mean((y - target) ** 2)

    base = ran.model.apply(ran.variables, x)
    adapted = ran.apply(ran.adapters, ran.variables, x)
    merged = ran.model.apply({"params": ran.params}, x)
    np.testing.assert_allclose(merged, adapted, 1e-5, 1e-5)
    assert loss(adapted) < 0.5 * loss(base)
    np.testing.assert_allclose(ran.merged(x), ran.net(x), 0, 1e-5)
    assert type(ran.merged.layers[0]) is nnx.Linear
    assert loss(ran.net(x)) < loss(ran.base(x))


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    found, times = set(), collections.Counter()
    for heading in re.findall(r"^#+ (.*)", prose(page), re.MULTILINE):
        heading = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)  # a link's text
        slug = re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
        found.add(f"{slug}-{times[slug]}" if times[slug] else slug)
        times[slug] += 1
    return found


def dead_links(page):
    """The links of a page to files and headings that are not there."""
    for link in re.findall(r"\]\(([^)\s]+)(?: \"[^\"]*\")?\)", prose(page)):
        if not re.match(r"https?:|mailto:", link):
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            if not target.exists() or anchor and anchor not in anchors(target):
                yield link


@pytest.mark.parametrize("page", LINKED, ids=label)
def test_links_lead_somewhere(page):
    assert not list(dead_links(page))


def test_dead_links_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# One `a_b`!\n[](#one-a_b) [x](#one) [y](page.md#two) [z](no.md)\n"
    )
    assert list(dead_links(page)) == ["#one", "page.md#two", "no.md"]


def exists(name):
    for place in ("", "mora_jax.", "flax."):
        with contextlib.suppress(ImportError, AttributeError):
            return pkgutil.resolve_name(place + name) is not None
    return False


@pytest.mark.parametrize("page", [*PAGES, REPORT], ids=label)
def test_names_exist(page):
    text = page.read_text()
    names = [n for n in NAMES.findall(text) if not n.startswith("mora_jax.maxtext")]
    assert not [name for name in names if not exists(name)]  # MaxText is elsewhere
    settings = {field.name for field in dataclasses.fields(MoRAConfig)}
    if page.stem == "troubleshooting":  # which has a name of PEFT's
        settings.add("lora_alpha")
    for arguments in re.findall(r"MoRAConfig\(([^)]*)", text):
        assert set(re.findall(r"(\w+)=", arguments)) <= settings


def test_every_page_is_listed():
    listed = re.findall(r"\]\(([\w-]+\.md)\)", (ROOT / "docs/README.md").read_text())
    pages = {page.name for page in PAGES[1:]} - {"README.md", "index.md"}
    assert sorted(listed) == sorted(pages)


def test_table_of_layers_is_the_registry():
    text = (ROOT / "docs/what-is-adapted.md").read_text()
    kinds = "dense|convolution|embedding"
    rows = re.findall(rf"^\| (?:{kinds}) \| (.*?) \| (.*?) \|", text, re.MULTILINE)
    for api, cells in zip((nn, nnx), zip(*rows, strict=True), strict=True):
        known = {
            f"{cls.__name__}.{rule.method}".removesuffix(".__call__")
            for cls, rules in RULES.items()
            for rule in rules
            if isinstance(cls, type) and getattr(api, cls.__name__, None) is cls
        }
        assert set(re.findall(r"`([\w.]+)`", "".join(cells))) == known


def test_defaults_are_as_the_table_of_layers_says():
    def net(rngs):
        dense, head = (nnx.Linear(8, 8, rngs=rngs) for _ in range(2))
        stem, table = nnx.Conv(8, 8, (3,), rngs=rngs), nnx.Embed(8, 8, rngs=rngs)
        return nnx.Dict(dense=dense, stem=stem, table=table, head=head)

    model = nnx.eval_shape(lambda: net(nnx.Rngs(0)))
    assert list(mora_jax.nnx.plan(model)) == ["dense/kernel"]


def test_table_of_operators_has_all():
    text = (ROOT / "docs/operators.md").read_text()
    every = {"auto", "subspace", *OPERATORS}
    assert every == set(re.findall(r"^\| `(\w+)` \|", text, re.M))


def measured(kind):
    """The rows of the one run that pages show, of steps or of forward passes."""
    results = (ROOT / "benchmarks/step/results/all_methods.json").read_text()
    return [row for row in json.loads(results)["results"] if row["kind"] == kind]


def test_costs_are_as_measured():
    """The page's table has all steps of our model; its text has forward passes."""
    cells = "{method} | {fastest:.2f} | {temporary_MB:,.0f} MB | {arithmetic:.2f}"
    row = f"| {cells} | {{compile_seconds:.0f}} s |"
    steps = [row.format(**r) for r in measured("step") if r["model"] == "SmolLM2"]
    page = (ROOT / "docs/costs.md").read_text()
    assert re.findall(r"^\|.*\| \d+ s \|$", page, re.MULTILINE) == steps != []
    ours = (r for r in measured("forward") if r["model"] == "SmolLM2")
    times = {r["method"]: "{fastest:.2f}".format(**r) for r in ours}
    said = re.search(
        r"base's does \((\S+) .*costs\s(\S+) with blocks, (\S+) with sharing, (\S+) "
        r"with rotation and (\S+) with our LoRA",
        " ".join(page.split()),
    )
    names = "merged model", "MoRA, block_diagonal", "MoRA, sharing", "MoRA, rotation"
    assert said and said.groups() == (
        *map(times.get, names),
        times["LoRA, this library"],
    )


def test_costs_in_readme_are_as_measured():
    """The default run's methods in both models, and the memory of the frozen ones."""
    by_method = {}
    for r in measured("step"):
        by_method.setdefault(r["method"], []).append(r)
    ours, theirs = by_method["frozen model"]
    shown = [method_name(name) for name in train_step.OPERATORS_OF_README]
    by_method = {name: by_method[name] for name in [*shown, "LoRA, qwix"]}
    text = README.read_text()
    both = f"{ours['temporary_MB']:,.0f} and {theirs['temporary_MB']:,.0f} MB"
    assert f"(frozen: {both})" in text
    cells = "{fastest:.2f} | {temporary_MB:,.0f} MB"
    rows = [
        f"| {method} | {' | '.join(cells.format(**r) for r in runs)} |"
        for method, runs in by_method.items()
    ]
    assert re.findall(r"^\| .* MB \|$", text, re.MULTILINE) == rows
    assert {len(runs) for runs in by_method.values()} == {2}


@pytest.mark.parametrize(
    ("experiment", "cells"),
    [
        (
            "pretraining",
            "{seeds} | @rate | {steps} | {after:.1f} | {ratio:.2f}{error:.2f} | "
            "{other:.1f} | {divergence:.2f}",
        ),
        (
            "pretraining_long",
            "{seeds} | @rate | {steps} | {after:.1f} | {ratio:.2f}{error:.2f} | "
            "{other:.1f} | {divergence:.2f}",
        ),
        (
            "reasoning",
            "{seeds} | @rate | {after:.1%}{error:.1%} | {training:.2f} | {loss:.2f} | "
            "{divergence:.2f} | {memory:,.0f} | {seconds:.2f} | {file:.1f}",
        ),
        (
            "restarts",
            "{seeds} | @rate | {perplexity:.2f} | {ratio:.3f}{error:.3f} | {speed:.3f}",
        ),
        (
            "facts",
            "@rate | {recalled} of {seeds} | {steps:.1f} | {ratio:.2f}{error:.2f} | "
            "{divergence:.2f} | {same:.0%} | {text:.2f}",
        ),
    ],
)
def test_other_experiments_are_as_measured(experiment, cells):
    """Each row of their tables, by its rate and figures."""
    found = ROOT / f"benchmarks/quality/results/{experiment}.json"
    page = REPORT.read_text()
    for row in json.loads(found.read_text())["settings"]["summaries"]:
        form = cells if row.get("error") else re.sub(r"{error.*?}", "", cells)
        if row.get("ratio", 1) is None:  # facts have more rates than their best ones
            if row["seeds"] < 3:
                continue
            form = re.sub(r"{ratio.*?} ", "", form)
        form = form.replace("{error", " ± {error")
        rate = _short(f"{row['rate']:.1e}")
        assert f"| {form} |".format(**row).replace("@rate", rate) in page


def _short(rate: str) -> str:
    """4.0e-04 as 4e-4."""
    return rate.replace(".0e", "e").replace("e-0", "e-")


def test_what_is_learned_is_as_measured():
    page = REPORT.read_text()
    for row in summaries("pairs"):
        error = f" ± {row['error']:.2f}" if row["error"] else ""
        ratio, rate = f"{row['ratio']:.2f}{error}", f"{row['rate']:.1e}"
        cells = "| @name | {parameters:,} | {seeds} | @rate | {steps99:.1f} | @ratio | "
        cells = (cells + "{divergence:.2f} |").format(**row).replace("@ratio", ratio)
        cells = cells.replace("@name", TITLES[row["name"]])
        assert cells.replace("@rate", _short(rate)) in page


def test_the_strongest_methods_are_as_measured():
    page = REPORT.read_text()
    for row in summaries("strongest"):
        error = "" if row["name"] == "lora" else f" ± {row['error']:.2f}"
        cells = "{seeds} | @rate | {steps90:.1f} | {steps99:.1f} | {ratio:.2f}@error | "
        cells = f"| @name | {cells}{{passes:.2f}} | {{divergence:.2f}} |".format(**row)
        cells = cells.replace("@error", error).replace("@name", TITLES[row["name"]])
        rate = _short(f"{row['rate']:.1e}")
        assert cells.replace("@rate", rate) in page


def test_blocks_are_as_measured():
    """All rates of two sets or more, of blocks and of damped inputs."""
    page, rows = REPORT.read_text(), 0
    for row in summaries("blocks"):
        if row["name"] != "lora" and row["seeds"] > 1 and row["steps99"]:
            rate, setting = _short(f"{row['rate']:.1e}"), BETWEEN[row["setting"]]
            cells = f"| {setting} | {TITLES[row['name']]} | {row['seeds']} | {rate} | "
            cells += "{steps90:.1f} | {steps99:.1f} | {ratio:.2f} ± {error:.2f} | "
            cells += "{divergence90:.3f} | {divergence:.3f} |"
            assert cells.format(**row) in page
            rows += 1
    assert rows > 6


def test_a_full_adapter_is_as_measured():
    """Each row of its table; what no run came to is left empty."""
    forms = "{known:.1%}", "{steps90:.1f}", "{ratio90:.2f} ± {error90:.2f}"
    forms += "{steps99:.1f}", "{ratio:.2f} ± {error:.2f}"
    forms += "{divergence90:.2f}", "{divergence:.2f}"
    page, found = REPORT.read_text(), summaries("filled")
    assert {row["setting"] for row in found} == {"half a bit", "one bit"}
    for row in found:
        cells = [TITLES[row["name"]], f"{row['parameters']:,}", str(row["seeds"])]
        cells.append(_short(f"{row['rate']:.1e}"))
        for form in forms:
            used = re.findall(r"{(\w+)", form)
            if row[used[0]] is None or row["name"] == "lora" and used[0] == "ratio":
                cells.append("")
                continue
            if row[used[-1]] in (None, 0.0) or row["name"] == "lora":
                form = form.partition(" ±")[0]
            cells.append(form.format(**row))
        assert re.sub(r"  (?=\|)", " ", f"| {' | '.join(cells)} |") in page


@pytest.mark.parametrize("experiment", ["facts", "facts_filled"])
def test_what_is_forgotten_at_equal_recall_is_as_measured(experiment):
    """Each method's row; a recall that was never reached is left empty."""
    found = ROOT / f"benchmarks/quality/results/{experiment}.json"
    rows = json.loads(found.read_text())["settings"]["least_forgotten"]
    for name in {row["name"] for row in rows}:
        at = {row["recall"]: row for row in rows if row["name"] == name}
        form = "| {divergence:.2f} | {text:.2f} "
        cells = [form.format(**at[k]) if k in at else "| | " for k in (0.5, 0.75, 0.95)]
        start = f"| {TITLES[name]} | {at[0.5]['parameters']:,} | {at[0.5]['seeds']} "
        assert f"{start}{''.join(cells)}|\n" in REPORT.read_text()


def summaries(experiment):
    """What an experiment found, by method and setting, each at its best rate."""
    report = json.loads(
        (ROOT / f"benchmarks/quality/results/{experiment}.json").read_text()
    )
    return [
        {"setting": "r=8", "steps99": row.get("steps"), **row}
        for row in report["settings"]["summaries"]
        if row["ratio"] is not None
    ]


BETWEEN = {"r=1, 4 layers": "r = 1 on 4 of 30 layers", "r=8": "r = 8", "r=1": "r = 1"}
"""How tables call a setting."""
RECIPE = {
    "lora": "LoRA",
    "lora, damped 0": "LoRA, inputs damped",
    "full": "every kernel",
    "block_diagonal": "MoRA, blocks (default)",
    "block_diagonal, damped 0": "MoRA, inputs damped",
    "block_diagonal, damped 4": "MoRA, inputs damped along 4 directions too",
    "rotation": "MoRA, rotation",
    "subspace": "MoRA, directions of a gradient",
    "subspace, damped 0": "MoRA, directions of a gradient, inputs damped",
}
"""How tables of one rate call a method."""


def one_rate():
    """{(setting, method): what was found at full fine-tuning's rate}."""
    return {(row["setting"], row["name"]): row for row in summaries("recipe")}


def test_table_of_learning_in_readme_is_as_measured():
    found, page = one_rate(), README.read_text()
    for name in ("lora", "full", "block_diagonal, damped 0", "subspace, damped 0"):
        facts, pairs = (found[f"{task}, r=8", name] for task in ("facts", "pairs"))
        cells = "{steps:.1f} | {forgotten:.2f}"
        cells = f"{cells.format(**facts)} | {cells.format(**pairs)}"
        assert f"| {RECIPE[name]} | {cells} |\n" in page


@pytest.mark.parametrize("page", [ANSWERS, REPORT], ids=lambda p: p.stem)
def test_tables_of_one_rate_are_as_measured(page):
    """Steps and forgetting beside LoRA's; the report has each row."""
    text, rows = page.read_text(), 0
    for (setting, name), row in one_rate().items():
        task, _, extent = setting.partition(", ")
        error = f" ± {row['error']:.2f}" if row["error"] else ""
        cells = f"| {task}, {BETWEEN[extent]} | {RECIPE[name]} | "
        cells += "{sets} | {steps:.1f} | {ratio:.2f}@error | {forgotten:.2f} | "
        cells = (cells + "{forgotten_ratio:.2f} |").format(**row)
        shown = cells.replace("@error", error) + "\n" in text
        assert shown or page is ANSWERS
        rows += shown
    assert rows > 10


RESULTS = sorted(ROOT.glob("benchmarks/*/results/*.json"))


def test_all_figures_are_listed_with_their_machine_and_day():
    page = (ROOT / "docs/results.md").read_text()
    machines = {p.stem: json.loads(p.read_text())["machine"] for p in RESULTS}
    listed = re.findall(r"^\| \[(\w+)\]\(.*\| ([\d-]+) \|$", page, re.MULTILINE)
    assert dict(listed) == {k: found.pop("date") for k, found in machines.items()}
    assert len(listed) == len(RESULTS)
    for found in machines.values():
        assert "{cores} CPU cores ({architecture})".format(**found) in page
        assert "Python {python},\njax {jax}, flax {flax}.".format(**found) in page


@pytest.mark.parametrize("found", RESULTS, ids=lambda p: p.stem)
def test_results_name_no_folder_of_a_machine(found):
    assert not re.findall(r'"/[^"]*"', found.read_text())


def test_table_of_ranks_is_what_plans_have():
    text = (ROOT / "docs/vllm.md").read_text()
    (budgets,) = re.findall(r"^\| kernel \| (.*) \|$", text, re.MULTILINE)
    budgets = [int(cell.removeprefix("r = ")) for cell in budgets.split(" | ")]
    rows = re.findall(r"^\| (\d+) x (\d+) \| (.*) \|$", text, re.MULTILINE)
    assert len(rows) > 5
    for ins, outs, cells in rows:
        kernel = jax.ShapeDtypeStruct((int(ins), int(outs)), jnp.float32)
        for budget, cell in zip(budgets, cells.split(" | "), strict=True):
            config = MoRAConfig(rank=budget, operator="signed_sharing")
            operator = mora_jax.plan({"kernel": kernel}, config)["kernel"].operator
            rank = operator.square_rank
            rooms = [str(room) for room in RANKS if room >= rank]
            assert cell == [*rooms, "merged"][0]


@pytest.mark.parametrize("name", ["many_adapters", "many_adapters_chips"])
def test_rows_with_adapters_of_their_own_are_as_measured(name):
    """Each row of the tables: a phase and a number of adapters, on a chip or here."""
    page = (ROOT / "docs/many-adapters.md").read_text()
    results = ROOT / f"benchmarks/layer/results/{name}.json"
    found = {}
    for row in json.loads(results.read_text())["results"]:
        place = {"": "", "v5e": "v5e, ", "h100": "H100, "}[row["chip"]]
        phase = {"decode": "decoding", "prefill": "prompts"}[row["phase"]]
        cells = found.setdefault(f"{place}{phase}, {row['slots']:,}", {})
        cells[row["method"]] = f"{row['time']:.2f}"
    methods = ["one adapter", "one for each row", "LoRA of equal budget"]
    methods += ["merged copies", "LoRA of rank q"]
    for label, cells in found.items():
        line = " | ".join(cells.get(method, "-") for method in methods)
        assert f"| {label} | {line} |" in page, label


def test_rates_of_vllm_are_as_measured():
    page = (ROOT / "docs/vllm.md").read_text()
    results = ROOT / "benchmarks/serving/results/vllm_rates.json"
    for row in json.loads(results.read_text())["results"]:
        cells = row["method"], row["rank"] or "", f"{row['rate']:.2f}"
        cells += f"{row['time']:.2f}", f"{row['megabytes']:,.1f}"
        line = "|".join(f" {cell} " if cell else " " for cell in cells)
        assert f"|{line}|" in page


def test_files_that_pages_name_exist():
    ours = [*(ROOT / "mora_jax").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
    for page in (ROOT / "docs/inside.md", ROOT / "CONTRIBUTING.md"):
        for name in re.findall(r"`((?:\w+/)*\w+\.py)`", page.read_text()):
            assert any(f"{path}".endswith(f"/{name}") for path in ours), (page, name)
