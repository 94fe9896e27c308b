"""Programs that tests run in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

PATH = [os.path.abspath(path) for path in sys.path]
ROOT = Path(__file__).parents[1]


def python(*args, code=0, cwd=None, **env):
    """What a Python process printed, which must exit with `code`.

    It sees the modules that this process does. It returns stdout, or stderr where
    `code` is that of a failure; an `env` of None takes a variable away.
    """
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(PATH), **env}
    done = subprocess.run(
        [sys.executable, *map(str, args)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={name: value for name, value in env.items() if value is not None},
    )
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr
