"""Schemes: defaults, refusals, and their way through files."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from equipoise.errors import OptionError
from equipoise.operators import scheme_from_dict, schemes
from equipoise.quantization import (
    Assembled,
    Cayley,
    Compensated,
    Scheme,
    Structured,
    scheme_to_dict,
)


def test_scheme_defaults() -> None:
    shown = {name: (kind(4).granularity, kind(4).scale) for name, kind in schemes().items()}
    assert shown == {
        "assembled": ("tensor", "max"),
        "structured": ("tensor", "mse"),
        "compensated": ("tensor", "mse"),
        "cayley": ("row", "mse"),
    }
    assert all(kind(4).name == name for name, kind in schemes().items())
    assert Compensated(bits=3).margin == 0.05
    assert Compensated(3).diagonal_bits == 16
    assert Cayley(8).alpha is None
    assert (Assembled(4).input_bits, Assembled(4).bias_bits, Assembled(4).head_bits) == (None, None, None)


def test_schemes_are_frozen_values() -> None:
    assert Structured(2) == Structured(bits=2)
    assert Structured(2) != Assembled(2)
    assert len({Cayley(8), Cayley(8), Cayley(8, alpha=0.5)}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        Structured(2).bits = 3  # type: ignore[misc]
    assert dataclasses.replace(Structured(2), bits=3, input_bits=8) == Structured(3, input_bits=8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_bits": 40}, "input_bits is 40; it is an integer from 1 to 16, or 32"),
        ({"bias_bits": True}, "bias_bits is True"),
        ({"head_bits": 0}, "head_bits is 0"),
        ({"granularity": "group"}, "granularity is 'group'"),
        ({"scale": None}, "scale is None"),
    ],
)
@pytest.mark.parametrize("kind", schemes().values())
def test_scheme_options_out_of_range(kind: type[Scheme], options: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        kind(4, **options)


@pytest.mark.parametrize("bad", [0, -1.0, math.nan, math.inf, True, "0.1"])
def test_margins_and_alphas_are_positive(bad: object) -> None:
    with pytest.raises(OptionError, match=r"margin is .*; it is a finite number above 0"):
        Compensated(3, margin=bad)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=r"alpha is .*; it is a finite number above 0"):
        Cayley(3, alpha=bad)  # type: ignore[arg-type]


def test_scheme_misuse() -> None:
    with pytest.raises(TypeError, match="abstract"):
        Scheme(4)
    with pytest.raises(TypeError, match="unexpected keyword"):
        Assembled(4, rounding="up")  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="positional"):
        Assembled(4, "row")  # type: ignore[misc]
    with pytest.raises(OptionError, match="diagonal_bits is 1; it is an integer from 2 to 16, or 32"):
        Compensated(3, diagonal_bits=1)


@pytest.mark.parametrize(
    "scheme",
    [
        Assembled(4, granularity="row"),
        Structured(1, input_bits=8, bias_bits=16, head_bits=32),
        Compensated(2, margin=1, diagonal_bits=8),
        Cayley(5, alpha=0.8),
    ],
)
def test_schemes_travel_through_files(scheme: Scheme) -> None:
    values = json.loads(json.dumps(scheme_to_dict(scheme)))
    assert values["scheme"] == scheme.name
    assert scheme_from_dict(values) == scheme


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"scheme": "rounded", "bits": 4}, "scheme is 'rounded'; it is one of assembled, "),
        ({"scheme": ["assembled"], "bits": 4}, "; it is one of assembled"),
        ({"bits": 4}, "scheme is None"),
        ({"scheme": "cayley"}, "cayley needs bits"),
        ({"scheme": "cayley", "bits": 4, "margin": 0.1}, "cayley has no option 'margin'"),
        ({"scheme": "cayley", "bits": 4.0}, "bits is 4.0"),
    ],
)
def test_scheme_dictionaries_are_checked(values: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        scheme_from_dict(values)
