"""Networks by name, how they are trained by default, and what training can be told beside."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

import equipoise as eq
from command_line import Capsys, run, run_json
from equipoise.augmentation import Augmentation
from equipoise.data import Data, Split, load_data
from equipoise.errors import OptionError
from equipoise.jobs import Job
from equipoise.presets import KINDS, Sizes, preset_of
from equipoise.training import TrainingConfig, fit
from trainings import STEPS, explicit, same, stopped


@pytest.fixture(scope="module")
def digits() -> Data:
    return load_data("digits")


HEAVY = ("lmdeq-published", "mdeq-published")
NAMES = [f"{kind}-{preset}" for kind in KINDS for preset in KINDS[kind].presets]


@pytest.mark.filterwarnings("ignore::equipoise.ConvergenceWarning")  # a plain MDEQ need not converge
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in HEAVY else n for n in NAMES])
def test_every_preset_builds_a_network_for_its_data(name: str, digits: Data) -> None:
    kind, preset = name.split("-")
    before = torch.get_rng_state()
    model = preset_of(kind, preset).build(digits, Sizes())
    assert torch.equal(torch.get_rng_state(), before)
    again, other = (preset_of(kind, preset).build(digits, Sizes(seed=seed)) for seed in (0, 1))
    assert same(model, again)
    assert not same(model, other)
    assert model.preprocessing == digits.preprocessing
    assert model.eval()(digits.test.x[:3]).shape == (3, 10)


@pytest.mark.parametrize("kind", ["monconv", "multitier", "lmdeq"])
def test_networks_on_images_go_on_where_they_stopped(kind: str, digits: Data, tmp_path: Path) -> None:
    """To the last bit, augmentation and dropout included; what layers remember is not carried over an epoch."""
    preset = preset_of(kind, "tiny")
    part = Data(
        digits.name, Split(digits.train.x[:90], digits.train.y[:90]), Split(digits.validation.x[:50],
        digits.validation.y[:50]), Split(digits.test.x[:50], digits.test.y[:50]), digits.preprocessing, digits.classes,
    )  # fmt: skip
    config = preset.config("digits", True, epochs=2, batch_size=30, accelerator="cpu")
    whole, parts, again = (preset.build(part, Sizes()) for _ in range(3))
    fit(whole, part, config, progress=False)
    with pytest.raises(InterruptedError):
        fit(stopped(parts, 5), part, config, tmp_path, progress=False)
    fit(again, part, config, tmp_path, progress=False, resume=True)
    assert same(again, whole)


@pytest.mark.filterwarnings("ignore::equipoise.errors.ConvergenceWarning")
@pytest.mark.parametrize("kind", ["monconv", "multitier", "lmdeq", "mdeq"])
def test_the_command_trains_them(kind: str, tmp_path: Path, capsys: Capsys) -> None:
    out = tmp_path / "m.safetensors"
    line = ("train", "--model", kind, "--preset", "tiny", "--batch-size", 400, "--epochs", 1, "--schedule", "cosine")
    found = run_json(capsys, *line, "--out", out)
    assert found["certified"] is (kind != "mdeq")
    assert found["accuracy_test"] == found["accuracy"]
    model = eq.load(out)
    assert model(load_data("digits").test.x[:2]).shape == (2, 10)
    assert found["size_bytes"] == eq.size(model)
    assert run(capsys, *line, "--out", out)[0] == 2, "what is there is kept"
    status, _, err = run(capsys, *line, "--rank", 3, "--out", tmp_path / "o")
    assert (status, f"a {kind} has none" in err) == (2, True)
    status, _, err = run(capsys, *line, "--scheme", "structured", "--bits", 4, "--out", tmp_path / "o")
    assert (status, "trains as floats" in err) == (2, True)


def test_the_default_is_the_first_preset() -> None:
    for kind in KINDS:
        assert preset_of(kind) is preset_of(kind, next(iter(KINDS[kind].presets)))


def test_sizes_are_heeded(digits: Data) -> None:
    model = preset_of("mondeq").build(digits, Sizes(features=12, rank=5, margin=0.4))
    assert (model[0].features, model[0].recurrent.A.shape) == (12, (5, 12))  # type: ignore[union-attr]
    assert eq.margin(model) == pytest.approx(0.4)
    model = preset_of("lmdeq").build(digits, Sizes(gamma=0.3))
    assert model[1].contraction(training=True) <= 0.3  # type: ignore[operator]
    model = preset_of("nemon").build(digits, Sizes(features=12, gamma=0.3))
    assert (model[0].features, float(model[0].recurrent.gamma)) == (12, pytest.approx(0.3))  # type: ignore[union-attr,arg-type]


def test_unknown_names_and_sizes_of_other_kinds_are_refused() -> None:
    config = TrainingConfig(1)
    for options, says in (
        ({"model": "resnet"}, "model='resnet': choose one of mondeq"),
        ({"preset": "huge"}, "preset='huge': a mondeq has small, published"),
        ({"gamma": 0.5}, r"gamma=0\.5: a mondeq has none, but nemon, nemonconv"),
        ({"model": "nemon", "rank": 3}, "rank=3: a nemon has none, but mondeq"),
        ({"model": "nemon", "start": Path("f"), "gamma": 0.5}, r"gamma=0\.5: the network in f has its own"),
        ({"model": "monconv", "start": Path("f")}, "f holds a network"),
    ):
        with pytest.raises(OptionError, match=says):
            Job("digits", config, **options)  # type: ignore[arg-type]


def test_a_preset_trains_as_it_says_unless_told_otherwise() -> None:
    preset = preset_of("mondeq", "published")
    assert preset.config("mnist") == preset.training
    changed = preset.config("cifar10", True, epochs=3, learning_rate=None)
    assert (changed.epochs, changed.learning_rate, changed.schedule) == (3, 1e-3, "step")
    assert changed.augment == Augmentation(4, mirror=True)
    assert preset.config("mnist", True).augment == Augmentation(2)


# What training can be told


def rates(schedule: str, digits: Data) -> list[float]:
    """The learning rate after every step of a training of three epochs."""
    seen: list[float] = []
    model = explicit()
    real = torch.optim.AdamW.step

    def step(self: Any, *given: Any, **named: Any) -> Any:
        seen.append(self.param_groups[0]["lr"])
        return real(self, *given, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        config = TrainingConfig(4, learning_rate=0.1, schedule=schedule, accelerator="cpu")
        fit(model, digits, config, progress=False)
    assert len(seen) == 4 * STEPS
    return seen


def test_schedules(digits: Data) -> None:
    step = rates("step", digits)
    wanted = [0.1 * 0.1 ** (k // STEPS) for k in range(4 * STEPS)]
    assert step == pytest.approx(wanted, rel=1e-9)
    cosine = torch.tensor(rates("cosine", digits), dtype=torch.float64)
    angles = torch.arange(4 * STEPS, dtype=torch.float64) / (4 * STEPS) * torch.pi
    assert torch.allclose(cosine, 0.05 * (1 + angles.cos()), rtol=1e-6)
    assert set(rates("constant", digits)) == {0.1}
    cycle = rates("one-cycle", digits)
    assert max(cycle) == pytest.approx(0.1, rel=1e-2)
    peak = cycle.index(max(cycle))
    assert all(a < b for a, b in itertools.pairwise(cycle[: peak + 1]))
    assert all(a > b for a, b in itertools.pairwise(cycle[peak:]))


def test_channels_last_trains_to_the_same_up_to_rounding(digits: Data) -> None:
    plain, last = (preset_of("nemonconv").build(digits, Sizes(features=4)) for _ in range(2))
    for model, so in ((plain, False), (last, True)):
        fit(model, digits, TrainingConfig(1, accelerator="cpu", channels_last=so), progress=False)
    assert all(value.is_contiguous() for value in last.state_dict().values())
    for name, value in last.state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[name], rtol=2e-2, atol=2e-3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_needs_a_gpu(precision: str, tmp_path: Path, capsys: Capsys) -> None:
    status, out, err = run(capsys, "train", "--precision", precision, "--epochs", 1, "--out", tmp_path / "o")
    assert (status, out) == (2, "")
    assert f"precision='{precision}' is for GPUs" in err
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    "options", [{"schedule": "linear"}, {"precision": "16"}, {"channels_last": 1}, {"augment": True}]
)
def test_bad_configurations_are_refused(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(OptionError, match=name):
        TrainingConfig(1, **options)


# Which training goes on


def test_another_schedule_start_or_tolerance_is_not_resumed(tmp_path: Path, capsys: Capsys, digits: Data) -> None:
    line = ["train", "--features", 6, "--epochs", 1, "--out", tmp_path / "o", "--log-dir", tmp_path / "run", "--force"]
    assert run(capsys, *line)[0] == 0
    for change, says in (
        (["--schedule", "cosine"], "schedule='one-cycle', not 'cosine'"),
        (["--margin", 0.5], "start_margin=None, not 0.5"),
        (["--augment"], "augment"),
        (["--channels-last"], "channels_last=False, not True"),
    ):
        status, _, err = run(capsys, *line, *change, "--resume")
        assert (status, says in err) == (2, True), err
    for name in ("first", "second"):
        run_json(capsys, "train", "--features", 6, "--epochs", 1, "--seed", len(name), "--out", tmp_path / name)
    line = ["train", "--epochs", 1, "--out", tmp_path / "o", "--log-dir", tmp_path / "from", "--force", "--from"]
    assert run(capsys, *line, tmp_path / "first")[0] == 0
    assert run(capsys, *line, tmp_path / "first", "--resume")[0] == 0
    status, _, err = run(capsys, *line, tmp_path / "second", "--resume")
    assert status == 2
    assert "start_network=" in err

    def layer(training_tol: float | None) -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(eq.MonDEQ(64, 6, training_tol=training_tol), torch.nn.Linear(6, 10))

    config = TrainingConfig(1, accelerator="cpu")
    fit(layer(1e-3), digits, config, tmp_path / "tol", progress=False)
    with pytest.raises(OptionError, match=r"training_tol=0\.001, not 0\.01"):
        fit(layer(1e-2), digits, config, tmp_path / "tol", resume=True)


def test_a_sweep_learns_scales_and_takes_other_models(tmp_path: Path, capsys: Capsys) -> None:
    line = ["sweep", "--features", 6, "--epochs", 1, "--out", tmp_path / "s"]
    found = run_json(capsys, *line, "--schemes", "float,structured", "--bits", 3, "--skew-bits", 4, "--learn-scale")
    assert [job["error"] for job in found["jobs"]] == [None, None]
    model = eq.load(tmp_path / "s" / "structured-3-seed0" / "model.safetensors")
    assert model[0].scheme == eq.Structured(3, skew_bits=4)  # type: ignore[index]
    line = ["sweep", "--model", "nemon", "--features", 6, "--epochs", 1, "--out", tmp_path / "n"]
    assert run_json(capsys, *line, "--schemes", "float")["jobs"][0]["certified"]
    assert isinstance(eq.load(tmp_path / "n" / "float-seed0" / "model.safetensors")[0], eq.NEMON)  # type: ignore[index]
