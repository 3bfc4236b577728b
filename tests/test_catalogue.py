"""Whatever the library offers by a class is in the tables it is found by, and in the catalogue it is tested on."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import equipoise as eq
from catalogue import ACTIVATIONS_KNOWN, OPERATORS, SCHEMES, SOLVERS
from equipoise import activations, operators, solvers
from equipoise.cli.options import scheme_option
from equipoise.cli.reproduce import PaperName
from equipoise.files import _MODELS
from equipoise.layers.border import Bordered
from equipoise.layers.chain import CONVOLUTIONAL, EQUILIBRIUM
from equipoise.layers.convolutional import ConvolutionalLayer
from equipoise.layers.equilibrium import EquilibriumLayer
from equipoise.layers.multiscale_deq import MultiscaleDEQ
from equipoise.layers.solving import SolvingLayer
from equipoise.linearized import Linearized, Mirrored
from equipoise.operators import DenseOperator, MonotoneOperator, PreparedWeight, QuantizedWeight
from equipoise.operators.conv import ConvOperator
from equipoise.operators.dense import TransposedOperator
from equipoise.operators.recipes import PROVED, RECIPES
from equipoise.report.canvas import MARKERS
from equipoise.reproduce import PAPERS

MADE_OF_OTHERS = {Linearized, Mirrored, Bordered}
"""Activations that nobody asks for by name."""

BY_ROWS = {ConvOperator}
"""Without a transform of Cayley: tested on images of any size in test_nemon_conv.py."""

for room in ("layers", "operators", "quantization", "solvers"):
    package = importlib.import_module(f"equipoise.{room}")
    for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        importlib.import_module(module.name)


def ours(base: type) -> Iterator[type]:
    """Every class of the library that is derived from ``base`` and can be instantiated."""
    for kind in base.__subclasses__():
        yield from ours(kind)
        if (
            kind.__module__.startswith("equipoise.")
            and not inspect.isabstract(kind)
            and not kind.__name__.startswith("_")
        ):
            yield kind


def test_every_activation_is_in_the_table_and_in_the_catalogue() -> None:
    kinds = set(ours(eq.Activation)) - MADE_OF_OTHERS
    assert kinds == set(activations.ACTIVATIONS.values()) == activations.PROVED
    assert kinds == {type(known.variants[0]) for known in ACTIVATIONS_KNOWN}
    assert all(type(each) is type(known.variants[0]) for known in ACTIVATIONS_KNOWN for each in known.variants)


def test_every_solver_is_in_the_table_and_in_the_catalogue() -> None:
    kinds = set(ours(eq.Solver))
    assert kinds == set(solvers.SOLVERS.values()) == solvers.PROVED
    assert kinds == {*(type(solver) for solver in SOLVERS), eq.Rounded}  # which ends on a grid: test_rounded.py


def test_every_scheme_is_in_the_table_and_in_the_catalogue() -> None:
    kinds = set(ours(eq.Scheme))
    assert kinds == set(RECIPES) == {type(scheme) for scheme in SCHEMES}
    made = {*ours(QuantizedWeight), *ours(PreparedWeight)}
    assert made <= PROVED
    assert {*MARKERS} <= {*operators.schemes()}  # others have a cross
    assert all(f"{name}: " in scheme_option().help for name in operators.schemes())  # of --scheme


def test_every_operator_is_in_the_catalogue() -> None:
    found = {type(build(torch.float64)) for build in OPERATORS.values()}
    assert found | BY_ROWS == set(ours(MonotoneOperator))
    assert {DenseOperator, TransposedOperator} <= found


def test_every_layer_is_in_the_chain_and_in_files() -> None:
    kinds = {*ours(SolvingLayer), *ours(MultiscaleDEQ)} - {EquilibriumLayer}
    assert kinds | {nn.Sequential} == {codec.module for codec in _MODELS.values()}
    assert set(ours(EquilibriumLayer)) == set(EQUILIBRIUM)
    assert set(ours(ConvolutionalLayer)) == set(CONVOLUTIONAL)


@pytest.mark.parametrize(
    "table", [activations.ACTIVATIONS, solvers.SOLVERS, {kind.__name__: kind for kind in RECIPES}], ids=len
)
def test_what_a_table_names_is_public(table: dict[str, type]) -> None:
    for name, kind in table.items():
        assert kind.__name__ == name
        assert getattr(eq, name) is kind
        assert name in eq.__all__


def test_every_paper_can_be_asked_for() -> None:
    assert {paper.value for paper in PaperName} == set(PAPERS)
