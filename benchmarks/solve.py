"""``equipoise bench``, for whoever looks for it here: ``python benchmarks/solve.py --help``."""

import sys

from equipoise.cli import main

sys.exit(main(["bench", *sys.argv[1:]]))
