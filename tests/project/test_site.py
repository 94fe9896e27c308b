"""The site that `make docs` builds: no public name and no page is missing."""

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


def test_every_page_is_in_the_menu():
    menu = (DOCS / "index.md").read_text()
    pages = {page.relative_to(DOCS).with_suffix("") for page in DOCS.rglob("*.md")}
    names = re.findall(r"^(?:.* <)?([\w./-]+)>?$", menu, re.MULTILINE)
    assert {str(page) for page in pages} - {"index"} <= set(names)


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
    text = "".join(map(Path.read_text, [*NOTEBOOKS, DOCS / "what-is-mora.md"]))
    found = re.findall(r"^```\{code-cell\}[^\n]*\n(.*?)^```", text, re.M | re.S)
    drawn = [cell for cell in found if re.search(r"subplots\(|plot_\w+\(", cell)]
    assert len(drawn) > 5 and all("alt: " in cell for cell in drawn)
