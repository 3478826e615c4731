"""Training in two processes: each check below runs in both of one spawned pair, on its half of a batch."""

from __future__ import annotations

import datetime
import functools
import gc
import itertools
import json
import os
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from wgan_ext import (
    CriticLoss,
    GradientPenalty,
    explain,
    gradient_penalty,
    input_gradient,
    parametrizations,
    spectral_norm,
)

ENGINES = ("autograd", "analytic")
OPTIONS: dict[str, dict[str, bool]] = {
    "default": {},
    "unused": {"find_unused_parameters": True},
    "static": {"static_graph": True},
    "view": {"gradient_as_bucket_view": True},
}
PROCESSES = 2
BATCH = 12

CHECKS: dict[str, Callable[[], None]] = {}


def check(**choices: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a function one check for each combination of its arguments."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        for values in itertools.product(*choices.values()):
            arguments = dict(zip(choices, values, strict=True))
            name = function.__name__ + (f"[{'-'.join(map(str, values))}]" if values else "")
            assert name not in CHECKS
            CHECKS[name] = lambda arguments=arguments: function(**arguments)  # type: ignore[misc]
        return function

    return register


# What each process computes, and what one process would


def make_critic() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(5, 9), nn.LeakyReLU(0.2), nn.Linear(9, 7), nn.LeakyReLU(0.2), nn.Linear(7, 1)]
    return nn.Sequential(*layers).double()


def whole_batch() -> tuple[Tensor, Tensor, Tensor]:
    """Real, fake and mix."""
    torch.manual_seed(1)
    real, fake, mix = torch.randn(BATCH, 5), 2 * torch.randn(BATCH, 5), torch.rand(BATCH, 1)
    return real.double(), fake.double(), mix.double()


def my_batch() -> tuple[Tensor, Tensor, Tensor]:
    real, fake, mix = (t.chunk(PROCESSES)[dist.get_rank()] for t in whole_batch())
    return real, fake, mix


def penalty_of(critic: nn.Module, engine: Any, batch: tuple[Tensor, Tensor, Tensor] | None = None) -> Tensor:
    real, fake, mix = batch or my_batch()
    return gradient_penalty(critic, real, fake, mix=mix, engine=engine)


def scores_loss(critic: nn.Module, batch: tuple[Tensor, Tensor, Tensor] | None = None) -> Tensor:
    real, fake, _ = batch or my_batch()
    return critic(fake).mean() - critic(real).mean()


@functools.cache
def whole_batch_gradients(penalty: float) -> list[Tensor | None]:
    critic, batch = make_critic(), whole_batch()
    (scores_loss(critic, batch) + penalty * penalty_of(critic, "autograd", batch)).backward()
    return [p.grad for p in critic.parameters()]


def assert_synchronised(module: nn.Module, backward_passes: int = 1, penalty: float = 10.0) -> None:
    """The gradients are those of this many passes over the whole batch."""
    for parameter, want in zip(module.parameters(), whole_batch_gradients(penalty), strict=True):
        got: Any = parameter.grad
        torch.testing.assert_close(got.full_tensor() if hasattr(got, "full_tensor") else got, backward_passes * want)


def joint_loss(ddp: DistributedDataParallel, engine: str, order: str = "scores-penalty") -> Tensor:
    real, fake, _ = my_batch()
    if order == "scores-penalty":
        return scores_loss(ddp) + 10 * penalty_of(ddp.module, engine)
    if order == "penalty-scores":
        return 10 * penalty_of(ddp.module, engine) + scores_loss(ddp)
    fake_scores = ddp(fake)
    penalty = penalty_of(ddp.module, engine)
    return fake_scores.mean() + 10 * penalty - ddp(real).mean()


def assert_unsynchronised_raises(op: str, backward: Callable[[], None]) -> None:
    with pytest.raises(RuntimeError, match=rf"{op}: .*no forward of the wrapper.*Wrap wgan_ext\.CriticLoss\(critic\)"):
        backward()


# DDP


@check(engine=ENGINES, options=OPTIONS)
def loss_in_ddp(engine: str, options: str) -> None:
    ddp = DistributedDataParallel(CriticLoss(make_critic(), engine=engine), **OPTIONS[options])
    real, fake, mix = my_batch()
    for _ in range(3):
        ddp.zero_grad()
        ddp(real, fake, mix=mix).backward()
        assert_synchronised(ddp)


@check(engine=ENGINES)
def loss_in_ddp_accumulates(engine: str) -> None:
    ddp = DistributedDataParallel(CriticLoss(make_critic(), engine=engine))
    real, fake, mix = my_batch()
    with ddp.no_sync():
        ddp(real, fake, mix=mix).backward()
    ddp(real, fake, mix=mix).backward()
    assert_synchronised(ddp, backward_passes=2)


@check(engine=ENGINES, options=OPTIONS, order=("scores-penalty", "penalty-scores", "between"))
def joint_loss_is_synchronised(engine: str, options: str, order: str) -> None:
    ddp = DistributedDataParallel(make_critic(), **OPTIONS[options])
    for _ in range(3):
        ddp.zero_grad()
        joint_loss(ddp, engine, order).backward()
        assert_synchronised(ddp)


# DDP itself fails for a static graph whose first pass is under no_sync.
@check(engine=ENGINES, options=("default", "unused", "view"))
def joint_loss_accumulates(engine: str, options: str) -> None:
    ddp = DistributedDataParallel(make_critic(), **OPTIONS[options])
    for _ in range(2):
        ddp.zero_grad()
        with ddp.no_sync():
            joint_loss(ddp, engine).backward()
            inside = joint_loss(ddp, engine)
        inside.backward()
        joint_loss(ddp, engine).backward()
        assert_synchronised(ddp, backward_passes=3)


@check(engine=ENGINES)
def joint_loss_trains(engine: str) -> None:
    """The parameters stay those of one process."""
    ddp, critic = DistributedDataParallel(make_critic()), make_critic()
    optimizers = [torch.optim.Adam(m.parameters(), lr=1e-2) for m in (ddp, critic)]
    penalty = GradientPenalty(engine=engine, every=2)
    alone = GradientPenalty(engine="autograd", every=2)
    (real, fake, mix), (all_real, all_fake, all_mix) = my_batch(), whole_batch()
    for _ in range(4):
        for optimizer in optimizers:
            optimizer.zero_grad()
        (scores_loss(ddp) + 10 * penalty(ddp.module, real, fake, mix=mix)).backward()
        whole = (all_real, all_fake, all_mix)
        (scores_loss(critic, whole) + 10 * alone(critic, all_real, all_fake, mix=all_mix)).backward()
        for optimizer in optimizers:
            optimizer.step()
    for got, want in zip(ddp.parameters(), critic.parameters(), strict=True):
        torch.testing.assert_close(got, want)


@check(engine=ENGINES)
def loss_of_a_hand_written_penalty_is_synchronised(engine: str) -> None:
    ddp = DistributedDataParallel(make_critic())
    real, fake, mix = my_batch()
    grads = input_gradient(ddp.module, mix * real + (1 - mix) * fake, engine=engine)
    (scores_loss(ddp) + 10 * (grads.norm(dim=1) - 1).square().mean()).backward()
    assert_synchronised(ddp)


@check()
def penalty_alone_is_unsynchronised() -> None:
    """Why there is an error: DDP says nothing."""
    ddp = DistributedDataParallel(make_critic())
    real, fake, mix = my_batch()
    points = (mix * real + (1 - mix) * fake).requires_grad_()
    (grads,) = torch.autograd.grad(ddp.module(points).sum(), points, create_graph=True)
    (grads.norm(dim=1) - 1).square().mean().backward()
    weight = ddp.module[0].weight.grad
    other = weight.clone()
    dist.broadcast(other, 0)
    assert dist.get_rank() == 0 or not torch.allclose(weight, other)


@check(engine=ENGINES, options=OPTIONS)
def penalty_alone_raises(engine: str, options: str) -> None:
    ddp = DistributedDataParallel(make_critic(), **OPTIONS[options])
    for _ in range(2):
        assert_unsynchronised_raises("gradient_penalty", (10 * penalty_of(ddp.module, engine)).backward)
    ddp.zero_grad()
    joint_loss(ddp, engine).backward()
    assert_synchronised(ddp)
    assert_unsynchronised_raises("gradient_penalty", penalty_of(ddp.module, engine).backward)


@check(engine=ENGINES)
def penalty_after_the_synchronised_pass_raises(engine: str) -> None:
    ddp = DistributedDataParallel(make_critic())
    scores, penalty = scores_loss(ddp), penalty_of(ddp.module, engine)
    scores.backward()
    assert_unsynchronised_raises("gradient_penalty", penalty.backward)


@check(engine=ENGINES)
def penalties_of_other_kinds_alone_raise(engine: str) -> None:
    ddp = DistributedDataParallel(make_critic())
    real, fake, mix = my_batch()
    each = gradient_penalty(ddp.module, real, fake, mix=mix, reduction="none", engine=engine)
    assert_unsynchronised_raises("gradient_penalty", each.mean().backward)
    lazy, _ = GradientPenalty(at="real", every=2, return_norms=True, engine=engine)(ddp.module, real)
    assert_unsynchronised_raises("gradient_penalty", lazy.backward)
    by_hand = input_gradient(ddp.module, real, engine=engine).square().sum()
    assert_unsynchronised_raises("input_gradient", by_hand.backward)
    in_a_part = DistributedDataParallel(CriticLoss(make_critic(), engine=engine))
    assert_unsynchronised_raises("gradient_penalty", penalty_of(in_a_part.module.critic, engine).backward)


@check(engine=ENGINES)
def penalty_accumulated_before_the_synchronised_pass(engine: str) -> None:
    ddp = DistributedDataParallel(make_critic())
    outside = penalty_of(ddp.module, engine)
    with ddp.no_sync():
        (4 * outside).backward()
        (6 * penalty_of(ddp.module, engine)).backward()
    scores_loss(ddp).backward()
    assert_synchronised(ddp)


@check(engine=ENGINES)
def values_and_measured_gradients_do_not_raise(engine: str) -> None:
    ddp = DistributedDataParallel(make_critic())
    with torch.no_grad():
        penalty_of(ddp.module, engine)
    torch.autograd.grad(penalty_of(ddp.module, engine), ddp.module[0].weight)
    assert all(p.grad is None for p in ddp.parameters())
    joint_loss(ddp, engine).backward()
    torch.autograd.grad(penalty_of(ddp.module, engine), ddp.module[0].weight)
    assert_synchronised(ddp)


@check(engine=ENGINES)
def critics_without_ddp_do_not_raise(engine: str) -> None:
    ddp, other = DistributedDataParallel(make_critic()), make_critic()
    penalty_of(other, engine).backward()
    once_wrapped = ddp.module
    assert_unsynchronised_raises("gradient_penalty", penalty_of(once_wrapped, engine).backward)
    del ddp
    gc.collect()
    penalty_of(once_wrapped, engine).backward()
    again = DistributedDataParallel(once_wrapped)
    again.zero_grad()
    joint_loss(again, engine).backward()
    assert_synchronised(again)
    assert_unsynchronised_raises("gradient_penalty", penalty_of(once_wrapped, engine).backward)


@check(engine=ENGINES)
def critics_are_seen_when_wrapped_later_or_again(engine: str) -> None:
    critic = make_critic()
    penalty_of(critic, engine).backward()
    first = DistributedDataParallel(critic)
    assert_unsynchronised_raises("gradient_penalty", penalty_of(critic, engine).backward)
    second = DistributedDataParallel(critic)
    for _ in range(2):
        second.zero_grad()
        joint_loss(second, engine).backward()
        assert_synchronised(second)
    assert_unsynchronised_raises("gradient_penalty", penalty_of(critic, engine).backward)
    assert first.module is second.module


@check(engine=ENGINES)
def wrapper_of_one_process_does_not_raise(engine: str) -> None:
    groups = [dist.new_group([rank]) for rank in range(PROCESSES)]
    ddp = DistributedDataParallel(make_critic(), process_group=groups[dist.get_rank()])
    penalty_of(ddp.module, engine).backward()


@check(engine=ENGINES)
def wrapped_critics_are_refused(engine: str) -> None:
    ddp = DistributedDataParallel(make_critic())
    refused = r"gradient_penalty: the critic is wrapped in DistributedDataParallel.*Wrap wgan_ext\.CriticLoss\(critic\)"
    with pytest.raises(NotImplementedError, match=refused):
        penalty_of(ddp, engine)


# FSDP


def sharded(module: nn.Module, *parts: nn.Module, **options: Any) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (PROCESSES,))
    for part in (*parts, module):
        fully_shard(part, mesh=mesh, **options)
    return module


@check(engine=ENGINES, reshard_after_forward=(True, False))
def loss_in_fsdp(engine: str, reshard_after_forward: bool) -> None:
    loss = sharded(CriticLoss(make_critic(), engine=engine), reshard_after_forward=reshard_after_forward)
    real, fake, mix = my_batch()
    for _ in range(3):
        loss.zero_grad()
        loss(real, fake, mix=mix).backward()
        assert_synchronised(loss)


@check(engine=ENGINES)
def loss_in_fsdp_accumulates(engine: str) -> None:
    loss = sharded(CriticLoss(make_critic(), engine=engine))
    real, fake, mix = my_batch()
    loss.set_requires_gradient_sync(False)
    loss(real, fake, mix=mix).backward()
    loss.set_requires_gradient_sync(True)
    loss(real, fake, mix=mix).backward()
    assert_synchronised(loss, backward_passes=2)


@check(engine=ENGINES)
def sharded_critics_are_refused(engine: str) -> None:
    critic = sharded(make_critic())
    with pytest.raises(NotImplementedError, match=r"the critic is sharded by FSDP .*CriticLoss\(critic\), and nothing"):
        penalty_of(critic, engine)
    with pytest.raises(NotImplementedError, match="explain: the critic is sharded by FSDP"):
        explain(critic, my_batch()[0])


@check(engine=ENGINES)
def sharded_parts_of_the_loss_are_refused(engine: str) -> None:
    real, fake, mix = my_batch()
    critic = make_critic()
    with pytest.raises(
        NotImplementedError, match=r"layer '2' of the critic is sharded by FSDP .*and nothing inside it"
    ):
        sharded(CriticLoss(critic, engine=engine), critic[2])(real, fake, mix=mix)
    critic = make_critic()
    with pytest.raises(NotImplementedError, match=r"the critic is sharded by FSDP .*and nothing inside it"):
        sharded(CriticLoss(critic, engine=engine), critic)(real, fake, mix=mix)


@check(engine=ENGINES)
def sharded_parameters_outside_their_forward_are_refused(engine: str) -> None:
    loss = sharded(CriticLoss(make_critic(), engine=engine))
    with pytest.raises(
        NotImplementedError, match=r"parameter '0.weight' of the critic is a DTensor.*not in its forward"
    ):
        penalty_of(loss.critic, engine)


@check(engine=ENGINES)
def tensor_parallel_critics_are_refused(engine: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    critic = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 1)).double()
    mesh = init_device_mesh("cpu", (PROCESSES,))
    parallelize_module(critic, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    with pytest.raises(NotImplementedError, match=r"is a DTensor.*tensor parallel, which is not supported"):
        penalty_of(critic, engine)


# Spectral norm

SPECTRAL = {
    "hook": (spectral_norm, nn.utils.spectral_norm),
    "parametrization": (parametrizations.spectral_norm, nn.utils.parametrizations.spectral_norm),
}


def normalized_critic(normalize: Callable[..., Any], seed: int = 2) -> nn.Sequential:
    critic = make_critic()
    torch.manual_seed(seed)  # of the vectors, which are random at first
    for i in (0, 2, 4):
        normalize(critic[i])
    return critic


def in_ddp(module: nn.Module, broadcast_buffers: bool) -> DistributedDataParallel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 prefers another option, which does broadcast once
        return DistributedDataParallel(module, broadcast_buffers=broadcast_buffers)


def train(module: nn.Module, *batch: Tensor, steps: int = 3) -> None:
    """Steps on D(fake) - D(real)."""
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    real, fake, *_ = batch
    for _ in range(steps):
        optimizer.zero_grad()
        (module(fake).mean() - module(real).mean()).backward()
        optimizer.step()


def states(module: nn.Module) -> list[dict[str, Tensor]]:
    """The module's parameters and buffers in each process."""
    mine = {key: value.clone() for key, value in module.state_dict().items()}
    gathered: list[Any] = [None] * PROCESSES
    dist.all_gather_object(gathered, mine)
    return gathered


def assert_same_everywhere(module: nn.Module) -> None:
    first, *others = states(module)
    for other in others:
        for key, value in first.items():
            assert torch.equal(value, other[key]), key


def assert_trained_as_in_one_process(module: nn.Module, normalize: Callable[..., Any]) -> None:
    alone = normalized_critic(normalize)
    train(alone, *whole_batch())
    for key, value in alone.state_dict().items():
        torch.testing.assert_close(module.state_dict()[key], value, msg=lambda m, key=key: f"{key}: {m}")


@check(interface=SPECTRAL, broadcast_buffers=(True, False))
def spectral_vectors_are_those_of_one_process(interface: str, broadcast_buffers: bool) -> None:
    """Vectors that are equal at first stay equal, bit by bit, though no process sees the other's."""
    for normalize in SPECTRAL[interface]:
        ddp = in_ddp(normalized_critic(normalize), broadcast_buffers)
        train(ddp, *my_batch())
        assert_same_everywhere(ddp.module)
        assert_trained_as_in_one_process(ddp.module, SPECTRAL[interface][1])


@check(interface=SPECTRAL)
def spectral_vectors_are_broadcast(interface: str) -> None:
    """Seeds that differ do not matter: DDP gives all processes the vectors of the first."""
    ddp = DistributedDataParallel(normalized_critic(SPECTRAL[interface][0], seed=2 + dist.get_rank()))
    assert_same_everywhere(ddp.module)
    train(ddp, *my_batch())
    assert_same_everywhere(ddp.module)
    assert_trained_as_in_one_process(ddp.module, SPECTRAL[interface][1])


@check(interface=SPECTRAL)
def spectral_vectors_that_differ_do_as_torchs(interface: str) -> None:
    """Without broadcasts each process keeps its own, of one weight."""
    trained = []
    for normalize in SPECTRAL[interface]:
        ddp = in_ddp(normalized_critic(normalize, seed=2 + dist.get_rank()), broadcast_buffers=False)
        train(ddp, *my_batch())
        trained.append(ddp.module.state_dict())
        first, second = states(ddp.module)
        for key, value in first.items():
            if not key.endswith(("_u", "_v")):
                assert torch.equal(value, second[key]), key
            elif key.startswith("0."):
                assert not torch.equal(value, second[key]), key
    torch.testing.assert_close(*trained)


@check(interface=SPECTRAL, reshard_after_forward=(True, False))
def spectral_norm_in_fsdp(interface: str, reshard_after_forward: bool) -> None:
    """In the forward of a sharded module the weights are whole."""
    normalize = SPECTRAL[interface][0]
    critic = sharded(normalized_critic(normalize), reshard_after_forward=reshard_after_forward)
    train(critic, *my_batch())
    alone = normalized_critic(SPECTRAL[interface][1])
    train(alone, *whole_batch())
    for key, value in critic.state_dict().items():
        full = value.full_tensor() if hasattr(value, "full_tensor") else value
        torch.testing.assert_close(full, alone.state_dict()[key])


@check(interface=SPECTRAL)
def spectral_norm_of_sharded_weights_is_refused(interface: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    normalize = SPECTRAL[interface][0]
    with pytest.raises(NotImplementedError, match=r"spectral_norm: module is sharded by FSDP \(FSDPModule\)"):
        normalize(sharded(nn.Linear(5, 8)))
    mesh = init_device_mesh("cpu", (PROCESSES,))
    with pytest.raises(NotImplementedError, match=r"spectral_norm: the weight is a DTensor"):
        normalize(parallelize_module(nn.Linear(5, 8), mesh, ColwiseParallel()))
    critic = sharded(normalized_critic(normalize))
    with pytest.raises(NotImplementedError, match=r"spectral_norm: the weight is a DTensor"):
        critic[0](my_batch()[0])


# Running them


def run_checks(rank: int, folder: str) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", PROCESSES)
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=PROCESSES, timeout=timeout)
    failures = {}
    for name, run in CHECKS.items():
        try:
            run()
        except (Exception, pytest.fail.Exception):
            failures[name] = traceback.format_exc()
        dist.barrier()
    Path(folder, f"{rank}.json").write_text(json.dumps(failures))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """Of each process, the traceback of each check that failed."""
    folder = tmp_path_factory.mktemp("distributed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("TORCH_CPP_LOG_LEVEL", "ERROR")
        torch.multiprocessing.spawn(run_checks, (os.fspath(folder),), nprocs=PROCESSES)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(PROCESSES)]


@pytest.mark.parametrize("name", CHECKS)
def test_in_two_processes(failures: list[dict[str, str]], name: str) -> None:
    failed = [f"process {rank}: {texts[name]}" for rank, texts in enumerate(failures) if name in texts]
    if failed:
        pytest.fail("\n".join(failed), pytrace=False)


# In this process


@pytest.fixture
def world_of_one(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("world_of_one")
@pytest.mark.parametrize("engine", ENGINES)
def test_one_process_needs_no_synchronisation(engine: str) -> None:
    ddp = DistributedDataParallel(make_critic())
    penalty_of(ddp.module, engine, whole_batch()).backward()
    (scores_loss(ddp, whole_batch()) + 10 * penalty_of(ddp.module, engine, whole_batch())).backward()
    assert_synchronised(ddp, penalty=11)


@pytest.mark.parametrize("engine", ENGINES)
def test_data_parallel(engine: str) -> None:
    real, fake, mix = whole_batch()
    with pytest.raises(
        NotImplementedError, match=r"gradient_penalty: the critic is wrapped in DataParallel.*CriticLoss"
    ):
        penalty_of(DataParallel(make_critic()), engine, whole_batch())
    critic = DataParallel(make_critic())
    (scores_loss(critic, whole_batch()) + 10 * penalty_of(critic.module, engine, whole_batch())).backward()
    assert_synchronised(critic)
    loss = DataParallel(CriticLoss(make_critic(), engine=engine))
    loss(real, fake, mix=mix).backward()
    assert_synchronised(loss)


def replicate(module: Any) -> Any:
    """As torch.nn.parallel.replicate, for a CPU: parameters of a replica are attributes, copied in the graph."""
    replica = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        replica._modules[name] = replicate(child)
    for name, parameter in module._parameters.items():
        setattr(replica, name, parameter.clone())
    return replica


@pytest.mark.parametrize("engine", ENGINES)
def test_replicas_of_data_parallel(engine: str) -> None:
    loss = CriticLoss(make_critic(), engine=engine)
    chunks = zip(*(t.chunk(2) for t in whole_batch()), strict=True)
    torch.stack([replicate(loss)(real, fake, mix=mix) for real, fake, mix in chunks]).mean().backward()
    assert_synchronised(loss)


class Inner(nn.Module):
    """A critic of one wrapped part."""

    def __init__(self, wrap: Any) -> None:
        super().__init__()
        self.inner = wrap(make_critic())

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


# Each critic, made with a wrapper around one of its layers.
WRAPPED_LAYERS: dict[str, Callable[[Any], nn.Module]] = {
    "a layer": lambda wrap: nn.Sequential(wrap(nn.Linear(5, 9)), nn.ReLU(), nn.Linear(9, 1)),
    "a part of a part": lambda wrap: nn.Sequential(
        nn.Linear(5, 9), nn.Sequential(nn.ReLU(), wrap(nn.Sequential(nn.Linear(9, 7), nn.ReLU()))), nn.Linear(7, 1)
    ),
    "all of it": Inner,
}


@pytest.mark.usefixtures("world_of_one")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("wrapper", [DistributedDataParallel, DataParallel])
@pytest.mark.parametrize("name", WRAPPED_LAYERS)
def test_wrapped_layers_are_refused(name: str, wrapper: Any, engine: Any) -> None:
    real, fake, mix = whole_batch()
    critic = WRAPPED_LAYERS[name](wrapper).double()
    refused = rf"of the critic is wrapped in {wrapper.__name__}"
    for _ in range(2):  # also with a plan
        with pytest.raises(NotImplementedError, match=rf"gradient_penalty: .*{refused}"):
            penalty_of(critic, engine, whole_batch())
        with pytest.raises(NotImplementedError, match=rf"input_gradient: .*{refused}"):
            input_gradient(critic, real, engine=engine)
        with pytest.raises(NotImplementedError, match=rf"wgan_gp_loss: .*{refused}"):
            CriticLoss(critic, engine=engine)(real, fake, mix=mix)
        with pytest.raises(NotImplementedError, match=rf"explain: .*{refused}"):
            explain(critic, real)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", WRAPPED_LAYERS)
def test_layers_in_data_parallel_are_refused_without_processes(name: str, engine: Any) -> None:
    critic = WRAPPED_LAYERS[name](lambda layer: layer).double()
    penalty_of(critic, engine, whole_batch())
    critic = WRAPPED_LAYERS[name](DataParallel).double()
    with pytest.raises(NotImplementedError, match=r"gradient_penalty: .*of the critic is wrapped in DataParallel"):
        penalty_of(critic, engine, whole_batch())
