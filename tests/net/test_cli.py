"""Flags, files and presets, and the errors for mistakes."""

import dataclasses
import os
import re
import signal
from pathlib import Path

import pytest

from net.common import cli
from net.common.errors import UsageError
from net.common.fields import flag_name
from net.evaluate import EvaluateConfig
from net.prepare import PrepareConfig
from net.training import runs
from net.training.config import TrainConfig
from tests.commands import one_line, run, run_here, start, wait_for


def resolve(*arguments: str) -> TrainConfig:
    return cli.resolve(cli.given(TrainConfig, "net.train", "", arguments), TrainConfig)


def help_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit):
        cli.given(TrainConfig, "net.train", "", [*arguments, "--help"])
    return capsys.readouterr().out


def test_help_lists_every_flag_in_its_group(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    text = help_of(capsys)
    assert re.findall(r"^(\w.*):$", text, re.MULTILINE) == ["options", *TrainConfig.GROUPS]
    listed = {name.replace("[no-]", "") for name in re.findall(r"^  (?:-\w, )?(--[][\w-]+)", text, re.MULTILINE)}
    assert listed == {"--help", *(flag_name(item.name) for item in dataclasses.fields(TrainConfig))}
    # Two screens.
    assert len(text.splitlines()) <= 100


def test_help_shows_the_preset_s_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    for preset, epochs, reflect in (("digits", 20, "off"), ("imagenet", 90, "on")):
        for arguments in (("--preset", preset), (f"--preset={preset}",)):
            text = " ".join(help_of(capsys, *arguments).split())
            assert f"may end earlier ({epochs})" in text
            assert f"random horizontal reflections ({reflect})" in text


def test_help_shows_the_defaults_that_hold(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Whatever decides them: here the preset of a file, and the number of epochs, which drops the time budget."""
    (tmp_path / "a.toml").write_text('preset = "imagenet"')
    budget = "stop after this many seconds of training; 0 for no limit"
    for arguments, has, has_not in (
        (("--config", str(tmp_path / "a.toml")), "may end earlier (90)", "(60.0)"),
        (("--config", str(tmp_path / "a.toml"), "--preset", "digits"), "may end earlier (20)", "(90)"),
        ((), f"{budget} (60.0)", "(90)"),
        (("--epochs", "3"), budget, f"{budget} (60.0)"),
    ):
        text = " ".join(help_of(capsys, *arguments).split())
        assert has in text
        assert has_not not in text


@pytest.mark.parametrize(
    ("module", "arguments", "says"),
    [
        ("train", ["--help", "--preset", "bogus"], "argument --preset: invalid choice: 'bogus'"),
        ("train", ["--help", "--preset="], "argument --preset: invalid choice: ''"),
        ("train", ["--help", "--preset"], "argument --preset: expected one argument"),
        ("train", ["--pre", "imagenet", "--help"], "unrecognized arguments: --pre imagenet; did you mean --preset?"),
        ("train", ["--help", "--config", "nowhere"], "--config: file nowhere does not exist"),
        ("evaluate", ["--help", "--bogus"], "unrecognized arguments: --bogus"),
    ],
)
def test_mistakes_beside_help(module: str, arguments: list[str], says: str) -> None:
    one_line(run_here(f"net.{module}", *arguments), 2, says)


def test_help_needs_no_other_argument() -> None:
    for arguments in (["--help"], ["-h"], ["a", "-h"]):
        done = run_here("net.export", *arguments)
        assert done.returncode == 0, done.stderr
        assert "Write a trained network as ONNX" in done.stdout


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
    short = resolve("--preset", "imagenet", "--recipe", "original_code", "--epochs", "5")
    assert (short.epochs, short.lr_milestones) == (5, (1, 3, 4))
    assert resolve("--preset", "alexnet32").lr_milestones == (30, 42)
    assert resolve("--preset", "alexnet32", "--epochs", "24").lr_milestones == (15, 21)
    assert resolve("--preset", "alexnet32", "--epochs", "1").lr_milestones == (1,)
    assert resolve("--preset", "alexnet32", "--epochs", "24", "--lr-milestones", "5").lr_milestones == (5,)


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
        ("epoch = 3", "unknown flag 'epoch'; did you mean epochs?"),
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
    with pytest.raises(UsageError, match="--config: file nowhere does not exist"):
        resolve("--config", "nowhere")


def test_a_file_of_other_bytes_is_named(tmp_path: Path) -> None:
    (tmp_path / "flags.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match=r"flags\.toml is not UTF-8"):
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
        ("train", ["--epoch", "3"], "unrecognized arguments: --epoch 3; did you mean --epochs?"),
        ("train", ["--data_path", "x"], "unrecognized arguments: --data_path x; did you mean --data-path?"),
        ("train", ["--batchsize=5"], "unrecognized arguments: --batchsize=5; did you mean --batch-size?"),
        ("train", ["5"], "unrecognized arguments: 5\n"),
        ("train", ["--output-dir", ""], "--output-dir must be a non-empty string without null bytes; got ''"),
        ("train", ["--data-path", ""], "--data-path must be a non-empty string"),
        ("train", ["--config", ""], "--config must be a non-empty string"),
        ("train", ["--resume", ""], "--resume must be a non-empty string"),
        ("evaluate", [""], "--checkpoints[0] must be a non-empty string"),
        ("export", ["", "a.onnx"], "--checkpoint must be a non-empty string"),
        ("prepare", ["a", ""], "--target must be a non-empty string"),
        ("data.shapes", [""], "--folder must be a non-empty string"),
        ("train", ["--architecture", "without=[[["], "without: '[[[' is not a convolution"),
        ("train", ["--architecture", "lrn=" + "[" * 5000], "network: lrn must be of type bool"),
        ("train", ["--architecture", "lrn=" + "9" * 5000], "network: lrn must be of type bool"),
        ("train", ["--architecture", "lrn_size=" + "9" * 50], "network: lrn_size must be less than 2**63"),
        ("train", ["--epochs", "9" * 400], "--epochs must be less than 2**63; got 99"),
        ("train", ["--epochs", "9" * 5000], "argument --epochs: invalid int value"),
        ("train", ["--data-path", "synthetic:²"], "after 'synthetic:' comes a positive number"),
        ("train", ["--data-path", "synthetic:" + "9" * 5000], "after 'synthetic:' comes a positive number"),
        ("train", ["-j", "1000000000"], "--workers must be at most 1,024; got 1000000000"),
        ("train", ["--image-size", "1000000000"], "--image-size must be at most 65,536; got 1000000000"),
        ("train", ["--timeout", "1e308"], "--timeout must be at most 1,000,000; got 1e+308"),
        ("evaluate", ["x", "-b", "1000000000"], "--batch-size must be at most 65,536; got 1000000000"),
        ("prepare", ["a", "b", "-j", "1000000000"], "--workers must be at most 1,024; got 1000000000"),
        ("train", ["--lr", "nan"], "--lr must be at least 0; got nan"),
        ("train", ["--lr", "inf"], "--lr must be at least 0; got inf"),
        ("train", ["--epochs", "0"], "--epochs must be at least 1; got 0"),
        ("train", ["--architecture", "lrn"], "'lrn' is not NAME=VALUE"),
        ("train", ["--preset", "imagenet"], "--preset imagenet needs --data-path"),
        ("train", ["--data-path", "synthetic:x"], "after 'synthetic:' comes a positive number"),
        ("train", ["--seed", "99999999999999999999"], "--seed must be less than 2**63"),
        ("train", ["--momentum", "5"], "--momentum must be less than 1; got 5.0"),
        ("train", ["--architecture", "convolutions=3"], "network: convolutions must be a list; got 3"),
        ("train", ["--architecture", "image_channels=1"], "--architecture image_channels: set by the data"),
        ("train", ["--device", "cpu:3"], "--device must be cpu, cuda, cuda:N or mps; got 'cpu:3'"),
        ("train", ["--architecture", "without=conv9"], "'conv9' is not a convolution of digits"),
        ("train", ["--device", "tpu"], "--device must be cpu, cuda, cuda:N or mps; got 'tpu'"),
        ("train", ["--device", "cuda:99"], "--device cuda:99: this machine has"),
        ("train", ["--batch-size", "2000"], "--batch-size 2000 is more than the 1442 training images"),
        ("train", ["--image-size", "8"], "window does not fit"),
        ("train", ["--architecture", "classes=3"], "--architecture classes: set by the data"),
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


@pytest.mark.parametrize(
    ("module", "arguments", "says"),
    [
        ("train", ["--data-path", "nowhere"], "--data-path nowhere does not exist"),
        ("train", ["--init-from", "nowhere"], "--init-from nowhere does not exist"),
        ("train", ["--data-path", ".", "--val-labels", "nowhere"], "--val-labels nowhere does not exist"),
        ("train", ["--preset", "imagenet"], "--preset imagenet needs --data-path"),
        ("evaluate", ["nowhere"], "error: nowhere does not exist"),
        ("evaluate", [".", "--data-path", "nowhere"], "--data-path nowhere does not exist"),
        ("predict", ["nowhere", "a.png"], "error: nowhere does not exist"),
        ("predict", [".", "nowhere.png"], "nowhere.png cannot be read as an image: does not exist"),
        ("prepare", ["nowhere", "store"], "nowhere does not exist"),
        ("export", ["nowhere", "a.onnx"], "error: nowhere does not exist"),
        ("figures", ["filters", "nowhere"], "error: nowhere does not exist"),
        ("hashing", ["nowhere"], "error: nowhere does not exist"),
        ("ablations", ["--data-path", "nowhere"], "--data-path nowhere does not exist"),
    ],
)
def test_paths_come_before_pytorch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, arguments: list[str], says: str
) -> None:
    """Half a second instead of ten: nothing is imported, created or printed before."""
    monkeypatch.chdir(tmp_path)

    def load(*modules: str) -> None:
        raise AssertionError(f"imports {modules}")

    monkeypatch.setattr(cli, "load", load)
    done = run_here(f"net.{module}", *arguments)
    assert done.returncode in (1, 2)
    one_line(done, done.returncode, says)
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_no_configuration_can_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = os.fsdecode(b"im\xffages")
    one_line(run_here("net.train", "--data-path", name), 2, "--data-path ", "im\\udcffages is not valid UTF-8")
    # TOML requires DEL to be escaped, JSON does not.
    runs.write_config(tmp_path, TrainConfig(data_path='a\x7f\n\tb"\\é'))
    assert runs.read_config(tmp_path)["data_path"] == str(tmp_path / 'a\x7f\n\tb"\\é')


def test_ctrl_c_waits_for_an_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An exception in an import would leave a half-initialized library, and has been swallowed by one."""
    done, ended = [], []

    def slow(name: str) -> None:
        signal.raise_signal(signal.SIGINT)
        done.append(name)

    monkeypatch.setattr(cli.importlib, "import_module", slow)
    monkeypatch.setattr(os, "_exit", ended.append)
    with pytest.raises(SystemExit) as left:
        cli.run(lambda: cli.load("one"))
    assert left.value.code == 130
    assert (done, ended) == (["net.one"], [])
    assert capsys.readouterr().err == "error: interrupted\n"
    with pytest.raises(KeyboardInterrupt):
        cli.load("one", "two")
    assert ended == [130], "the second one ends the process"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_without_a_subcommand_all_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.subcommand("net", "The network.", {"train": "train it", "export": "write it"}, [])
    assert capsys.readouterr().err.endswith("train   train it\n  export  write it\n")


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
