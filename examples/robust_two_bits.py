"""Train a robust network, store it in 2 bits, and certify it within 0.1 per pixel.

Cells start with ``# %%``, as notebooks and editors read them. The data are scikit-learn's 8×8 digits; with
``data = load_data("mnist")`` the same cells do the same on MNIST.
"""

# %% [markdown]
# A NEMON layer answers with the one solution z* of z = relu(W z + U x + b). Row sums of W say that there is one, so no
# eigenvalue is needed, and rounding below that structure cannot lose it.

# %%
import torch
from torch import nn

import equipoise as eq
from equipoise.data import Batches, load_data

EPS, EPOCHS, RATE = 0.1, 15, 2e-2  # eps in pixels scaled to [0, 1]

torch.set_num_threads(1)
torch.manual_seed(0)
data = load_data("digits")
model = nn.Sequential(eq.NEMON(data.features, 32, gamma=0.8, training_tol=1e-3), nn.Linear(32, data.class_count))

# %% [markdown]
# ## Train
# Half of the loss is that of the worst scores over the box of all images within eps; eps grows from 0. The bits are
# trained through: every step rounds T and rebuilds the diagonal of W from what was rounded.

# %%
scheme = eq.Structured(bits=2)
loss = eq.RobustLoss(eps=EPS, share=0.5, ramp=0.5)


def train(network: nn.Module, epochs: int) -> nn.Module:
    """One cycle of Adam over ``epochs``."""
    batches = Batches(data.train, 64, shuffle=True, seed=0)
    steps, step = epochs * len(batches), 0
    optimizer = torch.optim.Adam(network.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps + 1)
    network.train()
    for epoch in range(epochs):
        batches.set_epoch(epoch)
        for x, y in batches:
            optimizer.zero_grad()
            loss(network, x, y, network(x), step / steps, data.preprocessing).backward()
            optimizer.step()
            schedule.step()
            step += 1
    return network.eval()


model = train(model, EPOCHS)
prepared = train(eq.prepare_qat(model, scheme), EPOCHS // 3)

# %% [markdown]
# ## Quantize to 2 bits
# The codes are bit for bit what was trained, and their measure is at most γ, by algebra on the stored numbers.

# %%
small = eq.convert(prepared)
certificate = eq.certify(small)
print(certificate)
assert certificate.certified
assert certificate.measure is not None
print(f"W in {small[0].recurrent.packed_bytes} bytes, {eq.size(model)} bytes as float, {eq.size(small)} packed")

# %% [markdown]
# ## Certify within 0.1 per pixel
# Certified accuracy is proved, attacked accuracy is what projected gradient ascent leaves; the truth lies between.

# %%
for name, network in (("float", model), ("2 bits", small)):
    for eps in (0.02, 0.05, EPS):
        found = eq.robustness(network, data.test, data.preprocessing, eps)
        assert found.pgd_accuracy is not None
        assert found.certified_accuracy <= found.pgd_accuracy <= found.clean_accuracy
        print(
            f"{name:6}  eps {eps:4}  certified {100 * found.certified_accuracy:5.1f} %"
            f"  attacked {100 * found.pgd_accuracy:5.1f} %  clean {100 * found.clean_accuracy:5.1f} %"
        )
        last = found
