"""What both interfaces of spectral normalization promise, with torch's own as the specification."""

from __future__ import annotations

import copy
import inspect
import io
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call
from torch.nn import utils as torch_utils
from torch.nn.utils import parametrizations as torch_parametrizations
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves

import wgan_ext

DOUBLE = torch.float64
Normalize = Callable[..., Any]


class Interface:
    """One of the two: our function, torch's, and where they keep things."""

    def __init__(
        self, ours: Normalize, theirs: Normalize, places: dict[str, str], removes: tuple[Normalize, Normalize]
    ):
        self.ours, self.theirs, self.places = ours, theirs, places
        self.our_remove, self.their_remove = removes

    def key(self, what: str, name: str = "weight") -> str:
        return self.places[what].format(name)

    def get(self, what: str, module: nn.Module, name: str = "weight") -> Any:
        return operator.attrgetter(self.key(what, name))(module)

    def pair(self, make: Callable[[], nn.Module], **options: Any) -> tuple[Any, Any]:
        """The same module normalized by torch and by us, in the same state."""
        module = make()
        modules = []
        for normalize in (self.theirs, self.ours):
            torch.manual_seed(1)
            modules.append(normalize(copy.deepcopy(module), **options))
        modules[1].load_state_dict(modules[0].state_dict())
        return modules[0], modules[1]


INTERFACES = {
    "hook": Interface(
        wgan_ext.spectral_norm,
        torch_utils.spectral_norm,
        {"original": "{}_orig", "u": "{}_u", "v": "{}_v"},
        (wgan_ext.remove_spectral_norm, torch_utils.remove_spectral_norm),
    ),
    "parametrization": Interface(
        wgan_ext.parametrizations.spectral_norm,
        torch_parametrizations.spectral_norm,
        {
            "original": "parametrizations.{}.original",
            "u": "parametrizations.{}.0._u",
            "v": "parametrizations.{}.0._v",
        },
        (parametrize.remove_parametrizations, parametrize.remove_parametrizations),
    ),
}


@pytest.fixture(params=INTERFACES)
def api(request: pytest.FixtureRequest) -> Interface:
    return INTERFACES[request.param]


def linear() -> nn.Linear:
    return nn.Linear(4, 3)


X = torch.linspace(-1, 1, 8).view(2, 4)


def assert_same_states(a: nn.Module, b: nn.Module, **tolerances: float) -> None:
    first, second = a.state_dict(), b.state_dict()
    assert list(first) == list(second)
    for key in first:
        torch.testing.assert_close(first[key], second[key], **tolerances, msg=lambda m, key=key: f"{key}: {m}")


def formula_or_operator(formula: bool) -> Any:
    """Within it our module takes the formula of torch's operators, or the operator."""
    return forward_ad.dual_level() if formula else torch.enable_grad()


# ---- training and evaluation

Case = tuple[Callable[[], nn.Module], str, Callable[[], tuple[Any, ...]]]


def images(*shape: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randn(shape, dtype=DOUBLE),)


def attention_inputs() -> tuple[Tensor, ...]:
    x = torch.randn(5, 2, 4, dtype=DOUBLE)
    return x, x, x


MODULES: dict[str, Case] = {
    "linear": (lambda: nn.Linear(6, 5), "weight", images(4, 6)),
    "large linear": (lambda: nn.Linear(200, 300), "weight", images(4, 200)),
    "bias": (lambda: nn.Linear(6, 5), "bias", images(4, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), "weight", images(2, 4, 8)),
    "grouped conv2d": (lambda: nn.Conv2d(4, 6, 3, groups=2), "weight", images(2, 4, 6, 6)),
    "channels_last": (lambda: nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last), "weight", images(2, 4, 6, 6)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), "weight", images(2, 2, 4, 4, 4)),
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(4, 6, 3), "weight", images(2, 4, 5)),
    "grouped conv_transpose2d": (lambda: nn.ConvTranspose2d(6, 4, 3, groups=2), "weight", images(2, 6, 5, 5)),
    "conv_transpose3d": (lambda: nn.ConvTranspose3d(2, 3, 2), "weight", images(2, 2, 3, 3, 3)),
    "embedding": (lambda: nn.Embedding(10, 4), "weight", lambda: (torch.randint(10, (2, 3)),)),
    "bilinear": (
        lambda: nn.Bilinear(3, 4, 5),
        "weight",
        lambda: (torch.randn(2, 3, dtype=DOUBLE), torch.randn(2, 4, dtype=DOUBLE)),
    ),
    "lstm": (lambda: nn.LSTM(3, 4, 2), "weight_hh_l0", images(5, 3)),
    "attention": (lambda: nn.MultiheadAttention(4, 2), "in_proj_weight", attention_inputs),
    "layer norm": (lambda: nn.LayerNorm(6), "weight", images(4, 6)),
}


@pytest.mark.parametrize("n_power_iterations", [1, 3])
@pytest.mark.parametrize("case", MODULES)
def test_training_is_torchs(api: Interface, case: str, n_power_iterations: int, device: torch.device) -> None:
    """Outputs of two batches, gradients through both, steps, evaluation, a step under no_grad: the same all along."""
    make, name, inputs = MODULES[case]
    models = api.pair(lambda: make().double().to(device), name=name, n_power_iterations=n_power_iterations)
    assert_same_states(*models, rtol=0, atol=0)
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in models]
    for step in range(5):
        batches = [[t.to(device) for t in inputs()] for _ in range(2)]
        results = []
        for model, optimizer in zip(models, optimizers, strict=True):
            model.train(step != 3)
            with torch.no_grad():
                model(*batches[0])
            first, second = (tree_leaves(model(*batch))[0].square().mean() for batch in batches)
            optimizer.zero_grad()
            (first - second).backward()
            results.append([first, second, *(p.grad for p in model.parameters())])
            optimizer.step()
        torch.testing.assert_close(results[0], results[1], rtol=1e-8, atol=1e-10)
        assert_same_states(*models, rtol=1e-9, atol=1e-11)
    theirs, ours = (m.eval()(*batches[0]) for m in models)
    torch.testing.assert_close(tree_leaves(theirs), tree_leaves(ours))


@pytest.mark.parametrize("shape", [(64, 96), (256, 512), (16, 32, 3, 3), (24, 16, 3)])
def test_iterates_of_float32_are_those_of_float64(api: Interface, shape: tuple[int, ...], device: torch.device) -> None:
    """Over 500 steps of one sequence of weights: rounding does not add up."""
    channels = shape[1], shape[0]
    make = {
        2: lambda: nn.Linear(*channels, bias=False),
        3: lambda: nn.ConvTranspose1d(*shape[:2], 3, bias=False),
        4: lambda: nn.Conv2d(*channels, 3, bias=False),
    }[len(shape)]
    theirs, ours = api.pair(make)
    theirs, ours = theirs.double().to(device), ours.to(device)
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(shape, generator=generator)
    for _ in range(500):
        weight = weight + 0.02 * torch.randn(shape, generator=generator)
        iterates = []
        for module in (theirs, ours):
            original = api.get("original", module)
            with torch.no_grad():
                original.copy_(weight)
                for hook in module._forward_pre_hooks.values():
                    hook(module, ())
                sigma = original.double().norm() / module.weight.double().norm()
            iterates.append([api.get("u", module).double(), api.get("v", module).double(), sigma])
        for want, got in zip(*iterates, strict=True):
            assert (got - want).norm() <= 2e-6 * want.norm()


def test_evaluation_follows_the_weight_and_iterates_not(api: Interface) -> None:
    _, module = api.pair(linear)
    module(X)
    module.eval()
    before = {what: api.get(what, module).clone() for what in "uv"}
    first = module(X) - module.bias
    with torch.no_grad():
        api.get("original", module).mul_(3.0)
    second = module(X) - module.bias
    torch.testing.assert_close(second, first)  # sigma follows
    with torch.no_grad():
        api.get("original", module)[0] += 1.0
    module(X).sum().backward()
    assert all(torch.equal(api.get(what, module), before[what]) for what in "uv")
    assert api.get("original", module).grad.count_nonzero() > 0


@pytest.mark.parametrize("no_grad", [False, True])
def test_buffers_are_updated_in_place(api: Interface, no_grad: bool) -> None:
    _, module = api.pair(linear)
    buffers = [api.get(what, module) for what in "uv"]
    pointers, versions = [b.data_ptr() for b in buffers], [b._version for b in buffers]
    values = [b.clone() for b in buffers]
    with torch.set_grad_enabled(not no_grad):
        module(X)
        module(X)
    for what, buffer, value, pointer, version in zip("uv", buffers, values, pointers, versions, strict=True):
        assert api.get(what, module) is buffer
        assert buffer.data_ptr() == pointer
        assert buffer._version > version
        assert not torch.equal(buffer, value)
        assert not buffer.requires_grad


def test_results_of_two_forwards_share_no_vectors(api: Interface) -> None:
    """D(real) - D(fake): the first backward uses the vectors of the first forward."""
    gradients = []
    for module in api.pair(lambda: linear().double()):
        x, y = X.double(), X.double().flip(1).exp()
        module(x)
        (module(x).square().sum() - module(y).square().sum()).backward()
        gradients.append(api.get("original", module).grad)
        state = copy.deepcopy(module.state_dict())
        for separate in (x, y):
            module(separate).square().sum().backward()
        assert not torch.equal(state[api.key("u")], api.get("u", module))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("formula", [True, False])
def test_an_evaluation_shares_no_vectors_with_training(api: Interface, formula: bool) -> None:
    """Torch's hook refuses the backward pass: its evaluations use the buffers themselves."""
    _, module = api.pair(linear)
    with formula_or_operator(formula):
        loss = module.eval()(X).square().sum()
        (expected,) = torch.autograd.grad(loss, api.get("original", module), retain_graph=True)
        module.train()(X)
        loss.backward()
    torch.testing.assert_close(api.get("original", module).grad, expected)


# ---- names, keys, checkpoints


def test_signature(api: Interface) -> None:
    """Torch's, and options of our own by keyword alone."""
    ours, theirs = (list(inspect.signature(f).parameters.values()) for f in (api.ours, api.theirs))
    shared = ours[: len(theirs)]
    assert [(p.name, p.kind, p.default) for p in shared] == [(p.name, p.kind, p.default) for p in theirs]
    assert all(p.kind is p.KEYWORD_ONLY for p in ours[len(theirs) :])


@pytest.mark.parametrize("case", MODULES)
def test_names_shapes_and_metadata_are_torchs(api: Interface, case: str) -> None:
    make, name, _ = MODULES[case]
    theirs, ours = api.pair(make, name=name)
    for kind in ("named_parameters", "named_buffers", "named_modules"):
        of_theirs, of_ours = ([n for n, _ in getattr(m, kind)()] for m in (theirs, ours))
        assert of_theirs == of_ours
    assert type(theirs).__name__ == type(ours).__name__
    assert repr(theirs) == repr(ours)
    states = theirs.state_dict(), ours.state_dict()
    assert states[0]._metadata == states[1]._metadata
    for a, b in zip(*(s.values() for s in states), strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


def test_the_parameter_stays_the_same_object(api: Interface) -> None:
    module = linear()
    weight, values = module.weight, module.weight.detach().clone()
    assert api.ours(module) is module
    assert api.get("original", module) is weight
    assert torch.equal(weight, values)


@pytest.mark.parametrize("dim", [None, 0, 1, 2, 3])
@pytest.mark.parametrize("make", [lambda: nn.Conv2d(4, 6, (2, 3)), lambda: nn.ConvTranspose2d(4, 6, (2, 3))])
def test_dim(api: Interface, make: Callable[[], nn.Module], dim: int | None) -> None:
    theirs, ours = api.pair(lambda: make().double(), dim=dim)
    x = torch.randn(2, 4, 5, 5, dtype=DOUBLE)
    torch.testing.assert_close(theirs(x), ours(x))
    assert_same_states(theirs, ours, rtol=1e-11, atol=1e-12)
    if dim is not None:
        negative = api.ours(make().double(), dim=dim - 4)
        assert api.get("u", negative).shape == api.get("u", ours).shape


def test_initial_vectors_are_torchs(api: Interface) -> None:
    """From one seed; the parametrization's have 15 iterations behind them, and the one of its registration."""
    for dtype, tolerance in ((DOUBLE, 1e-13), (torch.float32, 1e-6)):
        for train in (True, False):
            module = linear().to(dtype).train(train)
            states, modes = [], []
            for normalize in (api.theirs, api.ours):
                torch.manual_seed(5)
                normalized = normalize(copy.deepcopy(module))
                states.append(normalized.state_dict())
                modes.append([m.training for m in normalized.modules()])
            torch.testing.assert_close(*states, rtol=0, atol=tolerance)
            assert modes[0] == modes[1]


def test_checkpoints_go_both_ways(api: Interface) -> None:
    theirs, ours = api.pair(linear)
    for source, target in ((theirs, ours), (ours, theirs)):
        source(X)
        stream = io.BytesIO()
        torch.save(source.state_dict(), stream)
        stream.seek(0)
        buffers = [api.get(what, target) for what in "uv"]
        target.load_state_dict(torch.load(stream))
        assert_same_states(source, target, rtol=0, atol=0)
        assert all(api.get(what, target) is buffer for what, buffer in zip("uv", buffers, strict=True))
        torch.testing.assert_close(source.eval()(X), target.eval()(X))
        source.train()
        target.train()


@pytest.mark.parametrize("missing", ["original", "u", "v"])
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("with_metadata", [True, False])
def test_missing_keys_are_torchs(api: Interface, missing: str, strict: bool, with_metadata: bool) -> None:
    """Without metadata a state dict counts as one of the hook's version 0."""
    results: list[Any] = []
    for module in api.pair(linear):
        state: Any = module.state_dict() if with_metadata else dict(module.state_dict())
        del state[api.key(missing)]
        state["surplus"] = torch.ones(1)
        try:
            results.append(module.load_state_dict(state, strict=strict))
        except RuntimeError as error:
            results.append(str(error))
        bare = dict(module.state_dict())  # without metadata
        module.load_state_dict(bare)
    assert results[0] == results[1]
    assert isinstance(results[0], str) == strict


def test_load_hooks_of_the_user_run(api: Interface) -> None:
    seen = []
    for module in api.pair(linear):
        module.register_load_state_dict_post_hook(lambda m, keys: seen.append(list(keys.missing_keys)))
        module.register_load_state_dict_pre_hook(lambda m, state, *_: state.pop("surplus", None))
        module.load_state_dict(module.state_dict() | {"surplus": torch.ones(1)})
    assert seen == [[], []]


def test_one_vector_set_for_each_name(api: Interface) -> None:
    theirs, ours = api.pair(lambda: nn.LSTM(3, 4).double(), name="weight_hh_l0")
    for module, normalize in ((theirs, api.theirs), (ours, api.ours)):
        torch.manual_seed(5)
        normalize(module, "weight_ih_l0")
    x = torch.ones(5, 3, dtype=DOUBLE)
    torch.testing.assert_close(theirs(x)[0], ours(x)[0])
    assert_same_states(theirs, ours)
    assert theirs.state_dict()._metadata == ours.state_dict()._metadata
    api.our_remove(ours, "weight_hh_l0")
    assert api.key("u", "weight_ih_l0") in ours.state_dict()
    assert api.key("u", "weight_hh_l0") not in ours.state_dict()
    ours.load_state_dict(ours.state_dict())
    ours(x)


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("of", ["ours", "theirs"])
@pytest.mark.parametrize("trained", [True, False])
def test_removal_across_the_libraries(api: Interface, of: str, trained: bool, name: str) -> None:
    """Each library's removal of each library's module does what torch's does of its own."""
    made = linear().double()
    expected, ours = api.pair(lambda: made, name=name)
    theirs, _ = api.pair(lambda: made, name=name)  # a copy of a parametrized module would share its class
    other, remove = (ours, api.their_remove) if of == "ours" else (theirs, api.our_remove)
    for module in (expected, other):
        module.train(trained)
        module(X.double())
    api.their_remove(expected, name)
    assert remove(other, name) is other
    assert type(other) is nn.Linear
    assert isinstance(getattr(other, name), nn.Parameter)
    assert_same_states(expected, other)
    assert list(dict(other.named_parameters())) == list(dict(expected.named_parameters()))
    assert not other._forward_pre_hooks
    assert not other._state_dict_hooks
    other(X.double()).sum().backward()
    assert getattr(other, name).grad is not None
    with pytest.raises(ValueError, match=name):
        remove(other, name)


# ---- copies, ties, replicas


def test_copies_go_on_alone(api: Interface) -> None:
    model = nn.Sequential(api.ours(nn.Linear(4, 4)), nn.ReLU(), api.ours(nn.Linear(4, 1)))
    model(X).sum().backward()
    first = copy.deepcopy(model)
    second = copy.deepcopy(first)
    assert_same_states(model, second, rtol=0, atol=0)
    before = copy.deepcopy(model.state_dict())
    expected = copy.deepcopy(model)(X)
    torch.testing.assert_close(second(X), expected)
    second(X).sum().backward()
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    assert not torch.equal(api.get("u", second[0]), api.get("u", model[0]))
    assert type(second[0]) is type(first[0])
    assert second.state_dict()._metadata == model.state_dict()._metadata


def test_tied_weights_stay_tied(api: Interface) -> None:
    models = []
    for normalize in (api.theirs, api.ours):
        torch.manual_seed(2)
        a, b = nn.Linear(4, 4).double(), nn.Linear(4, 4).double()
        b.weight = a.weight
        normalize(a)
        normalize(b)
        models.append((a, b))
        assert api.get("original", a) is api.get("original", b)
        assert api.get("u", a).data_ptr() != api.get("u", b).data_ptr()
        (a(X.double()) + b(X.double()) ** 2).sum().backward()
    torch.testing.assert_close(*(api.get("original", a).grad for a, _ in models))


def replicate(module: Any) -> Any:
    """As torch.nn.parallel.replicate on one device: parameters are attributes in a graph, buffers are shared."""
    replica = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        replica._modules[name] = replicate(child)
    for name, parameter in module._parameters.items():
        setattr(replica, name, None if parameter is None else parameter.clone())
    return replica


def test_replicas_share_the_buffers(api: Interface) -> None:
    """DataParallel: two replicas iterate on the buffers of the module, and their gradients reach it."""
    results = []
    for module in api.pair(lambda: linear().double()):
        before = api.get("u", module).clone()
        replicas = [replicate(module) for _ in range(2)]
        (replicas[0](X.double()) - replicas[1](X.double()) ** 2).sum().backward()
        assert not torch.equal(api.get("u", module), before)
        results.append([api.get("original", module).grad, api.get("u", module), api.get("v", module)])
    torch.testing.assert_close(*results)


def test_functional_calls_iterate_on_the_buffers_that_are_given(api: Interface) -> None:
    results = []
    for module in api.pair(lambda: linear().double()):
        before = copy.deepcopy(module.state_dict())
        given = {key: value.clone() for key, value in module.state_dict().items()}
        results.append([functional_call(module, given, (X.double(),)), given])
        for key, value in module.state_dict().items():
            assert torch.equal(value, before[key])
        assert not torch.equal(given[api.key("u")], before[api.key("u")])
    torch.testing.assert_close(*results)


# ---- derivatives


# torch's own use of torch.jit.script, at the first forward-mode derivative of a process
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("make", [lambda: nn.Linear(3, 2), lambda: nn.ConvTranspose1d(2, 3, 2)])
def test_derivatives_of_the_module(api: Interface, make: Callable[[], nn.Module]) -> None:
    _, module = api.pair(lambda: make().double().eval())
    x = torch.randn(2, 3, dtype=DOUBLE) if isinstance(module, nn.Linear) else torch.randn(2, 2, 4, dtype=DOUBLE)
    weight = api.get("original", module).detach().clone().requires_grad_()

    def scores(weight: Tensor, x: Tensor) -> Tensor:
        return functional_call(module, {api.key("original"): weight}, (x,))

    x.requires_grad_()
    assert gradcheck(scores, (weight, x))
    assert gradgradcheck(scores, (weight, x))
    assert gradcheck(scores, (weight, x), check_forward_ad=True)


def test_gradient_penalty_through_the_layers(api: Interface, device: torch.device) -> None:
    """Second derivatives by the weight, as a gradient penalty takes them, in training: torch's."""
    results = []
    for normalize in (api.theirs, api.ours):
        torch.manual_seed(3)
        critic = nn.Sequential(normalize(nn.Linear(5, 7)), nn.Tanh(), normalize(nn.Linear(7, 1))).double().to(device)
        x = torch.randn(6, 5, dtype=DOUBLE, device=device, requires_grad=True)
        (grad,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
        penalty = (grad.norm(dim=1) - 1).square().mean()
        weights = [api.get("original", critic[i]) for i in (0, 2)]
        results.append(torch.autograd.grad(penalty, weights))
    torch.testing.assert_close(*results)


def transforms(scores: Callable[[Tensor, Tensor], Tensor], weight: Tensor, x: Tensor) -> dict[str, Callable[[], Any]]:
    """Calls of torch.func; scores is a function of the weight and a batch or a sample."""
    tangent = torch.linspace(-1, 1, weight.numel(), dtype=weight.dtype).view_as(weight)
    weights = torch.stack([weight, weight + tangent])

    def loss(weight: Tensor, x: Tensor) -> Tensor:
        return scores(weight, x).square().sum()

    gradient = torch.func.grad
    return {
        "grad": lambda: gradient(loss)(weight, x),
        "vjp": lambda: torch.func.vjp(lambda w: scores(w, x), weight)[0],
        "jacrev": lambda: torch.func.jacrev(scores)(weight, x),
        "gradient of each sample": lambda: torch.vmap(torch.func.grad(loss), (None, 0))(weight, x),
        "vmap over samples": lambda: torch.vmap(scores, (None, 0))(weight, x),
        "vmap over weights": lambda: torch.vmap(scores, (0, None))(weights, x),
        "gradient of each weight": lambda: torch.vmap(torch.func.grad(loss), (0, None))(weights, x),
        "jvp": lambda: torch.func.jvp(lambda w: scores(w, x), (weight,), (tangent,)),
        "jacfwd": lambda: torch.func.jacfwd(scores)(weight, x),
        "gradient of a penalty": lambda: torch.func.grad(lambda w: gradient(loss, 1)(w, x).square().sum())(weight),
        "gradient of a gradient": lambda: torch.func.grad(lambda w: gradient(loss)(w, x).square().sum())(weight),
        "forward over reverse": lambda: torch.func.jvp(lambda w: gradient(loss)(w, x), (weight,), (tangent,)),
        "hessian": lambda: torch.func.hessian(loss)(weight, x),
    }


TRANSFORMS = list(transforms(lambda w, x: w, X, X))
# torch refuses out= in forward mode
NOT_TORCHS_IN_TRAINING = ("jvp", "jacfwd", "forward over reverse", "hessian")
NOBODYS_IN_TRAINING = ("vmap over weights", "gradient of each weight")  # one u and v for many weights


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms(api: Interface, name: str, train: bool) -> None:
    results, states = [], []
    for module in api.pair(lambda: linear().double()):
        module.train(train)
        weight = api.get("original", module).detach()

        def scores(w: Tensor, x: Tensor, module: nn.Module = module) -> Tensor:
            return functional_call(module, {api.key("original"): w}, (x,))

        call = transforms(scores, weight, X.double())[name]
        if train and name in NOBODYS_IN_TRAINING:
            with pytest.raises((RuntimeError, NotImplementedError)):
                call()
            continue
        if train and name in NOT_TORCHS_IN_TRAINING and not results:
            module(X.double())  # its iteration; then, ours has that behind it too
            module.eval()
        results.append(call())
        states.append([api.get(what, module) for what in "uv"])
    if results:
        torch.testing.assert_close(*results)
        torch.testing.assert_close(*states)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("train", [True, False])
def test_forward_mode(api: Interface, train: bool) -> None:
    theirs, ours = api.pair(lambda: linear().double())
    weight = api.get("original", ours).detach()
    tangent = torch.randn_like(weight)
    ours.train(train)
    if train:
        theirs(X.double())
    theirs.eval()
    tangents = []
    for module in (theirs, ours):
        with forward_ad.dual_level():
            dual = {api.key("original"): forward_ad.make_dual(weight, tangent)}
            tangents.append(forward_ad.unpack_dual(functional_call(module, dual, (X.double(),))).tangent)
    torch.testing.assert_close(*tangents)
    assert_same_states(theirs, ours)


# ---- weights that are zero, not finite, of extreme size or of half precision


@pytest.mark.parametrize("formula", [True, False])
@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf])
@pytest.mark.parametrize("make", [linear, lambda: nn.Conv2d(4, 3, 2), lambda: nn.ConvTranspose1d(4, 3, 2)])
def test_bad_weights_leave_the_vectors(
    api: Interface, make: Callable[[], nn.Module], value: float, formula: bool, device: torch.device
) -> None:
    """Torch's module normalizes to NaN for good after a weight of zeros."""
    _, module = api.pair(make)
    module.to(device)
    original = api.get("original", module)
    weight = original.detach().clone()
    vectors = [api.get(what, module).clone() for what in "uv"]
    x = torch.ones(2, 4, *[3] * (weight.dim() - 2), device=device)
    with torch.no_grad():
        original.fill_(value)
    with formula_or_operator(formula):
        scores = module(x)
        assert all(torch.equal(api.get(what, module), v) for what, v in zip("uv", vectors, strict=True))
        if value == 0:
            scores.sum().backward()
            assert original.grad.isfinite().all()
            assert not module.eval().weight.any()
        else:
            assert scores.isnan().all()
    module.train()
    with torch.no_grad():
        original.copy_(weight)
        for _ in range(100):
            module(x)
    assert module.weight.isfinite().all()


@pytest.mark.parametrize("formula", [True, False])
@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e12, 1e30])
def test_vectors_are_units_whatever_the_size_of_the_weight(api: Interface, size: float, formula: bool) -> None:
    _, module = api.pair(linear)
    reference = copy.deepcopy(module)
    with torch.no_grad():
        api.get("original", module).mul_(size)
    with formula_or_operator(formula):
        torch.testing.assert_close(module(X), reference(X))
    for what in "uv":
        torch.testing.assert_close(api.get(what, module), api.get(what, reference))


def test_registration_of_a_zero_weight(api: Interface) -> None:
    module = linear()
    nn.init.zeros_(module.weight)
    api.ours(module)
    assert all(api.get(what, module).norm().item() == pytest.approx(1) for what in "uv")
    with torch.no_grad():
        api.get("original", module).normal_()
        for _ in range(200):
            module(X)
    assert torch.linalg.matrix_norm(module.weight.detach(), 2).item() == pytest.approx(1)


@pytest.mark.parametrize("formula", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(
    api: Interface, dtype: torch.dtype, formula: bool, device: torch.device
) -> None:
    module = api.ours(nn.Linear(40, 30).to(device, dtype))
    wide = copy.deepcopy(module).double()
    assert {t.dtype for t in module.state_dict().values()} == {dtype}
    x = torch.ones(2, 40, device=device, dtype=dtype)
    with formula_or_operator(formula):
        scores = module(x)
    wide(x.double())
    scores.sum().backward()
    assert api.get("original", module).grad.dtype == dtype
    normalized, exact = module.eval().weight.detach(), wide.eval().weight.detach()
    assert normalized.dtype == dtype
    # the vectors are rounded too: sigma has their error, squared, beside the rounding of the result
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(normalized.double(), exact, rtol=2 * eps, atol=eps * float(exact.abs().max()) / 4)
    for what in "uv":
        assert (api.get(what, module).double() - api.get(what, wide)).abs().max() <= eps / 2


@pytest.mark.parametrize("formula", [True, False])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_leaves_the_normalization_alone(
    api: Interface, train: bool, dtype: torch.dtype, formula: bool, device: torch.device
) -> None:
    _, module = api.pair(lambda: nn.Linear(40, 30))
    module.to(device).train(train)
    plain = copy.deepcopy(module)
    x = torch.ones(2, 40, device=device)
    with torch.autocast(device.type, dtype), formula_or_operator(formula):
        scores = module(x)
    assert scores.dtype == dtype
    plain(x)
    assert_same_states(module, plain)
    assert module.weight.dtype == torch.float32
    scores.float().sum().backward()
    assert api.get("original", module).grad.dtype == torch.float32


def test_meta(api: Interface) -> None:
    for make in (lambda: nn.Linear(4, 3, device="meta"), lambda: nn.ConvTranspose1d(4, 3, 2, device="meta")):
        for module in api.pair(make):
            module(torch.ones(2, 4, *([5] if isinstance(module, nn.ConvTranspose1d) else []), device="meta"))
            module.eval().weight.sum().backward()
            assert api.get("original", module).grad.is_meta
    materialized = api.ours(nn.Linear(4, 3, device="meta")).to_empty(device="cpu")
    materialized.load_state_dict(api.ours(linear()).state_dict())
    materialized(X)


# ---- compilers and exporters


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # inductor's own
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_without_a_break(api: Interface, backend: str, device: torch.device) -> None:
    """Forward and backward of a model, two calls in a graph, in training and then in evaluation."""

    def make() -> nn.Module:
        return nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 1)).to(device)

    models = []
    model = make()
    for normalize in (api.theirs, api.ours):
        torch.manual_seed(1)
        normalized = copy.deepcopy(model)
        for i in (0, 3):
            normalize(normalized[i])
        models.append(normalized)
    models[1].load_state_dict(models[0].state_dict())
    torch._dynamo.reset()

    def loss(model: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
        return model(fake).mean() - model(real).mean()

    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    real, fake = (torch.randn(2, 2, 4, 4, device=device) for _ in range(2))
    for train in (True, True, False):
        for function, module in ((loss, models[0]), (compiled, models[1])):
            module.train(train)
            module.zero_grad()
            function(module, real, fake).backward()
        assert_same_states(*models, rtol=1e-5, atol=1e-6)
        for a, b in zip(*(m.parameters() for m in models), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)
    copy.deepcopy(models[1])


@pytest.mark.parametrize("train", [True, False])
def test_dynamo_sees_one_graph(api: Interface, train: bool) -> None:
    for module in api.pair(linear):
        torch._dynamo.reset()
        explained = torch._dynamo.explain(module.train(train))(X)
        assert (explained.graph_count, explained.graph_break_count) == (1, 0)


@pytest.mark.filterwarnings("ignore:The tensor attribute:UserWarning")  # of the hook: that it sets `weight`
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")  # torch's own use
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("make", [linear, lambda: nn.Conv2d(4, 3, 2), lambda: nn.ConvTranspose1d(4, 3, 2)])
def test_exported_programs_need_no_operator_of_ours(api: Interface, make: Callable[[], nn.Module], train: bool) -> None:
    module = api.ours(make()).train(train)
    x = torch.randn(2, 4, *[5] * (api.get("original", module).dim() - 2))
    batch = torch.export.Dim("batch", min=2)
    exported = torch.export.export(copy.deepcopy(module), (x,), dynamic_shapes=({0: batch},))
    lowered = torch.export.export(copy.deepcopy(module), (x,), dynamic_shapes=({0: batch},)).run_decompositions()
    for program in (exported, lowered):
        # in training, a region without gradients is an operator of its own until it is lowered
        allowed = {"aten", "higher_order"} if train and program is exported else {"aten"}
        assert namespaces(program.graph_module) <= allowed
    more = torch.cat([x, x])
    for _ in range(2):
        want = module(more)
        for run in (exported.module(), lowered.module()):
            torch.testing.assert_close(run(more), want)
            buffers = dict(run.named_buffers())
            for what in "uv":
                torch.testing.assert_close(buffers[api.key(what)], api.get(what, module))


def namespaces(graph_module: torch.fx.GraphModule) -> set[str]:
    """The libraries of the operators that are called."""
    targets = [
        node.target
        for part in graph_module.modules()
        if isinstance(part, torch.fx.GraphModule)
        for node in part.graph.nodes
        if node.op == "call_function" and node.target is not operator.getitem
    ]
    return {str(getattr(target, "namespace", target)) for target in targets}


@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning")
def test_traces_of_evaluation(api: Interface) -> None:
    theirs, ours = (module.eval() for module in api.pair(linear))
    traced = torch.jit.trace(ours, (X,))
    assert "wgan_ext::" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(2 * X), theirs(2 * X))


def test_checkpointed_activations(api: Interface) -> None:
    """A forward that is made again iterates again, as torch's does."""
    results = []
    for module in api.pair(lambda: linear().double().eval()):
        x = X.double().requires_grad_()
        torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False).square().sum().backward()
        results.append([x.grad, api.get("original", module).grad])
    torch.testing.assert_close(*results)
