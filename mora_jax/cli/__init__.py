"""The command line: `mora-jax`."""

import sys


def main() -> None:
    """Run `mora-jax`."""
    try:  # Typer and Rich are in an extra, which may be missing
        from mora_jax.cli._app import run
    except ImportError as error:
        remedy = "the command line needs: pip install 'mora-jax[cli]'"
        print(f"error: {error}; {remedy}", file=sys.stderr)
        raise SystemExit(1) from None
    run()
