"""Robustness in pixel units: certified and attacked (theory §7).

ε is a distance in pixels scaled to [0, 1]: with x = (pixel − mean)/std a network sees perturbations of at most ε/std.
"""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .certificates import certified_classes
from .data import Preprocessing, Split
from .errors import ConvergenceWarning, InputError, OptionError, StructureError
from .layers.chain import EQUILIBRIUM, final_head
from .layers.linear import affine

__all__ = [
    "PixelBall",
    "Robustness",
    "check_eps",
    "pgd",
    "robustness",
]

ROUNDING = 2.0**-20
"""Of float32 preprocessing, times (1 + |mean|)/std. With u = 2⁻²⁴ a pixel of [0, 1] is scaled to within 5u (its own
rounding, the scale's, a product with its inverse), loses 2u (1 + |mean|) to the rounded mean and the difference, and
3u (1 + |mean|) to the division by a rounded std: below 16u in all, second orders included."""


@final
@dataclass(frozen=True)
class PixelBall:
    """All images within ``eps`` of one, pixel by pixel, that are images: pixels stay in [0, 1].

    Args:
        eps: in pixels scaled to [0, 1]; 0 or more.
        preprocessing: what was done to the pixels that a network is fed.

    Raises:
        OptionError: ``eps`` negative, not finite, or above 1.
    """

    eps: float
    preprocessing: Preprocessing

    def __post_init__(self) -> None:
        check_eps(self.eps)

    def box(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(low, high) ``(B, d)`` in float64 for preprocessed ``x (B, d)``: what certificates need.

        Contains whatever the float32 preprocessing makes of an image within ``eps`` of any image of which it made x,
        and the exact ball: the rounding of both is counted. With ``eps`` 0 that is x itself.

        Raises:
            InputError: x of another size, or with entries that are no pixels in [0, 1] after this preprocessing.
        """
        return self._around(x, 2.0 if self.eps else 0.0)

    def inner(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(low, high) ``(B, d)`` in float64 of the exact ball: what attacks may use. Raises as :meth:`box`."""
        return self._around(x, 0.0)

    def _around(self, x: Tensor, roundings: float) -> tuple[Tensor, Tensor]:
        black, white, slack, std = self._ends(x)
        x = x.detach().to("cpu", torch.float64)
        if bad := int(((x < black - slack) | (x > white + slack)).sum()):
            raise InputError(
                f"{bad} of {x.numel()} entries are outside [{float(black.min()):.4g}, {float(white.max()):.4g}], where "
                f"pixels lie after {self.preprocessing}: give inputs preprocessed that way, and eps in pixels of [0, 1]"
            )
        outward = roundings * slack  # of the given pixels and of the perturbed ones
        reach = self.eps / std * (1 + 1e-12) + outward if roundings else self.eps / std
        low, high = (x - reach).maximum(black - outward), (x + reach).minimum(white + outward)
        return low.minimum(x), high.maximum(x)

    def _ends(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Black, white, the rounding of preprocessing and std ``(d,)``, in what the network is fed."""
        p = self.preprocessing
        if x.ndim != 2 or x.shape[1] != p.features:
            raise InputError(f"x is {tuple(x.shape)}; (batch, {p.features}) is what {p} makes")
        channels = p.input_shape[0]
        mean, std = (
            torch.as_tensor(value, dtype=torch.float64).expand(channels).repeat_interleave(p.features // channels)
            for value in (p.mean, p.std)
        )
        return -mean / std, (1 - mean) / std, ROUNDING * (1 + mean.abs()) / std, std


def check_eps(eps: float) -> float:
    """``eps`` as a float; raises :class:`OptionError` unless 0 <= eps <= 1."""
    number = isinstance(eps, (int, float)) and not isinstance(eps, bool)
    if not number or not 0 <= eps <= 1:
        raise OptionError(f"eps is {eps!r}; it is a distance in pixels scaled to [0, 1], such as 0.1")
    return float(eps)


@final
@dataclass(frozen=True, eq=False)
class Robustness:
    """What holds of ``count`` samples under perturbations of at most ``eps`` per pixel.

    ``certified_accuracy``: share of samples proved to keep their right class over the whole ball. ``clean_accuracy``:
    share classified rightly. ``pgd_accuracy``: share that the attack leaves right. The true robust accuracy lies
    between the first and the last. ``robust_agreement``: with a reference, the share of samples at every point of whose
    ball the model provably gives the reference's class. ``certified``, ``agreeing``: per sample ``(B,)``.
    """

    eps: float
    count: int
    certified_accuracy: float
    clean_accuracy: float
    pgd_accuracy: float | None
    robust_agreement: float | None
    certified: Tensor
    agreeing: Tensor | None = None

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain values, without the samples."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if not isinstance(value, Tensor) and name != "agreeing"}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), allow_nan=False)

    def summary(self) -> list[tuple[str, str]]:
        """Rows (what, value) in reading order, without what does not apply."""
        shares = (
            (f"class proved right within {self.eps:g} per pixel", self.certified_accuracy),
            ("right under attack there, at most", self.pgd_accuracy),
            ("right without perturbation", self.clean_accuracy),
            ("class proved the reference's on the whole ball", self.robust_agreement),
        )
        return [(name, f"{100 * value:.2f} % of inputs") for name, value in shares if value is not None]


def robustness(
    model: nn.Module,
    split: Split,
    preprocessing: Preprocessing,
    eps: float,
    reference: nn.Module | None = None,
    attack_steps: int = 20,
) -> Robustness:
    """Certify and attack ``model`` on ``split`` within ``eps`` per pixel (of [0, 1]); theory §7.

    Args:
        model: ends in one linear head; float or quantized.
        preprocessing: of ``split``'s inputs.
        reference: a float model, to prove the same class over each ball: of both, perturbation and quantization.
        attack_steps: of projected gradient ascent; 0 attacks none.

    Raises:
        OptionError: eps outside [0, 1].
        InputError: an empty split; inputs that are no preprocessed pixels; labels that are no classes of the model.
        NotWellPosedError, StructureError: as :func:`equipoise.certified_classes`.
    """
    ball = PixelBall(eps, preprocessing)
    if not len(split):
        raise InputError("an empty split has no robustness: give at least one sample")
    x, y = split.x, split.y.cpu()
    low, high = ball.box(x)
    _check_classes(model, y, reference)
    proved = certified_classes(model, low, high)
    certified = proved == y
    agreeing = None
    if reference is not None:
        agreeing = (proved >= 0) & (proved == certified_classes(reference, low, high))
    clean = _classes(model, x) == y
    attacked = None
    if attack_steps:
        moved = pgd(model, x, split.y, ball, attack_steps)
        attacked = clean & (_classes(model, moved) == y)
    return Robustness(
        float(eps),
        len(y),
        float(certified.double().mean()),
        float(clean.double().mean()),
        None if attacked is None else float(attacked.double().mean()),
        None if agreeing is None else float(agreeing.double().mean()),
        certified,
        agreeing,
    )


def _check_classes(model: nn.Module, y: Tensor, reference: nn.Module | None) -> None:
    counts = []
    for network in (model,) if reference is None else (model, reference):
        name = final_head(network)
        if name is None:
            raise StructureError("classes are proved of a model that ends in one linear module; this one does not")
        counts.append(int(affine(network.get_submodule(name))[0].shape[0]))
    if len(set(counts)) > 1:
        raise StructureError(f"the model has {counts[0]} classes, the reference {counts[1]}: not the same task")
    if bad := int(((y < 0) | (y >= counts[0])).sum()):
        raise InputError(f"{bad} of {len(y)} labels are no classes of the model, 0 to {counts[0] - 1}")


@torch.no_grad()
def _classes(model: nn.Module, x: Tensor) -> Tensor:
    was_training = model.training
    model.eval()
    try:
        return torch.cat([model(part).argmax(1) for part in _like(model, x).split(4096)]).cpu()
    finally:
        model.train(was_training)


def _like(model: nn.Module, x: Tensor) -> Tensor:
    """``x`` on the device and in the precision of the model."""
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    layers = [module for module in model.modules() if isinstance(module, EQUILIBRIUM)]
    return x.to(layers[0].bias) if layers else x.to(tensors[0]) if tensors else x


def pgd(model: nn.Module, x: Tensor, y: Tensor, ball: PixelBall, steps: int = 20, seed: int = 0) -> Tensor:
    """Projected gradient ascent on the cross-entropy: points ``(B, d)`` of the ball of each ``x (B, d)``.

    Starts at random in the ball; steps of 2.5 ε/steps by the gradient's sign; of every sample the point with the
    smallest lead of its class ``y (B,)`` is kept. What it finds bounds robust accuracy from above. A gradient that did
    not settle is an ascent direction as good as any: nothing is warned of.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise OptionError(f"steps is {steps!r}; it is a positive integer")
    was_training = model.training
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    parts = zip(x.split(2048), y.split(2048), strict=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            return torch.cat([_ascend(model, a, b, ball, steps, generator) for a, b in parts])
    finally:
        model.train(was_training)


def _ascend(model: nn.Module, x: Tensor, y: Tensor, ball: PixelBall, steps: int, generator: torch.Generator) -> Tensor:
    low, high = ball.inner(x)
    like = _like(model, x[:0])
    # inside the ball also where it is rounded to the model's dtype
    lo, hi = torch.nextafter(low.to(like), high.to(like)), torch.nextafter(high.to(like), low.to(like))
    x, y = x.to(like), y.to(like.device)
    lo, hi = torch.minimum(lo, x), torch.maximum(hi, x)
    rate = (hi - lo).amax(0) * (1.25 / steps)
    best, best_lead = x.clone(), _lead(model, x, y)
    point = lo + (hi - lo) * torch.rand(x.shape, generator=generator).to(like)
    for _ in range(steps):
        point = point.detach().requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(cross_entropy(model(point), y, reduction="sum"), point)
        point = (point.detach() + rate * gradient.sign()).maximum(lo).minimum(hi)
        lead = _lead(model, point, y)
        better = lead < best_lead
        best, best_lead = torch.where(better[:, None], point, best), torch.where(better, lead, best_lead)
    return best


@torch.no_grad()
def _lead(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """By how much the score of class ``y`` leads."""
    scores = model(x)
    own = scores.gather(1, y[:, None])[:, 0]
    return own - scores.scatter(1, y[:, None], -math.inf).amax(1)
