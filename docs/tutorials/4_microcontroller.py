# %% [markdown]
# # To a microcontroller
#
# A network trained at 2 bits becomes C99 that computes in integers only, from pixels to scores, with a fixed number
# of steps and a proved bound on the error of every answer. [Export](../export.md) describes the files and has the
# figures, [theory §10](../theory.md) the proofs. The last part needs a C compiler.

# %%
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

import equipoise as eq
from equipoise.data import load_data

torch.set_num_threads(1)
torch.manual_seed(0)
data = load_data("digits")
scheme = eq.Structured(bits=2, input_bits=2, head_bits=4)
layer = eq.MonDEQ(data.features, 32, rank=8, margin=1.0, learn_margin=True)
prepared = eq.prepare_qat(nn.Sequential(layer, nn.Linear(32, data.class_count)), scheme)
optimizer = torch.optim.AdamW(prepared.parameters(), lr=3e-3, weight_decay=0.3)
for _ in range(20):
    for rows in torch.randperm(len(data.train)).split(50):
        optimizer.zero_grad()
        nn.functional.cross_entropy(prepared(data.train.x[rows]), data.train.y[rows]).backward()
        optimizer.step()
model = eq.convert(prepared.eval())
model.preprocessing = data.preprocessing  # so that the program takes raw pixels
right = (model(data.test.x).argmax(1) == data.test.y).double().mean()
print(f"{100 * float(right):.1f} % right in {eq.size(model)} bytes")
#: 95.3 % right in 1052 bytes

# %% [markdown]
# ## Writing it
#
# The number of steps is chosen so that what further steps would change is small against what rounding costs anyway.
# The certificate splits the error: displacement against the reference (nothing to speak of here, since the reference
# is the network of the codes itself), rounding, truncation.

# %%
folder = Path(tempfile.mkdtemp()) / "digits_c"
shipped = eq.export(model, folder)
for name, value in shipped.summary():
    print(f"{name}: {value}")
print(sorted(path.name for path in folder.iterdir()))
assert shipped.certified
#: certified: yes
#: mode: factored, 2-bit codes, 16-bit iterates
#: steps: 45
#: error of the equilibrium, at most: 0.0499474
#:   moved by rounded weights: 1.22012e-16
#:   rounding in the program: 0.0405805
#:   steps left out: 0.00936693
#: error of a class score, at most: 0.0696119
#: against: the network of the exported file, in exact arithmetic
#: iterates: proved to stay in range on every input
#: RAM, bytes: 448
#: flash, bytes: 1408
#: multiply-accumulates: 71552
#: ['certificate.json', 'eqnet.c', 'eqnet.h', 'eqnet_host.c', 'selftest.c', 'vectors.h']

# %% [markdown]
# The bound holds for **every** image, noise included. On data, the range of the iterates is smaller; with calibration
# images a finer grid is chosen, and the program checks the range as it runs: an image that leaves it gets a status
# and no answer.

# %%
checked = eq.export(model, folder, calibration=data.train.x, force=True)
print(f"error at most {checked.error_bound:.4f} instead of {shipped.error_bound:.4f}; {checked.iterate_range}")
assert checked.error_bound < shipped.error_bound
#: error at most 0.0080 instead of 0.0499; checked as they are computed: another status is returned when one leaves its range

# %% [markdown]
# ## Running it
#
# On a device, `eqnet.c` and `eqnet.h` are all that is needed. Here `equipoise.runtime` compiles the same program and
# calls it on arrays. Its answers are compared with the exact equilibria, solved for in float64.

# %%
program = eq.runtime.load(folder)
images = data.test.x.numpy()
exact = model.double()[0].solve(data.test.x.double(), tol=1e-10)
errors = np.linalg.norm(program.equilibrium(images) - exact.value.numpy(), axis=1)
print(f"worst error {errors.max():.5f}, proved for these images at most {program.error_bound(images).max():.5f}")
print(f"{100 * (program(images).argmax(1) == data.test.y.numpy()).mean():.1f} % right")
assert (errors <= program.error_bound(images) + exact.error_bound.numpy()).all()
#: worst error 0.00154, proved for these images at most 0.00794
#: 95.3 % right

# %% [markdown]
# `certificate.json` names the sources by their SHA-256, and `selftest.c` repeats the integers of numpy's emulation on
# the machine it is compiled for. `make test-mcu` does that on two Cortex-M boards in QEMU.
