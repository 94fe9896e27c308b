"""The program as it is started, and as it is stopped."""

import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from processes import ROOT, environment, python


def test_options_are_checked(tmp_path):
    said = python(
        "-m", "examples.serve_many", "--adapters", tmp_path / "no", code=2, cwd=ROOT
    )
    assert "--adapters must be a directory" in said


@pytest.mark.slow
def test_sigterm_finishes_streams(tmp_path):
    """Also of those who wait for a row; nobody else is taken."""
    given = "--model tiny --port 0 --rows 2 --slots 2 --context 256 --adapters"
    command = [sys.executable, "-m", "examples.serve_many", *given.split(), tmp_path]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment()
    ) as process:
        assert process.stdout is not None
        address = None
        while address is None and (line := process.stdout.readline()):
            address = re.search(r"one machine: 0 adapters at (\S+)", line)
        client = openai.OpenAI(base_url=address[1], api_key="none", max_retries=0)

        def ask(seed):
            return client.chat.completions.create(
                model="tiny",
                messages=[{"role": "user", "content": "Hi"}],
                temperature=2,
                seed=seed,
                max_tokens=200,
                stream=True,
            )

        with ThreadPoolExecutor(4) as clients:
            streams = list(clients.map(ask, range(4)))
            process.send_signal(signal.SIGTERM)
            ends = clients.map(lambda s: [*s][-1].choices[0].finish_reason, streams)
            assert set(ends) <= {"stop", "length"}
        with pytest.raises(openai.APIConnectionError):
            ask(5)
        assert process.wait(20) == 0
        client.close()
