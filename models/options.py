"""Types of command-line options."""

import argparse


def positive(text: str) -> int:
    """An integer of at least 1, as `type` of an argument of `argparse`."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number
