"""What the paper and its released code print [LLC26], each with where it stands."""

from __future__ import annotations

__all__ = [
    "ACCURACY",
    "CHECK",
    "CITATION",
    "DELTA",
    "HEAD_ERROR",
    "LIPSCHITZ",
    "MARGIN",
    "NETWORK",
    "QAT",
    "RELATIVE_CONDITION",
    "ROUNDED",
    "RULE_STEPS",
    "TILDE_MARGIN",
    "TITLE",
]

TITLE = "Quantization robustness of monotone operator equilibrium networks"
CITATION = (
    "J. Li, P. H. W. Leong, T. Chaffey, Quantization Robustness of Monotone Operator Equilibrium Networks,"
    " arXiv:2603.10562, 2026; code: github.com/JLi-Projects/mondeq-quant."
)

ACCURACY, MARGIN, LIPSCHITZ, RELATIVE_CONDITION = 0.9822, 0.2269, 1.845, 7.56
"""Of the float network: the paper's section V, and κ_rel of section IV."""

NETWORK = "n = 100, rank of A 25, Adam at 1e−3 for 15 epochs, divided by 10 after the tenth, seed 42"

DELTA = {4: 0.604, 6: 0.137, 8: 0.035}
"""‖ΔW‖₂ by bits: the code's README."""

TILDE_MARGIN = {4: -0.142, 5: 0.045, 6: 0.138, 8: 0.207}
"""m̃ by bits: the README, and the released experiment_results.json."""

RULE_STEPS = {8: 458}
"""Steps of the published rule; of 5 bits the paper says that they come near the cap of 2,000."""

CHECK: dict[int, dict[str, float]] = {
    6: {"share": 0.99140625, "moved": 4.682, "bound": 23.26},
    8: {"share": 0.933984375, "moved": 1.718, "bound": 5.896},
    12: {"share": 0.91484375, "moved": 0.1301, "bound": 0.3588},
    16: {"share": 0.912890625, "moved": 0.00788, "bound": 0.02182},
}
"""The displacement check on 2,560 samples, by bits: experiment_results.json."""

HEAD_ERROR = {8: 0.0667, 12: 0.00492, 16: 0.000179}
"""Mean error norm of the gradients, by bits: experiment_results.json."""

ROUNDED: dict[int, dict[str, float | None]] = {
    8: {"accuracy": 0.9829, "margin": 0.208, "ratio": 0.153},
    6: {"accuracy": 0.9825, "margin": 0.138, "ratio": 0.606},
    4: {"accuracy": None, "margin": -0.142, "ratio": 2.661},
}
"""W, U and b rounded after training, by bits: the data of the paper's third figure. ``margin`` is m̃."""

QAT: dict[int, dict[str, float | None]] = {
    8: {"accuracy": 0.9816, "margin": 0.098, "ratio": 0.2, "float_margin": 0.1229},
    6: {"accuracy": 0.9793, "margin": 0.022, "ratio": 0.8, "float_margin": 0.1266},
    4: {"accuracy": 0.9678, "margin": 0.006, "ratio": 1.0, "float_margin": 0.1844},
}
"""Trained through the quantizer, likewise; ``float_margin`` is the learned m."""
