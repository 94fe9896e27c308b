"""The grammar of docstrings and comments: sentences that are understood at once.

`python tests/project/test_prose.py [FOLDER...]` lists what breaks it.
"""

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "mora_jax").rglob("*.py"))

QUESTION = re.compile(r"(What|How|Whether|Where|Which|Who|Whose|When|Why)\b")
"""How no first line of a docstring begins: it is a noun phrase or an imperative."""

CLUMSY = re.compile(
    r"\b(of which|those of|that of|is no|are no|has no|have no|has not|as it stands"
    r"|in (the )?place of|anew|but for)\b"
)
"""Words that make a reader read a sentence twice."""

ENTRY = re.compile(r"^ +[a-z_, ]+: (What|How|Where|Which|Who|Whose|When|Why)\b")
"""How no argument or attribute is described: it is a noun phrase, too."""


def faults(path: Path) -> Iterator[str]:
    """The faults of a file, a line each."""
    text = path.read_text()
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module
    for node in ast.walk(ast.parse(text)):
        line = getattr(node, "lineno", 1)
        if isinstance(node, kinds) and (doc := ast.get_docstring(node)):
            first = doc.splitlines()[0]
            if QUESTION.match(first):
                yield f"{path}:{line}: begins with a question word: {first}"
            for entry in filter(ENTRY.match, doc.splitlines()):
                yield f"{path}:{line}: describe by a noun phrase: {entry.strip()}"
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            for found in CLUMSY.finditer(" ".join(str(node.value.value).split())):
                yield f"{path}:{line}: holds {found[0]!r}"
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    for token in tokens:
        if token.type == tokenize.COMMENT and (found := CLUMSY.search(token.string)):
            yield f"{path}:{token.start[0]}: holds {found[0]!r}: {token.string}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_docstrings_and_comments_are_read_once(path):
    assert not list(faults(path))


if __name__ == "__main__":
    folders = [Path(name) for name in sys.argv[1:]] or [ROOT / "mora_jax"]
    for folder in folders:
        for path in [folder] if folder.is_file() else sorted(folder.rglob("*.py")):
            for fault in faults(path):
                print(fault)
