"""The program as it is started, and as it is stopped."""

import contextlib
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from errno import EADDRNOTAVAIL, EAFNOSUPPORT

import openai
import pytest
from processes import ROOT, environment, python

from examples import serve_many


@pytest.mark.slow
def test_options_are_checked(tmp_path):
    said = python(
        "-m", "examples.serve_many", "--adapters", tmp_path / "no", code=2, cwd=ROOT
    )
    assert "--adapters must be a directory" in said


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--timeout", "nan", "must be from 0.001 to 1e+06, got nan"),
        ("--timeout", "inf", "must be from 0.001 to 1e+06, got inf"),
        ("--timeout", "0", "must be from 0.001 to 1e+06, got 0"),
        ("--port", "99999", "must be from 0 to 65535, got 99999"),
        ("--host", "1.2.3.4.5", "must be free on this machine"),
        ("--host", "x" * 64, "must be free on this machine"),
    ],
)
def test_options_are_checked_before_anything_is_compiled(
    tmp_path, monkeypatch, capsys, option, value, says
):
    monkeypatch.setattr(serve_many, "make_service", None)
    with pytest.raises(SystemExit, match="2"):
        serve_many.main(["--adapters", str(tmp_path), option, value])
    assert says in capsys.readouterr().err


def test_a_port_that_is_taken(tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        given = ["--port", str(taken.getsockname()[1])]
        with pytest.raises(SystemExit, match="2"):
            serve_many.main(["--adapters", str(tmp_path), *given])
    assert "must be free on this machine" in capsys.readouterr().err


@pytest.mark.parametrize(("host", "name"), [("127.0.0.1",) * 2, ("::1", "[::1]")])
def test_addresses_of_both_kinds(host, name):
    try:
        listener, address = serve_many.listen(host, 0)
    except OSError as error:
        if host == "::1" and error.errno in (EADDRNOTAVAIL, EAFNOSUPPORT):
            pytest.skip("this machine has no IPv6")
        raise
    with listener:
        port = listener.getsockname()[1]
        assert address == f"http://{name}:{port}"
        socket.create_connection((host, port)).close()


@pytest.mark.slow
def test_sigterm_finishes_streams(tmp_path):
    """Also of those who wait for a row; nobody else is taken."""
    given = "--model tiny --port 0 --rows 2 --slots 2 --context 256 --adapters"
    command = [sys.executable, "-m", "examples.serve_many", *given.split(), tmp_path]
    with (
        subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment()
        ) as process,
        contextlib.ExitStack() as end,
    ):
        end.callback(process.kill)  # whatever fails: the outer context waits
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
            for seed in range(5, 50):  # uvicorn looks for the signal each 0.1 s
                ask(seed).close()
                time.sleep(0.1)
        assert process.wait(20) == 0
        client.close()
