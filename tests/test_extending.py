"""Classes from elsewhere: they work by implementing the abstract class, and no promise of theirs gets into a proof."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import equipoise as eq
from catalogue import SOLVERS, matrix
from equipoise.activations import ACTIVATIONS
from equipoise.errors import FileFormatError, OptionError, StructureError
from equipoise.norms import WeightedMax
from equipoise.operators import RECIPES, DenseOperator, FixedPointMap, MonotoneOperator, QuantizedWeight, Recipe
from equipoise.operators.grids import Geometry
from equipoise.operators.quantized_tiers import AssembledTiers
from equipoise.operators.tiers import TierOperator
from equipoise.quantization import QuantizedTensor
from equipoise.solvers import SOLVERS as TABLE
from equipoise.solvers import Problem, Tuning
from equipoise.solvers.picard import RelaxedMap

F64 = torch.float64


@pytest.fixture
def tables() -> Iterator[None]:
    """Whatever a test registers is forgotten after it."""
    known: list[tuple[dict[Any, Any], dict[Any, Any]]] = [(t, dict(t)) for t in (ACTIVATIONS, TABLE, RECIPES)]
    yield
    for table, before in known:
        table.clear()
        table.update(before)


@dataclass(frozen=True)
class Arctan(eq.Activation):
    ulps: ClassVar[float] = 4.0

    def __call__(self, v: Tensor) -> Tensor:
        return v.arctan()

    def derivative(self, v: Tensor) -> Tensor:
        return 1 / (1 + v.square())


@dataclass(frozen=True)
class Steep(eq.ReLU):
    """Says that it is a ReLU, and rises three times as fast."""

    def __call__(self, v: Tensor) -> Tensor:
        return 3 * v.relu()


@dataclass(frozen=True)
class Falling(Arctan):
    def __call__(self, v: Tensor) -> Tensor:
        return -v.arctan() / 4


@dataclass(frozen=True)
class Sly(eq.ReLU):
    """A ReLU in every respect that can be looked at, but derived from one."""


@dataclass(frozen=True)
class Hasty(eq.ForwardBackward):
    """Says that it converges at once, and takes other steps than the splitting it is derived from."""

    def factor(self, operator: MonotoneOperator, alpha: float) -> float | None:
        return 1e-9

    def map(self, problem: Problem, tuning: Tuning) -> Any:
        return RelaxedMap(super().map(problem, tuning), 0.01)


@dataclass(frozen=True)
class Averaged(eq.Solver):
    """The mean of where forward–backward is and where it goes."""

    def tune(self, operator: MonotoneOperator) -> Tuning:
        return eq.ForwardBackward(self.alpha).tune(operator)._replace(rate=None)

    def map(self, problem: Problem, tuning: Tuning) -> FixedPointMap:
        return RelaxedMap(eq.ForwardBackward(self.alpha).map(problem, tuning), 0.5)


@dataclass(frozen=True, kw_only=True)
class Shifted(eq.Scheme):
    """Codes of W whose scales are powers of two."""


class ShiftedWeight(QuantizedWeight):
    def __init__(self, codes: QuantizedTensor) -> None:
        super().__init__()
        self.codes, self.features = codes, codes.shape[0]

    @classmethod
    def quantize(cls, weights: nn.Module, scheme: Any) -> ShiftedWeight:
        W = weights().detach().double()
        fitted = QuantizedTensor.fit(W, scheme.bits, scheme.granularity, scheme.scale)
        scale = torch.exp2(fitted.scale.double().log2().ceil()).to(fitted.scale)
        return cls(QuantizedTensor.from_codes((W / scale).round().to(fitted.codes.dtype), scale, scheme.bits))

    def assemble(self) -> tuple[Tensor, float]:
        return self.codes.dequantize().cpu(), 0.0

    @property
    def packed_bytes(self) -> int:
        return self.codes.packed_bytes


class BoastfulWeight(ShiftedWeight):
    """Promises a margin of 100 and that nothing was rounded."""

    def proofs(self) -> dict[str, Any]:
        return {"margin_floor": 100.0, "lipschitz_ceiling": 1e-3}

    def operator(self, like: Tensor) -> DenseOperator:
        return DenseOperator(super().assemble()[0].to(like), margin_floor=100.0)


class BoastfulOperator(TierOperator):
    def margin(self) -> float:
        return 100.0

    def cayley_bound(self, alpha: float) -> float:
        return 0.01


class BoastfulTiers(AssembledTiers):
    """Promises a margin of 100 and a factor of 0.01."""

    def operator(self, geometry: Geometry, like: Tensor) -> TierOperator:
        return BoastfulOperator(super().operator(geometry, like).kernels, geometry)


class Opaque(ShiftedWeight):
    def __init__(self, codes: QuantizedTensor, note: str) -> None:
        super().__init__(codes)
        self.note = note

    @classmethod
    def quantize(cls, weights: nn.Module, scheme: Any) -> Opaque:
        return cls(ShiftedWeight.quantize(weights, scheme).codes, "")


class Circulant(nn.Module):
    """W of one free row, shifted from row to row."""

    def __init__(self, row: Tensor) -> None:
        super().__init__()
        self.row = nn.Parameter(row)

    def forward(self) -> Tensor:
        return torch.stack([self.row.roll(i) for i in range(len(self.row))])


def network(seed: int = 0, **options: Any) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(eq.MonDEQ(6, 5, **options), nn.Linear(5, 3)).eval()


X = torch.linspace(-1, 1, 24).reshape(4, 6)

# Activations


def test_an_activation_from_elsewhere_works_in_layers() -> None:
    model = network(activation=Arctan())
    solution = model[0].solve(X)
    assert bool(solution.converged.all())
    z = solution.value
    torch.testing.assert_close(z, torch.arctan(z @ model[0].weight.mT + model[0]._inject(X)), atol=1e-5, rtol=0)
    model(X).sum().backward()


@pytest.mark.parametrize("activation", [Steep(), Falling()], ids=str)
def test_what_is_seen_to_be_no_proximal_map_is_refused(activation: eq.Activation, tables: None) -> None:
    with pytest.raises(OptionError, match=rf"{type(activation).__name__}.*σ\(.*slopes must lie in \[0, 1\]"):
        eq.MonDEQ(6, 5, activation=activation)
    model = network()
    model[0].activation = activation
    ACTIVATIONS[type(activation).__name__] = type(activation)
    with pytest.raises(StructureError, match=r"slopes must lie in \[0, 1\]"):
        eq.certify(model)


@pytest.mark.parametrize("activation", [Arctan(), Sly()], ids=str)
def test_nothing_is_proved_of_an_activation_that_nobody_vouches_for(activation: eq.Activation, tmp_path: Path) -> None:
    model = network(activation=activation)
    robust = eq.NEMON(6, 5, activation=activation)
    how = rf'ACTIVATIONS\["{type(activation).__name__}"\] = {type(activation).__name__}'
    for prove in (
        lambda: eq.certify(model),
        lambda: eq.margin(model),
        lambda: eq.input_lipschitz(model),
        lambda: eq.interval(robust, X, X),
        lambda: eq.certified_radius(nn.Sequential(robust, nn.Linear(5, 3)), X),
        lambda: eq.iterate_floor(model[0], X, eq.Rounded(eq.ForwardBackward(), 0.1)),
        lambda: eq.certify(eq.MonConv2d(1, 2, (4, 4), 3, activation=activation)),
    ):
        with pytest.raises(StructureError, match=how):
            prove()
    with pytest.raises(StructureError, match=how):
        eq.save(model, tmp_path / "m.safetensors")


def test_what_somebody_vouches_for_is_named_in_the_certificate(tables: None, tmp_path: Path) -> None:
    ACTIVATIONS["Arctan"] = Arctan
    model = network(activation="arctan")
    certificate = eq.certify(model, inputs=X)
    assert certificate.certified
    assert certificate.assumes == ("Arctan() is a proximal map and errs by no more than its evaluation_error",)
    assert "provided that" in str(certificate)
    assert certificate.to_dict()["assumes"] == list(certificate.assumes)
    two = nn.Sequential(eq.MonDEQ(6, 6), *model)
    assert eq.certify(two).assumes == certificate.assumes
    assert eq.certify(network()).assumes == ()
    eq.save(model, tmp_path / "m.safetensors", certificate)
    assert torch.equal(eq.load(tmp_path / "m.safetensors")(X), model(X))
    with pytest.raises(StructureError, match="no rounding is proved"):
        eq.iterate_floor(model[0], X, eq.Rounded(eq.PeacemanRachford(alpha=1.0), 0.1))


def test_a_class_derived_from_relu_is_not_exported_as_one(tables: None, tmp_path: Path) -> None:
    small = eq.quantize(network(activation=Sly()), eq.Cayley(8))
    with pytest.raises(StructureError, match="Sly"):
        eq.export(small, tmp_path / "c", input_range=(-1.0, 1.0))


# Solvers


@pytest.mark.parametrize("solver", [Hasty(), Averaged()], ids=lambda s: type(s).__name__)
def test_a_solver_from_elsewhere_solves_and_has_no_rate(solver: eq.Solver, tables: None, tmp_path: Path) -> None:
    model = network(solver=solver).double()
    patient = dataclasses.replace(solver, max_steps=50_000)
    assert bool(model[0].solve(X.double(), solver=patient, tol=1e-4).converged.all())
    certificate = eq.certify(model)
    assert certificate.certified
    assert certificate.rate is certificate.steps is certificate.inexact is None
    name = type(solver).__name__
    with pytest.raises(StructureError, match=rf'solvers\.SOLVERS\["{name}"\] = {name}'):
        eq.save(model, tmp_path / "m.safetensors")
    TABLE[name] = type(solver)
    eq.save(model, tmp_path / "m.safetensors")
    again = eq.load(tmp_path / "m.safetensors")
    assert again[0].solver == solver  # type: ignore[index]
    assert eq.certify(again).rate is None  # to be known is not to be believed
    with pytest.raises(OptionError, match=name):
        eq.Rounded(solver, 0.1)
    del TABLE[name]
    with pytest.raises(FileFormatError, match=name):
        eq.load(tmp_path / "m.safetensors")


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("eta", [None, 0], ids=["2-norm", "rows"])
def test_proved_factors_hold(solver: eq.Solver, eta: int | None) -> None:
    """A step from anywhere comes nearer to the fixed point by the factor, in the norm that it is proved in."""
    proved = 0
    for seed in range(12):
        torch.manual_seed(seed)
        n = 1 + seed % 5
        W = matrix(n, (0.05, 0.4, 1.5)[seed % 3], seed, gain=0.4)
        family = {} if eta is None else {"family": WeightedMax(torch.rand(n) + 0.5)}
        if eta is not None:
            W = W - torch.diag(W.abs().sum(1) * 2)
        operator = DenseOperator(W, **family)  # type: ignore[arg-type]
        problem = Problem(operator, torch.randn(40, n, dtype=F64), eq.LeakyReLU(0.3) if seed % 2 else eq.ReLU())
        alpha = solver.tune(operator).alpha
        rate = solver.factor(operator, alpha)
        if rate is None:
            continue
        proved += 1
        step = solver.map(problem, Tuning(alpha, None, None))
        end = torch.zeros(40, n, dtype=F64)
        for _ in range(6000):
            end = step(end)
        u = end + torch.randn(40, n, dtype=F64)
        in_rows = eta is not None and alpha <= operator.averaging_step()
        length = operator.family.of if in_rows else (lambda r: torch.linalg.vector_norm(r, dim=1))
        assert bool((length(step(u) - end) <= rate * length(u - end) + 1e-11).all()), (seed, alpha, rate)
    accelerated = isinstance(solver, (eq.Anderson, eq.Broyden))
    assert (proved > 0) == (not accelerated and not (eta is not None and isinstance(solver, eq.Tseng)))


# Schemes


def test_a_scheme_from_elsewhere_needs_one_line(tables: None, tmp_path: Path) -> None:
    model = network()
    with pytest.raises(OptionError, match=r"RECIPES\[Shifted\] = Recipe\(ShiftedWeight\)"):
        eq.quantize(model, Shifted(8))
    RECIPES[Shifted] = Recipe(ShiftedWeight)
    small = eq.quantize(model, Shifted(8, input_bits=8))
    certificate = eq.certify(small, reference=model, inputs=X)
    assert certificate.certified
    assert certificate.scheme is not None
    assert certificate.scheme["scheme"] == "shifted"
    assert eq.size(small) < eq.size(model)
    eq.save(small, tmp_path / "m.safetensors", certificate)
    again = eq.load(tmp_path / "m.safetensors")
    assert torch.equal(again(X), small(X))
    assert eq.certify(again).margin == certificate.margin
    for refused in (eq.NEMON(6, 5), eq.MonConv2d(1, 2, (4, 4), 3)):
        with pytest.raises(StructureError, match="Shifted"):
            eq.quantize(refused, Shifted(8))
    with pytest.raises(StructureError, match="Shifted cannot be trained through"):
        eq.prepare_qat(model, Shifted(8))
    RECIPES.pop(Shifted)
    with pytest.raises(FileFormatError, match="shifted"):
        eq.load(tmp_path / "m.safetensors")


def test_a_margin_that_codes_merely_promise_is_not_believed(tables: None) -> None:
    RECIPES[Shifted] = Recipe(BoastfulWeight)
    torch.manual_seed(3)
    wild = eq.MonDEQ.from_weights(3 * torch.randn(5, 5), torch.eye(5), torch.zeros(5), check=False)
    small = eq.quantize(wild, Shifted(8))
    certificate = eq.certify(small)
    W = small.weight.double()
    true = float(torch.linalg.eigvalsh(torch.eye(5) - (W + W.mT) / 2)[0])
    assert true < 0
    assert not certificate.certified
    assert eq.margin(small) <= true
    assert eq.lipschitz(small) >= float(torch.linalg.matrix_norm(torch.eye(5) - W, 2))
    assert small.operator.margin() <= true  # nor by the solutions' bounds
    with pytest.warns(eq.ConvergenceWarning):
        assert math.isinf(float(small.solve(X[:1, :5], stop="residual").error_bound))


def test_kernels_that_merely_promise_are_not_believed(tables: None) -> None:
    RECIPES[Shifted] = Recipe(ShiftedWeight, tiers=BoastfulTiers)
    torch.manual_seed(3)
    model = eq.MonConv2d(1, 2, 4, margin=0.2)
    small, plain = eq.quantize(model, Shifted(4)), eq.quantize(model, eq.Assembled(4))
    x = torch.randn(2, 1, 4, 4)
    found, known = (eq.certify(each, reference=model, inputs=x) for each in (small, plain))
    assert found.rate == pytest.approx(known.rate, rel=1e-6)
    assert found.margin == pytest.approx(known.margin, rel=1e-6)
    assert eq.margin(small) == small.operator.margin() == found.margin
    torch.testing.assert_close(found.displacement, known.displacement, rtol=1e-4, atol=1e-9)


def test_codes_that_files_cannot_hold_are_refused_by_what_they_are_made_of(tables: None, tmp_path: Path) -> None:
    RECIPES[Shifted] = Recipe(Opaque)
    small = eq.quantize(network(), Shifted(8))
    with pytest.raises(StructureError, match=r"Opaque is made of note: .*str.*files hold QuantizedTensor"):
        eq.save(small, tmp_path / "m.safetensors")
    eq.save(network(), tmp_path / "m.safetensors")  # which is no harm to others
