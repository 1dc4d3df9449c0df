"""`python -m longcat_jax CMD` is `longcat CMD`."""

import sys

from longcat_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
