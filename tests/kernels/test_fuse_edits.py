"""What people do to a model after fusing it: the fused copy does what the original does under the same treatment."""

import contextlib
import copy
import io
import pickle
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel

import kernels
from tests.kernels.test_fuse import CaffeNet, PaperAcross, assert_same, images, made, results

CHANNELS = 4
CHANGED = "has been changed and runs as it was written"


def features() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, CHANNELS, 3),
        nn.ReLU(),
        nn.LocalResponseNorm(3, 0.5),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(CHANNELS, 2, 1),
    )


class Network(nn.Module):
    """A chain in its own forward, one in a Sequential, and a head."""

    scale = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.features = features()
        self.relu, self.norm, self.cut = nn.ReLU(), nn.LocalResponseNorm(3, 0.5), True
        self.steps = [2, 3]
        self.squash = torch.tanh
        self.classifier = nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.relu(self.features(x)))
        if self.cut:
            x = x[:, :, 1:]
        return self.classifier(self.squash(x * self.scale * len(self.steps)).mean((2, 3)))


def pair() -> tuple[nn.Module, nn.Module]:
    """The model, and itself fused."""
    model = made(Network).eval()
    return model, kernels.fuse(model, images(13))


def is_fused(module: nn.Module) -> bool:
    """Whether a call runs the operators, as seen by the warning that tells of the opposite."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        module(images(13))
    return not any(CHANGED in str(one.message) for one in seen)


def test_slices_are_the_layers_they_say() -> None:
    model = made(features)
    fused = kernels.fuse(model)
    for part in (slice(None, 1), slice(None, 3), slice(1, None), slice(None)):
        input = images(13) if not part.start else model[0](images(13)).detach()
        assert type(fused[part]) is nn.Sequential
        assert_same(fused[part], model[part], input)
    assert_same(nn.Sequential(*list(fused.children())[:-1]), model[:-1], images(13))
    assert is_fused(fused)


#: What is done to the model, and whether all chains still run as operators.
EDITS: dict[str, tuple[Callable[[Any], object], bool]] = {
    "append": (lambda model: model.features.append(nn.ReLU()), False),
    "longer head": (lambda model: setattr(model, "classifier", nn.Sequential(*(nn.Linear(2, 2) for _ in "abc"))), True),
    "other classes": (lambda model: setattr(model.classifier, "1", nn.Linear(2, 7)), True),
    "no head": (lambda model: setattr(model, "classifier", nn.Identity()), False),
    "replaced features": (lambda model: setattr(model, "features", nn.Conv2d(3, 2, 3)), False),
    "replaced ReLU": (lambda model: setattr(model.features, "1", nn.GELU()), False),
    "deleted layer": (lambda model: model.features.pop(2), False),
    "other stride": (lambda model: setattr(model.features[3], "stride", 1), False),
    "other convolution stride": (lambda model: setattr(model.features[0], "stride", (2, 2)), False),
    "no bias": (lambda model: setattr(model.features[0], "bias", None), True),
    "another weight": (lambda model: setattr(model.features[0], "weight", nn.Parameter(torch.ones(4, 3, 3, 3))), True),
    "flag": (lambda model: setattr(model, "cut", False), False),
    "class flag": (lambda model: setattr(model, "scale", 2.0), False),
    "function": (lambda model: setattr(model, "squash", torch.sigmoid), False),
    "list": (lambda model: model.steps.append(4), False),
    "parametrization": (lambda model: parametrizations.weight_norm(model.features[0]), False),
    "pruning": (lambda model: prune.l1_unstructured(model.features[0], "weight", 0.5), False),
    "pruned head": (lambda model: prune.l1_unstructured(model.classifier[1], "weight", 0.5), True),
    "forward of a layer": (lambda model: setattr(model.norm, "forward", lambda x: -x), False),
    "training": (lambda model: model.train(), True),
}


@pytest.mark.parametrize("what", EDITS)
def test_edits(what: str) -> None:
    edit, still = EDITS[what]
    both = pair()
    for model in both:
        torch.manual_seed(1)
        edit(model)
        model.double()
    assert is_fused(both[1]) == still
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_same(both[1], both[0], images(13))
    again = kernels.fuse(both[1], images(13))
    assert is_fused(again)
    assert_same(again, both[0], images(13))


@pytest.mark.parametrize("path", ["", *(name for name, _ in Network().named_modules() if name)])
def test_hooks_anywhere(path: str) -> None:
    """One that changes the output: it is called once a forward, wherever it is, and taken off again."""
    model, fused = pair()
    calls: list[nn.Module] = []

    def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        calls.append(module)
        return output * 1.5

    handles = [each.get_submodule(path).register_forward_hook(hook) for each in (model, fused)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_same(fused, model, images(13))
    assert calls == [fused.get_submodule(path), model.get_submodule(path)]
    for handle in handles:
        handle.remove()
    assert is_fused(fused)
    assert_same(fused, model, images(13))


def test_hooks_for_all_modules() -> None:
    _, fused = pair()
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        assert not is_fused(fused)
    finally:
        handle.remove()
    assert set(seen) == set(fused.modules())


def test_a_bound_method_as_a_hook_survives_copies() -> None:
    """It refers to the model that holds it."""
    model = made(Network).eval()
    model.note = lambda: None
    model.features.register_forward_hook(model.double)  # type: ignore[arg-type]
    fused = kernels.fuse(model)
    other = copy.deepcopy(fused)
    (hook,) = other.features._forward_hooks.values()
    assert hook.__self__ is other


def test_a_moving_average_learns_along() -> None:
    model, fused = pair()
    averages = [AveragedModel(each) for each in (model, fused)]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    for each, average in zip((model, fused), averages, strict=True):
        average.update_parameters(each)
    assert is_fused(averages[1])
    assert_same(averages[1], averages[0], images(13))


def test_edits_after_compiling() -> None:
    """Compiled once; what is changed then is noticed, as PyTorch notices it in the original."""
    model, fused = pair()
    torch._dynamo.reset()
    compiled = torch.compile(fused, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images(13)), model(images(13)))
    for edit in (
        lambda model: setattr(model.features[3], "stride", 1),
        lambda model: model.features.append(nn.Sigmoid()),
        lambda model: setattr(model, "cut", False),
    ):
        for each in (model, fused):
            edit(each)
        torch.testing.assert_close(compiled(images(13)), model(images(13)))


# Tools


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("network", [PaperAcross, CaffeNet])
def test_tracers_take_the_module_s_own_forward(network: type[nn.Module]) -> None:
    model = made(network).eval()
    fused = kernels.fuse(model)
    expected = model(images())
    for traced in (torch.jit.trace(fused, images()), fx.symbolic_trace(fused)):
        torch.testing.assert_close(traced(images()), expected)
    with pytest.raises(NotImplementedError, match=r"torch\.jit\.script cannot take a fused model"):
        torch.jit.script(fused)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamo", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_onnx_exporters(dynamo: bool, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    if dynamo:
        pytest.importorskip("onnxscript")
    model = made(PaperAcross).float().eval()
    input = images().float()
    path = tmp_path / "fused.onnx"
    torch.onnx.export(kernels.fuse(model), (input,), str(path), dynamo=dynamo)
    session = onnxruntime.InferenceSession(path)
    (found,) = session.run(None, {session.get_inputs()[0].name: input.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(input), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_quantization_prepares_what_it_would_of_the_original() -> None:
    from torch.ao.quantization import get_default_qconfig, get_default_qconfig_mapping, prepare
    from torch.ao.quantization.quantize_fx import prepare_fx

    model = made(PaperAcross).float().eval()
    input = images().float()
    observed = []
    for each in (model, kernels.fuse(model)):
        each = copy.deepcopy(each)
        each.qconfig = get_default_qconfig("x86")  # type: ignore[assignment]
        prepared = prepare(each)
        torch.testing.assert_close(prepared(input), model(input))
        observed.append([name for name, _ in prepared.named_modules()])
    assert observed[1] == observed[0]
    assert any("activation_post_process" in name for name in observed[0])
    torch.testing.assert_close(
        prepare_fx(kernels.fuse(model), get_default_qconfig_mapping("x86"), (input,))(input), model(input)
    )


def test_fully_sharded(tmp_path: Path) -> None:
    """FSDP2 hooks modules and changes their classes, wherever in the model it is asked to."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for paths, still in ((["features", "classifier", ""], True), (["features.0", "features.4", ""], False)):
            model = made(Network).eval()
            expected = model(images(13))
            fused = copy.deepcopy(kernels.fuse(model))
            for path in paths:
                fully_shard(fused.get_submodule(path), mesh=mesh)  # type: ignore[call-overload]
            assert is_fused(fused) == still
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                output = fused(images(13))
            torch.testing.assert_close(output, expected)
            output.sum().backward()
            model(images(13)).sum().backward()
            for ours, theirs in zip(fused.parameters(), model.parameters(), strict=True):
                torch.testing.assert_close(ours.grad.full_tensor(), theirs.grad)  # type: ignore[union-attr]
            with pytest.raises(ValueError, match="fuse: model cannot be copied: FSDP"):
                kernels.fuse(fused)
    finally:
        torch.distributed.destroy_process_group()


# Anything


class Block(nn.Module):
    """Layers called by a forward of its own, with a flag and a skip."""

    def __init__(self, layers: list[nn.Module], skip: bool) -> None:
        super().__init__()
        self.layers, self.skip, self.gain = nn.ModuleList(layers), skip, 0.5

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for layer in self.layers:
            y = layer(y)
        return y + self.gain * x if self.skip else torch.relu(y)


LAYERS: tuple[Callable[[], nn.Module], ...] = (
    lambda: nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1),
    nn.ReLU,
    lambda: nn.ReLU(inplace=True),
    lambda: nn.LocalResponseNorm(3, 0.5, k=2.0),
    lambda: nn.MaxPool2d(3, 1, 1),
    lambda: nn.MaxPool2d(2, 1, 1, dilation=2),
    lambda: nn.BatchNorm2d(CHANNELS),
    nn.Sigmoid,
)
#: A number is a layer, a list a Sequential of its items, and a pair a block: whether it has a skip, and its items.
LAYER = st.integers(0, len(LAYERS) - 1)


def nested(items: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    chosen = st.lists(items, min_size=1, max_size=4)
    return st.one_of(items, chosen, st.tuples(st.booleans(), chosen))


PLANS = st.lists(nested(nested(LAYER)), min_size=1, max_size=4)


def built(plan: Any) -> nn.Module:
    if isinstance(plan, int):
        return LAYERS[plan]()
    if isinstance(plan, tuple):
        skip, layers = plan
        return Block(list(map(built, layers)), skip)
    return nn.Sequential(*map(built, plan))


def module_of(model: nn.Module, number: int, *kinds: type[nn.Module]) -> Any:
    found = [module for module in model.modules() if not kinds or isinstance(module, kinds)]
    return found[number % len(found)] if found else None


def scale(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output * 1.5


def shift(module: nn.Module, inputs: Any) -> Any:
    return (inputs[0] + 0.25,)


def double(module: nn.Module, inputs: Any, outputs: Any) -> Any:
    return tuple(2 * each for each in inputs)


def random_edit(model: nn.Module, kind: int, number: int) -> nn.Module:
    """The edit ``kind`` at a place that ``number`` chooses; some have no place in some models."""
    torch.manual_seed(number)
    module = module_of(model, number)
    layers = module_of(model, number, nn.Sequential, nn.ModuleList)
    if kind == 0:
        module.register_forward_hook(scale)
    elif kind == 1:
        module.register_forward_pre_hook(shift)
    elif kind == 2:
        layers.append(LAYERS[number % len(LAYERS)]())
    elif kind == 3 and len(layers) > 1:
        del layers[number % len(layers)]
    elif kind == 4:
        layers[number % len(layers)] = LAYERS[number // 7 % len(LAYERS)]()
    elif kind == 5 and isinstance(model, nn.Sequential):
        model = model[: 1 + number % len(model)]
    elif kind == 6 and (norm := module_of(model, number, nn.LocalResponseNorm)) is not None:
        norm.size, norm.alpha = 1 + number % 4, 0.3
    elif kind == 7 and (block := module_of(model, number, Block)) is not None:
        block.skip, block.gain = not block.skip, 0.75
    elif kind == 8 and (conv := module_of(model, number, nn.Conv2d)) is not None:
        conv.bias = None
    elif kind == 9:
        model = copy.deepcopy(model)
    elif kind == 10:
        model = pickle.loads(pickle.dumps(model))
    elif kind == 11:
        model.train(not model.training)
    elif kind == 12 and (conv := module_of(model, number, nn.Conv2d)) is not None:
        conv.register_full_backward_hook(double)
    return model.double()


def check_random(plan: Any, edits: list[tuple[int, int]], seed: int) -> bool:
    """Whether there was something to fuse, and the original could be run after the edits."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 1), built(plan)).double()
    input = torch.randn(2, CHANNELS, 6, 5, dtype=torch.float64)
    original = copy.deepcopy(model)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            fused = copy.deepcopy(kernels.fuse(model))
    except ValueError:
        return False
    for kind, number in edits:
        original, fused = (random_edit(each, kind, number) for each in (original, fused))
    states = copy.deepcopy(original.state_dict())
    assert list(fused.state_dict()) == list(states)
    try:
        results(original, input)
    except RuntimeError:
        # Autograd refuses some operations in place.
        return False
    original.load_state_dict(states)
    fused.load_state_dict(states)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours, theirs = results(fused, input), results(original, input)
    # Sums that cancel, such as the gradient of a bias in front of a batch normalization, are as exact as their terms.
    largest = max(float(each.detach().abs().max()) for each in theirs)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12 * (1 + largest))
    return True


RANDOM = given(PLANS, st.lists(st.tuples(st.integers(0, 12), st.integers(0, 1000)), max_size=4), st.integers(0, 3))


@RANDOM
@settings(max_examples=25, deadline=None, derandomize=True)
def test_random_models_and_edits(plan: Any, edits: list[tuple[int, int]], seed: int) -> None:
    check_random(plan, edits, seed)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@RANDOM
@settings(max_examples=1000, deadline=None)
def test_many_random_models_and_edits(plan: Any, edits: list[tuple[int, int]], seed: int) -> None:
    check_random(plan, edits, seed)


def test_random_models_are_fused_and_run() -> None:
    """The test above is of something: most models have a chain and can still be run after edits."""
    plans = [[0, 1, 3, 4], [0, [2, 3]], (True, [0, 1, 4]), [[0, 2, 4], (False, [0, 3, 5])]]
    assert all(check_random(plan, [(kind, 5)], 0) for plan in plans for kind in (0, 2, 9))


def test_what_it_returns_may_be_written_to() -> None:
    """By the caller or by a module behind, with gradients to come: a fused ReLU and pooling keep their output."""
    layers = (nn.Conv2d(3, CHANNELS, 3), nn.ReLU(), nn.MaxPool2d(3, 2))
    block = made(lambda: nn.Sequential(nn.Sequential(*layers), nn.Dropout(0.5, inplace=True)))
    assert_same(kernels.fuse(block), block, images(13))
    fused = kernels.fuse(block[0])
    found = [each(images(13)).mul_(2).sum() for each in (fused, block[0])]
    for ours, theirs in zip(*(torch.autograd.grad(each, list(block.parameters())) for each in found), strict=True):
        torch.testing.assert_close(ours, theirs)
    with torch.no_grad():
        assert fused(images(13)).sum() == block[0](images(13)).sum()


def test_what_it_was_given_may_be_written_to() -> None:
    """A fused normalization keeps its input, and PyTorch's ReLU does not."""
    block = nn.Sequential(nn.ReLU(), nn.LocalResponseNorm(3, 0.5), nn.MaxPool2d(2)).double()
    for each in (block, kernels.fuse(block)):
        x = images(13).requires_grad_() * 1
        y = each(x)
        x.mul_(2)
        y.sum().backward()


def test_saved_whole(tmp_path: Path) -> None:
    _, fused = pair()
    buffer = io.BytesIO()
    torch.save(fused, buffer)
    buffer.seek(0)
    assert is_fused(torch.load(buffer, weights_only=False))


class Scaled(nn.Module):
    """Reads numbers of its own and of a child that it does not call."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.settings, self.child = nn.Conv2d(3, 6, 3), {"scale": 1.0}, nn.Identity()
        self.child.scale = 1.0  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv(x)), 3, 2)
        return x * self.settings["scale"] * self.child.scale  # type: ignore[operator]


def test_numbers_in_dictionaries_and_in_modules_that_are_not_called() -> None:
    x = torch.randn(2, 3, 9, 9)
    for place in ("settings", "child"):
        fused = kernels.fuse(Scaled())
        expected = 2 * fused(x)
        if place == "settings":
            fused.settings["scale"] = 2.0  # type: ignore[index]
        else:
            fused.child.scale = 2.0  # type: ignore[union-attr,assignment]
        with pytest.warns(UserWarning, match=CHANGED):
            torch.testing.assert_close(fused(x), expected)


def test_a_forward_that_stores_tensors_in_containers_is_not_traced() -> None:
    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.kept = nn.Conv2d(3, 6, 3), {"outputs": [torch.zeros(1)], "seen": set()}

        def forward(self, x: Tensor) -> Tensor:
            x = F.max_pool2d(F.relu(self.conv(x)), 3, 2)
            self.kept["outputs"].append(x)  # type: ignore[union-attr]
            self.kept["seen"].add(1)  # type: ignore[union-attr]
            self.kept["last"] = x  # type: ignore[assignment]
            return x

    model = Keeps()
    before = list(model.kept["outputs"])
    with pytest.raises(ValueError, match=r"not traced: the model \(Keeps\): forward changes the contents of self.kept"):
        kernels.fuse(model)
    fused = kernels.fuse(nn.Sequential(model, nn.MaxPool2d(2)))
    for kept in (model.kept, fused[0].kept):  # type: ignore[index]
        assert list(kept) == ["outputs", "seen"]
        assert kept["seen"] == set()
        assert len(kept["outputs"]) == len(before) == 1
    x = torch.randn(2, 3, 9, 9)
    fused(x)
    assert torch.equal(fused[0].kept["last"], fused[0].kept["outputs"][1])  # type: ignore[index]


def test_layers_with_numbers_that_are_tensors_stay() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.LocalResponseNorm(5), nn.Conv2d(6, 6, 3), nn.ReLU(), nn.MaxPool2d(2))
    model[1].alpha = nn.Parameter(torch.tensor(5.0))  # type: ignore[union-attr]
    fused = kernels.fuse(model)
    assert fused.replaced == ["2.bias, 3, 4 -> relu_max_pool2d"]
    x = torch.randn(2, 3, 9, 9)
    torch.testing.assert_close(fused(x), model(x))


def test_copies_are_made_while_other_threads_run_modules() -> None:
    """torch.fx patches nn.Module for all threads while it traces; a copy is not traced again."""
    fused, other = kernels.fuse(Scaled()), nn.Linear(4, 4)
    ended, errors = threading.Event(), []

    def serve() -> None:
        while not ended.is_set():
            try:
                other(torch.ones(1, 4))
            except Exception as error:
                errors.append(error)

    def copies() -> None:
        for _ in range(20):
            copy.deepcopy(fused)

    threads = [threading.Thread(target=each) for each in (serve, copies, copies)]
    for thread in threads:
        thread.start()
    for thread in threads[1:]:
        thread.join()
    ended.set()
    threads[0].join()
    assert errors == []
    x = torch.randn(2, 3, 9, 9)
    copied = copy.deepcopy(fused)
    assert torch.equal(copied(x), fused(x))
    assert type(copied).__name__ == "FusedScaled"
    # Traced again, because it was changed.
    fused.child.scale = 2.0  # type: ignore[union-attr,assignment]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(copy.deepcopy(fused)(x), 2 * copied(x))
