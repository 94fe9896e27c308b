"""The site that `make docs` builds: no public name and no page is missing."""

import ast
import importlib
import inspect
import json
import re
import tomllib
from pathlib import Path
from xml.etree import ElementTree

import pytest
from processes import ROOT

import mora_jax

DOCS = ROOT / "docs"
API = {page.stem: page for page in sorted((DOCS / "api").glob("*.md"))}
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.md"))
CONF, INDEX, README = DOCS / "conf.py", DOCS / "index.md", ROOT / "README.md"
PAGES = sorted(DOCS.glob("*.md"))


def public(module):
    """The names that a module has for its users, other than modules."""
    is_package = hasattr(module, "__path__")
    return {
        name
        for name, value in inspect.getmembers(module)
        if not name.startswith("_") and not inspect.ismodule(value)
        if is_package or getattr(value, "__module__", None) == module.__name__
    }


def test_every_module_has_a_page():
    folder = ROOT / "mora_jax"
    modules = {path.stem for path in folder.iterdir() if path.name[0] not in "_."}
    assert API.keys() == modules - {"cli", "maxtext", "py", "vllm"} | {"mora_jax"}


def test_the_page_of_the_package_has_every_name():
    page = API["mora_jax"].read_text()
    named = re.findall(r"^\.\. auto(?:class|function):: (\w+)$", page, re.MULTILINE)
    assert sorted(named) == sorted(public(mora_jax))
    pages = set(re.findall(r"\]\((\w+)\.md\)", page))
    assert pages == API.keys() - {"mora_jax"}


@pytest.mark.parametrize("name", sorted(API.keys() - {"mora_jax"}))
def test_a_page_takes_all_names_of_its_module(name):
    """Those that are left out are on the package's page."""
    page = API[name].read_text()
    if name == "qwix":
        pytest.importorskip(name)
    module = importlib.import_module(f"mora_jax.{name}")
    assert public(module)
    if f".. automodule:: mora_jax.{name}\n" in page:
        assert (":imported-members:" in page) == hasattr(module, "__path__")
        left_out = re.findall(r":exclude-members: (\w+)", page)
        assert set(left_out) <= public(module) & public(mora_jax)
    else:
        named = re.findall(r"^\.\. auto\w+:: (\w+)$", page, re.MULTILINE)
        missing = public(module) - public(mora_jax) - set(named)
        assert not [k for k in missing if callable(getattr(module, k))]
    for member in public(module):
        value = getattr(module, member)
        if callable(value):
            assert inspect.getdoc(value), member


def setting(name):
    """A literal that conf.py gives a name to."""
    tree = ast.parse(CONF.read_text())
    (value,) = (
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name
    )
    return ast.literal_eval(value)


def entries(lines, folder):
    """The pages that lines of a menu name, as paths below the root of the sources."""
    names = [re.sub(r".* <(.*)>", r"\1", line) for line in lines]
    return [(folder / f"{name}.md").resolve().relative_to(ROOT) for name in names]


def test_the_menu_has_every_page_once_and_at_most_thirty_entries():
    """At first sight, beside what is below a page that is open."""
    blocks = re.findall(r"^```\{toctree\}\n(.*?)^```", INDEX.read_text(), re.M | re.S)
    lines = re.findall(r"^[^:\n].*", "".join(blocks), re.MULTILINE)
    assert 20 < len(lines) <= 30
    menu = entries(lines, DOCS)
    for page, below in setting("BELOW").items():
        assert (ROOT / f"{page}.md").relative_to(ROOT) in menu
        menu += entries(below, (ROOT / page).parent)
    assert len(menu) == len(set(menu))
    reports = ROOT.glob("benchmarks/**/*.md")
    pages = {*DOCS.rglob("*.md"), *ROOT.glob("*.md"), *reports} - {INDEX}
    assert {page.relative_to(ROOT) for page in pages} == set(menu)


def from_conf(name, **given):
    """A function of conf.py, whose module needs what builds the site."""
    (function,) = (
        node
        for node in ast.parse(CONF.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name == name
    )
    exec(ast.unparse(function), given)
    return given[name]


def test_the_way_to_install_follows_one_setting():
    """Pages lack an address of their own, and the site adds what it knows."""
    start = (DOCS / "start.md").read_text()
    before, _, after = start.partition("<!-- sources -->")
    assert "## Install" in before and "pip install '.[io,cli]'" in after
    assert not [page for page in (README, *PAGES) if "git clone" in page.read_text()]
    given = {"repository": None, "archive": "mora_jax-1.0.tar.gz"}
    assert from_conf("sources", **given)() == ""
    given["html_extra_path"] = ["../build/mora_jax-1.0.tar.gz"]
    unknown = from_conf("sources", **given)()
    assert "tar xzf mora_jax-1.0.tar.gz" in unknown and "git clone" not in unknown
    given["repository"] = "https://github.com/someone/mora_jax"
    known = from_conf("sources", **given)()
    assert "    git clone https://github.com/someone/mora_jax mora_jax\n" in known


def test_notebooks_have_buttons():
    page, given = "docs/notebooks/quickstart", {"repository": None, "branch": "main"}
    unknown = from_conf("buttons", **given)(page)
    assert "{download}" in unknown and "<quickstart.ipynb>" in unknown
    assert "colab" not in unknown
    given["repository"] = "https://github.com/someone/mora_jax"
    place = "someone/mora_jax/blob/main/docs/notebooks/quickstart.ipynb"
    known = from_conf("buttons", **given)(page)
    assert f"(https://colab.research.google.com/github/{place})" in known


def test_the_logo_is_a_picture_of_our_own():
    (name,) = re.findall(r'html_logo = html_favicon = "(.*)"', CONF.read_text())
    logo = ElementTree.parse(DOCS / name).getroot()
    assert logo.tag.endswith("}svg") and logo.findall(".//{*}rect")


@pytest.mark.parametrize("word", ["install", "KeyError"])
def test_headings_have_words_that_people_search_for(word):
    headings = re.findall(r"^#+ (.*)", "".join(map(Path.read_text, PAGES)), re.M)
    assert any(word.lower() in heading.lower() for heading in headings)


def test_gallery_names_every_program_and_notebook():
    text = (DOCS / "gallery.md").read_text()
    programs = {path.name for path in (ROOT / "examples").glob("[a-z]*.py")}
    assert programs == set(re.findall(r"\]\(\.\./examples/(\w+\.py)\)", text))
    linked = set(re.findall(r"\]\(notebooks/(\w+)\.md\)", text))
    assert linked == {page.stem for page in NOTEBOOKS}


def test_a_notebook_may_wait_as_long_as_the_machine_is_busy():
    """Its limit is of processor time, which waiting does not use."""
    assert setting("nb_execution_timeout") == -1
    (limit,) = re.findall(r"RLIMIT_CPU, \((\d+),", CONF.read_text())
    assert int(limit) >= 1200


def cells(text):
    """The code cells of a notebook as text, without their tags."""
    found = re.findall(r"^```\{code-cell\}[^\n]*\n(.*?)^```", text, re.M | re.S)
    options = r"\A(?:---\n.*?\n---\n|(?::\w+:[^\n]*\n)+\n?)"
    return [re.sub(options, "", cell, flags=re.S).strip() for cell in found]


@pytest.mark.parametrize("page", NOTEBOOKS, ids=lambda page: page.stem)
def test_a_notebook_is_the_same_for_colab(page):
    """And it holds no outputs, which are made when the site is built."""
    notebook = json.loads(page.with_suffix(".ipynb").read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert ["".join(cell["source"]) for cell in code] == cells(page.read_text()) != []
    assert not any(cell["outputs"] for cell in code)
    assert "pip install" in "".join(code[0]["source"])


def test_badges_are_true():
    """As pyproject.toml says, and on no server of others."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (jax,) = (d for d in project["dependencies"] if d.startswith("jax>="))
    kinds = [kind.rpartition(" ")[2] for kind in project["classifiers"]]
    pythons = [kind for kind in kinds if re.fullmatch(r"3\.\d+", kind)]
    for name, value in (
        ("python", f"{pythons[0]} to {pythons[-1]}"),
        ("jax", jax.replace("jax>=", ">= ")),
        ("licence", project["license"]),
    ):
        badge = ElementTree.parse(DOCS / f"static/{name}.svg").getroot()
        assert badge.findall(".//{*}text")[1].text == value
        assert f"(docs/static/{name}.svg)" in (ROOT / "README.md").read_text()


def test_pictures_say_what_they_show():
    """Each cell that draws has a text for who does not see it."""
    text = "".join(map(Path.read_text, [*NOTEBOOKS, INDEX, DOCS / "what-is-mora.md"]))
    found = re.findall(r"^```\{code-cell\}[^\n]*\n(.*?)^```", text, re.M | re.S)
    drawn = [cell for cell in found if re.search(r"subplots\(|plot_\w+\(", cell)]
    assert len(drawn) > 5 and all("alt: " in cell for cell in drawn)
