"""Print pip constraints that hold every dependency, and qwix, at its lower bound."""

import pathlib
import re
import tomllib

PYPROJECT = pathlib.Path(__file__).parents[1] / "pyproject.toml"

project = tomllib.loads(PYPROJECT.read_text())["project"]
for requirement in project["dependencies"] + project["optional-dependencies"]["qwix"]:
    match = re.fullmatch(r"([\w.-]+)(?:\[\w+\])?>=([\w.]+)", requirement)
    if match is None:
        raise SystemExit(f"no plain lower bound in {requirement!r}")
    print("{}=={}".format(*match.groups()))
