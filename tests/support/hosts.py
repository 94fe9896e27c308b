"""Several processes of one program on this machine, as several hosts would run it."""

import faulthandler
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import NamedTuple

import jax
from jax._src.distributed import global_state
from processes import ROOT, environment

DEVICES, SECONDS, GRACE = 2, 300, 5
"""Devices of a process; seconds until a group must have ended, and between signals."""


class Group(NamedTuple):
    """Results of a group of processes.

    Attributes:
      errors: {case: the traceback on each process, "" where it passed}; a process that
        did not come to its end is missing.
      codes: The exit status of each process.
      seconds: The time that they took.
      logs: The output of all of them.
    """

    errors: dict[str, dict[int, str]]
    codes: list[int]
    seconds: float
    logs: str

    def check(self, case: str) -> None:
        """Fail, with all logs, unless a case passed on all processes."""
        found = self.errors.get(case, {})
        missing = [n for n in range(len(self.codes)) if n not in found]
        text = "".join(f"process {n}: {error}" for n, error in found.items() if error)
        text += f"no result of processes {missing}" * bool(missing)
        assert not text, f"{case}: {text}, exit status {self.codes}\n{self.logs}"


def run(
    file: str, count: int, cases: list[str], folder: Path, heartbeat: int = 30
) -> Group:
    """Run functions of a file, one after the other, on `count` processes at once.

    Each gets a folder of its own, which the processes share. JAX takes a process for
    dead that was silent for `heartbeat` seconds.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # XLA's CPU compiler would let sums that need not wait for each other begin in
    # another order on each process, and gloo would wait for ever.
    flag = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
    # Each sum that a device of a process has begun keeps a thread until the others have
    # begun it as well. By default a process has as many threads as cores: on two cores
    # two sums of one device would keep the other device from ever beginning them.
    env = environment(
        PJRT_NPROC="16",
        NPROC="16",
        XLA_FLAGS=f"{os.environ.get('XLA_FLAGS', '')} {flag}",
        # Programs that JAX 0.12.1 reads from its cache may wait for each other for ever
        # on two CPUs. Those that it compiles do not.
        JAX_ENABLE_COMPILATION_CACHE="false",
    )
    for case in cases:
        (folder / case).mkdir(parents=True)
    settings = [file, str(folder), str(port), str(heartbeat), str(count)]
    start, processes = time.monotonic(), []
    for number in range(count):
        command = [sys.executable, __file__, *settings, str(number), *cases]
        with (folder / f"log{number}").open("wb") as log:
            processes.append(
                subprocess.Popen(command, stdout=log, stderr=log, env=env, cwd=ROOT)
            )
    try:
        _wait(processes, start + SECONDS)
    finally:
        for end in (signal.SIGTERM, signal.SIGKILL):
            for process in processes:
                if process.poll() is None:
                    process.send_signal(end)
            _wait(processes, time.monotonic() + GRACE)
    seconds, logs = time.monotonic() - start, ""
    errors: dict[str, dict[int, str]] = {}
    for number in range(count):
        logs += f"--- process {number}\n{(folder / f'log{number}').read_text()}"
        results = folder / f"results{number}"
        for line in results.read_text().splitlines() if results.exists() else ():
            case, error = json.loads(line)
            errors.setdefault(case, {})[number] = error
    return Group(errors, [process.poll() for process in processes], seconds, logs)


def _wait(processes: list[subprocess.Popen], end: float) -> None:
    """Wait until all processes have ended, or until a time."""
    while any(p.poll() is None for p in processes) and time.monotonic() < end:
        time.sleep(0.05)


def main(file: str, folder: str, *settings: str):
    """One of the processes."""
    port, heartbeat, count, number = map(int, settings[:4])
    faulthandler.dump_traceback_later(SECONDS - GRACE)  # its log says where it waits
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        f"127.0.0.1:{port}",
        count,
        number,
        heartbeat_timeout_seconds=heartbeat,
        shutdown_timeout_seconds=GRACE,
    )
    functions = runpy.run_path(file)
    with Path(folder, f"results{number}").open("w") as results:
        for case in settings[4:]:
            barrier(case)
            try:
                functions[case](Path(folder, case))
                error = ""
            except Exception:
                error = traceback.format_exc()
            print(json.dumps((case, error)), file=results, flush=True)
    barrier("end", 2 * GRACE)  # the first process must not end before the others


def barrier(name: str, seconds: float = SECONDS) -> None:
    """Wait until all processes are here."""
    client = global_state.client
    assert client is not None
    client.wait_at_barrier(f"tests/{name}", int(1000 * seconds))


if __name__ == "__main__":
    main(*sys.argv[1:])
