"""The launches of an update, counted without a GPU: more of them, or of their bytes, would cost every update."""

import pytest

from bench.launches import launches
from net.model.forms import Forms

#: What is launched in the forms that serve untuned GPUs.
LAUNCHES = {"convolutions": 23, "products": 9, "stages": 20, "update": 3, "elementwise": 28}


@pytest.mark.slow
def test_an_update_of_the_paper_s_network() -> None:
    found = launches("paper", Forms("blocks", "together"), 128)
    assert found.counts == LAUNCHES
    # Gradients come in the parameter's memory format and dtype, or the optimizer would copy them. What is copied is the
    # gradient of conv4, whose halves belong to one tower each.
    assert found.copies == 384 * 192 * 9 * 2
    assert found.bytes["elementwise"] < 50e6
    assert found.bytes["stages"] < 720e6


def test_an_update_of_a_small_network() -> None:
    """The digits' network has no blocks; its towers share conv1 and conv3."""
    apart, together = (launches("digits", Forms("pixels", shared), 64) for shared in ("apart", "together"))
    assert together.counts == {"convolutions": 23, "products": 9, "stages": 20, "update": 3, "elementwise": 24}
    assert apart.counts["convolutions"] - together.counts["convolutions"] == 5
    # The gradient of conv4 in bfloat16, put together from its towers'.
    assert together.copies == 96 * 48 * 9 * 2
