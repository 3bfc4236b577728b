"""The mutation check changes what it says: one constant or one returned bound of a module at a time."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import mutants
import mutations


@pytest.mark.parametrize("file", sorted(mutations.TESTS))
def test_every_mutant_is_a_module_that_differs(file: str) -> None:
    plain = ast.unparse(ast.parse((mutants.ROOT / "src" / "equipoise" / file).read_text()))
    found = mutants.sites(file)
    assert len({site.key for site in found}) == len(found) > 0
    for site in found[:: len(found) // 6 + 1]:  # writing a module down again takes a while
        changed = mutants.mutant(site, 0.99)
        compile(changed, file, "exec")
        assert changed.removesuffix(mutants.HELPER) != plain
    for name in mutations.TESTS[file]:
        assert (mutants.ROOT / "tests" / name).exists()


def test_what_a_return_gives_is_changed_in_the_direction_asked() -> None:
    scope: dict[str, Any] = {}
    exec(mutants.HELPER, scope)
    mutated = scope["_mutated"]
    assert mutated(2.0, 0.99) == 1.98
    assert mutated(-2.0, 0.99) == -2.02
    assert mutated((1.0, "a", None, 3, True), 1.01) == (1.01, "a", None, 3, True)
    assert torch.allclose(mutated(torch.tensor([1.0, -1.0]), 0.99), torch.tensor([0.99, -1.01]))
    assert torch.equal(mutated(torch.tensor([1, 2]), 0.99), torch.tensor([1, 2]))


def test_survivors_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    site, other = mutants.sites("norms.py")[:2]
    journal = tmp_path / "journal.jsonl"
    lines = [{"key": other.key, "killer": "a test"}, {"key": site.key, "killer": None}, {"key": "old", "killer": None}]
    journal.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert mutations.main(["--out", str(journal), "--limit", "0"]) == 1
    printed = capsys.readouterr().out
    assert "2 mutants, 1 survivors" in printed
    assert f"norms.py:{site.line} {site.function}" in printed
