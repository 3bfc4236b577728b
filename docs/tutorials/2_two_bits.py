# %% [markdown]
# # Two bits
#
# A network whose recurrent and input weights have 2 bits each, trained as such: the rounding stands in every forward
# pass, gradients pass straight through it, and the margin is there at every step. [Theory §4](../theory.md) explains
# why, [training](../training.md) has the figures on MNIST.

# %%
import torch
from torch import nn

import equipoise as eq
from equipoise.data import load_data

torch.set_num_threads(1)
data = load_data("digits")
scheme = eq.Structured(bits=2, input_bits=2)  # A and B − Bᵀ, and U; b, margin and head stay floats


def train(network, epochs, rate=3e-3):
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=0.3)
    network.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(data.train)).split(50):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(data.train.x[rows]), data.train.y[rows]).backward()
            optimizer.step()
    return network.eval()


def accuracy(network):
    return 100 * float((network(data.test.x).argmax(1) == data.test.y).float().mean())


def fresh():
    torch.manual_seed(0)
    return nn.Sequential(eq.MonDEQ(data.features, 32, margin=1.0, learn_margin=True), nn.Linear(32, data.class_count))


# %% [markdown]
# ## Rounding afterwards
#
# First the plain way: train floats, round at the end. The margin is kept, since the scheme keeps it. The accuracy is
# not.

# %%
floats = train(fresh(), 12)
afterwards = eq.quantize(floats, scheme)
print(f"float {accuracy(floats):.1f} %, rounded to 2 bits {accuracy(afterwards):.1f} %")
print(f"margin of the codes >= {eq.margin(afterwards):.3f}")
assert eq.certify(afterwards).certified
#: float 97.2 %, rounded to 2 bits 88.9 %
#: margin of the codes >= 0.651

# %% [markdown]
# ## Training through it
#
# `prepare_qat` gives a copy that rounds its free tensors in every step; nothing else of the training changes. Scales
# are fitted anew in every step.

# %%
prepared = eq.prepare_qat(fresh(), scheme)
train(prepared, 24)
small = eq.convert(prepared)
print(f"trained at 2 bits: {accuracy(small):.1f} %")
assert accuracy(small) > accuracy(afterwards)
#: trained at 2 bits: 95.0 %

# %% [markdown]
# `convert` keeps the codes that were trained, so both networks give the same answers, bit for bit:

# %%
with torch.no_grad():
    assert torch.equal(prepared(data.test.x), small(data.test.x))

# %% [markdown]
# ## What is proved of it
#
# There is no float network to compare with: this *is* the network. So the certificate speaks of its margin and its
# solver, and of no displacement.

# %%
certificate = eq.certify(small)
print(certificate)
assert certificate.certified
assert certificate.displacement is None
#: verdict                                        certified
#: margin, at least                               0.516229
#: Lipschitz constant, at most                    1.20673
#: condition number, at most                      2.33757
#: rate of PeacemanRachford (α = 1.296), at most  0.552396
#: steps to shrink the error by 1e-06, at most    24
#: arithmetic                                     float64 on the CPU, every rounding counted; definiteness by floating-point Cholesky [R06]; about the stored codes and scales

# %% [markdown]
# ## What it weighs
#
# Codes are packed at their bits; the head is still floats, and 2 or 4 bits for it (`head_bits`) would save most of
# the rest.

# %%
print(f"{eq.size(floats)} bytes as floats, {eq.size(small)} bytes packed")
assert eq.size(small) < eq.size(floats) / 5
#: 17836 bytes as floats, 2360 bytes packed

# %% [markdown]
# ## One bit
#
# The same with every code −1 or +1. In C, the products with such weights are additions and subtractions: see [to a
# microcontroller](4_microcontroller.py).

# %%
one = eq.convert(train(eq.prepare_qat(fresh(), eq.Structured(bits=1, input_bits=1)), 24))
print(f"trained at 1 bit: {accuracy(one):.1f} % in {eq.size(one)} bytes, margin >= {eq.margin(one):.3f}")
assert eq.certify(one).certified
#: trained at 1 bit: 93.1 % in 1914 bytes, margin >= 0.505
