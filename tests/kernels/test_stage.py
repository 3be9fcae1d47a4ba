"""The chain bias, ReLU, normalization, pooling: every implementation and every way of differentiating and compiling."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._inductor.utils import run_and_get_code
from torch.autograd import forward_ad

import kernels
from kernels import aten, autograd, cpu, dispatch, inductor, traced
from kernels.arguments import Normalization, Pooling
from tests.tolerances import TOLERANCES

#: A window of the paper's shape whose sums are about as large as k for inputs of deviation 2.
WINDOW = Normalization(5, 0.5, 0.75, 2.0, 2)
OTHER_WINDOWS = (
    None,
    Normalization(4, 0.7, 0.6, 1.0, 1),
    Normalization(3, 0.3, 1.0, 0.5, 3),
    Normalization(9, 1, 0.75, 1, 2),
)
PAPER_POOL = Pooling((3, 3), (2, 2), (0, 0), (1, 1), False)
POOLS = (
    PAPER_POOL,
    Pooling((3, 3), (2, 2), (0, 0), (1, 1), True),
    Pooling((3, 3), (2, 2), (1, 1), (1, 1), True),
    Pooling((2, 2), (2, 2), (0, 0), (1, 1), False),
    Pooling((2, 3), (1, 2), (1, 0), (1, 1), True),
    Pooling((3, 2), (2, 3), (1, 1), (2, 4), False),
    Pooling((3, 3), (5, 4), (1, 1), (1, 1), True),
    Pooling((6, 5), (1, 2), (3, 2), (1, 1), False),
    Pooling((1, 1), (1, 1), (0, 0), (1, 1), False),
)
#: On maps of 6x6 an element might lie in five rows of windows, and there are two.
FEW_WINDOWS = Pooling((5, 3), (1, 1), (0, 0), (1, 1), False)
FORMATS = (torch.contiguous_format, torch.channels_last)
Parts = tuple[bool, Normalization | None, Pooling | None]


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    """So that one test's variants do not use up the limit on another's."""
    torch._dynamo.reset()


def inputs(
    shape: tuple[int, ...] = (3, 6, 9, 8), dtype: torch.dtype = torch.float64, format: torch.memory_format = FORMATS[0]
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(shape, generator=generator, dtype=torch.float64) * 2
    bias = torch.randn(shape[1], generator=generator, dtype=torch.float64)
    return input.to(dtype).contiguous(memory_format=format).requires_grad_(), bias.to(dtype).requires_grad_()


def results(function: Callable[..., Tensor], input: Tensor, bias: Tensor | None) -> list[Tensor]:
    """Output and gradients, with an output gradient of its own for each element."""
    output = function(input, bias)
    generator = torch.Generator().manual_seed(1)
    output_gradient = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)
    wanted = [input] if bias is None else [input, bias]
    return [output.detach(), *torch.autograd.grad(output, wanted, output_gradient)]


def chain(*parts: Any) -> Callable[..., Tensor]:
    return lambda input, bias: autograd.run(input, bias, *parts)


def composed(*parts: Any) -> Callable[..., Tensor]:
    """PyTorch's own operators."""
    return lambda input, bias: aten.forward(input, bias, *parts)


def assert_same(ours: list[Tensor], theirs: list[Tensor], tolerance: float = 1e-12) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * max(1.0, other.abs().max().item()))


@pytest.fixture(params=["cpu", "reference", "traced"])
def formula(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager calls run this form of the formula; the traced ones take milliseconds so, and seconds to trace."""
    monkeypatch.setattr(dispatch, "choose", lambda input, normalization: request.param)


@pytest.mark.usefixtures("formula")
@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("relu", [False, True])
def test_every_part_is_pytorch_s(relu: bool, with_bias: bool, format: torch.memory_format) -> None:
    """Any subset of the chain, in float64, output and gradients; the formats are kept."""
    input, bias = inputs(format=format)
    for normalization, pooling in itertools.product((WINDOW, *OTHER_WINDOWS), (None, *POOLS)):
        parts = (relu, normalization, pooling)
        if normalization is None and pooling is None:
            continue
        ours = results(chain(*parts), input, bias if with_bias else None)
        theirs = results(composed(*parts), input, bias if with_bias else None)
        assert_same(ours, theirs)
        assert ours[0].is_contiguous(memory_format=format), parts
        assert ours[1].stride() == input.stride(), parts


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_types_round_once(dtype: torch.dtype) -> None:
    """Against float64 on the same inputs: within 1 ulp forward; the maximum is of the values before rounding."""
    input, bias = inputs((2, 8, 9, 9), dtype)
    parts = (True, WINDOW, PAPER_POOL)
    output, gradient, bias_gradient = results(chain(*parts), input, bias)
    exact_input, exact_bias = (tensor.detach().double().requires_grad_() for tensor in (input, bias))
    exact, exact_gradient, exact_bias_gradient = results(composed(*parts), exact_input, exact_bias)
    ulp = TOLERANCES[dtype].forward
    torch.testing.assert_close(output.double(), exact, rtol=ulp, atol=0)
    # The output gradient was rounded to the half type, which is one more half ulp of every term.
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=4 * ulp, atol=4 * ulp)
    torch.testing.assert_close(bias_gradient.double(), exact_bias_gradient, rtol=0, atol=40 * ulp)


def test_an_image_does_not_depend_on_its_batch() -> None:
    input, bias = inputs((5, 6, 9, 9), torch.float32)
    whole = results(chain(True, WINDOW, PAPER_POOL), input, bias)
    output = autograd.run(input.detach()[3:4], bias.detach(), True, WINDOW, PAPER_POOL)
    assert torch.equal(output, whole[0][3:4])


# Ties, NaN, infinities, windows in the padding


def special() -> dict[str, Tensor]:
    nan, inf = float("nan"), float("inf")
    steps = torch.arange(2 * 4 * 6 * 6, dtype=torch.float64).reshape(2, 4, 6, 6)
    scattered = torch.randn(2, 4, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with_nan, with_inf = scattered.clone(), scattered.clone()
    with_nan.view(-1)[::7] = nan
    with_inf.view(-1)[::5], with_inf.view(-1)[::9] = inf, -inf
    return {
        "ties": (steps % 3).floor(),
        "all equal": torch.full((2, 4, 6, 6), 1.5, dtype=torch.float64),
        "zeros": torch.zeros(2, 4, 6, 6, dtype=torch.float64),
        "negative": -1 - steps,
        "minus infinity": torch.full((2, 4, 6, 6), -inf, dtype=torch.float64),
        "nan": with_nan,
        "all nan": torch.full((2, 4, 6, 6), nan, dtype=torch.float64),
        "infinities": with_inf,
    }


def assert_special_values(run: Callable[..., Callable[..., Tensor]], *parts: Any) -> None:
    """Outputs and gradients of ``run(*parts)`` are PyTorch's for each kind of special values."""
    kinds = special()
    input = torch.cat(list(kinds.values())).requires_grad_()
    for ours, theirs in zip(results(run(*parts), input, None), results(composed(*parts), input, None), strict=True):
        for kind, one, other in zip(kinds, ours.split(2), theirs.split(2), strict=True):
            assert torch.equal(one.isnan(), other.isnan()), (kind, parts)
            assert torch.equal(one.nan_to_num(1e9), other.nan_to_num(1e9)), (kind, parts)


@pytest.mark.usefixtures("formula")
def test_special_values_go_where_pytorch_s_do() -> None:
    for relu, pooling in itertools.product((False, True), (*POOLS, FEW_WINDOWS)):
        assert_special_values(chain, relu, None, pooling)


@pytest.mark.parametrize("relu", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_special_values_in_a_graph(relu: bool) -> None:
    def compiled(*parts: Any) -> Callable[..., Tensor]:
        return torch.compile(chain(*parts), backend="aot_eager", fullgraph=True)

    assert_special_values(compiled, relu, None, POOLS[0] if relu else POOLS[2])


@pytest.mark.parametrize("kernel", [11, 12, 16, 17, 27])
def test_large_windows(kernel: int) -> None:
    """Offsets take one byte up to 16x16, two beyond."""
    pooling = Pooling((kernel, kernel), (3, 3), (2, 2), (1, 1), False)
    assert pooling.offset_dtype == (torch.uint8 if kernel <= 16 else torch.int16)
    # Increasing inputs have their maxima in the last element of each window.
    for input in (inputs((1, 2, 40, 40))[0], torch.arange(3200.0).reshape(1, 2, 40, 40).requires_grad_()):
        assert_same(
            results(chain(False, None, pooling), input, None), results(composed(False, None, pooling), input, None)
        )


@pytest.mark.parametrize(
    ("size", "pooling", "counting"),
    [
        ((1400, 2980), PAPER_POOL, torch.float32),
        ((1400, 3000), PAPER_POOL, torch.int64),
        # The maximum's number in its window is about 40 million.
        ((10, 9), Pooling((9000, 9000), (1, 1), (4500, 4500), (1, 1), False), torch.int64),
    ],
    ids=str,
)
def test_large_numbers(size: tuple[int, int], pooling: Pooling, counting: torch.dtype) -> None:
    """Elements are numbered in float32 only where it is exact."""
    assert cpu._counts_in_float32(pooling, size) == (counting == torch.float32)
    input = inputs((1, 1, *size))[0]
    assert_same(results(chain(False, None, pooling), input, None), results(composed(False, None, pooling), input, None))


@pytest.mark.parametrize("implementation", ["reference", "aten"])
def test_the_output_may_be_written_in_place(implementation: str) -> None:
    """Where it is not kept for backward, which ReLU and pooling without a normalization do."""
    for format in FORMATS:
        input, bias = inputs(format=format)
        for parts in (
            (False, WINDOW, None),
            (True, WINDOW, None),
            (False, None, PAPER_POOL),
            (True, WINDOW, PAPER_POOL),
        ):
            with kernels.implementation(implementation):
                doubled = results(lambda *tensors, parts=parts: chain(*parts)(*tensors).mul_(2), input, bias)
            assert_same(doubled, results(lambda *tensors, parts=parts: composed(*parts)(*tensors) * 2, input, bias))


# What is kept


def kept(function: Callable[[], object]) -> list[tuple[torch.Size, torch.dtype]]:
    found: list[tuple[torch.Size, torch.dtype]] = []

    def pack(tensor: Tensor) -> Tensor:
        found.append((tensor.shape, tensor.dtype))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return found


@pytest.mark.parametrize("compiled", [False, True])
def test_what_is_kept_for_backward(compiled: bool) -> None:
    """The input and a byte for each window: 1.06 times the convolution's output in float32."""
    input, bias = inputs((2, 6, 9, 9), torch.float32, torch.channels_last)

    def run(parts: Parts) -> list[tuple[torch.Size, torch.dtype]]:
        function = chain(*parts)
        if compiled:
            torch._dynamo.reset()
            function = torch.compile(function, backend="aot_eager_decomp_partition", fullgraph=True)
        # The bias is no tensor of a size that counts.
        return sorted((item for item in kept(lambda: function(input, bias)) if len(item[0]) > 1), key=str)

    def sizes(parts: Parts) -> list[tuple[int, int]]:
        """(elements, bytes of each) of what is kept."""
        return sorted((shape.numel(), dtype.itemsize) for shape, dtype in run(parts))

    whole, windows = 2 * 6 * 9 * 9, 2 * 6 * 4 * 4
    assert sizes((True, WINDOW, PAPER_POOL)) == [(windows, 1), (whole, 4)]
    assert sizes((True, WINDOW, None)) == [(whole, 4)]
    assert sizes((False, None, PAPER_POOL)) == [(windows, 1)]
    # The output, which the next layer keeps as well; compiled it becomes a mask of a byte.
    assert sizes((True, None, PAPER_POOL)) == [(windows, 1), (windows, 1 if compiled else 4)]


def test_nothing_is_kept_or_computed_without_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    forward = cpu.forward

    def noted(*arguments: Any) -> tuple[Tensor, Tensor]:
        asked.append(arguments[-1])
        output, offsets = forward(*arguments)
        assert (offsets.numel() > 0) == asked[-1]
        return output, offsets

    monkeypatch.setattr(cpu, "forward", noted)
    input, bias = inputs()
    frozen = [tensor.detach() for tensor in (input, bias)]

    def run(*tensors: Tensor) -> Tensor:
        return autograd.run(*tensors, True, WINDOW, PAPER_POOL)

    assert kept(lambda: run(*frozen)) == []
    with torch.no_grad():
        run(input, bias)
    with torch.inference_mode():
        run(*frozen)
    assert asked == [False] * 3
    run(input, frozen[1])
    run(frozen[0], bias)
    assert asked == [False] * 3 + [True] * 2


# Differentiation


ALL_PARTS: tuple[Parts, ...] = (
    (True, Normalization(3, 0.5, 0.75, 2.0, 2), Pooling((3, 3), (2, 2), (0, 0), (1, 1), False)),
    (True, None, Pooling((2, 2), (1, 2), (1, 0), (1, 1), True)),
    (False, None, Pooling((2, 2), (2, 2), (0, 0), (3, 2), False)),
    (True, Normalization(4, 0.5, 0.6, 1.0, 1), None),
)


@pytest.mark.parametrize("parts", ALL_PARTS, ids=str)
def test_gradients_of_gradients_and_forward_mode(parts: Parts) -> None:
    input, bias = inputs((2, 4, 4, 3))
    assert torch.autograd.gradcheck(chain(*parts), (input, bias), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(chain(*parts), (input, bias))


@pytest.mark.parametrize("parts", ALL_PARTS, ids=str)
def test_function_transforms(parts: Parts) -> None:
    input, bias = (tensor.detach() for tensor in inputs((2, 4, 4, 3)))
    ours, theirs = chain(*parts), composed(*parts)
    tangents = (torch.randn_like(input), torch.randn_like(bias))
    for one, other in zip(
        torch.func.jvp(ours, (input, bias), tangents), torch.func.jvp(theirs, (input, bias), tangents), strict=True
    ):
        torch.testing.assert_close(one, other)
    expected = torch.func.jvp(lambda tensor: theirs(tensor, bias), (input,), tangents[:1])[1]
    with forward_ad.dual_level():
        dual = ours(forward_ad.make_dual(input, tangents[0]), bias)
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, expected)
    for argnum in (0, 1):
        pair = [
            torch.func.grad(lambda *tensors, f=function: f(*tensors).square().sum(), argnum)(input, bias)
            for function in (ours, theirs)
        ]
        torch.testing.assert_close(pair[0], pair[1])
    batch, biases = torch.randn(3, 2, 4, 4, 3, dtype=torch.float64) * 2, torch.randn(3, 4, dtype=torch.float64)
    for in_dims, tensors in (((0, None), (batch, bias)), ((0, 0), (batch, biases)), ((None, 0), (input, biases))):
        expected = torch.stack(
            [
                theirs(*(tensor if dim is None else tensor[n] for tensor, dim in zip(tensors, in_dims, strict=True)))
                for n in range(3)
            ]
        )
        torch.testing.assert_close(torch.vmap(ours, in_dims)(*tensors), expected)
    per_example = torch.vmap(torch.func.grad(lambda x, b: ours(x[None], b).square().sum()), (0, None))(input, bias)
    torch.testing.assert_close(per_example, torch.func.grad(lambda x: theirs(x, bias).square().sum())(input))


def test_output_gradients_of_any_layout() -> None:
    for format in FORMATS:
        input, bias = inputs(format=format)
        output = autograd.run(input, bias, True, WINDOW, PAPER_POOL)
        output_gradient = torch.randn_like(output)
        spread = torch.zeros(*output.shape[:3], 2 * output.shape[3], dtype=output.dtype)[..., ::2]
        spread.copy_(output_gradient)
        layouts = [output_gradient, output_gradient.contiguous(), spread]
        layouts.append(output_gradient.contiguous(memory_format=torch.channels_last))
        first, *others = [torch.autograd.grad(output, (input, bias), item, retain_graph=True) for item in layouts]
        for other in others:
            assert torch.equal(first[0], other[0])
            assert torch.equal(first[1], other[1])
        constant = torch.autograd.grad(output, input, torch.ones((), dtype=output.dtype).expand(output.shape))
        assert torch.equal(
            constant[0], torch.autograd.grad(autograd.run(input, bias, True, WINDOW, PAPER_POOL).sum(), input)[0]
        )


def test_views_are_read_where_they_are() -> None:
    base = torch.randn(6, 24, 12, 12, dtype=torch.float64) * 2
    bias = torch.randn(48, dtype=torch.float64)[::4]
    for view in (
        base[1:, 3:15],
        base[::2, 12:],
        base[:, :12].transpose(2, 3),
        base[:, ::2, 1:, 1:],
        base[:, :12, ::2, 3:],
    ):
        for format in FORMATS:
            exact = composed(True, WINDOW, PAPER_POOL)(view.contiguous(), bias)
            assert_same([autograd.run(view, bias, True, WINDOW, PAPER_POOL)], [exact])
            assert_same([autograd.run(view.contiguous(memory_format=format), bias, True, WINDOW, PAPER_POOL)], [exact])


# Compiled


@pytest.fixture
def two_threads(threads: None) -> None:
    """For loops in parallel, which Inductor writes for more than one."""
    torch.set_num_threads(2)


@pytest.mark.parametrize(
    ("pooling", "normalization", "format"),
    [
        (None, OTHER_WINDOWS[1], FORMATS[0]),
        (POOLS[5], WINDOW, FORMATS[1]),
        *(
            pytest.param(*others, marks=pytest.mark.slow)
            for others in (
                (None, WINDOW, FORMATS[1]),
                (POOLS[5], None, FORMATS[0]),
                *itertools.product((*POOLS[:5], POOLS[6]), (None, WINDOW), FORMATS),
            )
        ),
    ],
    ids=str,
)
def test_the_traced_forms_are_the_same_formula(
    pooling: Pooling | None, normalization: Normalization | None, format: torch.memory_format
) -> None:
    """What is traced under torch.compile differs in form from what runs eagerly; aot_eager runs it without Inductor."""
    input, bias = inputs(format=format)
    parts = (True, normalization, pooling)
    compiled = torch.compile(chain(*parts), backend="aot_eager", fullgraph=True)
    ours = results(compiled, input, bias)
    assert_same(ours, results(chain(*parts), input, bias))
    assert ours[0].is_contiguous(memory_format=format)
    assert ours[1].stride() == input.stride()


@pytest.mark.compiles
@pytest.mark.slow  # Its regions are compiled for eager calls below, and between convolutions.
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_inductor_compiles_it_without_a_break(format: torch.memory_format) -> None:
    input, bias = inputs((2, 12, 11, 9), torch.float32, format)
    compiled = torch.compile(chain(True, WINDOW, POOLS[2]), fullgraph=True)
    ours = results(compiled, input, bias)
    assert_same(ours, results(chain(True, WINDOW, POOLS[2]), input, bias), 1e-5)
    assert ours[0].is_contiguous(memory_format=format)
    # A batch of another size, of a view that does not begin where its memory does, is traced with a size that varies.
    larger = torch.randn(7, 12, 11, 9).contiguous(memory_format=format)[2:].requires_grad_()
    assert_same(results(compiled, larger, bias), results(chain(True, WINDOW, POOLS[2]), larger, bias), 1e-5)
    # So is a batch of larger images, with a new graph.
    images = torch.randn(3, 12, 13, 15).contiguous(memory_format=format).requires_grad_()
    assert_same(results(compiled, images, bias), results(chain(True, WINDOW, POOLS[2]), images, bias), 1e-5)
    alone = torch.compile(chain(False, None, PAPER_POOL), fullgraph=True)
    assert_same(results(alone, larger, None), results(chain(False, None, PAPER_POOL), larger, None))


@pytest.mark.parametrize("differentiating", [True, False])
def test_in_a_compiled_graph_the_chain_is_one_operator(differentiating: bool) -> None:
    """Dynamo does not interpret the formulas, and AOTAutograd caches graphs of operators."""
    nodes: list[torch.fx.Node] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        nodes.extend(graph.graph.nodes)
        return graph

    input, bias = inputs()
    with torch.set_grad_enabled(differentiating):
        torch.compile(chain(True, WINDOW, PAPER_POOL), backend=backend, fullgraph=True)(input, bias)
    targets = [node.target for node in nodes if node.op not in ("placeholder", "output")]
    assert targets == [torch.ops.alexnet_fused.stage.default]
    (node,) = [node for node in nodes if node.op == "call_function"]
    assert node.args[-2:] == (differentiating, autograd._CODE)


def test_a_compiled_graph_is_cached_with_the_code_it_is_made_from(monkeypatch: pytest.MonkeyPatch) -> None:
    assert autograd._code() == autograd._CODE
    read = autograd.pkgutil.get_data

    def changed(name: str) -> str:
        """The hash if the source of a module were another."""

        def source(package: str, file: str) -> bytes | None:
            return (read(package, file) or b"") + (b"#" if file == f"{name}.py" else b"")

        monkeypatch.setattr(autograd.pkgutil, "get_data", source)
        return autograd._code()

    modules = ("arguments", "autograd", "dispatch", "reference", "traced", "gpu/ops")
    assert len({autograd._CODE, *map(changed, modules)}) == 7
    monkeypatch.setattr(autograd.pkgutil, "get_data", lambda package, file: None)
    assert autograd._code() != autograd._code()


@pytest.mark.parametrize("own_bias", [False, True])
def test_vmap_in_a_compiled_graph(own_bias: bool) -> None:
    input, bias = inputs((3, 6, 9, 8))
    biases = torch.stack([bias.detach() + example for example in range(3)]).requires_grad_()

    def each(input: Tensor, bias: Tensor) -> Tensor:
        return chain(True, WINDOW, PAPER_POOL)(input[None], bias)[0]

    def mapped(input: Tensor, biases: Tensor) -> Tensor:
        return torch.func.vmap(each, in_dims=(0, 0 if own_bias else None))(input, biases if own_bias else biases[0])

    def one_by_one(input: Tensor, biases: Tensor) -> Tensor:
        return torch.stack([each(input[example], biases[example if own_bias else 0]) for example in range(3)])

    compiled = torch.compile(mapped, backend="aot_eager", fullgraph=True)
    assert_same(results(compiled, input, biases), results(one_by_one, input, biases))


@pytest.mark.compiles
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str)
def test_between_convolutions_inductor_makes_loops_over_channels(dtype: torch.dtype) -> None:
    """It has dimension 1 of what it writes there in four dimensions lie next to each other; once these were rows, and
    the stage took twice its time. A group's border in the middle of a loop stopped it from being vectorized. Masks of
    integers at the groups' borders, and each window's offsets loaded as bytes, took half of the stage's time."""
    images = inputs((1, 16, 35, 35), dtype, torch.channels_last)[0]
    weight = inputs((96, 16, 3, 3), dtype, torch.channels_last)[0]
    # Computed outside of the graph: Inductor would generate a kernel for each, which takes five seconds to compile.
    weight = (weight.detach() / 12).requires_grad_()
    bias = inputs((1, 96, 1, 1), dtype)[1]
    ones = bias.new_ones(2, 96, 3, 3).contiguous(memory_format=torch.channels_last)

    def layers(images: Tensor, weight: Tensor) -> Tensor:
        pooled = chain(True, WINDOW, PAPER_POOL)(F.conv2d(images, weight, padding=1), bias)
        return F.conv2d(pooled, ones)

    compiled = torch.compile(layers, fullgraph=True)
    ours, code = run_and_get_code(lambda: results(compiled, images, weight))
    if dtype == torch.float32:
        assert_same(ours, results(layers, images, weight), 1e-4)
    assert len(code) == 2
    for each in code:
        assert "transpose_mxn" not in each
        assert " % static_cast" not in each
        assert "VecMask<int" not in each
        assert each.count("Vectorized<uint8_t>::loadu") <= 1


@pytest.mark.parametrize(("largest", "formula"), [(9, False), (8, True)])
def test_compiled_code_compares_only_offsets_that_floats_count(
    monkeypatch: pytest.MonkeyPatch, largest: int, formula: bool
) -> None:
    """Windows with more elements, 16 million in float32, take the plain formula; this window has nine."""
    calls: list[object] = []
    monkeypatch.setattr(traced, "_EXACT", largest)
    monkeypatch.setattr(traced.reference, "pool_backward", lambda *arguments: calls.append(arguments))
    traced._pool_backward(torch.ones(1, 2, 2, 4), torch.zeros(1, 2, 2, 4, dtype=torch.uint8), (5, 5), PAPER_POOL)
    assert bool(calls) == formula


def test_bfloat16_runs_where_pytorch_s_own_does_not() -> None:
    input, bias = inputs(dtype=torch.bfloat16)
    with pytest.raises(RuntimeError), kernels.implementation("aten"):
        autograd.run(input, bias, True, WINDOW, PAPER_POOL)
    assert autograd.run(input, bias, True, WINDOW, PAPER_POOL).dtype == torch.bfloat16


@pytest.mark.compiles
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_eager_calls_of_the_compiled_implementation(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Inductor unless slow tests run; above, it compiles the same formula between convolutions."""
    compiled: list[object] = []

    def compile(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        compiled.append(function)
        return torch_compile(function, backend=backend, **options)

    torch_compile = torch.compile
    monkeypatch.setattr(inductor.torch, "compile", compile)
    inductor._compiled.cache_clear()
    parts = (True, WINDOW, PAPER_POOL)
    shapes = ((3, 6, 9, 8), *(((4, 6, 12, 10), (2, 8, 9, 9)) if backend == "inductor" else ()))
    with kernels.implementation("inductor"):
        for number, shape in enumerate(shapes):
            input, bias = inputs(shape, torch.float32, FORMATS[1 - number % 2])
            assert_same(results(chain(*parts), input, bias), results(composed(*parts), input, bias), 1e-5)
        assert compiled == [traced.forward, traced.backward]
        first = torch.autograd.grad(chain(*parts)(input, bias).sum(), input, create_graph=True)
        second = torch.autograd.grad(first[0].sum(), input)
        assert second[0].abs().max() > 0
    inductor._compiled.cache_clear()


def test_without_a_compiler_it_says_so_once_and_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    dispatch._say_once.cache_clear()
    monkeypatch.setattr(dispatch.compiler, "obstacle", lambda: "no C++ compiler")
    input, bias = inputs()
    with (
        kernels.implementation("inductor"),
        pytest.warns(UserWarning, match=r"running 'reference' instead of 'inductor': no C\+\+ compiler") as said,
    ):
        ours = results(chain(True, WINDOW, PAPER_POOL), input, bias)
    assert len(said) == 1
    assert_same(ours, results(composed(True, WINDOW, PAPER_POOL), input, bias))
    dispatch._say_once.cache_clear()


def test_exported_it_is_the_same() -> None:
    class Stage(torch.nn.Module):
        def forward(self, input: Tensor) -> Tensor:
            return kernels.relu_lrn_max_pool2d(input, 5, 0.5, 0.75, 2.0, groups=2, padding=1)

    input = inputs()[0].detach()
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(Stage(), (input,), dynamic_shapes={"input": {0: batch}}).module()
    larger = torch.randn(7, *input.shape[1:], dtype=torch.float64)
    torch.testing.assert_close(exported(larger), Stage()(larger))


# Refusals


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda x: kernels.max_pool2d(x, 3, padding=2), ValueError, "padding must be at most half the window"),
        (
            lambda x: kernels.max_pool2d(x, 2, padding=2, dilation=4),
            ValueError,
            "half the window, which is 2 rows without its dilation",
        ),
        (
            lambda x: kernels.max_pool2d(x[..., :2], 2, 1, (0, 1), (1, 3)),
            ValueError,
            "dilation must leave each window an element; of 2 columns one with dilation 3 and padding 1 holds none",
        ),
        (lambda x: kernels.max_pool2d(x, 9), ValueError, "the window of 9 columns does not fit input of shape"),
        (lambda x: kernels.max_pool2d(x, 3, stride=()), ValueError, r"stride must be .*; got \(\)"),
        (lambda x: kernels.max_pool2d(x, (3, 3, 3)), ValueError, "kernel_size must be"),
        (lambda x: kernels.max_pool2d(x, True), ValueError, "kernel_size must be"),
        (lambda x: kernels.local_response_norm(x, 5, alpha="a"), TypeError, "alpha must be a number; got 'a'"),
        (lambda x: kernels.local_response_norm(x, 5, beta=None), TypeError, "beta must be a number; got None"),
        (lambda x: kernels.relu_local_response_norm(x, 5, bias=[1.0] * 6), TypeError, "bias must be a torch.Tensor"),
        (
            lambda x: kernels.relu_max_pool2d(x, 3, bias=torch.ones(6, dtype=torch.int64)),
            TypeError,
            "bias must be float64, .*; got torch.int64",
        ),
        (
            lambda x: kernels.relu_max_pool2d(x, 3, bias=torch.ones(6, device="meta")),
            ValueError,
            "bias must be on input's device, cpu; got meta",
        ),
    ],
)
def test_refusals(call: Callable[[Tensor], Tensor], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        call(torch.ones(2, 6, 9, 8))


def test_numpy_integers_are_integers() -> None:
    import numpy as np

    input, _ = inputs()
    pair = [kernels.relu_lrn_max_pool2d(input, size(5), kernel_size=size(3)) for size in (int, np.int64)]
    assert torch.equal(pair[0], pair[1])


def test_empty_batches() -> None:
    for parts in ALL_PARTS:
        input, bias = torch.empty(0, 4, 4, 3, requires_grad=True), torch.ones(4, requires_grad=True)
        output = autograd.run(input, bias, *parts)
        assert output.shape == aten.forward(torch.ones(1, 4, 4, 3), None, *parts)[:0].shape
        output.sum().backward()
        assert F.mse_loss(bias.grad, torch.zeros(4)) == 0  # type: ignore[arg-type]
