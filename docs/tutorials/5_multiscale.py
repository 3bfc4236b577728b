# %% [markdown]
# # Images on several scales
#
# A multiscale equilibrium network whose contraction is proved from the true norms of its convolutions, and kept at any
# number of bits. [Theory §9](../theory.md) has the map and the proof, [the page](../multiscale.md) every option.

# %%
import torch
from torch import nn

import equipoise as eq
from equipoise.data import load_data

torch.manual_seed(0)
torch.set_num_threads(1)
data = load_data("digits")
train, test = (part.x.view(-1, 1, 8, 8) for part in (data.train, data.test))

model = eq.LipschitzMDEQ(
    1, 8, data.class_count, channels=(16, 32), expansion=2, contraction=0.9, dropout=0.0, head_channels=32
)
print(f"{sum(p.numel() for p in model.parameters())} parameters on 8 × 8 and 4 × 4 pixels")
#: 58554 parameters on 8 × 8 and 4 × 4 pixels

# %% [markdown]
# ## Training
#
# Kernels are scaled to their cap as they are used, so every step of the optimizer leaves the map a contraction.

# %%
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
for _ in range(6):
    for rows in torch.randperm(len(train)).split(64):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(train[rows]), data.train.y[rows]).backward()
        optimizer.step()
model.eval()


def accuracy(network):
    with torch.no_grad():
        return 100 * float((network(test).argmax(1) == data.test.y).float().mean())


tally = model.tally
print(f"accuracy {accuracy(model):.1f} %")
print(f"{tally.evaluations / tally.samples:.1f} evaluations a sample, {tally.failures} of {tally.samples} failed")
assert tally.failures == 0
#: accuracy 94.4 %
#: 4.0 evaluations a sample, 0 of 7902 failed

# %% [markdown]
# ## What is proved
#
# A bound of the Lipschitz constant of `z ↦ f(z; x)`, the same for every image. It is below 1, so every image has one
# equilibrium, and plain iteration finds it.

# %%
certificate = eq.certify(model)
print(certificate)
assert certificate.certified
assert certificate.contraction <= 0.9
#: verdict                                      certified
#: contraction ‖N‖₂, at most                    0.772132
#: contraction with dropout, at most            0.772132
#: contraction of weighted branches, at most    0.723393
#: margin, at least                             0.227868
#: Lipschitz constant, at most                  1.77214
#: condition number, at most                    7.777
#: rate of Picard (α = 1), at most              0.772132
#: steps to shrink the error by 1e-06, at most  54
#: arithmetic                                   float64 on the CPU, every rounding counted; definiteness by floating-point Cholesky [R06]; about the stored codes and scales

# %% [markdown]
# Each answer comes with a bound of its own, whichever solver found it; nothing is proved of Anderson's method itself.

# %%
for solver in (eq.Picard(), eq.Anderson(on=eq.Picard())):
    found = model.solve(test[:100], solver=solver, tol=1e-4)
    size = torch.linalg.vector_norm(found.value, dim=1)
    print(f"{type(solver).__name__}: {found.steps.float().mean():.1f} evaluations,", end=" ")
    print(f"error at most {float((found.error_bound / size).max()):.1e} of the answer")
    assert bool(found.converged.all())
#: Picard: 4.1 evaluations, error at most 1.6e-05 of the answer
#: Anderson: 4.0 evaluations, error at most 1.3e-05 of the answer

# %% [markdown]
# ## Codes
#
# Structured codes are scaled until the norm of codes times scale is proved to be within the cap: the contraction that
# was asked for holds at every number of bits. With the float network as a reference, each image has a bound of how far
# its equilibrium moved.

# %%
print("bits  contraction  bytes   accuracy  moved, at most")
for bits in (8, 4, 2, 1):
    small = eq.quantize(model, eq.Structured(bits=bits))
    proof = eq.certify(small, reference=model, inputs=test[:50])
    moved = float((proof.displacement / torch.linalg.vector_norm(model.solve(test[:50]).value, dim=1)).median())
    print(
        f"{bits:4d}  {proof.contraction:11.3f}  {eq.size(small):6d}  {accuracy(small):6.1f} %  {moved:.0%} of the answer"
    )
    assert proof.certified
    assert proof.contraction <= 0.9
#: bits  contraction  bytes   accuracy  moved, at most
#:    8        0.772   76808    94.4 %  3% of the answer
#:    4        0.740   50568    95.0 %  51% of the answer
#:    2        0.470   37448    88.6 %  210% of the answer
#:    1        0.305   30888    83.9 %  284% of the answer
