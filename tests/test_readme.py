"""Every command and code block of the README does what it says."""

import importlib.metadata
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import free_port, wait_for

from train import compare, image_classification, language_model

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BIN = Path(sys.executable).parent


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def run(*command, timeout=280, **kwargs):
    environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        command, cwd=kwargs.pop("cwd", ROOT), env=environment, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def demo_answers(command, folder):
    port = free_port()
    server = subprocess.Popen(
        [*command, f"ARGS=--port {port}"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        assert b"Engram memory" in wait_for(f"http://127.0.0.1:{port}/", server, seconds=200)
    finally:
        server.terminate()
        server.wait()


def make_knows(command, folder):
    assert "pytest" in run(command[0], "--dry-run", *command[1:])


def extras_exist(command, folder):
    wanted = set(re.search(r"\[(.*)\]", command[-1])[1].split(","))
    assert wanted <= set(importlib.metadata.metadata("hf-engram").get_all("Provides-Extra"))


def runs(command, folder):
    assert run(*command)


def trains_into(command, folder):
    assert "parameters" in run(*command, "--output_dir", str(folder / "run"))
    assert (folder / "run" / "model.safetensors").is_file()


def trains_briefly(command, folder):
    trains_into([*command, "--max_steps", "2", "--save_strategy", "no", "--eval_strategy", "no"], folder)


def measures_briefly(command, folder):
    assert "floor" in run(*command, "--sections", "training", "--works", "a", "--rounds", "2")


def imports(command, folder):
    keras_file = ROOT / "tests" / "fixtures" / "keras" / "keras_3.15.1" / "classifier.keras"
    assert "EnnForImageClassification" in run(*command[:-2], str(keras_file), str(folder / command[-1]))


def options_are_known(command, folder):
    place = next(index for index, word in enumerate(command) if word.startswith("train."))
    command_module = {
        "train.compare": compare,
        "train.image_classification": image_classification,
        "train.language_model": language_model,
    }[command[place]]
    assert command_module.parse(command[place + 1 :])


def searches_the_debug_images(command, folder):
    config = command.index("train/configs/mnist_rows.yaml")
    command[config : config + 1] = ["train/configs/debug_images.yaml", "--output_dir", str(folder)]
    assert "Best of 2" in run(*command[:-1], "2", "--num_train_epochs", "1")


COMMANDS = {
    "make demo": demo_answers,
    "make test": make_knows,
    'pip install ".[cpu]"': extras_exist,
    'pip install ".[cpu,train]"': extras_exist,
    'pip install ".[cpu,traces]"': extras_exist,
    'pip install ".[keras]"': extras_exist,
    "python -m hf_engram.keras_import mnist.keras mnist/": imports,
    "python -m train.language_model --help": runs,
    "python -m train.language_model train/configs/debug.yaml": trains_into,
    "python -m train.language_model train/configs/books.yaml": trains_briefly,
    "python -m train.image_classification --help": runs,
    "python -m train.image_classification train/configs/debug_images.yaml": trains_into,
    # Trained for a few steps on the real data sets by tests/train.
    "python -m train.language_model train/configs/wikitext2.yaml": options_are_known,
    "python -m train.image_classification train/configs/mnist_rows.yaml": options_are_known,
    "python -m train.image_classification train/configs/mnist_permuted.yaml": options_are_known,
    "python -m train.image_classification train/configs/cifar10_rows.yaml": options_are_known,
    "python -m train.image_classification train/configs/paper_mnist_rows.yaml": options_are_known,
    "python -m train.image_classification train/configs/paper_cifar10_rows.yaml": options_are_known,
    "python -m train.language_model train/configs/paper_wikitext.yaml": options_are_known,
    "accelerate launch --config_file train/configs/accelerate/two_processes.yaml -m train.language_model "
    "train/configs/debug.yaml": trains_into,
    "python -m train.compare train/configs/compare/mnist_rows.yaml": options_are_known,
    "python -m train.compare train/configs/compare/mnist_permuted.yaml": options_are_known,
    "python -m train.compare train/configs/compare/cifar10_rows.yaml": options_are_known,
    "python -m train.compare train/configs/compare/wikitext2.yaml": options_are_known,
    'pip install ".[search]"': extras_exist,
    "python -m train.search image_classification train/configs/mnist_rows.yaml --trials 20": searches_the_debug_images,
    "python -m benchmarks.exactness": runs,
    "python -m benchmarks.speed": measures_briefly,
}


def test_all_commands_are_tested():
    commands = [line for block in blocks("bash") for line in block.splitlines()]
    assert sorted(set(commands)) == sorted(COMMANDS)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_command(command, tmp_path):
    COMMANDS[command](shlex.split(command), tmp_path)


@pytest.mark.parametrize("code", blocks("python"), ids=lambda code: code.splitlines()[0])
def test_code_block(code, tmp_path):
    (tmp_path / "model_cards").symlink_to(ROOT / "model_cards")
    output = run(sys.executable, "-W", "error::UserWarning:hf_engram", "-c", code, cwd=tmp_path)
    assert output


def test_links_lead_somewhere():
    targets = re.findall(r"\]\((?!http)([^)#]+)", README)
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []
