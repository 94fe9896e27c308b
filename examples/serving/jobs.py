"""What the engine is asked for, and what it says to that."""

import enum
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass


class End(enum.StrEnum):
    """Why a job has ended; the first two are OpenAI's words."""

    STOP = "stop"
    LENGTH = "length"
    LATE = "late"
    GONE = "gone"
    FAILED = "failed"


Event = int | End
"""A token, or the end of a job."""


class Full(Exception):
    """The queue has no place, or the engine is stopping.

    Args:
        message: What it is.
        stopping: Whether there will be no place either.
    """

    def __init__(self, message: str, stopping: bool = False) -> None:
        super().__init__(message)
        self.stopping = stopping


@dataclass(eq=False)
class Job:
    """A prompt to continue.

    Attributes:
        prompt: Its tokens.
        slot: The slot of its adapter; -1 for the base alone.
        max_tokens: The largest number of new tokens.
        temperature: 0 takes the likeliest token.
        seed: The seed of its random numbers.
        deadline: The value of `time.monotonic` after which it ends.
        on_event: A function that `publish` calls with each event of this job.
        gone: Whether nobody waits for it; anyone may set it.
        said: The number of tokens so far.
    """

    prompt: Sequence[int]
    slot: int
    max_tokens: int
    temperature: float
    seed: int
    deadline: float
    on_event: Callable[[Event], None]
    gone: bool = False
    said: int = 0

    def over(self) -> End | None:
        """Why it should not go on, if so."""
        if self.gone:
            return End.GONE
        return End.LATE if time.monotonic() > self.deadline else None
