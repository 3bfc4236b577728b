"""Equilibria on images side by side. ``python benchmarks/images.py --help``."""

import argparse
import json

from rich.console import Console

from equipoise.bench.images import run, table

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--data-dir", help="folder with MNIST and CIFAR-10; else EQUIPOISE_DATA, else digits")
parser.add_argument("--quick", action="store_true", help="fewer steps and rounds")
parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
options = parser.parse_args()
found = run(options.data_dir, options.quick)
if options.json:
    print(json.dumps(found))
else:
    for part in table(found):
        Console(width=120).print(part)
