"""Models in files: what comes back is what was saved, and what was not saved here does not come in."""

from __future__ import annotations

import json
import struct
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import catalogue
import equipoise as eq
from equipoise.certificates.fingerprint import fingerprint
from equipoise.data import Preprocessing
from equipoise.files import load, read_certificate, save
from equipoise.layers import QuantizedLinear
from equipoise.layers.linear import quantize_linear

D, N, K = 7, 5, 3

Model = nn.Module


def layer(**options: Any) -> eq.MonDEQ:
    return eq.MonDEQ(D, N, **options)


def classifier(**options: Any) -> nn.Sequential:
    return nn.Sequential(layer(**options), nn.Linear(N, K))


def quantized(scheme: eq.Scheme) -> nn.Module:
    return eq.quantize(classifier(margin=0.5), scheme)


def from_weights(**options: Any) -> eq.MonDEQ:
    return eq.MonDEQ.from_weights(0.1 * torch.randn(N, N), torch.randn(N, D), torch.randn(N), **options)


def tied() -> nn.Sequential:
    relu, inner = nn.ReLU(), nn.Linear(N, N)
    return nn.Sequential(layer(), relu, inner, relu, inner)


def quantized_inputs() -> eq.MonDEQ:
    """Float recurrent weights, an injection of codes alone: nothing but a word in the file tells its dtype."""
    model = layer().double()
    assert isinstance(model.injection, nn.Linear)
    model.injection = quantize_linear(model.injection, eq.Assembled(4), 4, 6)
    return model


FLOAT_MODELS: dict[str, Callable[[], Model]] = {
    "layer": layer,
    "classifier": classifier,
    "float64": lambda: classifier().double(),
    "rank 0": lambda: layer(rank=0),
    "rank 2": lambda: layer(rank=2, margin=1.5),
    "learned margin": lambda: layer(margin=0.3, learn_margin=True),
    "one feature": lambda: eq.MonDEQ(1, 1),
    "options": lambda: layer(tol=1e-6, backward_tol=1e-3, strict=True),
    "from_weights": from_weights,
    "from_weights, no margin": lambda: eq.MonDEQ.from_weights(
        torch.ones(N, N).triu(1), torch.randn(N, D), torch.zeros(N), check=False, solver=eq.ForwardBackward()
    ),
    "two layers": lambda: nn.Sequential(nn.Flatten(), layer(), nn.Linear(N, 4), nn.Tanh(), eq.MonDEQ(4, 2)),
    "no bias": lambda: nn.Sequential(layer(), nn.Linear(N, K, bias=False)),
    "activations": lambda: nn.Sequential(
        layer(),
        nn.Identity(),
        nn.ReLU(inplace=True),
        nn.LeakyReLU(0.3),
        nn.ELU(0.5),
        nn.Softplus(beta=2.0, threshold=10.0),
        nn.Hardtanh(-torch.inf, 2.0),
        nn.Softshrink(0.1),
        nn.Sigmoid(),
        nn.Tanh(),
        nn.Dropout(0.25),
    ),
    "named": lambda: nn.Sequential(OrderedDict(core=layer(), head=nn.Linear(N, K))),
    "nested": lambda: nn.Sequential(nn.Sequential(nn.Flatten(-1, -1), layer()), nn.Sequential(), nn.Linear(N, K)),
    "tied": tied,
    "codes for inputs": quantized_inputs,
}
ACTIVATIONS = [*catalogue.ACTIVATIONS, eq.LeakyReLU(0.25), eq.ELU(0.5), eq.Hardtanh(float("-inf"), 2.0)]
SOLVERS = [
    *catalogue.SOLVERS,
    eq.PeacemanRachford(alpha=0.3, max_steps=500, check_every=2),
    eq.Anderson(on=eq.ForwardBackward(alpha=0.2), memory=3),
]
SCHEMES: list[eq.Scheme] = [
    *(kind(4) for kind in catalogue.SCHEME_KINDS),
    *(kind(bits) for kind in (eq.Assembled, eq.Structured) for bits in (1, 2, 3, 8, 11, 16, 32)),
    *(eq.Assembled(bits, granularity="row") for bits in (2, 8)),
    eq.Structured(2, granularity="row", input_bits=3, bias_bits=9, head_bits=1),
    eq.Compensated(3),
    eq.Compensated(5, granularity="row", margin=0.2, diagonal_bits=9),
    eq.Cayley(8),
    eq.Cayley(8, alpha=0.7, granularity="tensor", scale="max"),
]
MODELS: dict[str, Callable[[], Model]] = {
    **FLOAT_MODELS,
    **{f"activation {a}": (lambda a=a: layer(activation=a)) for a in ACTIVATIONS},
    **{f"solver {s}": (lambda s=s: layer(solver=s)) for s in SOLVERS},
    **{str(s): (lambda s=s: quantized(s)) for s in SCHEMES},
    "quantized from_weights": lambda: eq.quantize(from_weights(), eq.Structured(3)),
}


def inputs(model: Model) -> Tensor:
    first = next(module for module in model.modules() if isinstance(module, eq.MonDEQ))
    return torch.randn(4, first.in_features, dtype=first.bias.dtype)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


# What comes back


@pytest.mark.filterwarnings("ignore::equipoise.errors.ConvergenceWarning")
@pytest.mark.parametrize("name", MODELS)
def test_what_comes_back_computes_the_same_numbers(name: str, path: Path) -> None:
    model = MODELS[name]().eval()
    save(model, path)
    again = load(path)
    x = inputs(model)
    expected, found = model(x), again(x)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", MODELS)
def test_what_comes_back_is_the_same_model(name: str, path: Path) -> None:
    model = MODELS[name]()
    save(model, path)
    again = load(path)
    assert repr(again) == repr(model)
    assert fingerprint(again) == fingerprint(model)
    state = again.state_dict()
    assert list(state) == list(model.state_dict())
    for key, tensor in model.state_dict().items():
        assert state[key].dtype == tensor.dtype
        assert torch.equal(state[key], tensor), key
    mine, theirs = ([module for _, module in m.named_modules(remove_duplicate=False)] for m in (model, again))
    for one, other in zip(mine, theirs, strict=True):
        assert type(one) is type(other)
        assert [p.requires_grad for p in one.parameters(False)] == [p.requires_grad for p in other.parameters(False)]
        if isinstance(one, eq.MonDEQ):
            for option in ("activation", "solver", "tol", "backward_tol", "strict", "scheme"):
                assert getattr(one, option) == getattr(other, option), option
        if isinstance(one, QuantizedLinear):
            assert one.dense()[0].dtype == other.dense()[0].dtype
        if isinstance(one, nn.Flatten):
            assert (one.start_dim, one.end_dim) == (other.start_dim, other.end_dim)


def test_saving_what_was_loaded_gives_the_same_file(path: Path, tmp_path: Path) -> None:
    for name, make in MODELS.items():
        save(make(), path, force=True)
        second = tmp_path / "second"
        save(load(path), second, force=True)
        assert second.read_bytes() == path.read_bytes(), name


def test_loading_draws_no_random_numbers(path: Path) -> None:
    save(classifier(), path)
    torch.manual_seed(3)
    expected = torch.rand(())
    torch.manual_seed(3)
    load(path)
    assert torch.rand(()) == expected


def test_what_was_loaded_trains(path: Path) -> None:
    save(classifier(learn_margin=True), path)
    model = load(path).train()
    model(torch.randn(4, D)).sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


def test_what_was_loaded_does_not_hang_on_the_file(path: Path) -> None:
    model = classifier()
    save(model, path)
    again = load(path)
    path.write_bytes(b"\xff" * path.stat().st_size)
    for key, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor)


def test_strides_and_views_do_not_matter(path: Path) -> None:
    model = layer()
    store = torch.randn(2 * D, N)
    model.injection.weight = nn.Parameter(store[:D].T)
    save(model, path)
    again = load(path)
    assert isinstance(again, eq.MonDEQ)
    assert torch.equal(again.input_weight, store[:D].T)


@pytest.mark.parametrize(
    "scheme", [eq.Structured(1), eq.Structured(4, input_bits=4, bias_bits=4, head_bits=4)], ids=str
)
def test_codes_take_their_bits_in_the_file(scheme: eq.Scheme, path: Path) -> None:
    model = eq.quantize(nn.Sequential(eq.MonDEQ(200, 100, rank=25), nn.Linear(100, 10)), scheme)
    save(model, path)
    header = struct.unpack("<Q", path.read_bytes()[:8])[0]
    assert path.stat().st_size == 8 + header + eq.size(model)
    assert header < 3000


def test_preprocessing_travels(path: Path) -> None:
    model = classifier()
    save(model, path)
    assert not hasattr(load(path), "preprocessing")
    for value in (
        Preprocessing(mean=0.1307, std=0.3081, scale=255.0, input_shape=(28, 28)),
        Preprocessing(mean=(0.1, 0.2, 0.3), std=(0.5, 0.5, 0.5), scale=255.0, input_shape=(3, 4, 4)),
    ):
        model.preprocessing = value  # type: ignore[assignment]
        save(model, path, force=True)
        assert load(path).preprocessing == value


def test_certificate_travels(path: Path) -> None:
    model = quantized(eq.Structured(4))
    save(model, path)
    assert read_certificate(path) is None
    certificate = eq.certify(model)
    save(model, path, certificate=certificate, force=True)
    assert read_certificate(path) == json.loads(certificate.to_json())
    assert torch.equal(load(path)(torch.ones(1, D)), model.eval()(torch.ones(1, D)))


# What is not saved


class OwnLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return -super().forward(x)


class OwnActivation(eq.Activation):
    def __call__(self, v: Tensor) -> Tensor:
        return v / 2

    def derivative(self, v: Tensor) -> Tensor:
        return torch.full_like(v, 0.5)


class OwnSolver(eq.PeacemanRachford):
    pass


def parametrized() -> nn.Sequential:
    model = classifier()
    nn.utils.parametrizations.weight_norm(model[1])
    return model


def with_buffer() -> nn.Sequential:
    model = classifier()
    model.register_buffer("temperature", torch.ones(()))
    return model


def with_nan() -> nn.Sequential:
    model = classifier()
    with torch.no_grad():
        model[0].recurrent.B[1, 2] = torch.nan
    return model


def with_words() -> nn.Sequential:
    model: Any = classifier()
    model.preprocessing = "as usual"
    return model


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: nn.Sequential(layer(), nn.Conv2d(1, 1, 1)), eq.StructureError, r"Conv2d at position '1'"),
        (lambda: nn.Sequential(nn.Sequential(nn.GELU())), eq.StructureError, r"GELU at position '0\.0'"),
        (lambda: nn.Sequential(layer(), OwnLinear(N, K)), eq.StructureError, r"OwnLinear at position '1'"),
        (parametrized, eq.StructureError, r"ParametrizedLinear at position '1'"),
        (
            lambda: nn.Linear(2, 2),
            eq.StructureError,
            r"Linear cannot be saved; known here: MonDEQ, NEMON, Sequential, NEMONConv2d",
        ),
        (lambda: nn.Sequential(layer(activation=OwnActivation())), eq.StructureError, r"OwnActivation.* position '0'"),
        (lambda: layer(solver=OwnSolver()), eq.StructureError, "OwnSolver"),
        (lambda: layer(solver=eq.Anderson(on=OwnSolver())), eq.StructureError, "OwnSolver"),
        (with_buffer, eq.StructureError, "temperature"),
        (with_nan, eq.InputError, r"0\.recurrent\.B holds 1 NaN"),
        (with_words, eq.InputError, "as usual"),
    ],
)
def test_what_cannot_be_saved_is_named(
    make: Callable[[], Model], error: type[Exception], match: str, path: Path
) -> None:
    with pytest.raises(error, match=match):
        save(make(), path)
    assert not list(path.parent.iterdir())


@pytest.mark.parametrize("certificate", ["certified", {"certified": True}, 3])
def test_a_certificate_is_what_certify_returns(certificate: Any, path: Path) -> None:
    with pytest.raises(eq.InputError, match="certify"):
        save(classifier(), path, certificate=certificate)
    assert not path.exists()
