"""Symbols of convolutions against dense matrices and FFTs, and bounds over all frequencies against eigenvalues."""

from __future__ import annotations

import math
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import conv2d

from equipoise.errors import InputError, OptionError
from equipoise.operators import spectra


def circular(kernel: Tensor, size: tuple[int, int], stride: int = 1) -> Tensor:
    """The dense matrix of the circular convolution."""
    inputs, reach = kernel.shape[1], kernel.shape[2] // 2
    basis = torch.eye(inputs * size[0] * size[1], dtype=kernel.dtype).view(-1, inputs, *size)
    rows, columns = (torch.arange(-reach, n + reach) % n for n in size)
    return conv2d(basis[:, :, rows][:, :, :, columns], kernel, stride=stride).flatten(1).T


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (5, 4), (6, 6), (7, 9)])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_symbols_multiply_the_fft_of_an_image(size: tuple[int, int], k: int) -> None:
    torch.manual_seed(0)
    kernel = torch.randn(3, 2, k, k, dtype=torch.float64)
    image = torch.randn(2, *size, dtype=torch.float64)
    result = (circular(kernel, size) @ image.flatten()).view(3, *size)
    p, q = spectra.frequencies(size)
    values, error = spectra.symbols(kernel, size)
    expected = torch.fft.rfft2(result)[:, p, q]
    found = torch.einsum("foi,if->of", values, torch.fft.rfft2(image)[:, p, q])
    assert (found - expected).abs().max() < 1e-12
    assert 0 < error < 1e-12


@given(st.integers(0, 10**6), st.sampled_from([(1, 4, 6, 3), (2, 4, 6, 3), (3, 3, 9, 5), (2, 8, 4, 1), (4, 8, 4, 3)]))
@settings(max_examples=40, deadline=None)
def test_norm_is_that_of_the_dense_matrix(seed: int, shape: tuple[int, int, int, int]) -> None:
    stride, height, width, k = shape
    generator = torch.Generator().manual_seed(seed)
    outputs, inputs = (int(n) for n in torch.randint(1, 4, (2,), generator=generator))
    kernel = torch.randn(outputs, inputs, k, k, generator=generator, dtype=torch.float64)
    true = float(torch.linalg.matrix_norm(circular(kernel, (height, width), stride), 2))
    found = spectra.norm(*spectra.symbols(kernel, (height, width), stride))
    assert true * (1 - 1e-14) <= found <= true * (1 + 1e-9)


@given(st.integers(0, 10**6), st.floats(-2, 2))
@settings(max_examples=30, deadline=None)
def test_margin_and_lipschitz_are_those_of_the_dense_matrix(seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    kernel = torch.randn(3, 3, 3, 3, generator=generator, dtype=torch.float64) * 10**scale
    away = torch.eye(60, dtype=torch.float64) - circular(kernel, (4, 5))
    spectrum = spectra.symbols(kernel, (4, 5))
    margin = float(torch.linalg.eigvalsh((away + away.T) / 2).min())
    lipschitz = float(torch.linalg.matrix_norm(away, 2))
    found = spectra.margin(*spectrum)
    assert margin - 1e-9 * (1 + abs(margin)) <= found <= margin + 1e-12 * (1 + 10**scale)
    assert lipschitz * (1 - 1e-14) <= spectra.lipschitz(*spectrum) <= lipschitz * (1 + 1e-9)


def test_closed_forms() -> None:
    """A Laplacian: symbol 2 cos α + 2 cos β − 4."""
    kernel = torch.zeros(1, 1, 3, 3)
    kernel[0, 0, 1] = torch.tensor([1.0, -4.0, 1.0])
    kernel[0, 0, :, 1] = torch.tensor([1.0, -4.0, 1.0])
    values, _ = spectra.symbols(kernel, (8, 8))
    p, q = spectra.frequencies((8, 8))
    expected = 2 * torch.cos(p.double() * (math.pi / 4)) + 2 * torch.cos(q.double() * (math.pi / 4)) - 4
    assert (values[:, 0, 0] - expected).abs().max() < 1e-14
    assert 8 <= spectra.norm(*spectra.symbols(kernel, (8, 8))) <= 8 * (1 + 1e-12)
    assert 1 - 1e-12 <= spectra.margin(*spectra.symbols(kernel, (8, 8))) <= 1


def test_bounds_count_the_error_they_are_given() -> None:
    torch.manual_seed(0)
    values = torch.randn(5, 3, 3, dtype=torch.complex128)
    assert spectra.norm(values, 0.5) >= spectra.norm(values) + 0.5
    assert spectra.margin(values, 0.5) <= spectra.margin(values) - 0.5
    assert spectra.min_eigenvalue(values, 0.25) <= spectra.min_eigenvalue(values) - 0.25


@pytest.mark.parametrize("scale", [0.0, 1e-40, 1e-300, 1e300])
def test_extreme_sizes(scale: float) -> None:
    torch.manual_seed(0)
    kernel = torch.randn(2, 2, 3, 3, dtype=torch.float64)
    true = spectra.norm(*spectra.symbols(kernel, (4, 4)))
    found = spectra.norm(*spectra.symbols(kernel * scale, (4, 4)))
    assert true * scale * (1 - 1e-12) <= found <= true * scale * (1 + 1e-9) + 1e-290


def test_many_frequencies_in_about_a_second() -> None:
    torch.manual_seed(0)
    kernel = torch.randn(64, 64, 3, 3)
    begin = time.process_time()
    values, error = spectra.symbols(kernel, (32, 32))
    found = spectra.norm(values, error)
    assert len(values) == 544
    assert found <= float(torch.linalg.matrix_norm(values, 2).max()) * (1 + 1e-6)
    assert time.process_time() - begin < 20  # about 0.7 s on an idle core


def test_bad_input_is_refused() -> None:
    kernel = torch.randn(2, 2, 3, 3)
    with pytest.raises(InputError, match="NaN or infinite"):
        spectra.symbols(kernel * math.nan, (4, 4))
    with pytest.raises(InputError, match="floats"):
        spectra.symbols(kernel[0], (4, 4))
    with pytest.raises(OptionError, match="does not divide"):
        spectra.symbols(kernel, (4, 5), 2)
    with pytest.raises(OptionError, match="positive integers"):
        spectra.symbols(kernel, (0, 4))
    with pytest.raises(InputError, match="complex128"):
        spectra.norm(torch.randn(2, 2, 2))
    with pytest.raises(InputError, match="NaN"):
        spectra.norm(torch.full((1, 2, 2), complex(math.nan), dtype=torch.complex128))
