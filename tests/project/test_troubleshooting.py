"""The page of errors: each is raised as it is printed there, and its lines mend it."""

import contextlib
import doctest
import importlib
import re
import sys

import pytest
from processes import ROOT

PAGE = ROOT / "docs/troubleshooting.md"
SECTIONS = re.split(r"^### ", PAGE.read_text(), flags=re.MULTILINE)
BLOCK = re.compile(r"(?:^<!-- without (\w+) -->\n)?^```(\w+)\n(.*?)^```", re.M | re.S)
FORM = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def blocks(section):
    """(package that it goes without, language, text) of each block."""
    return [match.groups() for match in BLOCK.finditer(section)]


@contextlib.contextmanager
def without(package):
    """As if a package were not installed."""
    hidden = {k: v for k, v in sys.modules.items() if k.partition(".")[0] == package}
    for name in hidden:
        del sys.modules[name]
    sys.modules[package] = None
    try:
        yield
    finally:
        sys.modules.pop(package)
        sys.modules.update(hidden)


def test_the_page_has_twenty_errors_of_three_blocks_each():
    assert len(SECTIONS) - 1 == 20
    for section in SECTIONS[1:]:
        kinds = [language for _, language, _ in blocks(section)]
        assert kinds == ["text", "python", "python"], section.partition("\n")[0]


@pytest.mark.slow  # as a whole, so that CI runs it
@pytest.mark.usefixtures("unchecked")
def test_errors_are_raised_as_printed_and_mended(tmp_path, monkeypatch):
    """The sections share their names, as one reads them from the top."""
    pytest.importorskip("qwix")
    monkeypatch.chdir(tmp_path)
    scope = {}
    ((_, _, preamble),) = blocks(SECTIONS[0])
    exec(preamble, scope)
    for section in SECTIONS[1:]:
        (_, _, shown), (package, _, raising), (_, _, mending) = blocks(section)
        title = section.partition("\n")[0]
        hidden = without(package) if package else contextlib.nullcontext()
        with hidden, pytest.raises(Exception) as raised:
            exec(raising, scope)
        told = f"{_name(raised.type)}: {raised.value}\n"
        assert doctest.OutputChecker().check_output(shown, told, FORM), (title, told)
        exec(mending, scope)


def _name(kind):
    """The name of an exception, ours as users import it."""
    if kind.__module__ == "builtins":
        return kind.__name__
    public = re.sub(r"\._.*", "", kind.__module__)
    ours = public.startswith("mora_jax")
    assert not ours or hasattr(importlib.import_module(public), kind.__name__)
    return f"{public}.{kind.__name__}"
