"""Flags, files and presets, and how mistakes are answered."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from net import cli, runs
from net.config import EvaluateConfig, PrepareConfig, TrainConfig
from net.errors import UsageError
from tests.commands import one_line, run, run_here, start, wait_for


def resolve(*arguments: str) -> TrainConfig:
    return cli.resolve(cli.given(TrainConfig, "net.train", "", arguments), TrainConfig)


@pytest.mark.parametrize("command", ["train", "evaluate", "prepare"])
def test_help_is_instant(command: str) -> None:
    """It must not import torch: the best of three runs stays under a second."""
    fastest = 10.0
    for _ in range(3):
        start = time.monotonic()
        done = subprocess.run([sys.executable, "-m", f"net.{command}", "--help"], capture_output=True, text=True)
        fastest = min(fastest, time.monotonic() - start)
        assert done.returncode == 0
        assert "usage: python -m net." in done.stdout
    assert fastest < 1


def test_flags_users_know() -> None:
    line = """--preset imagenet --data-path D --network half --image-size 128 --epochs 3 --max-steps 7 --time-budget 9
        -b 64 --lr 0.02 --momentum 0.8 --weight-decay 0.001 --precision bf16 --no-channels-last --compile --device cpu
        -j 4 --seed 5 --init-from W --checkpoint-every 50 --keep 2 --output-dir O --eval-every 2 --tensorboard"""
    config = resolve(*line.split())
    assert (config.network, config.image_size, config.epochs, config.max_steps) == ("half", 128, 3, 7)
    assert (config.batch_size, config.lr, config.momentum, config.weight_decay) == (64, 0.02, 0.8, 0.001)
    assert (config.precision, config.channels_last, config.compile, config.device) == ("bf16", False, True, "cpu")
    assert (config.workers, config.seed, config.init_from, config.checkpoint_every) == (4, 5, "W", 50)
    assert (config.keep, config.output_dir, config.eval_every, config.tensorboard) == (2, "O", 2, True)
    assert (config.time_budget, config.compile) == (9, True)


def test_presets_and_recipes() -> None:
    digits = resolve()
    assert (digits.network, digits.recipe, digits.reflect, digits.colour_noise) == ("digits", "digits", False, 0.0)
    assert digits.time_budget == 60
    imagenet = resolve("--preset", "imagenet")
    assert (imagenet.network, imagenet.recipe, imagenet.reflect, imagenet.lr) == ("paper", "paper", True, 0.01)
    assert resolve("--preset", "cifar10").recipe == "paper"
    code = resolve("--preset", "imagenet", "--recipe", "original_code")
    assert (code.epochs, code.lr_milestones, code.bias_lr_multiplier) == (91, (25, 51, 79), 2.0)
    assert resolve("--preset", "imagenet", "--recipe", "original_code", "--epochs", "5").epochs == 5


def test_a_fixed_length_is_not_cut_by_the_preset_s_budget() -> None:
    assert resolve("--epochs", "500").time_budget is None
    assert resolve("--max-steps", "500").time_budget is None
    assert resolve("--epochs", "500", "--time-budget", "30").time_budget == 30


def test_architecture_fields() -> None:
    config = resolve("--architecture", "lrn=false", "dropout=0.3", "activation=tanh", 'without=["conv3"]')
    assert config.architecture == {"lrn": False, "dropout": 0.3, "activation": "tanh", "without": ["conv3"]}


def test_files_stand_between_presets_and_flags(tmp_path: Path) -> None:
    path = tmp_path / "flags.toml"
    path.write_text(
        'preset = "imagenet"\nlr = 1\nbatch-size = 32\nlr_milestones = [3, 5]\narchitecture = { lrn = false }\n'
    )
    config = resolve("--config", str(path), "-b", "16")
    assert (config.preset, config.lr, config.batch_size, config.lr_milestones) == ("imagenet", 1.0, 16, (3, 5))
    assert config.architecture == {"lrn": False}
    assert config.epochs == 90


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("epoch = 3", "'epoch' is no flag; did you mean epochs?"),
        ('epochs = "3"', "epochs must be of type int; got '3'"),
        ("epochs = true", "epochs must be of type int; got True"),
        ('precision = "fp8"', "precision must be one of auto, fp32, tf32, bf16; got 'fp8'"),
        ("lr_milestones = 3", "must be a list"),
        ('lr_milestones = ["a"]', "must be of type int"),
        ("architecture = 3", "must be of type dict"),
        ("epochs = ", "is not TOML"),
    ],
)
def test_mistakes_in_a_file_are_named(tmp_path: Path, content: str, says: str) -> None:
    path = tmp_path / "flags.toml"
    path.write_text(content)
    with pytest.raises(UsageError, match=r"flags\.toml") as refused:
        resolve("--config", str(path))
    assert says in str(refused.value)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(UsageError, match="--config: cannot read nowhere"):
        resolve("--config", "nowhere")


def test_a_file_of_other_bytes_is_named(tmp_path: Path) -> None:
    (tmp_path / "flags.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match=r"flags\.toml is not TOML"):
        resolve("--config", str(tmp_path / "flags.toml"))


def test_the_written_configuration_reads_back(tmp_path: Path) -> None:
    config = resolve("--architecture", "lrn=false", "activation=tanh", 'without=["conv3"]', "--lr", "1e-7", "--no-crop")
    runs.write_config(tmp_path, config)
    assert cli.resolve(runs.read_config(tmp_path), TrainConfig, {}) == config
    assert resolve("--config", str(tmp_path / runs.CONFIG)) == TrainConfig(
        **{**vars(config), "config": str(tmp_path / runs.CONFIG)}
    )


@pytest.mark.parametrize(
    ("module", "arguments", "says"),
    [
        ("train", ["--epochs", "x"], "argument --epochs: invalid int value: 'x'"),
        ("train", ["--network", "vgg"], "argument --network: invalid choice: 'vgg'"),
        ("train", ["--epoch", "3"], "unrecognized arguments: --epoch 3"),
        ("train", ["--epochs", "0"], "--epochs must be at least 1; got 0"),
        ("train", ["--architecture", "lrn"], "'lrn' is not NAME=VALUE"),
        ("train", ["--preset", "imagenet"], "--preset imagenet needs --data-path"),
        ("train", ["--data-path", "synthetic:x"], "after 'synthetic:' comes a positive number"),
        ("train", ["--seed", "99999999999999999999"], "--seed must be less than 2**63"),
        ("train", ["--momentum", "5"], "--momentum must be less than 1; got 5.0"),
        ("train", ["--architecture", "convolutions=3"], "network: convolutions must be a list; got 3"),
        ("train", ["--architecture", "image_channels=1"], "--architecture image_channels: it comes from the data"),
        ("train", ["--device", "cpu:3"], "--device must be cpu, cuda, cuda:N or mps; got 'cpu:3'"),
        ("train", ["--architecture", "without=conv9"], "'conv9' is no convolution of digits"),
        ("train", ["--device", "tpu"], "--device must be cpu, cuda, cuda:N or mps; got 'tpu'"),
        ("train", ["--device", "cuda:99"], "--device cuda:99: this machine has"),
        ("train", ["--batch-size", "2000"], "--batch-size 2000 is more than the 1442 training images"),
        ("train", ["--image-size", "8"], "window does not fit"),
        ("train", ["--architecture", "classes=3"], "--architecture classes: it comes from the data"),
        ("evaluate", [], "the following arguments are required: checkpoints"),
        ("evaluate", ["x", "-b", "0"], "--batch-size must be at least 1; got 0"),
        ("prepare", ["a"], "give SOURCE and TARGET"),
        ("prepare", ["a", "b", "--size", "0"], "--size must be at least 1; got 0"),
    ],
)
def test_mistakes_cost_one_line_and_exit_with_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, arguments: list[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    one_line(run_here(f"net.{module}", *arguments), 2, says)
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_in_a_process_of_its_own() -> None:
    one_line(run("net.train", "--epochs", 0), 2, "--epochs must be at least 1; got 0")
    one_line(run("net.evaluate", "nowhere"), 1, "nowhere does not exist")


def test_a_reader_that_leaves_ends_the_command_quietly(tmp_path: Path) -> None:
    process = start("net.train", "--epochs", 9, "--log-every", 1, "--output-dir", tmp_path / "run")
    wait_for(process, "step 1/")
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 128 + signal.SIGPIPE


@pytest.mark.parametrize("config", [TrainConfig, EvaluateConfig, PrepareConfig])
def test_every_flag_has_a_help_text(config: type) -> None:
    for action in cli.parser(config, "net.x", "")._actions:
        assert action.help
