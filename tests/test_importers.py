"""Other projects' checkpoints: their numbers, their formula, and what is refused."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import equipoise as eq
from equipoise.certificates.fingerprint import fingerprint
from equipoise.data import Preprocessing
from equipoise.files import load, save
from equipoise.importers import FORMATS, import_model

D, N, R, K = 6, 5, 3, 4
MNIST = Preprocessing(mean=0.1307, std=0.3081, scale=255.0, input_shape=(28, 28))
State = dict[str, Tensor]


def mondeq_quant(d: int = D, dtype: torch.dtype = torch.float32) -> State:
    shapes = {"A": (R, N), "S": (N, N), "m_raw": (), "U": (N, d), "b": (N,)}
    shapes |= {"classifier.weight": (K, N), "classifier.bias": (K,)}
    return {key: torch.randn(shape, dtype=dtype) for key, shape in shapes.items()}


def monotone_op_net(d: int = D, dtype: torch.dtype = torch.float32) -> State:
    """The keys that the original's modules give, in their order."""

    def linear(inputs: int, outputs: int, bias: bool) -> nn.Linear:
        return nn.Linear(inputs, outputs, bias, dtype=dtype)

    core = nn.ModuleDict({"U": linear(d, N, True), "A": linear(N, N, False), "B": linear(N, N, False)})
    net = nn.ModuleDict({"mon": nn.ModuleDict({"linear_module": core}), "Wout": linear(N, K, True)})
    return {key: value.detach() for key, value in net.state_dict().items()}


def nemon(d: int = D, dtype: torch.dtype = torch.float32) -> State:
    state = {key.replace("B.weight", "d"): value for key, value in monotone_op_net(d, dtype).items()}
    return {**state, "mon.linear_module.d": torch.randn(N, dtype=dtype)}


STATES: dict[str, Callable[..., State]] = {
    "mondeq-quant": mondeq_quant,
    "monotone_op_net": monotone_op_net,
    "nemon": nemon,
}


def truth(W: Tensor, q: Tensor) -> Tensor:
    """Equilibria of z = relu(W z + q), rows of q, by the damped iteration in float64."""
    W, q = W.double(), q.double()
    gap = torch.eye(len(W), dtype=torch.float64) - W
    step = float(torch.linalg.eigvalsh((gap + gap.T) / 2)[0] / torch.linalg.matrix_norm(gap, 2) ** 2)
    z = torch.zeros_like(q)
    for _ in range(20_000):
        z = torch.relu((1 - step) * z + step * (z @ W.T + q))
    return z


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "theirs.pt"


def test_every_format_is_tested() -> None:
    assert FORMATS.keys() == STATES.keys()


# The numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mondeq_quant_is_its_formula(dtype: torch.dtype, path: Path) -> None:
    s = mondeq_quant(dtype=dtype)
    torch.save(s, path)
    model = import_model(path, "mondeq-quant")
    layer, head = model
    assert isinstance(layer, eq.MonDEQ)
    assert isinstance(head, nn.Linear)
    d = {key: value.double() for key, value in s.items()}
    m = float(torch.log1p(torch.exp(d["m_raw"]))) + 1e-4
    W = (1 - m) * torch.eye(N, dtype=torch.float64) - d["A"].T @ d["A"] + d["S"] - d["S"].T
    torch.testing.assert_close(layer.weight.detach().double(), W, rtol=0, atol=100 * torch.finfo(dtype).eps)
    for found, key in ((layer.input_weight, "U"), (layer.bias, "b"), (head.weight, "classifier.weight")):
        assert torch.equal(found, s[key])
        assert found.requires_grad
    assert eq.margin(layer) == pytest.approx(m, rel=1e-5)
    x = torch.randn(3, D, dtype=dtype)
    z = truth(W, x.double() @ d["U"].T + d["b"])
    expected = z @ d["classifier.weight"].T + d["classifier.bias"]
    torch.testing.assert_close(model(x).double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("margin", [None, 1.0, 0.1, 2.5])
def test_monotone_op_net_is_its_formula(margin: float | None, path: Path) -> None:
    s = monotone_op_net(dtype=torch.float64)
    torch.save(s, path)
    model = import_model(path, "monotone_op_net", margin=margin)
    layer = model[0]
    assert isinstance(layer, eq.MonDEQ)
    A, B, U, b = (s[f"mon.linear_module.{key}"] for key in ("A.weight", "B.weight", "U.weight", "U.bias"))
    m = 1.0 if margin is None else margin
    # A(z) is z Aᵀ for rows z, so the original's product is z ↦ (1 − m) z − (z Aᵀ) A + z Bᵀ − z B.
    z = torch.randn(3, N, dtype=torch.float64)
    theirs = (1 - m) * z - (z @ A.T) @ A + z @ B.T - z @ B
    torch.testing.assert_close(layer.operator.apply(z), theirs)
    assert eq.margin(layer) >= m * (1 - 1e-9)
    x = torch.randn(3, D, dtype=torch.float64)
    expected = truth(layer.weight.detach(), x @ U.T + b) @ s["Wout.weight"].T + s["Wout.bias"]
    torch.testing.assert_close(model(x), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("margin", [None, 0.05, 2.0])
def test_nemon_is_its_formula(margin: float | None, path: Path) -> None:
    s = nemon(dtype=torch.float64)
    torch.save(s, path)
    model = import_model(path, "nemon", margin=margin)
    layer = model[0]
    assert isinstance(layer, eq.NEMON)
    A, d, U, b = (s[f"mon.linear_module.{key}"] for key in ("A.weight", "d", "U.weight", "U.bias"))
    gamma = 1 - (0.9 if margin is None else margin)
    z = torch.randn(3, N, dtype=torch.float64)
    transformed = torch.diag((-d).exp()) @ A @ torch.diag(d.exp())
    theirs = gamma * z + z @ transformed.T - z @ torch.diag(A.abs().sum(1))
    torch.testing.assert_close(layer.operator.apply(z), theirs)
    assert eq.margin(layer) >= (1 - gamma) * (1 - 1e-9)
    x = torch.randn(3, D, dtype=torch.float64)
    found = layer.solve(x, tol=1e-10).value
    torch.testing.assert_close(found, torch.relu(found @ layer.weight.detach().T + x @ U.T + b), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(model(x), found @ s["Wout.weight"].T + s["Wout.bias"], rtol=1e-7, atol=1e-7)


def test_the_published_checkpoint(shared_reference: Path) -> None:
    model = import_model(shared_reference, "mondeq-quant")
    layer, head = model
    assert isinstance(layer, eq.MonDEQ)
    assert model.preprocessing == MNIST
    s = {key: value.double() for key, value in safetensors.torch.load_file(shared_reference).items()}
    m = float(torch.log1p(torch.exp(s["m_raw"])) + 1e-4)
    W = (1 - m) * torch.eye(100, dtype=torch.float64) - s["A"].T @ s["A"] + s["S"] - s["S"].T
    assert layer.weight.dtype == torch.float32
    torch.testing.assert_close(layer.weight.detach().double(), W, rtol=0, atol=1e-6)
    assert torch.equal(head.weight.double(), s["classifier.weight"])
    # as published, last printed digit
    assert round(m, 6) == 0.226887
    assert eq.margin(layer) == pytest.approx(0.226887, abs=1e-6)
    assert eq.lipschitz(layer) == pytest.approx(1.845263, abs=1e-6)
    assert float(torch.linalg.matrix_norm(layer.weight.detach().double(), 2)) == pytest.approx(1.715768, abs=1e-6)


@pytest.mark.parametrize("format", FORMATS)
def test_an_import_can_be_quantized_and_saved(format: str, path: Path, tmp_path: Path) -> None:
    torch.save(STATES[format](784), path)
    model = import_model(path, format)
    assert model.preprocessing == MNIST
    save(eq.quantize(model, eq.Structured(4)), tmp_path / "ours")
    again = load(tmp_path / "ours")
    assert again.preprocessing == MNIST
    assert eq.margin(again) > 0


def test_other_widths_have_no_preprocessing(path: Path) -> None:
    torch.save(mondeq_quant(), path)
    assert not hasattr(import_model(path, "mondeq-quant"), "preprocessing")


# How they are wrapped


def lined(state: State, old: str, new: str) -> State:
    return {key.replace(old, new): value for key, value in state.items()}


def core(state: State) -> State:
    """As its own modules name them: what the released checkpoint holds."""
    return {key if "classifier" in key else f"mon.core.{key}": value for key, value in state.items()}


WRAPPERS: dict[str, Callable[[State], Any]] = {
    "plain": lambda s: s,
    "state_dict": lambda s: {"state_dict": s, "epoch": 3},
    "model_state_dict": lambda s: {"model_state_dict": s, "optimizer_state_dict": {"state": {}}},
    "parallel": lambda s: {f"module.{k}": v for k, v in s.items()},
    "compiled": lambda s: {"state_dict": {f"_orig_mod.{k}": v for k, v in s.items()}},
    "parameters": lambda s: {k: nn.Parameter(v) for k, v in s.items()},
    "another order": lambda s: dict(reversed(s.items())),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("format", FORMATS)
def test_wrappers_are_taken_off(format: str, wrapper: str, path: Path, tmp_path: Path) -> None:
    state = STATES[format]()
    safetensors.torch.save_file(state, tmp_path / "plain.safetensors")
    expected = import_model(tmp_path / "plain.safetensors", format).state_dict()
    torch.save(WRAPPERS[wrapper](state), path)
    found = import_model(path, format).state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.parametrize("rename", [core, lambda s: lined(core(s), "classifier", "output")])
def test_both_of_their_classes_are_known(rename: Callable[[State], State], path: Path) -> None:
    state = mondeq_quant()
    torch.save(rename(state), path)
    model = import_model(path, "mondeq-quant")
    assert torch.equal(model[0].input_weight, state["U"])
    assert torch.equal(model[1].bias, state["classifier.bias"])


@pytest.mark.parametrize("old_zip", [False, True])
def test_the_name_of_the_file_does_not_matter(old_zip: bool, tmp_path: Path) -> None:
    state = monotone_op_net()
    torch.save(state, tmp_path / "a.safetensors", _use_new_zipfile_serialization=not old_zip)
    safetensors.torch.save_file(state, tmp_path / "b.pt")
    first, second = (import_model(tmp_path / name, "monotone_op_net") for name in ("a.safetensors", "b.pt"))
    assert fingerprint(first) == fingerprint(second)


# What is refused


def test_unknown_formats_are_refused(path: Path) -> None:
    with pytest.raises(eq.OptionError, match=r"'onnx'; known: mondeq-quant, monotone_op_net, nemon"):
        import_model(path, "onnx")


@pytest.mark.parametrize("margin", [0.0, -1.0, float("nan"), float("inf")])
def test_margins_are_positive(margin: float, path: Path) -> None:
    torch.save(monotone_op_net(), path)
    with pytest.raises(eq.OptionError, match="margin"):
        import_model(path, "monotone_op_net", margin=margin)


def test_a_format_that_stores_its_margin_takes_none(path: Path) -> None:
    torch.save(mondeq_quant(), path)
    with pytest.raises(eq.OptionError, match="stores its own"):
        import_model(path, "mondeq-quant", margin=0.5)


def test_absent_files_are_named(path: Path) -> None:
    with pytest.raises(eq.DataNotFoundError, match=r"theirs\.pt"):
        import_model(path, "mondeq-quant")


def without(key: str) -> Callable[[State], Any]:
    return lambda s: {k: v for k, v in s.items() if k != key}


def changed(key: str, value: Any) -> Callable[[State], Any]:
    return lambda s: {**s, key: value}


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (without("m_raw"), r"expected A \(r, n\), S \(n, n\), m_raw \(\).*found A \(3, 5\).*missing m_raw$"),
        (changed("z", torch.zeros(2)), r"unknown 'z'"),
        (changed("S", torch.zeros(N, N + 1)), r"S \(5, 6\).*S does not fit"),
        (changed("U", torch.zeros(N)), "U does not fit"),
        (changed("b", torch.zeros(N + 1)), "b does not fit"),
        (changed("classifier.weight", torch.zeros(K, N + 1)), "weight does not fit"),
        (changed("classifier.bias", torch.zeros(K + 1)), "bias does not fit"),
        (changed("m_raw", torch.zeros(1)), "m_raw does not fit"),
        (changed("A", torch.zeros(N + 1, N)), "between 1 and n rows"),
        (changed("A", torch.zeros(0, N)), "between 1 and n rows"),
        (changed("b", torch.full((N,), torch.nan)), "b holds 5 NaN"),
        (changed("m_raw", torch.tensor(torch.inf)), "m_raw holds 1 NaN or infinite"),
        (changed("b", torch.zeros(N).double()), "b is torch.float64"),
        (changed("b", torch.zeros(N, dtype=torch.int64)), "b is torch.int64"),
        (lambda s: {k: v.half() for k, v in s.items()}, "float16"),
        (changed("U", torch.zeros(1).expand(N, 10**9)), "repeats its numbers"),
        (changed("b", torch.zeros(N).to_sparse()), "plain"),
        (changed("A", torch.full((R, N), 1e30)), "NaN or infinite"),
        (changed("epoch", 3), "not only plain tensors.*'epoch'"),
        (changed("mon.core.b", torch.zeros(N)), "twice"),
        (lambda s: {}, "found nothing"),
        (lambda s: [], "no state dict"),
        (lambda s: {0: s["b"]}, "no state dict"),
        (lambda s: {"state_dict": 3}, "'state_dict'"),
        (lambda s: s["b"], "no state dict"),
        (lambda s: monotone_op_net(), "missing A"),
        (lambda s: classifier_module(), "save it again"),
    ],
)
def test_other_state_dicts_are_refused(edit: Callable[[State], Any], match: str, path: Path) -> None:
    torch.save(edit(mondeq_quant()), path)
    with pytest.raises(eq.FileFormatError, match=match) as caught:
        import_model(path, "mondeq-quant")
    assert str(caught.value).startswith(f"{path} cannot be imported as mondeq-quant: ")


def classifier_module() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2))


@pytest.mark.parametrize(
    "keys",
    [
        {"U.weight": (8, 1, 3, 3), "A.weight": (8, 8, 3, 3), "B.weight": (8, 8, 3, 3), "g": (), "h": ()},
        {"U.weight": (8, 1, 3, 3), "A0.0.weight": (8, 8, 3, 3), "g.0": ()},
    ],
)
def test_convolutions_are_refused_by_name(keys: dict[str, tuple[int, ...]], path: Path) -> None:
    torch.save({f"mon.linear_module.{key}": torch.zeros(shape) for key, shape in keys.items()}, path)
    with pytest.raises(eq.FileFormatError, match="convolutional network, and only the fully connected"):
        import_model(path, "monotone_op_net")


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.environ["EQUIPOISE_TEST_BOMB"],)


@pytest.mark.parametrize("protocol", [None, 0, 2, 4])
def test_a_malicious_pickle_runs_nothing(
    protocol: int | None, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EQUIPOISE_TEST_BOMB", str(tmp_path / "boom"))
    state = {**mondeq_quant(), "extra": Bomb()}
    torch.save(state, path) if protocol is None else path.write_bytes(pickle.dumps(state, protocol))
    with pytest.raises(eq.FileFormatError, match="save it again"):
        import_model(path, "mondeq-quant")
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_every_truncation_is_seen(suffix: str, tmp_path: Path) -> None:
    state, path = mondeq_quant(), tmp_path / f"theirs.{suffix}"
    torch.save(state, path) if suffix == "pt" else safetensors.torch.save_file(state, path)
    whole = path.read_bytes()
    for length in range(0, len(whole), 37):
        path.write_bytes(whole[:length])
        with pytest.raises(eq.FileFormatError, match="cannot be imported"):
            import_model(path, "mondeq-quant")


def test_flipped_bytes_do_no_harm(path: Path) -> None:
    torch.save(mondeq_quant(), path)
    whole = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        content = bytearray(whole)
        for place in torch.randint(len(whole), (2,), generator=generator).tolist():
            content[place] ^= int(torch.randint(1, 256, (), generator=generator))
        path.write_bytes(content)
        try:
            import_model(path, "mondeq-quant")
        except eq.FileFormatError as error:
            message = str(error)
            assert str(path) in message
