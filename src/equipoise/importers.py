"""Networks that were trained elsewhere: the state dicts of other projects' equilibrium networks.

A format is a function from a state dict to a model; it registers in ``FORMATS``. Sizes are read from the tensors.
Checkpoints are read with PyTorch's restricted unpickler, which builds tensors and runs nothing.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ._codecs.tensors import TensorReader, first_bytes, open_tensors
from .data import Preprocessing
from .errors import FileFormatError, InputError, OptionError
from .layers import NEMON, MonDEQ
from .parametrizations.monotone import MARGIN_FLOOR, check_margin

__all__ = ["FORMATS", "import_model"]

State = Mapping[str, Tensor]

_WRAPPERS = ("state_dict", "model_state_dict")
_PREFIXES = ("module.", "_orig_mod.")
"""Put before every key by ``nn.DataParallel`` and ``torch.compile``."""
_MNIST = Preprocessing(mean=0.1307, std=0.3081, scale=255.0, input_shape=(28, 28))
"""What both projects train on."""


def import_model(path: str | os.PathLike[str], format: str, margin: float | None = None) -> nn.Sequential:
    """The network of another project's checkpoint as ``Sequential(layer, Linear)``, in its dtype, on the CPU.

    Formats (W as in theory §1; the activation is ReLU):

    - ``"mondeq-quant"`` [LLC26]: keys ``A (r, n)``, ``S (n, n)``, ``m_raw ()``, ``U (n, d)``, ``b (n,)``, with or
      without ``mon.core.`` before them, and ``classifier.weight (k, n)``, ``classifier.bias (k,)`` (or ``output.``).
      W = (1 − m) I − AᵀA + S − Sᵀ with m = softplus(m_raw) + 1e-4, which stays fixed here.
    - ``"monotone_op_net"`` [WK20], its fully connected network: keys ``mon.linear_module.{U.weight (n, d), U.bias
      (n,), A.weight (n, n), B.weight (n, n)}``, ``Wout.weight (k, n)``, ``Wout.bias (k,)``.
      W = (1 − m) I − AᵀA + B − Bᵀ.
    - ``"nemon"`` [JDPB21], its fully connected network: keys ``mon.linear_module.{U.weight (n, d), U.bias (n,),
      A.weight (n, n), d (n,)}``, ``Wout.weight (k, n)``, ``Wout.bias (k,)``; gives a NEMON layer.
      W = γ I + D⁻¹ A D − diag(|A| 1), D = diag(e^d), with γ = 1 − margin.

    With d = 784 the model gets the ``preprocessing`` both projects use on MNIST: (pixel/255 − 0.1307)/0.3081.

    Args:
        path: a ``.pt`` or ``.pth`` file that holds the state dict, or a dict with it under ``state_dict`` or
            ``model_state_dict``; or a ``.safetensors`` file.
        format: one of ``FORMATS``.
        margin: m where the file has none: of monotone_op_net (default 1.0, with which that project trains), and 1 − γ
            of nemon (default 0.9, that is γ = 0.1, as its network has by default).

    Raises:
        OptionError: an unknown format; a margin that is not positive, or one for a format that stores its own.
        DataNotFoundError: no such file.
        FileFormatError: other keys or shapes than the format's, NaN or infinite entries, mixed dtypes, a damaged
            file, or one that holds more than tensors.
    """
    if format not in FORMATS:
        raise OptionError(
            f"unknown format {format!r}; known: {', '.join(FORMATS)}. Any other network comes in by its W, U and b:"
            " equipoise.MonDEQ.from_weights"
        )
    if margin is not None:
        margin = check_margin(margin)
    try:
        return FORMATS[format](_read_state(path), margin).eval()
    except (FileFormatError, InputError) as error:  # InputError: products of the weights that overflow
        raise FileFormatError(f"{os.fspath(path)} cannot be imported as {format}: {error}") from error


def _mondeq_quant(state: State, margin: float | None) -> nn.Sequential:
    if margin is not None:
        raise OptionError(f"margin is {margin}, but mondeq-quant stores its own; leave it out")
    # Its two classes differ in the names of the head; the released checkpoint goes through both.
    short = {re.sub(r"^output\.", "classifier.", key.removeprefix("mon.core.")): value for key, value in state.items()}
    if len(short) != len(state):
        raise FileFormatError(f"some keys stand twice, with and without a prefix: {_listed(state)}")
    shapes = {"A": "r n", "S": "n n", "m_raw": "", "U": "n d", "b": "n"}
    _check(short, {**shapes, "classifier.weight": "k n", "classifier.bias": "k"})
    m = float(nn.functional.softplus(short["m_raw"].double())) + MARGIN_FLOOR
    return _assemble(
        short["A"], short["S"], m, short["U"], short["b"], short["classifier.weight"], short["classifier.bias"]
    )


def _monotone_op_net(state: State, margin: float | None) -> nn.Sequential:
    (U, b, A, B), V, c = _fully_connected(state, {"A.weight": "r n", "B.weight": "n n"})
    return _assemble(A, B, 1.0 if margin is None else margin, U, b, V, c)


def _nemon(state: State, margin: float | None) -> nn.Sequential:
    (U, b, A, d), V, c = _fully_connected(state, {"A.weight": "n n", "d": "n"})
    layer = NEMON.from_factors(A, d, 1 - (0.9 if margin is None else margin), U, b)
    return _headed(layer, V, c)


def _fully_connected(state: State, shapes: Mapping[str, str]) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """(U, b and the recurrent weights of these ``shapes``, the head's V, c), as two of the formats name them."""
    core = "mon.linear_module."
    if any(value.ndim == 4 for key, value in state.items() if key.startswith(core)):
        raise FileFormatError("it is a convolutional network, and only the fully connected one can be imported")
    shapes = {"U.weight": "n d", "U.bias": "n", **shapes}
    _check(state, {**{core + key: shape for key, shape in shapes.items()}, "Wout.weight": "k n", "Wout.bias": "k"})
    return tuple(state[core + key] for key in shapes), state["Wout.weight"], state["Wout.bias"]


FORMATS: dict[str, Callable[[State, float | None], nn.Sequential]] = {
    "mondeq-quant": _mondeq_quant,
    "monotone_op_net": _monotone_op_net,
    "nemon": _nemon,
}
"""From a state dict, and a margin or None, to a model: a new format registers here."""


def _assemble(A: Tensor, B: Tensor, margin: float, U: Tensor, b: Tensor, V: Tensor, c: Tensor) -> nn.Sequential:
    """x ↦ V z* + c as a model of its own tensors."""
    return _headed(MonDEQ.from_factors(A, B, margin, U, b), V, c)


def _headed(layer: MonDEQ | NEMON, V: Tensor, c: Tensor) -> nn.Sequential:
    head = nn.Linear(V.shape[1], V.shape[0], device="meta")
    head.load_state_dict({"weight": V.clone(), "bias": c.clone()}, assign=True)
    model: Any = nn.Sequential(layer, head)
    if layer.in_features == _MNIST.features:
        model.preprocessing = _MNIST
    return model


def _check(state: State, shapes: Mapping[str, str]) -> None:
    """Exactly these keys, with shapes given by letters that stand for one size each; one dtype; all finite."""
    expected = ", ".join(f"{key} ({', '.join(shape.split())})" for key, shape in shapes.items())
    if state.keys() != shapes.keys():
        missing, unknown = sorted(shapes.keys() - state.keys()), sorted(state.keys() - shapes.keys())
        raise FileFormatError(
            f"expected {expected}; found {_listed(state)}"
            + (f"; missing {', '.join(missing)}" if missing else "")
            + (f"; unknown {', '.join(map(ascii, unknown))}" if unknown else "")
        )
    sizes: dict[str, int] = {}
    for key, shape in shapes.items():
        letters = shape.split()
        found = state[key].shape
        if len(found) != len(letters) or any(sizes.setdefault(k, n) != n for k, n in zip(letters, found, strict=True)):
            raise FileFormatError(f"expected {expected}; found {_listed(state)}; {key} does not fit")
    if 0 in sizes.values() or sizes.get("r", 0) > sizes["n"]:
        raise FileFormatError(f"A has between 1 and n rows, and no size is 0; found {_listed(state)}")
    for key in shapes:
        _check_entries(key, state[key], next(iter(state.values())).dtype)


def _check_entries(key: str, tensor: Tensor, dtype: torch.dtype) -> None:
    if tensor.dtype not in (torch.float32, torch.float64) or tensor.dtype != dtype:
        raise FileFormatError(f"{key} is {tensor.dtype}; all tensors are float32, or all float64, where it can be used")
    # A view may claim far more entries than there are numbers behind it.
    if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
        raise FileFormatError(f"{key} {tuple(tensor.shape)} is a view that repeats its numbers")
    if bad := int((~torch.isfinite(tensor)).sum()):
        raise FileFormatError(f"{key} holds {bad} NaN or infinite entries of {tensor.numel()}")


def _listed(state: State) -> str:
    shown = [f"{ascii(key)[1:-1]} ({', '.join(map(str, value.shape))})" for key, value in state.items()]
    return ", ".join(shown[:20]) + (f" and {len(shown) - 20} more" if len(shown) > 20 else "") or "nothing"


def _read_state(path: str | os.PathLike[str]) -> State:
    """The tensors of a checkpoint by key, without wrappers and the prefixes of wrappers."""
    # The 8 bytes before a safetensors header are its length; a checkpoint has other ones.
    if first_bytes(path)[8:9] == b"{":
        with open_tensors(path) as file:
            reader = TensorReader(file)
            state: Any = {key: reader.take(key, None) for key in file.keys()}  # noqa: SIM118 - not a mapping
    else:
        state = _unpickled(path)
        for wrapper in _WRAPPERS:
            if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
                state = state[wrapper]
    if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
        raise FileFormatError("it holds no state dict; save model.state_dict(), not the model")
    if others := sorted(ascii(key) for key, value in state.items() if not _plain(value)):
        raise FileFormatError(f"not only plain tensors are in its state dict, but also {', '.join(others[:20])}")
    for prefix in _PREFIXES:
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return {key: value.detach() for key, value in state.items()}


def _plain(value: Any) -> bool:
    """Whether ``value`` is a tensor with its entries in memory, one after the other."""
    return isinstance(value, Tensor) and not value.is_nested and value.layout is torch.strided and not value.is_meta


def _unpickled(path: str | os.PathLike[str]) -> Any:
    try:
        with open(path, "rb") as file:  # given the name, torch would go by its suffix
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files make torch raise a dozen unrelated types
        reason = " ".join(str(error).split())[:100]
        raise FileFormatError(
            "it is neither a safetensors file nor a checkpoint of tensors alone, or it is damaged; save it again with "
            f"torch.save(model.state_dict(), ...) ({type(error).__name__}: {reason})"
        ) from error
