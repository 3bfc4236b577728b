"""True norms of convolutions against dense matrices, and kernels that are capped by them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d, conv_transpose2d

from equipoise import verified
from equipoise.errors import InputError, OptionError
from equipoise.operators.conv_norm import conv_norm, torus
from equipoise.parametrizations.lipschitz import CappedKernel


def dense(kernel: Tensor, size: tuple[int, int], stride: int, padding: str) -> Tensor:
    reach = kernel.shape[2] // 2
    basis = torch.eye(kernel.shape[1] * size[0] * size[1], dtype=kernel.dtype).view(-1, kernel.shape[1], *size)
    if padding == "zeros":
        return conv2d(basis, kernel, stride=stride, padding=reach).flatten(1).T
    rows, columns = (torch.arange(-reach, n + reach) % n for n in size)
    return conv2d(basis[:, :, rows][:, :, :, columns], kernel, stride=stride).flatten(1).T


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_never_below_the_dense_norm(stride: int, k: int) -> None:
    """Forty random layers of each kind: 360 in all, of either padding."""
    generator = torch.Generator().manual_seed(10 * k + stride)
    for trial in range(40):
        outputs, inputs, height, width = (int(n) for n in torch.randint(1, 6, (4,), generator=generator))
        padding = "zeros" if trial % 2 else "circular"
        size = (height, width) if padding == "zeros" else (stride * height, stride * width)
        kernel = torch.randn(outputs, inputs, k, k, generator=generator, dtype=torch.float64)
        true = float(torch.linalg.matrix_norm(dense(kernel, size, stride, padding), 2))
        found = conv_norm(kernel, size, stride, padding)  # type: ignore[arg-type]
        assert found >= true * (1 - 1e-13)
        if padding == "circular":
            assert found <= true * (1 + 1e-9)


@pytest.mark.parametrize("channels", [1, 4, 16])
def test_near_the_true_norm_at_32_by_32(channels: int) -> None:
    torch.manual_seed(channels)
    kernel = torch.randn(channels, channels, 3, 3, dtype=torch.float64)
    x = torch.randn(1, channels, 32, 32, dtype=torch.float64)
    for _ in range(400):
        y = conv2d(x / x.norm(), kernel, padding=1)
        x = conv_transpose2d(y, kernel, padding=1)
    assert float(y.norm()) <= conv_norm(kernel, (32, 32)) <= 1.05 * float(y.norm())


def test_the_reshaped_kernel_understates_it() -> None:
    """All taps equal: the true norm is k times the reshaped kernel's, in the limit of large images."""
    kernel = torch.ones(1, 1, 3, 3)
    reshaped = float(torch.linalg.matrix_norm(kernel.flatten(1), 2))
    assert conv_norm(kernel, (32, 32), padding="circular") == pytest.approx(9.0)
    assert reshaped == pytest.approx(3.0)
    assert verified.spectral_norm(dense(kernel.double(), (12, 12), 1, "zeros")) > 2.8 * reshaped


def test_a_torus_leaves_room_for_the_border() -> None:
    assert torus((8, 7), 3) == (9, 8)
    assert torus((8, 7), 5, 2) == (10, 10)
    assert torus((8, 6), 3, 2, "circular") == (8, 6)


@pytest.mark.parametrize(("stride", "k"), [(1, 1), (1, 3), (2, 3), (2, 1), (1, 5)])
def test_the_power_iteration_finds_the_norm(stride: int, k: int) -> None:
    torch.manual_seed(0)
    kernel = torch.randn(3, 2, k, k, dtype=torch.float64)
    capped = CappedKernel(kernel, 1.5, torus((5, 6), k, stride), stride)
    capped.advance(500)
    proved = conv_norm(kernel, (5, 6), stride)
    assert float(capped.estimate().detach()) == pytest.approx(proved, rel=1e-6)
    assert conv_norm(capped().detach(), (5, 6), stride) == pytest.approx(1.5, rel=1e-6)
    assert conv_norm(capped(proved).detach(), (5, 6), stride) <= 1.5 * (1 + 1e-12)


def test_a_kernel_below_its_cap_is_itself() -> None:
    kernel = torch.randn(3, 2, 3, 3)
    capped = CappedKernel(kernel, 1e3, torus((4, 4), 3))
    assert torch.equal(capped().detach(), kernel)


def test_the_cap_is_differentiable() -> None:
    torch.manual_seed(0)
    capped = CappedKernel(torch.randn(2, 2, 3, 3, dtype=torch.float64), 0.7, torus((4, 4), 3))
    capped.advance(3000)

    def applied(weight: Tensor) -> Tensor:
        return torch.func.functional_call(capped, {"weight": weight})

    assert torch.autograd.gradcheck(applied, capped.weight.detach().requires_grad_(), atol=1e-6)


def test_the_iterate_is_part_of_the_state() -> None:
    torch.manual_seed(0)
    one = CappedKernel(torch.randn(2, 2, 3, 3), 0.5, (5, 5))
    one()
    other = CappedKernel(torch.zeros(2, 2, 3, 3), 0.5, (5, 5))
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(), other())


def test_bad_input_is_refused() -> None:
    with pytest.raises(OptionError, match="odd"):
        conv_norm(torch.randn(2, 2, 4, 4), (8, 8))
    with pytest.raises(InputError, match=r"\(o, i, k, k\)"):
        conv_norm(torch.randn(2, 2, 3, 5), (8, 8))
    with pytest.raises(OptionError, match="padding"):
        conv_norm(torch.randn(2, 2, 3, 3), (8, 8), padding="reflect")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="stride"):
        conv_norm(torch.randn(2, 2, 3, 3), (8, 8), stride=0)
    with pytest.raises(OptionError, match="divide"):
        conv_norm(torch.randn(2, 2, 3, 3), (7, 8), 2, "circular")
    with pytest.raises(OptionError, match="image_size"):
        conv_norm(torch.randn(2, 2, 3, 3), (0, 8))
    with pytest.raises(OptionError, match="norm_cap"):
        CappedKernel(torch.randn(2, 2, 3, 3), 0.0, (5, 5))
