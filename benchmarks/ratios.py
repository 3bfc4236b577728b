"""``equipoise bench``, for whoever looks for it here: ``python benchmarks/ratios.py --help``."""

import sys

from equipoise.cli import main

sys.exit(main(["bench", *sys.argv[1:]]))
