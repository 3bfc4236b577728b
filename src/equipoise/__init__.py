"""Equipoise: equilibrium networks that keep their guarantee at any bit-width.

One public path per name; whatever is not listed here is private.
"""

from importlib.metadata import version as _version

from . import runtime
from .activations import ELU, Activation, Hardtanh, LeakyReLU, ReLU, Sigmoid, Softplus, SoftThreshold, Tanh
from .certificates import Certificate, IterateFloor, certify, input_lipschitz, iterate_floor, lipschitz, margin
from .errors import (
    ConvergenceError,
    ConvergenceWarning,
    DataNotFoundError,
    EquipoiseError,
    FileFormatError,
    InputError,
    MissingExtraError,
    NotWellPosedError,
    OptionError,
    OutputError,
    StructureError,
)
from .export import export
from .files import load, save
from .importers import import_model
from .layers import MonDEQ
from .penalties import MarginPenalty
from .qat import convert, prepare_qat
from .quantization import Assembled, Cayley, Compensated, Scheme, Structured
from .quantize import quantize, size
from .solvers import (
    Anderson,
    Broyden,
    DouglasRachford,
    ForwardBackward,
    PeacemanRachford,
    Picard,
    Rounded,
    Solution,
    Solver,
    Tseng,
)

__version__ = _version("equipoise")

__all__ = [
    "ELU",
    "Activation",
    "Anderson",
    "Assembled",
    "Broyden",
    "Cayley",
    "Certificate",
    "Compensated",
    "ConvergenceError",
    "ConvergenceWarning",
    "DataNotFoundError",
    "DouglasRachford",
    "EquipoiseError",
    "FileFormatError",
    "ForwardBackward",
    "Hardtanh",
    "InputError",
    "IterateFloor",
    "LeakyReLU",
    "MarginPenalty",
    "MissingExtraError",
    "MonDEQ",
    "NotWellPosedError",
    "OptionError",
    "OutputError",
    "PeacemanRachford",
    "Picard",
    "ReLU",
    "Rounded",
    "Scheme",
    "Sigmoid",
    "SoftThreshold",
    "Softplus",
    "Solution",
    "Solver",
    "StructureError",
    "Structured",
    "Tanh",
    "Tseng",
    "certify",
    "convert",
    "export",
    "import_model",
    "input_lipschitz",
    "iterate_floor",
    "lipschitz",
    "load",
    "margin",
    "prepare_qat",
    "quantize",
    "runtime",
    "save",
    "size",
]
