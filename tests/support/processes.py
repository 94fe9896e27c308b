"""Programs that tests run in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def environment(**changes):
    """Variables of a process that sees our modules; None takes one away."""
    path = os.pathsep.join(os.path.abspath(path) for path in sys.path)
    env = {**os.environ, "PYTHONPATH": path, **changes}
    return {name: value for name, value in env.items() if value is not None}


def python(*args, code=0, cwd=None, **changes):
    """What Python prints, to stderr if it fails, with changes of the environment.

    It must exit with `code`.
    """
    args, env = [sys.executable, *map(str, args)], environment(**changes)
    done = subprocess.run(args, capture_output=True, text=True, cwd=cwd, env=env)
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr
