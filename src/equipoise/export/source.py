"""The C source of an integer program: templates of ``c/`` filled with tables and constants (theory §10)."""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import version
from importlib.resources import files
from itertools import pairwise
from string import Template

import numpy as np

from .affine import Affine
from .build import Shipped
from .factored import FactoredProgram
from .fixedpoint import INT32, Integers
from .grid import Grid
from .packing import array, code_type, packed_rows, piece_bytes
from .program import CayleyProgram, Program

__all__ = ["header", "host", "source", "template"]

INJECTION = "The injection of x, with the preprocessing."
UNCERTIFIED = "UNCERTIFIED: nothing is proved about the answers of this network."


def template(name: str, /, **values: object) -> str:
    """A file of ``c/`` with every ``$name`` filled in."""
    text = (files(__package__) / "c" / f"{name}.in").read_text(encoding="utf-8")
    return Template(text).substitute({key: str(value) for key, value in values.items()})


def header(shipped: Shipped) -> str:
    """``eqnet.h``: types, sizes, functions, and in words what is proved."""
    program, certificate = shipped.program, shipped.certificate
    lines = [] if certificate.certified else [UNCERTIFIED, ""]
    lines += [f"{name}: {value}" for name, value in certificate.summary()]
    lines += [
        "",
        "The errors are 2-norms in real units; they hold for every input of the declared range for which the",
        "function returns EQNET_OK." if certificate.certified else "Errors are unknown.",
        f"Overflow: {certificate.overflow}.",
    ]
    has_head = program.head is not None
    return template(
        "header.h",
        version=version("equipoise"),
        proof="\n".join(f" * {line}".rstrip() for line in lines),
        low=program.low,
        high=program.high,
        meaning=_meaning(shipped.grid),
        score_words=" * Scores   scores[k] stands for scores[k] * EQNET_SCORE_UNIT; the largest one is the class."
        if has_head
        else " *",
        inputs=program.inputs,
        features=program.features,
        classes=0 if program.head is None else program.head.codes.shape[0],
        steps=program.steps,
        certified=int(certificate.certified),
        unit=repr(shipped.unit),
        score_unit=f"#define EQNET_SCORE_UNIT {shipped.score_unit!r}" if has_head else "",
        iterate_words="an iterate left its range; results are zero" if program.checked else "never returned here",
        input_type=shipped.grid.ctype,
        state_type=program.state_type,
        score_function="""
/* The class scores of the inputs x; the same status. */
int eqnet_scores(const eqnet_input x[EQNET_INPUTS], int32_t scores[EQNET_CLASSES]);
"""
        if has_head
        else "",
    )


def source(shipped: Shipped) -> str:
    """``eqnet.c``."""
    program = shipped.program
    certified = "" if shipped.certificate.certified else f"\n *\n * {UNCERTIFIED}"
    assert isinstance(program, (CayleyProgram, FactoredProgram))
    added = isinstance(program, FactoredProgram) and program.additions_only
    parts = [
        template("prelude.c", version=version("equipoise"), certified=certified),
        template("product_added.c" if added else "product_multiplied.c"),
    ]
    parts += _affine(program.injection, "inject", "eqnet_input", INJECTION)
    parts += _cayley(program) if isinstance(program, CayleyProgram) else _factored(program)
    if program.head is not None:
        parts += _affine(program.head, "head", "eqnet_state", "Scores of the equilibrium.")
    check = _range_check(program, shipped.grid.ctype)
    parts.append(template("run.c", range_check=check))
    parts.append(template("public.c"))
    if program.head is not None:
        parts.append(template("scores.c"))
    return "\n".join(parts)


def _meaning(grid: Grid) -> str:
    lines = []
    for g, (step, offset) in enumerate(zip(grid.steps, grid.offsets, strict=True)):
        width = grid.features // grid.channels
        which = f" (j from {g * width} to {(g + 1) * width - 1})" if grid.channels > 1 else ""
        lines.append(f" *          x[j] * {float(step)!r} + {float(offset)!r}{which}")
    return "\n".join(lines)


def dot(name: str, bits: int, ctype: str) -> str:
    """A function that sums codes times numbers of type ``ctype``."""
    if bits in (1, 2, 4):
        return template(f"dot_{bits}.c", name=name, type=ctype)
    if bits < 8:
        half = 1 << (bits - 1)
        return template("dot_packed.c", name=name, type=ctype, bits=bits, mask=2 * half - 1, half=half)
    return template("dot_plain.c", name=name, type=ctype, code=code_type(bits))


TILE = 8
"""Images that the host build works on together."""

VECTOR = 64
"""Bytes of the widest vectors that compilers make use of."""

HEAD_OF_A_TILE = """        if (scores != 0) {
            int32_t *const mine = scores + (int64_t)k * EQNET_CLASSES;
            eqnet_head(own, mine);
            for (i = 0; status[k] != EQNET_OK && i < EQNET_CLASSES; ++i) {
                mine[i] = 0;
            }
        }
"""


def host(shipped: Shipped) -> str:
    """``eqnet_host.c``: the same integers from wider tables, for processors with vector instructions and memory."""
    program, affine = shipped.program, shipped.program.injection
    codes, inputs = _wide(affine.codes), whole(program.inputs)
    affine = replace(affine, codes=codes, bits=max(8, affine.bits), bounds=(*affine.bounds[:-1], inputs))
    terms, stride = _terms(affine, "eqnet_host_dot_inject", "x[k]", "inject")
    solve = "        for (k = 0; k < count; ++k) {\n            status[k] = eqnet_solve(p[k], all[k]);\n        }\n"
    wide: list[str] = []
    if isinstance(program, CayleyProgram):
        wide = _wide_cayley(program)
        solve = "        eqnet_host_solve(p, count, all, status);\n"
    parts = [
        template("host_prelude.c", version=version("equipoise")),
        array(code_type(affine.bits), "eqnet_host_codes", codes.flatten().tolist()),
        dot("eqnet_host_dot_inject", affine.bits, "eqnet_input"),
        *wide,
        template(
            "host.c",
            tile=TILE,
            code=code_type(affine.bits),
            terms="\n".join(f"    {line}" for line in terms),
            stride=stride,
            shift=affine.shift,
            solve=solve,
            width=whole(program.features),
            inputs=inputs,
            range_check=_range_check(program, shipped.grid.ctype, own_index=True),
            scores=HEAD_OF_A_TILE if program.head is not None else "        (void)scores;\n",
        ),
    ]
    return "\n".join(parts)


def whole(count: int) -> int:
    """``count`` elements filled up to whole vectors: what is left over would be done one by one."""
    return -(-count // VECTOR) * VECTOR


def _wide(codes: Integers) -> Integers:
    """Rows filled up with zeros."""
    return np.pad(codes, ((0, 0), (0, whole(codes.shape[1]) - codes.shape[1])))


def _terms(affine: Affine, product: str, x: str, tables: str) -> tuple[list[str], int]:
    """(the lines that add each piece of a row to t, elements of a row)."""
    pieces = list(pairwise(affine.bounds))
    at, lines = 0, []
    for g, (start, stop) in enumerate(pieces):
        which = f"i * {len(pieces)} + {g}" if len(pieces) > 1 else "i"
        piece = f"{product}({_plus('row', at)}, {_plus(x, start)}, {stop - start})"
        lines.append(f"        t += eqnet_product({piece}, eqnet_{tables}_multipliers[{which}]);")
        at += piece_bytes(stop - start, affine.bits)
    return lines, at


def _wide_cayley(program: CayleyProgram) -> list[str]:
    """The solver on rows of plain bytes."""
    return [
        array("int8_t", "eqnet_host_C", _wide(program.C.codes).flatten().tolist()),
        dot("eqnet_host_dot_start", 8, "int32_t"),
        dot("eqnet_host_dot_step", 8, "eqnet_state"),
        template("cayley_tile.c", tile=TILE, width=whole(program.features), **_start(program)),
    ]


def _start(program: CayleyProgram) -> dict[str, object]:
    """The constants that both solvers share."""
    lift = f"INT64_C({1 << (program.shift - program.fraction)})"
    return {"start_own": program.start_own, "start_shift": program.start_shift, "lift": lift}


def _affine(affine: Affine, name: str, ctype: str, words: str) -> list[str]:
    """Tables, dot product and function of an integer affine map."""
    terms, stride = _terms(affine, f"eqnet_dot_{name}", "x", name)
    return [
        array(code_type(affine.bits), f"eqnet_{name}_codes", packed_rows(affine.codes, affine.bits, affine.bounds)),
        array("int32_t", f"eqnet_{name}_multipliers", affine.multipliers.flatten().tolist()),
        array("int64_t", f"eqnet_{name}_offsets", affine.offsets.tolist()),
        dot(f"eqnet_dot_{name}", affine.bits, ctype),
        template(
            "affine.c", words=words, name=name, type=ctype, rows=len(affine.offsets), code=code_type(affine.bits),
            stride=stride, terms="\n".join(terms), shift=affine.shift,
        ),
    ]  # fmt: skip


def _plus(pointer: str, offset: int) -> str:
    return f"{pointer} + {offset}" if offset else pointer


def _cayley(program: CayleyProgram) -> list[str]:
    n, bits = program.features, program.C.bits
    stride = piece_bytes(n, bits)
    assert int(program.multipliers.max(initial=0)) <= INT32
    return [
        f"#define EQNET_LIMIT {program.limit}u  /* the largest iterate */\n",
        array(code_type(bits), "eqnet_C", packed_rows(program.C.codes, bits, (0, n))),
        array("int32_t", "eqnet_scales", program.multipliers.tolist()),
        array("int32_t", "eqnet_start", program.start_cross.tolist()),
        dot("eqnet_dot_start", bits, "int32_t"),
        dot("eqnet_dot_step", bits, "eqnet_state"),
        template("size.c", half=f"UINT64_C({1 << (program.shift - 1)})", shift=program.shift),
        _cayley_solver(program, stride),
    ]


def _cayley_solver(program: CayleyProgram, stride: int) -> str:
    """The iteration; without looks at the range where that is proved."""
    checked = program.checked
    return template(
        "cayley.c",
        steps=program.steps,
        stride=stride,
        over="    uint64_t over = 0;\n" if checked else "",
        check="        over |= size;\n" if checked else "",
        step_check="            over |= size;\n" if checked else "",
        kept="(size & EQNET_LIMIT)" if checked else "size",
        status="over > EQNET_LIMIT ? EQNET_ITERATE_RANGE : EQNET_OK" if checked else "EQNET_OK",
        **_start(program),
    )


def _loop(bits: int, table: str, added: tuple[str, str], general: str) -> str:
    """A loop over ``count`` codes: what to do for a code of +1, of −1, and for any ``code``."""
    head = "    for (j = 0; j < count; ++j) {"
    if bits >= 8:
        return f"{head}\n        const int32_t code = (int32_t){table}[j];\n        {general}\n    }}"
    at = {1: f"((uint32_t){table}[j >> 3] >> (j & 7)) & 1u", 2: f"((uint32_t){table}[j >> 2] >> (2 * (j & 3))) & 3u"}
    if bits in at:
        tests = ("bit == 1u", None) if bits == 1 else ("bit == 1u", "bit == 3u")
        other = "else" if tests[1] is None else f"else if ({tests[1]})"
        return (
            f"{head}\n        const uint32_t bit = {at[bits]};\n        if ({tests[0]}) {{\n            {added[0]}\n"
            f"        }} {other} {{\n            {added[1]}\n        }}\n    }}"
        )
    half = 1 << (bits - 1)
    return (
        f"    uint32_t buffer = 0;\n    uint32_t have = 0;\n{head}\n        int32_t code;\n"
        f"        if (have < {bits}u) {{\n            buffer |= (uint32_t)*{table} << have;\n            ++{table};\n"
        f"            have += 8u;\n        }}\n"
        f"        code = (int32_t)((buffer & {2 * half - 1}u) ^ {half}u) - {half};\n        {general}\n"
        f"        buffer >>= {bits}u;\n        have -= {bits}u;\n    }}"
    )


def _factored(program: FactoredProgram) -> list[str]:
    n, bits = program.features, program.A.bits
    codes = packed_rows(program.A.codes, bits, (0, n))
    upper = [
        v for i in range(n - 1) for v in packed_rows(program.K[i : i + 1, i + 1 :], program.K_bits, (0, n - 1 - i))
    ]
    packed = {1: "(count + 7) >> 3", 2: "(count + count + 7) >> 3"}
    advance = "count" if program.K_bits >= 8 else packed.get(program.K_bits, f"(count * {program.K_bits} + 7) >> 3")
    skew = _loop(
        program.K_bits,
        "w",
        ("sum += (int32_t)z[j]; k[j] -= mine;", "sum -= (int32_t)z[j]; k[j] += mine;"),
        "sum += code * (int32_t)z[j]; k[j] -= code * mine;",
    )
    pull = _loop(bits, "codes", ("w[j] += y;", "w[j] -= y;"), "w[j] += code * y;")
    return [
        f"#define EQNET_LIMIT {program.limit}u  /* the largest iterate */\n",
        array(code_type(bits), "eqnet_A", codes),
        array(code_type(program.K_bits), "eqnet_K", upper),
        array("int32_t", "eqnet_pull", program.pull.tolist()),
        template("product.c"),
        dot("eqnet_dot_pull", bits, "eqnet_state"),
        template("axpy.c", code=code_type(bits), loop=pull),
        template("skew.c", code=code_type(program.K_bits), loop=skew),
        template(
            "factored.c",
            k_code=code_type(program.K_bits),
            a_code=code_type(bits),
            rank=len(program.A.codes),
            stride=piece_bytes(n, bits),
            advance=advance,
            pull_shift=program.pull_shift,
            own=program.own,
            skew=program.skew,
            p_lift=program.shift - program.fraction,
            w_lift=program.shift - program.pull_fraction,
            half=f"UINT64_C({1 << (program.shift - 1)})",
            shift=program.shift,
            steps=program.steps,
        ),
    ]


def _range_check(program: Program, ctype: str, own_index: bool = False) -> str:
    """Comparisons that can fail; others would be reported by compilers as always false."""
    low, high = {"uint8_t": (0, 255), "int16_t": (-(2**15), 2**15 - 1)}[ctype]
    tests = [f"x[i] < {program.low}"] if program.low > low else []
    tests += [f"x[i] > {program.high}"] if program.high < high else []
    if not tests:
        return "    (void)x;\n" if own_index else ""
    loop = f"""    for (i = 0; i < EQNET_INPUTS; ++i) {{
        if ({" || ".join(tests)}) {{
            status = EQNET_INPUT_RANGE;
        }}
    }}
"""
    return f"    int32_t i;\n{loop}" if own_index else loop
