"""Print pip constraints that hold every dependency at its lower bound."""

import pathlib
import re
import tomllib

PYPROJECT = pathlib.Path(__file__).parents[1] / "pyproject.toml"

for requirement in tomllib.loads(PYPROJECT.read_text())["project"]["dependencies"]:
    match = re.fullmatch(r"([\w.-]+)>=([\w.]+)", requirement)
    if match is None:
        raise SystemExit(f"no plain lower bound in {requirement!r}")
    print("{}=={}".format(*match.groups()))
