"""The monotone operator equilibrium layer (theory §1–3)."""

from __future__ import annotations

from typing import Any, final

from torch import Tensor, nn

from ..activations import Activation, ReLU
from ..errors import NotWellPosedError
from ..operators import DenseOperator
from ..operators.dense import in_proving_norm
from ..parametrizations import Dense, Monotone
from ..solvers import PeacemanRachford, Solver
from .arguments import check_affine, check_sizes, check_square, check_tensors, refuse
from .equilibrium import EquilibriumLayer
from .solving import Options

__all__ = ["MonDEQ"]


@final
class MonDEQ(EquilibriumLayer):
    """x ``(B, d)`` ↦ z* ``(B, n)``, the one solution of z = σ(W z + U x + b) [WK20].

    W = (1 − m) I − AᵀA + B − Bᵀ has margin m > 0, so z* exists, is unique, and the solver reaches it.

    Args:
        in_features, features: d and n.
        rank: rows of A, at most n (default n); with fewer the margin is exactly m.
        margin: m, or its initial value if learned; any number above 0.
        learn_margin: train m as softplus(raw) + 1e-4.
        activation: a proximal map, or its name.
        solver: default Peaceman–Rachford with the best step.
        tol: relative tolerance of ``forward``; default 1e-5 in float32, 1e-12 in float64.
        backward_tol: the same for gradients; default that of ``forward``.
        training_tol: of ``forward`` in training mode; default ``tol``. 1e-2 gives gradients right to about as much.
        strict: raise :class:`ConvergenceError` where a solve fails, instead of warning.

    Of a quantized layer ``scheme`` is the scheme it was quantized by, else None.

    State: ``recurrent.A``, ``recurrent.B``, ``recurrent.margin`` or ``recurrent.raw_margin`` (``recurrent.weight``
    of a layer made by :meth:`from_weights`), ``injection.weight`` (U), ``injection.bias`` (b).

    Raises:
        OptionError: rank outside 0..n, margin not positive, unknown activation or solver.
    """

    def __init__(
        self,
        in_features: int,
        features: int,
        rank: int | None = None,
        margin: float = 0.2,
        learn_margin: bool = False,
        activation: Activation | str = ReLU(),
        solver: Solver = PeacemanRachford(),
        tol: float | None = None,
        backward_tol: float | None = None,
        training_tol: float | None = None,
        strict: bool = False,
    ) -> None:
        check_sizes(in_features=in_features, features=features)
        weights = Monotone(features, rank, margin, learn_margin)
        options = Options(activation, solver, tol, backward_tol, training_tol, strict)
        super().__init__(in_features, weights, features, options)

    @classmethod
    def from_factors(cls, A: Tensor, B: Tensor, margin: float, U: Tensor, b: Tensor, **options: Any) -> MonDEQ:
        """The layer with W = (1 − m) I − AᵀA + B − Bᵀ from its factors, trainable, in their dtype.

        ``A (r, n)``, ``B (n, n)``, ``U (n, d)``, ``b (n,)``; ``options`` as in the constructor.
        """
        refuse(options, "from_factors", "rank", "its number of rows is A's")
        check_tensors(A=A, B=B, U=U, b=b)
        learn_margin = options.pop("learn_margin", False)
        return cls._assemble(Monotone.from_factors(A, B, margin, learn_margin), U, b, options)

    @classmethod
    def from_weights(cls, W: Tensor, U: Tensor, b: Tensor, check: bool = True, **options: Any) -> MonDEQ:
        """The layer with W ``(n, n)`` as it is: no structure, so training may lose its margin.

        Without ``check``, where no Euclidean margin is proved and some maximum norm proves W well posed, everything the
        layer says is in that norm: ``layer.operator.family``, its solutions' bounds, its certificate (theory §7).

        Raises:
            NotWellPosedError: no positive margin is proved (the error carries the one found);
                ``check=False`` skips that.
            InputError: shapes that do not fit, NaN or infinite entries.
        """
        for option in ("rank", "margin", "learn_margin"):
            refuse(options, "from_weights", option, "W is taken as it is")
        check_tensors(W=W, U=U, b=b)
        check_square(W)
        if check:
            operator = in_proving_norm(DenseOperator(W.detach()))
            margin, measured = operator.euclidean_margin(), operator.margin()
            if margin <= 0:
                remedy = "Scale W down, use from_factors, or pass check=False to go without the guarantee"
                if measured > 0:
                    remedy = f"A maximum norm proves 1 − μ(W) >= {measured:.6g}: use NEMON.from_weights, or check=False"
                raise NotWellPosedError(
                    f"W has the margin {margin:.6g}; λ_min(sym(I − W)) > 0 is needed for a monotone layer. {remedy}",
                    margin,
                )
        return cls._assemble(Dense(W), U, b, options)

    @classmethod
    def _assemble(cls, recurrent: nn.Module, U: Tensor, b: Tensor, options: dict[str, Any]) -> MonDEQ:
        W = recurrent()
        check_affine(W, U, b)
        return cls(U.shape[1], len(W), rank=0, **options)._assembled(recurrent, W, U, b)
