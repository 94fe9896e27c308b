"""`python -m mora_jax.cli`."""

from mora_jax.cli import main

if __name__ == "__main__":
    main()
