"""The launches of an update, counted without a GPU: more of them, or of their bytes, would cost every update."""

import pytest
from torch import Tensor, nn

from bench.launches import launches
from net.model.forms import Forms
from net.training import recipe

#: What is launched in the forms that serve untuned GPUs.
LAUNCHES = {
    "convolutions": 23, "products": 9, "stages": 12, "bias_relu": 4, "elementwise": 22, "loss": 3, "update": 3,
}  # fmt: skip


@pytest.fixture(autouse=True)
def strides_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients come in the parameter's strides, or the optimizer would copy them."""

    def unchanged(gradient: Tensor, parameter: nn.Parameter) -> Tensor:
        assert gradient.stride() == parameter.stride()
        return gradient

    monkeypatch.setattr(recipe, "_like", unchanged)


@pytest.mark.slow
@pytest.mark.parametrize("shared", ["together", "apart"])
def test_an_update_of_the_paper_s_network(shared: str) -> None:
    found = launches("paper", Forms("blocks", shared), 128)  # type: ignore[arg-type]
    # What torch.compile's form of the network launched: 53, which moved 1.1 GB.
    assert found.pointwise <= 28
    assert found.bytes["elementwise"] + found.bytes["bias_relu"] < 1.1e9 / 3
    if shared == "together":
        assert found.counts == LAUNCHES
        assert found.bytes["elementwise"] < 50e6
        assert found.bytes["stages"] < 545e6
    # No weight or gradient is cast or copied but conv1's, into blocks and, of two towers, into one gradient.
    copied = found.copied()
    assert len(copied["weights"]) == (4 if shared == "together" else 5)
    assert max(each.bytes for each in copied["weights"]) <= 96 * 3 * 12 * 12 * 2
    # fc6 reads features by channel.
    assert [(each.operator, each.shape) for each in copied["activations"]] == 2 * [("clone", (128, 256, 6, 6))]


def test_an_update_of_a_small_network() -> None:
    """The digits' network has no blocks; its towers share conv1 and conv3."""
    apart, together = (launches("digits", Forms("pixels", shared), 64) for shared in ("apart", "together"))
    assert together.counts == {**LAUNCHES, "elementwise": 18}
    assert apart.counts["convolutions"] - together.counts["convolutions"] == 5
    assert not together.copied()["weights"]
    assert not apart.copied()["weights"]
    assert {(each.operator, each.shape) for each in together.copied()["activations"]} == {("clone", (64, 64, 3, 3))}
