from __future__ import annotations

import copy
import csv
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import wgan_ext

ROOT = Path(__file__).parents[1]
FILES = {"samples.png", "curves.png", "metrics.csv", "checkpoint.pt"}


@pytest.fixture(scope="module")
def train() -> Iterator[ModuleType]:
    """examples/train.py as a module, measuring every second step."""
    sys.path.insert(0, str(ROOT / "examples"))
    import train

    train.REPORT_EVERY = 2
    threads = torch.get_num_threads()
    yield train
    torch.set_num_threads(threads)
    sys.path.remove(str(ROOT / "examples"))


def run(train: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
    train.main()


def rows(out: Path) -> list[dict[str, float]]:
    with open(out / "metrics.csv") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


# One step of training against plain torch


def wgan_gp_loss_in_plain_torch(critic: nn.Module, real: Tensor, fake: Tensor, mix: Tensor, weight: float) -> Tensor:
    real_scores, fake_scores = critic(torch.cat([real, fake])).split(len(real))
    interpolates = (mix * real + (1 - mix) * fake).requires_grad_()
    (grads,) = torch.autograd.grad(critic(interpolates).sum(), interpolates, create_graph=True)
    penalty = (grads.flatten(1).norm(dim=1) - 1).square().mean()
    return fake_scores.mean() - real_scores.mean() + weight * penalty


def critic_and_generator(convolutional: bool, spectral_norm: object) -> tuple[nn.Module, nn.Module]:
    sn, slope = spectral_norm, 0.2
    if convolutional:
        critic = nn.Sequential(
            sn(nn.Conv2d(1, 4, 4, 2, 1)), nn.LeakyReLU(slope), sn(nn.Conv2d(4, 8, 4, 2, 1)), nn.LeakyReLU(slope),
            nn.Flatten(), sn(nn.Linear(32, 1)),
        )  # fmt: skip
    else:
        critic = nn.Sequential(
            nn.Flatten(), sn(nn.Linear(64, 24)), nn.LeakyReLU(slope), sn(nn.Linear(24, 16)), nn.ReLU(), nn.Linear(16, 1)
        )
    generator = nn.Sequential(
        sn(nn.Linear(5, 24)), nn.ReLU(), sn(nn.Linear(24, 64)), nn.Unflatten(1, (1, 8, 8)), nn.Tanh()
    )
    return critic, generator


@pytest.mark.parametrize("convolutional", [False, True])
def test_training_equals_plain_torch_parameter_by_parameter(convolutional: bool, device: torch.device) -> None:
    trained = []
    for ours in (True, False):
        torch.manual_seed(0)
        nets = critic_and_generator(convolutional, wgan_ext.spectral_norm if ours else nn.utils.spectral_norm)
        critic, generator = (net.double().to(device) for net in nets)
        optimizers = [torch.optim.Adam(net.parameters(), 1e-2, (0.0, 0.9)) for net in (critic, generator)]
        for _ in range(3):
            for _ in range(2):
                real = torch.rand(6, 1, 8, 8, dtype=torch.float64).to(device)
                mix = torch.rand(6, 1, 1, 1, dtype=torch.float64).to(device)
                with torch.no_grad():
                    fake = generator(torch.randn(6, 5, dtype=torch.float64).to(device))
                if ours:
                    loss = wgan_ext.critic_loss(*critic(torch.cat([real, fake])).split(6))
                    loss = loss + 10.0 * wgan_ext.gradient_penalty(critic, real, fake, mix=mix)
                else:
                    loss = wgan_gp_loss_in_plain_torch(critic, real, fake, mix, 10.0)
                optimizers[0].zero_grad()
                loss.backward()
                optimizers[0].step()
            scores = critic(generator(torch.randn(6, 5, dtype=torch.float64).to(device)))
            optimizers[1].zero_grad()
            (wgan_ext.generator_loss(scores) if ours else -scores.mean()).backward()
            optimizers[1].step()
        trained.append({**critic.state_dict(prefix="critic."), **generator.state_dict(prefix="generator.")})
    assert trained[0].keys() == trained[1].keys()
    for name, value in trained[0].items():
        torch.testing.assert_close(
            value, trained[1][name], rtol=1e-9, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}"
        )


# The program


@pytest.mark.parametrize(
    ("objective", "data"),
    [
        ("wgan-gp", "digits"),
        ("wgan-gp", "8gaussians"),
        ("wgan-clip", "digits"),
        ("wgan-sn", "digits"),
        ("gan", "8gaussians"),
    ],
)
def test_every_objective_writes_its_files(
    train: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, objective: str, data: str
) -> None:
    run(
        train, monkeypatch, "--objective", objective, "--data", data, "--steps", 3, "--out", tmp_path, "--device", "cpu"
    )
    assert {path.name for path in tmp_path.iterdir()} == FILES
    assert [row["step"] for row in rows(tmp_path)] == [2, 3]
    assert all(row["sinkhorn_divergence"] > 0 and row["ratio"] > 0.5 for row in rows(tmp_path))
    with Image.open(tmp_path / "samples.png") as picture:
        assert picture.size[0] >= 400
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    critic = state["modules"][1]
    if objective == "wgan-clip":
        assert max(weight.abs().max().item() for weight in critic.values()) <= 0.05 + 1e-7
    assert any(name.endswith("weight_u") for name in critic) == (objective == "wgan-sn")


@pytest.mark.parametrize("data", ["25gaussians", "swissroll"])
def test_toy_sets(train: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, data: str) -> None:
    run(train, monkeypatch, "--data", data, "--steps", 1, "--out", tmp_path, "--device", "cpu")
    assert {path.name for path in tmp_path.iterdir()} == FILES


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((40, 28, 28), "uint8"), ((40, 16, 16, 3), "float32"), ((40, 5, 7), "int64"), ((40, 3), "float64")],
)
def test_arrays(
    train: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, shape: tuple[int, ...], dtype: str
) -> None:
    np.save(tmp_path / "set.npy", (np.random.default_rng(0).random(shape) * 200).astype(dtype))
    monkeypatch.chdir(tmp_path)
    run(train, monkeypatch, "--data", tmp_path / "set.npy", "--steps", 1, "--device", "cpu")
    assert {path.name for path in (tmp_path / "runs" / "wgan-gp-set").iterdir()} == FILES


def test_a_folder_of_images(train: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    for i in range(15):
        path = folder / ("nested" if i % 2 else "") / f"{i}.{('png', 'jpg', 'PNG')[i % 3]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(i).integers(0, 255, (40 + i, 60, 3), dtype=np.uint8)
        Image.fromarray(noise).convert(("RGB", "L")[i % 2]).save(path)
    (folder / "notes.txt").write_text("not an image")
    run(train, monkeypatch, "--data", folder, "--steps", 1, "--out", tmp_path / "out", "--device", "cpu")
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    generator = torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)["modules"][0]
    assert list(generator.values())[-2].shape[1] == 3  # the last layer makes three channels
    (folder / "broken.png").write_bytes(b"not a png")
    with pytest.raises(SystemExit):
        run(train, monkeypatch, "--data", folder, "--steps", 1)


def test_splits_do_not_overlap_and_are_scaled(train: ModuleType) -> None:
    for name in ("digits", "8gaussians", "25gaussians", "swissroll"):
        samples = train.data.load(name)
        assert len(samples.held_out) == 500
        assert samples.train.abs().max() <= 3
        assert samples.train.std() > 0.3
    digits = train.data.load("digits")
    assert len(digits.train) == 1297
    assert digits.shape == (1, 8, 8)
    assert digits.train.aminmax() == (-1, 1)


def test_ruler_reads_1_for_real_data_and_more_for_a_gaussian(train: ModuleType) -> None:
    digits = train.data.load("digits")
    ruler = train.Ruler(digits.train, digits.held_out)
    assert ruler.divergence(digits.train[500:1000]) / ruler.floor == pytest.approx(1, abs=0.15)
    assert 2 < ruler.gaussian < 3
    gaussian = torch.distributions.MultivariateNormal(
        digits.train.flatten(1).mean(0), digits.train.flatten(1).T.cov() + 1e-4 * torch.eye(64)
    )
    assert ruler.divergence(gaussian.sample((500,))) / ruler.floor == pytest.approx(ruler.gaussian, rel=0.1)


@pytest.mark.parametrize(
    ("objective", "data", "stop"),
    [("wgan-gp", "digits", 3), ("wgan-sn", "swissroll", 4), ("wgan-clip", "8gaussians", 5)],
)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    train: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, objective: str, data: str, stop: int
) -> None:
    common = ("--objective", objective, "--data", data, "--seed", 7, "--device", "cpu")
    run(train, monkeypatch, *common, "--steps", 7, "--out", tmp_path / "whole")
    run(train, monkeypatch, *common, "--steps", stop, "--out", tmp_path / "parts")
    torch.rand(5)  # what else drew numbers in between does not matter
    run(train, monkeypatch, *common, "--steps", 7, "--out", tmp_path / "parts", "--resume")
    for name in FILES - {"checkpoint.pt"}:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes(), name
    whole, parts = (torch.load(tmp_path / part / "checkpoint.pt", weights_only=True) for part in ("whole", "parts"))
    assert flat(whole) == flat(parts)


def flat(value: object, path: str = "") -> dict[str, object]:
    """All leaves of a checkpoint, tensors as bytes."""
    if isinstance(value, Tensor):
        return {path: value.numpy().tobytes()}
    if isinstance(value, (dict, list, tuple)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, child in items for k, v in flat(child, f"{path}.{key}").items()}
    return {path: value}


def test_seeds_differ_and_repeat(train: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(train, monkeypatch, "--steps", 2, "--seed", seed, "--out", tmp_path / out, "--device", "cpu")
    a, b, c = (flat(torch.load(tmp_path / out / "checkpoint.pt", weights_only=True)["modules"]) for out in "abc")
    assert a == b
    assert a != c


def test_measuring_and_writing_leave_training_alone(
    train: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    digits = train.data.load("digits")
    monkeypatch.setattr(sys, "argv", ["train.py", "--objective", "wgan-sn", "--out", str(tmp_path), "--device", "cpu"])
    watched = train.Run(train.arguments())
    ruler = train.Ruler(digits.train, digits.held_out)
    watched.advance()
    before = copy.deepcopy(flat(watched.state()["modules"]))
    watched.measure(ruler)
    watched.draw(tmp_path, ruler)
    watched.write(tmp_path)
    assert flat(watched.state()["modules"]) == before
    assert all(module.training for module in watched.critic.modules())


def test_every_step_and_process_draws_its_own_numbers(
    train: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--out", str(tmp_path), "--device", "cpu"])
    arguments, seeds = train.arguments(), set()
    for rank in range(2):
        watched = train.Run(arguments)
        watched.rank = rank
        for _ in range(3):
            watched.advance()
            seeds.add(torch.initial_seed())
    assert len(seeds) == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--objective", "vae"], "argument --objective: invalid choice: 'vae'"),
        (["--data", "nosuch"], "argument --data: nosuch is neither one of digits, 8gaussians"),
        (["--data", "{tmp}/empty"], "empty has no images in it"),
        (["--data", "{tmp}/few.npy"], "few.npy has 5 samples: 12 are the least"),
        (["--data", "{tmp}/cube.npy"], "must hold real numbers of shape [N, D]"),
        (["--data", "{tmp}/text.npy"], "must hold real numbers of shape [N, D]"),
        (["--data", "{tmp}/nan.npy"], "nan.npy has NaN or infinite values"),
        (["--data", "{tmp}/same.npy"], "same.npy holds 20 times the same sample"),
        (["--data", "{tmp}/junk.npy"], "junk.npy cannot be read as an .npy file"),
        (["--steps", "0"], "argument --steps: must be at least 1, got 0"),
        (["--steps", "many"], "argument --steps: invalid int value: 'many'"),
        (["--seed", "-1"], "argument --seed: must be at least 0, got -1"),
        (["--device", "warp"], "argument --device: warp cannot be used"),
        (["--device", "meta"], "argument --device: meta cannot be used"),
        (["--out", "{tmp}/few.npy"], "argument --out: "),
        (["--resume", "--out", "{tmp}/empty"], "argument --resume: there is no"),
    ],
)
def test_bad_arguments_are_refused_by_name(
    train: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "junk.npy").write_bytes(b"junk")
    nan = np.zeros((20, 2))
    nan[3, 1] = np.nan
    for name, array in (
        ("few", np.zeros((5, 2))),
        ("cube", np.zeros((20, 2, 3, 4, 5))),
        ("text", np.array([["a"] * 2] * 20)),
        ("nan", nan),
        ("same", np.ones((20, 2))),
    ):
        np.save(tmp_path / f"{name}.npy", array)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        run(train, monkeypatch, *(argument.format(tmp=tmp_path) for argument in arguments))
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_checkpoint_of_another_run_is_refused(
    train: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    common = ("--out", tmp_path, "--device", "cpu")
    run(train, monkeypatch, *common, "--steps", 2)
    for arguments, message in (
        (("--steps", 4, "--seed", 1), "it was made with seed 0, not 1"),
        (("--steps", 4, "--objective", "gan"), "it was made with objective wgan-gp, not gan"),
        (("--steps", 4, "--data", "swissroll"), "it was made with data digits, not swissroll"),
        (("--steps", 1), "it was made at step 2, beyond --steps 1"),
    ):
        with pytest.raises(SystemExit, match=message):
            run(train, monkeypatch, *common, *arguments, "--resume")
    with open(tmp_path / "checkpoint.pt", "r+b") as file:
        file.truncate(1000)
    with pytest.raises(SystemExit, match=r"argument --resume: .*checkpoint\.pt cannot be continued"):
        run(train, monkeypatch, *common, "--steps", 4, "--resume")


def test_two_processes_stay_identical_and_only_one_writes(tmp_path: Path) -> None:
    script = f"""
import sys, torch, torch.distributed as dist
sys.path.insert(0, {str(ROOT / "examples")!r})
import train
train.REPORT_EVERY = 2
end = dist.destroy_process_group
def compare():
    import gc
    run = next(o for o in gc.get_objects() if isinstance(o, train.Run))
    mine = torch.cat([v.double().flatten() for m in run.state()["modules"] for v in m.values()])
    other = mine.clone()
    dist.broadcast(other, 0)
    assert torch.equal(mine, other), "the processes differ"
    end()
dist.destroy_process_group = compare
train.main()
"""
    program = tmp_path / "program.py"
    program.write_text(script)
    out = tmp_path / "out"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program)]
    command = [*launch, "--objective", "wgan-sn", "--steps", "3", "--device", "cpu", "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=environment, check=True, timeout=300, capture_output=True)
    assert {path.name for path in out.iterdir()} == FILES
    assert [row["step"] for row in rows(out)] == [2, 3]
