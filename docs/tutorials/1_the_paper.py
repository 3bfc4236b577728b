# %% [markdown]
# # The paper in ten minutes
#
# [LLC26] asks: when does a monotone equilibrium network survive the rounding of its weights? This page runs through
# its theorems on a small network, with the digits of scikit-learn, and ends with what this library adds. [Theory
# §5](../theory.md) has the statements, [published figures and ours](../published.md) the comparison on MNIST.

# %%
import torch
from torch import nn

import equipoise as eq
from equipoise.data import load_data

torch.set_num_threads(1)
torch.manual_seed(0)
data = load_data("digits")  # splits train, validation and test; x flat and preprocessed, y classes
model = nn.Sequential(eq.MonDEQ(data.features, 40, rank=10, margin=0.2), nn.Linear(40, data.class_count))

optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
for _ in range(10):
    for rows in torch.randperm(len(data.train)).split(64):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(data.train.x[rows]), data.train.y[rows]).backward()
        optimizer.step()
model.eval()


def accuracy(network):
    return 100 * float((network(data.test.x).argmax(1) == data.test.y).float().mean())


print(f"accuracy {accuracy(model):.1f} %")
assert accuracy(model) > 85
#: accuracy 98.1 %

# %% [markdown]
# ## The network and its margin
#
# The hidden layer answers with the one `z` that solves `z = relu(W z + U x + b)`. There is exactly one because the
# margin `m`, the smallest eigenvalue of the symmetric part of `I − W`, is positive. The numbers below are proved: a
# lower bound of `m`, an upper bound of `L = ‖I − W‖₂`.

# %%
layer = model[0]
m, L = eq.margin(layer), eq.lipschitz(layer)
print(f"m >= {m:.4f}, L <= {L:.4f}, condition number <= {L / m:.1f}")
solution = layer.solve(data.test.x, tol=1e-6)
print(f"{int(solution.steps.max())} steps at most, error proved below {float(solution.error_bound.max()):.1e}")
assert m > 0.19
assert bool(solution.converged.all())
#: m >= 0.2000, L <= 2.9457, condition number <= 14.7
#: 98 steps at most, error proved below 1.3e-05

# %% [markdown]
# ## Theorem 2: how far rounding moves the margin
#
# Rounding `W` entry by entry moves the margin by at most `‖ΔW‖₂`. So `‖ΔW‖₂ < m` is enough for the rounded network to
# be well posed, and not necessary: the exact check is the margin `m̃` of the codes themselves.
#
# Three verdicts are kept apart: *certified*, where `m̃ > 0` is proved; *converged*, where that fails and the given
# inputs settle all the same; *diverged*.

# %%
for bits in (8, 6, 5, 4, 3):
    rounded = eq.quantize(model, eq.Assembled(bits=bits))
    found = eq.certify(rounded, reference=model)
    verdict = eq.certify(rounded, inputs=data.test.x).verdict
    enough = "holds" if found.sufficient else "fails"
    print(f"{bits} bits: ‖ΔW‖ <= {found.delta_norm:.3f}, ‖ΔW‖ < m {enough}, m̃ >= {found.margin:6.3f}, {verdict}")
    assert abs(found.margin - m) <= found.delta_norm + 1e-6
assert verdict != "certified"
#: 8 bits: ‖ΔW‖ <= 0.020, ‖ΔW‖ < m holds, m̃ >=  0.187, certified
#: 6 bits: ‖ΔW‖ <= 0.082, ‖ΔW‖ < m holds, m̃ >=  0.149, certified
#: 5 bits: ‖ΔW‖ <= 0.167, ‖ΔW‖ < m holds, m̃ >=  0.096, certified
#: 4 bits: ‖ΔW‖ <= 0.371, ‖ΔW‖ < m fails, m̃ >= -0.035, converged
#: 3 bits: ‖ΔW‖ <= 0.916, ‖ΔW‖ < m fails, m̃ >= -0.364, converged

# %% [markdown]
# ## Theorem 3: how far the equilibrium moves
#
# `‖z* − z̃*‖ ≤ ‖ΔW z̃*‖/m`, input by input. The published check of this bound found violations, because its solver
# had not reached the equilibria. At the equilibria there are none; the solver's own error is part of the bound here.

# %%
rounded = eq.quantize(model, eq.Assembled(bits=6))
found = eq.certify(rounded, reference=model, inputs=data.test.x)
print(
    f"moved {float(found.actual_displacement.mean()):.3f} in the mean, at most {float(found.displacement.mean()):.3f}"
)
print(f"{100 * found.agreement:.0f} % of the classes are proved unchanged")
assert bool((found.actual_displacement <= found.displacement + found.actual_error).all())
#: moved 0.995 in the mean, at most 3.637
#: 61 % of the classes are proved unchanged

# %% [markdown]
# A class is *proved* unchanged where the gap between scores is larger than the bound can close. Where it is not,
# nothing is said: mostly the class has not changed either.

# %%
same = (rounded(data.test.x).argmax(1) == model(data.test.x).argmax(1)).double().mean()
print(f"{100 * float(same):.0f} % of the classes are unchanged, as measured")
assert found.agreement <= float(same)
#: 100 % of the classes are unchanged, as measured

# %% [markdown]
# ## Corollary 2: iterates on a grid
#
# If every iterate is rounded to a grid δ, the solver ends within `ε/(1 − r)` of the equilibrium, `r` its rate; a grid
# that shrinks leaves no floor but the rounding of float32.

# %%
for decay in (None, 0.9):
    solver = eq.Rounded(eq.PeacemanRachford(), grid=0.01, decay=decay)
    floor = eq.iterate_floor(layer, data.test.x, solver)
    print(f"decay {decay}: rate {floor.rate:.3f}, ends within {float(floor.value.max()):.1e}")
#: decay None: rate 0.922, ends within 1.2e+00
#: decay 0.9: rate 0.922, ends within 5.0e-02

# %% [markdown]
# ## What can be done about it
#
# `W` was built as `(1 − m) I − AᵀA + B − Bᵀ`. Rounding `A` and `B − Bᵀ` instead of `W` keeps that form, so the margin
# survives at every number of bits, 1 included. That is the scheme `Structured`. It keeps the guarantee; accuracy at
# few bits comes from training through the rounding, which is the [next page](2_two_bits.py).

# %%
for bits in (8, 4, 2, 1):
    structured = eq.quantize(model, eq.Structured(bits=bits))
    found = eq.certify(structured, reference=model, inputs=data.test.x)
    print(f"{bits} bits: m̃ >= {found.margin:.4f}, {found.verdict}, accuracy {accuracy(structured):.1f} %")
    assert found.certified
    assert found.margin > m - 1e-5
#: 8 bits: m̃ >= 0.2000, certified, accuracy 98.1 %
#: 4 bits: m̃ >= 0.2000, certified, accuracy 98.1 %
#: 2 bits: m̃ >= 0.2000, certified, accuracy 88.6 %
#: 1 bits: m̃ >= 0.2000, certified, accuracy 82.5 %
