"""Equipoise: equilibrium networks that keep their guarantee at any bit-width.

One public path per name; whatever is not listed here is private.
"""

from importlib.metadata import version as _version

from . import runtime
from .activations import ELU, Activation, Hardtanh, LeakyReLU, ReLU, Sigmoid, Softplus, SoftThreshold, Tanh
from .certificates import (
    Box,
    Certificate,
    IterateFloor,
    certified_classes,
    certified_radius,
    certify,
    input_lipschitz,
    interval,
    iterate_floor,
    lipschitz,
    margin,
)
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
from .layers import NEMON, MonDEQ, NEMONConv2d
from .penalties import MarginPenalty
from .qat import convert, prepare_qat
from .quantization import Assembled, Cayley, Compensated, Scheme, Structured
from .quantize import quantize, size
from .robust import PixelBall, Robustness, pgd, robustness
from .robust_loss import RobustLoss, lipschitz_loss
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
    "NEMON",
    "Activation",
    "Anderson",
    "Assembled",
    "Box",
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
    "NEMONConv2d",
    "NotWellPosedError",
    "OptionError",
    "OutputError",
    "PeacemanRachford",
    "Picard",
    "PixelBall",
    "ReLU",
    "RobustLoss",
    "Robustness",
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
    "certified_classes",
    "certified_radius",
    "certify",
    "convert",
    "export",
    "import_model",
    "input_lipschitz",
    "interval",
    "iterate_floor",
    "lipschitz",
    "lipschitz_loss",
    "load",
    "margin",
    "pgd",
    "prepare_qat",
    "quantize",
    "robustness",
    "runtime",
    "save",
    "size",
]
