"""Convolutional monDEQs on one grid and on several: against dense matrices, and as networks."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

import equipoise as eq
from equipoise.errors import InputError, OptionError
from equipoise.layers.border import Bordered
from equipoise.layers.mon_conv import MonotoneConvolution
from equipoise.operators.tiers import TierOperator
from equipoise.parametrizations import Kernels, MonotoneKernels
from problems import equilibrium

F64 = torch.float64


def gained(layer: Any, gain: float = 1.7) -> Any:
    """``layer`` with kernels large enough to matter."""
    with torch.no_grad():
        for gains in (layer.recurrent.a, layer.recurrent.h, layer.recurrent.d):
            for parameter in gains:
                parameter.fill_(gain)
    return layer


def single(channels: int = 3, size: Any = (5, 4), seed: int = 0, **options: Any) -> eq.MonConv2d:
    torch.manual_seed(seed)
    return gained(eq.MonConv2d(2, channels, size, **{"margin": 0.4, **options})).double()


def tiered(channels: Any = (2, 3), size: Any = 4, seed: int = 0, **options: Any) -> eq.MultiTierMonDEQ:
    torch.manual_seed(seed)
    return gained(eq.MultiTierMonDEQ(2, channels, size, **{"margin": 0.4, **options})).double()


LAYERS = {
    "single": lambda: single(),
    "no border": lambda: single(border=0),
    "one pixel": lambda: single(size=1),
    "wide kernel": lambda: single(channels=2, size=3, kernel_size=5),
    "1x1": lambda: single(kernel_size=1),
    "stride": lambda: single(size=(6, 5), stride=2),
    "two tiers": lambda: tiered(),
    "two tiers, no border": lambda: tiered(border=0),
    "two tiers, wide": lambda: tiered(channels=(2, 1), size=4, kernel_size=5),
    "three tiers": lambda: tiered(channels=(1, 2, 1), size=(8, 4)),
    "three tiers, border 2": lambda: tiered(channels=(1, 1, 2), size=4, border=2),
}


def dense(operator: TierOperator) -> Tensor:
    with torch.no_grad():
        return operator.apply(torch.eye(operator.features, dtype=operator.tensors()[0].dtype)).mT.double()


def widened(operator: TierOperator) -> TierOperator:
    """The same kernels, multiplied in float64."""
    kernels = Kernels.of(tuple(k.detach().double() for k in operator.tensors()))
    return TierOperator(kernels, operator.geometry)


def factors(layer: MonotoneConvolution) -> tuple[Tensor, Tensor]:
    """(A, B) of theory §8 as dense matrices in the state's order, from their definition, tap by tap."""
    geometry, weights = layer.geometry, layer.recurrent
    assert isinstance(weights, MonotoneKernels)
    A_i, K_i, down = weights.scaled()
    n = sum(geometry.features(i) for i in range(geometry.tiers))
    numbers = geometry.split(torch.arange(n, dtype=F64)[None])
    where = [geometry.to_images(block, i)[..., 0].long() for i, block in enumerate(numbers)]  # (S, S', C)
    A, K = torch.zeros(n, n, dtype=F64), torch.zeros(n, n, dtype=F64)

    def fill(matrix: Tensor, kernel: Tensor, rows: Tensor, columns: Tensor, stride: int = 1, shift: int = 0) -> None:
        reach = kernel.shape[2] // 2
        height, width = columns.shape[:2]
        for r in range(height // stride):
            for c in range(width // stride):
                for p in range(kernel.shape[2]):
                    for q in range(kernel.shape[3]):
                        to = rows[r + shift, c + shift]
                        at = columns[(r * stride + p - reach) % height, (c * stride + q - reach) % width]
                        matrix[to[:, None], at[None, :]] += kernel[:, :, p, q]

    for i in range(geometry.tiers):
        fill(A, A_i[i].detach(), where[i], where[i])
        fill(K, K_i[i].detach(), where[i], where[i])
    for i, kernel in enumerate(down):
        fill(A, kernel.detach(), where[i + 1], where[i], 2, layer.border // 2)
    gram = A.mT @ A
    B = K / 2
    starts = torch.tensor([0] + [geometry.features(i) for i in range(geometry.tiers)]).cumsum(0).tolist()
    spans = [slice(a, b) for a, b in pairwise(starts)]
    for above, below in pairwise(spans):
        B[below, above] = -gram[below, above]
    return A, B


@pytest.mark.parametrize("name", LAYERS)
def test_w_is_that_of_its_factors(name: str) -> None:
    layer = LAYERS[name]()
    A, B = factors(layer)
    m, eye = float(layer.recurrent.margin), torch.eye(len(A), dtype=F64)
    W = (1 - m) * eye - A.mT @ A + B - B.mT
    operator = layer.operator
    torch.testing.assert_close(dense(operator), W, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(operator.summed(eye).mT, W, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(operator.transpose(eye), W, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(operator.transposed().apply(eye).mT, W.mT, rtol=1e-12, atol=1e-12)
    starts = torch.tensor([0] + [layer.geometry.features(i) for i in range(layer.geometry.tiers)]).cumsum(0).tolist()
    for a, b in pairwise(starts):
        assert not bool((W[a:b, b:].abs() > 1e-12).any())


@pytest.mark.parametrize("name", LAYERS)
def test_constants_are_proved_of_the_dense_matrix(name: str) -> None:
    layer = LAYERS[name]()
    operator = layer.operator
    W = dense(operator)
    F = torch.eye(len(W), dtype=F64) - W
    true = float(torch.linalg.eigvalsh((F + F.mT) / 2)[0])
    L, norm, spread = (float(torch.linalg.matrix_norm(X, 2)) for X in (F, W, W.abs()))
    m = float(layer.recurrent.margin)
    assert m - 1e-6 <= operator.margin() <= true + 1e-12
    assert operator.lipschitz() >= L * (1 - 1e-12)
    assert operator.norm() >= norm * (1 - 1e-12)
    assert operator.absolute_norm() >= spread * (1 - 1e-12)
    if layer.geometry.tiers == 1:  # exact, frequency by frequency
        assert operator.margin() == pytest.approx(true, abs=1e-10)
        assert operator.lipschitz() == pytest.approx(L, rel=1e-9)
        assert operator.norm() == pytest.approx(norm, rel=1e-9)
    for alpha in (0.2, 1.1):
        C = 2 * torch.linalg.inv(torch.eye(len(F), dtype=F64) + alpha * F) - torch.eye(len(F), dtype=F64)
        torch.testing.assert_close(operator.cayley(alpha), C, rtol=1e-10, atol=1e-10)
        x = torch.randn(3, len(F), dtype=F64)
        for product, matrix in (
            (operator.cayley_product(alpha), C),
            (operator.transposed().cayley_product(alpha), C.mT),
        ):
            with torch.no_grad():
                torch.testing.assert_close(product(x), x @ matrix.mT, rtol=1e-9, atol=1e-9)
                torch.testing.assert_close(product(x, x), x @ matrix.mT + x, rtol=1e-9, atol=1e-9)
        true_rate, bound = float(torch.linalg.matrix_norm(C, 2)), operator.cayley_bound(alpha)
        assert bound is not None
        assert true_rate <= bound < 1
        if layer.geometry.tiers == 1:
            assert bound <= true_rate + 0.04 * (1 - true_rate)
        step = float(torch.linalg.matrix_norm((1 - alpha) * torch.eye(len(F), dtype=F64) + alpha * W, 2))
        found = operator.forward_bound(alpha)
        assert found is None or step <= found


@pytest.mark.parametrize("name", ["single", "one pixel", "wide kernel", "two tiers", "three tiers"])
@pytest.mark.parametrize("activation", [eq.ReLU(), eq.Tanh(), eq.LeakyReLU(0.2)], ids=lambda a: a.name)
def test_equilibria_with_a_border(name: str, activation: eq.Activation) -> None:
    layer = LAYERS[name]()
    layer.activation = activation
    x = torch.randn(2, 2, *layer.image_size, dtype=F64)
    W, inside = dense(layer.operator), layer.geometry.interior()
    with torch.no_grad():
        q = layer._inject(x)[0]
    # the border is 0: what is left is an equilibrium of the inner part
    truth = torch.zeros_like(q)
    truth[:, inside] = (
        equilibrium(W[inside][:, inside], q[:, inside], activation)
        if inside.sum() <= 12
        else _iterated(W[inside][:, inside], q[:, inside], activation)
    )
    found = layer.solve(x, tol=1e-9)
    assert bool(found.converged.all())
    value = layer._value(truth, (0, 0))
    assert bool((torch.linalg.vector_norm(found.value - value, dim=1) <= found.error_bound + 1e-9).all())
    with torch.no_grad():
        torch.testing.assert_close(layer(x), layer._leave(truth, (0, 0)), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(layer.images(found.value, x), layer._leave(truth, (0, 0)), rtol=1e-6, atol=1e-7)


def _iterated(W: Tensor, q: Tensor, activation: eq.Activation) -> Tensor:
    F = torch.eye(len(W), dtype=F64) - W
    alpha = 0.5 * float(torch.linalg.eigvalsh((F + F.mT) / 2)[0]) / float(torch.linalg.matrix_norm(F, 2)) ** 2
    z = torch.zeros_like(q)
    for _ in range(6000):
        before, z = z, activation.prox(z - alpha * (z @ F.mT - q), alpha)
        if float((z - before).abs().max()) < 1e-14:
            break
    return z


def test_a_border_keeps_edges_apart() -> None:
    layer = single(channels=1, size=4, margin=0.9)
    x = torch.zeros(1, 2, 4, 4, dtype=F64)
    x[0, :, 0, 0] = 3.0
    with torch.no_grad():
        layer.injection.weight.zero_()
        layer.injection.weight[:, :, 1, 1] = 1.0
        layer.injection.bias.zero_()  # type: ignore[union-attr]
        z = layer(x)
        W = layer.operator
        naive, kernel = torch.zeros(1, 1, 6, 6, dtype=F64), W.kernels.own[0]
        q = pad(layer.injection(x), (1,) * 4)
        for _ in range(4000):  # forward–backward on the padded image, border cut by hand
            y = conv2d(pad(naive, (2,) * 4, mode="circular"), kernel)
            naive = pad((naive + 0.05 * (y + q - naive))[:, :, 1:-1, 1:-1].relu(), (1,) * 4)
    torch.testing.assert_close(z, naive[:, :, 1:-1, 1:-1], rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("of", [eq.ReLU(), eq.Tanh(), eq.Softplus(), eq.SoftThreshold(0.2)], ids=lambda a: a.name)
def test_bordered_activations_are_proximal_maps(of: eq.Activation) -> None:
    outside = torch.tensor([1, 4])
    activation, v = Bordered(of, outside), torch.randn(3, 6, dtype=F64)
    inner = [0, 2, 3, 5]
    for alpha in (0.3, 1.0, 2.0):
        p = activation.prox(v.clone(), alpha)
        assert not bool(p[:, outside].any())
        torch.testing.assert_close(p[:, inner], of.prox(v, alpha)[:, inner])
        torch.testing.assert_close(activation.reflect(v, alpha), 2 * p - v)
        out = torch.empty_like(v)
        torch.testing.assert_close(activation.reflect(v, alpha, out), 2 * p - v)
    torch.testing.assert_close(activation(v.clone()), activation.prox(v.clone(), 1.0))
    assert not bool(activation.derivative(v)[:, outside].any())


@pytest.mark.parametrize("made", ["single", "tiered"])
def test_gradients_against_finite_differences(made: str) -> None:
    layer: Any = (
        single(1, (3, 2), activation=eq.Tanh(), learn_margin=True)
        if made == "single"
        else tiered((1, 1), 2, border=0, activation=eq.Softplus())
    )
    names = [name for name, _ in layer.named_parameters()]

    def value(x: Tensor, *tensors: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, tensors, strict=True)), (x,))

    x = torch.randn(1, 2, *layer.image_size, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(
        value, (x, *(p.detach().requires_grad_() for p in layer.parameters())), atol=1e-6, fast_mode=True
    )


def test_gradients_are_those_of_the_unrolled_iteration() -> None:
    layer = tiered((1, 1), 2)
    x = torch.randn(2, 2, 2, 2, dtype=F64)
    layer(x).square().sum().backward()
    implicit = [p.grad.clone() for p in layer.parameters() if p.grad is not None]
    layer.zero_grad()
    operator, (q, _) = layer.operator, layer._inject(x)
    sigma, z = layer._sigma(q), torch.zeros_like(q)
    for _ in range(400):
        z = sigma(z + 0.05 * (operator.apply(z) + q - z))
    layer._leave(z, (0, 0)).square().sum().backward()
    for one, p in zip(implicit, [p for p in layer.parameters() if p.grad is not None], strict=True):
        torch.testing.assert_close(one, p.grad, rtol=1e-5, atol=1e-7)


def test_a_gain_cannot_cost_the_margin() -> None:
    layer = single(margin=0.2)
    for gain in (-3.0, 0.0, 5.0):
        with torch.no_grad():
            layer.recurrent.a[0].fill_(gain)
        assert layer.margin() >= 0.2 - 1e-7
    with torch.no_grad():
        layer.recurrent.A[0].zero_()  # no direction at all
    assert layer.margin() == pytest.approx(0.2, abs=1e-6)


@pytest.mark.parametrize("solver", [eq.ForwardBackward(), eq.Tseng(), eq.DouglasRachford(), eq.Anderson()], ids=str)
def test_solvers_agree(solver: eq.Solver) -> None:
    for layer in (single(margin=1.0), tiered(margin=1.0)):
        x = torch.randn(2, 2, *layer.image_size, dtype=F64)
        found, truth = layer.solve(x, solver=solver, tol=1e-7), layer.solve(x, tol=1e-9)
        apart = torch.linalg.vector_norm(found.value - truth.value, dim=1)
        assert bool((apart <= found.error_bound + truth.error_bound).all())
        assert bool(found.converged.all())


def test_float32_stays_within_its_bound() -> None:
    layer = single(margin=0.8).float()
    wide = copy.deepcopy(layer).double()
    x = torch.randn(4, 2, 5, 4)
    found, truth = layer.solve(x, tol=1e-4), wide.solve(x.double(), tol=1e-10)
    apart = torch.linalg.vector_norm(found.value.double() - truth.value, dim=1)
    assert bool((apart <= found.error_bound + 1e-5).all())
    assert float((found.error_bound / torch.linalg.vector_norm(truth.value, dim=1)).max()) < 0.02


def test_answers_do_not_depend_on_the_batch() -> None:
    layer = single(size=(6, 6)).float()
    x = torch.randn(9, 2, 6, 6)
    with torch.no_grad():
        whole, apart = layer(x), torch.cat([layer(part) for part in x.split(1)])
    torch.testing.assert_close(whole, apart, rtol=1e-4, atol=1e-5)


def test_bad_input_is_refused() -> None:
    good: dict[str, Any] = {"in_channels": 1, "channels": 2, "image_size": 8}
    bad: list[dict[str, Any]] = [
        {"channels": 0}, {"kernel_size": 2}, {"margin": 0.0}, {"margin": -1.0}, {"stride": 0}, {"border": -1},
        {"image_size": 0}, {"image_size": (8, 8, 8)}, {"activation": "gelu"}, {"tol": 2.0},
    ]  # fmt: skip
    for options in bad:
        with pytest.raises(OptionError):
            eq.MonConv2d(**{**good, **options})
    with pytest.raises(OptionError, match=r"do not halve 2 times.*12"):
        eq.MultiTierMonDEQ(1, (2, 2, 2), 10)
    for channels in ((), 3, (2, 0)):
        with pytest.raises(OptionError):
            eq.MultiTierMonDEQ(1, channels, 8)  # type: ignore[arg-type]
    made = eq.MonConv2d(1, 2, 4)
    for x in (torch.zeros(1, 4), torch.zeros(1, 2, 4, 4), torch.zeros(1, 1, 4, 4, dtype=torch.int64)):
        with pytest.raises(InputError):
            made(x)
    with pytest.raises(InputError, match=r"4×5.*4×4"):
        made(torch.zeros(1, 1, 4, 5))
    with pytest.raises(InputError, match="NaN"):
        made(torch.full((1, 1, 4, 4), torch.nan))
    assert made(torch.zeros(0, 1, 4, 4)).shape == (0, 2, 4, 4)
    assert eq.MultiTierMonDEQ(1, (2, 3), 4)(torch.zeros(0, 1, 4, 4)).shape == (0, 3, 2, 2)


def test_memory_of_a_training_step_does_not_grow_with_the_solver() -> None:
    def peak(tol: float) -> int:
        layer = eq.MonConv2d(1, 8, 16, margin=0.3, training_tol=tol)
        x, saved = torch.randn(4, 1, 16, 16), 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal saved
            saved += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            layer(x).sum().backward()
        return saved

    assert peak(1e-1) == peak(1e-5)
