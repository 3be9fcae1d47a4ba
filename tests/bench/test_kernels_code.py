"""A measurement belongs to what the kernels do: not to their comments, and not to the files that they are in."""

from bench.measure.environment import ROOT
from bench.measure.kernels_code import kernels_code, read_sources

LAUNCH = '''
from .choices import rows as count
from . import device
def forward_launch(x):
    """Starts it."""
    return device.kernel[count](x)
def backward_launch(x): return device.kernel[1](x)
def unused(): return 1
'''
DEVICE = """
@triton.jit
def kernel(x):
    return square(x)  # two of them
@triton.jit
def square(x): return x * x
"""
SOURCES = {"": "", "stage": LAUNCH, "device": DEVICE, "choices": "rows = 6\nother = 7\n"}


def changed(module: str, old: str, new: str) -> str:
    assert old in SOURCES[module]
    return kernels_code({**SOURCES, module: SOURCES[module].replace(old, new)})


def test_what_is_launched_counts_and_nothing_else() -> None:
    code = kernels_code(SOURCES)
    for module, old, new in (("stage", "Starts", "Begins"), ("device", "two of them", "x"), ("device", " * ", "*"),
                             ("stage", "return 1", "return 2"), ("choices", "other = 7", "other = 8")):  # fmt: skip
        assert changed(module, old, new) == code, old
    for module, old, new in (("device", "x * x", "x + x"), ("choices", "rows = 6", "rows = 8"),
                             ("stage", "[1]", "[2]"), ("device", "return square(x)", "return x")):  # fmt: skip
        assert changed(module, old, new) != code, old
    # Another folder, in two files.
    kernel, square = DEVICE.split("@triton.jit\ndef square(")
    moved = {
        "": "",
        "gpu": "",
        "gpu.launch": LAUNCH.replace("from . import", "from .. import").replace(".choices", "..choices"),
        "device": f"from .gpu.squares import square\n{kernel}",
        "gpu.squares": f"@triton.jit\ndef square({square}",
        "choices": SOURCES["choices"],
    }
    assert kernels_code(moved) == code
    assert kernels_code({"": "x = 1"}) == ""


def test_the_kernels_of_this_project_are_found() -> None:
    sources = read_sources(ROOT / "kernels")
    code = kernels_code(sources)
    assert len(code) == 10
    for text, other in (("tl.store(", "tl.save("), ("maxnreg", "most"), ("num_warps", "warps")):
        assert kernels_code({name: source.replace(text, other) for name, source in sources.items()}) != code, text
    assert kernels_code({name: f"{source}\n# {name}\n" for name, source in sources.items()}) == code
