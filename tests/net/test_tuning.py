"""The choice of forms: autotuning with given times on a fake GPU, its cache, and its flags."""

import json
from types import SimpleNamespace

import pytest
import torch
from triton.runtime.errors import OutOfResources

from net.model.alexnet import alexnet
from net.model.config import network
from net.model.forms import Forms, forms
from net.training import tuning

GPU = torch.device("cuda", 0)


def test_chooses_slot_by_slot_and_asks_once() -> None:
    paper = alexnet("paper", image_size=67, hidden=())
    available = list(forms(paper, torch.device("cuda")))
    asked: list[Forms] = []

    def seconds(form: Forms) -> float:
        asked.append(form)
        return {"pixels": 3.0, "blocks": 1.0}[form.first] + {"apart": 0.0, "together": -0.1}[form.shared]

    assert tuning.slot_by_slot(available, Forms(), seconds) == Forms("blocks", "together")
    assert len(asked) == len(set(asked))


def test_a_gain_that_is_noise_changes_nothing() -> None:
    available = [Forms(), Forms("blocks")]
    for times, expected in (((1.0, 0.99), Forms()), ((1.0, 0.97), Forms("blocks")), ((1.0, 1.0), Forms())):
        told = dict(zip(available, times, strict=True))
        assert tuning.slot_by_slot(available, Forms(), told.__getitem__) == expected


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What measuring calls on a GPU besides the measurement itself."""
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RuntimeError("no engine\nand more"), "no engine"),
        (torch.OutOfMemoryError("CUDA out of memory"), "CUDA out of memory"),
        (OutOfResources(300_000, 232_448, "shared memory"), "out of resource: shared memory, Required: 300000"),
        (KeyError(), "KeyError"),
    ],
)
def test_a_form_that_fails_is_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, line: str
) -> None:
    def milliseconds(*arguments: object) -> float:
        form = arguments[-1]
        assert isinstance(form, Forms)
        if form.shared == "together":
            raise error
        return 1.0 if form.towers == "at once" else 2.0

    monkeypatch.setattr(tuning, "milliseconds", milliseconds)
    entry = tuning.measure(network("paper"), 8, "bf16", GPU)
    assert entry["chosen"] == {"first": "blocks", "shared": "apart", "towers": "at once"}
    assert None in entry["milliseconds"].values()
    assert f"not supported here: {line}" in capsys.readouterr().out


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(tuning, "key", lambda *_: "this machine")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")


@pytest.mark.usefixtures("cache")
def test_a_choice_is_measured_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    measured: list[object] = []
    entry = {
        "chosen": {"first": "blocks", "shared": "apart", "towers": "in turn"},
        "milliseconds": {str(Forms("blocks")): 2.0},
        "seconds": 3.0,
    }
    monkeypatch.setattr(tuning, "measure", lambda *arguments: measured.append(arguments) or entry)

    def tuned(how: str, worth: bool = True) -> Forms:
        return tuning.tuned(network("paper"), 128, "bf16", torch.device("cuda"), how, worth)

    assert tuned("off") == tuned("auto", worth=False) == Forms("blocks", "together")
    assert not measured
    assert tuned("auto") == Forms("blocks")
    assert "measured in 0:00:03" in (said := capsys.readouterr().out)
    assert "64,000 images/s" in said
    assert tuned("auto", worth=False) == Forms("blocks")
    assert len(measured) == 1
    assert tuned("again") == Forms("blocks")
    assert len(measured) == 2
    # A truncated or foreign file holds no choice.
    for content in ("{", "[]", json.dumps({"this machine": {"chosen": {"first": "bricks"}}})):
        tuning.cache_file().write_text(content)
        assert tuning.remembered("this machine") is None
        assert tuned("auto") == Forms("blocks")
        assert tuning.remembered("this machine") == entry


def test_short_runs_measure_nothing() -> None:
    plan = network("paper")
    assert not tuning.worth_measuring(plan, 200 * 128, None)
    assert tuning.worth_measuring(plan, 90 * 1_200_000, None)
    assert not tuning.worth_measuring(plan, 90 * 1_200_000, 60.0)


def test_a_choice_is_of_one_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache's key changes with everything that a measurement depends on."""
    properties = {"name": "a GPU", "major": 9, "minor": 0, "multi_processor_count": 132}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(**properties))

    def key(variant: str = "paper", batch: int = 128, precision: str = "bf16") -> str:
        return tuning.key(network(variant), batch, precision, GPU)

    keys = [key(), key("half"), key(batch=64), key(precision="fp32")]
    for name, value in (("name", "another"), ("multi_processor_count", 114)):
        properties[name] = value
        keys.append(key())
    monkeypatch.setattr(torch, "__version__", "1.0")
    keys.append(key())
    assert len(set(keys)) == len(keys)
    assert key() == keys[-1]
