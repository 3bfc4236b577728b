"""The non-Euclidean monotone operator layer: well posed by an ℓ∞ condition (theory §7, [JDPB21])."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor, nn

from ..activations import Activation, ReLU, as_activation
from ..errors import InputError, NotWellPosedError
from ..norms import WeightedMax
from ..parametrizations import Contractive, Weighted
from ..parametrizations.nemon import best_weights
from ..solvers import Solver
from .arguments import check_affine, check_sizes, check_square, check_tensors, refuse
from .equilibrium import EquilibriumLayer, solver_in_rows
from .solving import Options

__all__ = ["NEMON"]


@final
class NEMON(EquilibriumLayer):
    """x ``(B, d)`` ↦ z* ``(B, n)``, the one solution of z = σ(W z + U x + b) [JDPB21].

    W = γ I + D⁻¹ T D − diag(|T| 1), D = diag(e^d), has μ_η(W) <= γ < 1 for η = e^{−d}, so z* exists, is unique, and
    the averaged iteration contracts towards it in ‖·‖_η. Bounds of its solutions are in ‖·‖_∞.

    Args:
        in_features, features: d and n.
        gamma: γ, or its initial value if learned; any number below 1.
        learn_gamma: train γ as 1 − softplus(raw) − 1e-3.
        learn_weights: train d; otherwise it stays 0.
        activation: σ with slopes in [0, 1], or its name.
        solver: default Peaceman–Rachford, at the averaged iteration's best step α* with the proved factor
            (1 − αm)/(1 + αm), m = 1 − γ, or at a longer one with a smaller factor ‖C_α‖₂; where prox_{αf} has no
            closed form, the averaged iteration itself, which is :class:`equipoise.Picard`, with 1 − α min(m, 1).
        tol: relative tolerance of ``forward``; default 1e-5 in float32, 1e-12 in float64.
        backward_tol: the same for gradients; default that of ``forward``.
        training_tol: of ``forward`` in training mode; default ``tol``. 1e-2 gives gradients right to about as much.
        strict: raise :class:`ConvergenceError` where a solve fails, instead of warning.

    Of a quantized layer ``scheme`` is the scheme it was quantized by, else None.

    State: ``recurrent.T``, ``recurrent.d``, ``recurrent.gamma`` or ``recurrent.raw_gap`` (``recurrent.weight`` and
    ``recurrent.log_eta`` of a layer made by :meth:`from_weights`), ``injection.weight`` (U), ``injection.bias`` (b).

    Raises:
        OptionError: gamma not below 1, unknown activation or solver.
    """

    def __init__(
        self,
        in_features: int,
        features: int,
        gamma: float = 0.95,
        learn_gamma: bool = False,
        learn_weights: bool = True,
        activation: Activation | str = ReLU(),
        solver: Solver | None = None,
        tol: float | None = None,
        backward_tol: float | None = None,
        training_tol: float | None = None,
        strict: bool = False,
    ) -> None:
        check_sizes(in_features=in_features, features=features)
        weights, activation = Contractive(features, gamma, learn_gamma, learn_weights), as_activation(activation)
        solver = solver_in_rows(activation) if solver is None else solver
        options = Options(activation, solver, tol, backward_tol, training_tol, strict)
        super().__init__(in_features, weights, features, options)

    @classmethod
    def from_factors(cls, T: Tensor, d: Tensor, gamma: float, U: Tensor, b: Tensor, **options: Any) -> NEMON:
        """The layer with W = γ I + e^{−d} T e^d − diag(|T| 1) from its factors, trainable, in their dtype.

        ``T (n, n)``, ``d (n,)``, ``U (n, k)``, ``b (n,)``; ``options`` as in the constructor.
        """
        check_tensors(T=T, d=d, U=U, b=b)
        learned = options.pop("learn_gamma", False), options.pop("learn_weights", True)
        return cls._assemble(Contractive.from_factors(T, d, gamma, *learned), U, b, options)

    @classmethod
    def from_weights(
        cls, W: Tensor, U: Tensor, b: Tensor, eta: Tensor | None = None, check: bool = True, **options: Any
    ) -> NEMON:
        """The layer with W ``(n, n)`` as it is: no structure, so training may lose its measure.

        ``eta (n,)``: the weights of the norm; by default the best ones, from a Perron vector (theory §7).

        Raises:
            NotWellPosedError: no measure below 1 is proved (the error names the spectral abscissa found);
                ``check=False`` skips that.
            InputError: shapes that do not fit, NaN or infinite entries, weights that are not positive.
        """
        for option in ("gamma", "learn_gamma", "learn_weights"):
            refuse(options, "from_weights", option, "W is taken as it is")
        check_tensors(W=W, U=U, b=b, **({} if eta is None else {"eta": eta}))
        check_square(W)
        if eta is None:
            eta = best_weights(W).eta if check else torch.ones(len(W), dtype=torch.float64)
        elif tuple(eta.shape) != (len(W),):
            raise InputError(f"eta is {tuple(eta.shape)}; one weight per feature is needed, ({len(W)},)")
        weights = Weighted(W, eta)
        margin = weights.family().margin(W)
        if check and margin <= 0:
            raise NotWellPosedError(
                f"W has the measure {1 - margin:.6g} in the norm of this eta, and below 1 is needed for a unique "
                "equilibrium; leave eta out for the best one, or pass check=False to go without the guarantee",
                margin,
            )
        return cls._assemble(weights, U, b, options)

    @classmethod
    def _assemble(cls, recurrent: nn.Module, U: Tensor, b: Tensor, options: dict[str, Any]) -> NEMON:
        W = recurrent()
        check_affine(W, U, b)
        return cls(U.shape[1], len(W), **options)._assembled(recurrent, W, U, b)

    @property
    def norm(self) -> WeightedMax:
        """The weighted maximum norm in which the layer contracts; its weights are ``norm.eta (n,)``."""
        family = self.operator.family
        assert isinstance(family, WeightedMax)
        return family
