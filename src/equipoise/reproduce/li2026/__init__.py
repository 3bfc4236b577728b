"""Li, Leong, Chaffey: Quantization robustness of monotone operator equilibrium networks [LLC26]."""

from .paper import PAPER

__all__ = ["PAPER"]
