"""Every command and code block of the README does what it says."""

import importlib.metadata
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import free_port, wait_for

from train import compare, image_classification, language_model

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BIN = Path(sys.executable).parent
OUTER_MAKE = ("MAKEFLAGS", "MAKELEVEL", "SLOW")  # what a `make` that runs these tests hands on
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in OUTER_MAKE}
ENVIRONMENT["PATH"] = f"{BIN}{os.pathsep}{os.environ['PATH']}"
FIXTURES = {
    "image_classification": ["--dataset_name", "tests/fixtures/shapes"],
    "language_model": ["--dataset_name", "tests/fixtures/articles", "--dataset_config", "None"],
}


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def run(*command, timeout=280, **kwargs):
    done = subprocess.run(
        command, cwd=kwargs.pop("cwd", ROOT), env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def demo_answers(command, folder):
    port = free_port()
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    server = subprocess.Popen([*command, f"ARGS=--port {port}"], cwd=ROOT, env=ENVIRONMENT, **output)
    try:
        assert b"Engram memory" in wait_for(f"http://127.0.0.1:{port}/", server, seconds=200)
    finally:
        server.terminate()
        server.wait()


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


def trains_on_a_fixture(command, folder):
    """In place of a data set that tests do without."""
    trains_briefly([*command, *FIXTURES["language_model"]], folder)


def measures_briefly(command, folder):
    assert "floor" in run(*command, "--works", "a", "--rounds", "2")


def times_models_briefly(command, folder):
    assert "over the LSTM's" in run(*command, "--rounds", "2")


def asks_briefly(command, folder):
    assert "by chance" in run(*command, "--steps", "2", "--output_dir", str(folder))


def make_runs(words):
    """`make` would run these: to do so would run the tests from within the tests, or measure for an hour."""

    def checked(command, folder):
        assert words in run(command[0], "--dry-run", *command[1:])

    return checked


def compares_briefly(command, folder):
    """The first of its models, in runs of two steps, with a data set in tests/fixtures."""
    comparison = compare.parse(command[3:])
    model, *_ = comparison.models
    briefly = ["--seeds", "1", "--max_steps", "2", "--save_strategy", "no", "--eval_strategy", "no"]
    options = ["--models", model, "--output_dir", str(folder), *briefly, *FIXTURES[comparison.recipe]]
    assert f"| {model} | " in run(*command, *options)


def lists_what_it_would_send(command, folder):
    assert "app.py" in run(*command, "--dry-run")


def watches_briefly(command, folder):
    if shutil.which("chromium") is None:
        pytest.skip("Chromium is not installed")
    options = ["--rounds", "1", "--tokens", "40", "--long", "60", "--visitors", "2"]
    assert "frames per second" in run(*command, *options)


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
    "make test": make_runs('-m "not slow"'),
    "make test SLOW=1": make_runs("-m pytest"),
    'pip install ".[cpu]"': extras_exist,
    'pip install ".[cpu,serve]"': extras_exist,
    'pip install ".[cpu,train]"': extras_exist,
    'pip install ".[cpu,traces]"': extras_exist,
    'pip install ".[keras]"': extras_exist,
    "python -m hf_engram.keras_import mnist.keras mnist/": imports,
    "python -m hf_engram.keras_import --help": runs,
    "python -m train.language_model --help": runs,
    "python -m train.language_model train/configs/debug.yaml": trains_into,
    "python -m train.language_model train/configs/books.yaml": trains_briefly,
    "python -m train.language_model train/configs/wikitext2.yaml": trains_on_a_fixture,
    "python -m train.language_model train/configs/wikitext103_mixer.yaml": trains_on_a_fixture,
    "python -m train.image_classification --help": runs,
    "python -m train.image_classification train/configs/debug_images.yaml": trains_into,
    # On data sets that tests do without; tests/train trains some of them for a few steps where these are there.
    "python -m train.image_classification train/configs/mnist_rows.yaml": options_are_known,
    "python -m train.image_classification train/configs/mnist_permuted.yaml": options_are_known,
    "python -m train.image_classification train/configs/cifar10_rows.yaml": options_are_known,
    "python -m train.image_classification train/configs/paper_mnist_rows.yaml": options_are_known,
    "python -m train.image_classification train/configs/paper_cifar10_rows.yaml": options_are_known,
    "python -m train.language_model train/configs/paper_wikitext.yaml": options_are_known,
    "accelerate launch --config_file train/configs/accelerate/two_processes.yaml -m train.language_model "
    "train/configs/debug.yaml": trains_into,
    "python -m train.compare train/configs/compare/mnist_rows.yaml": compares_briefly,
    "python -m train.compare train/configs/compare/mnist_permuted.yaml": compares_briefly,
    "python -m train.compare train/configs/compare/mnist_permuted_places.yaml": compares_briefly,
    "python -m train.compare train/configs/compare/cifar10_rows.yaml": compares_briefly,
    "python -m train.compare train/configs/compare/cifar10_rows.yaml --models gated gru lstm": compares_briefly,
    "python -m train.compare train/configs/compare/wikitext103.yaml": compares_briefly,
    "python -m train.compare train/configs/compare/wikitext103.yaml --dataset_config wikitext-2-raw-v1 "
    "--output_dir runs/compare/wikitext2": compares_briefly,
    "python -m train.compare train/configs/compare/wikitext103.yaml --parameters 5000000 "
    "--learning_rates_of docs/results/wikitext103 --output_dir runs/compare/wikitext103_5m": compares_briefly,
    "python -m train.compare train/configs/compare/ablations.yaml": compares_briefly,
    'pip install ".[search]"': extras_exist,
    "python -m train.search image_classification train/configs/mnist_rows.yaml --trials 20": searches_the_debug_images,
    "python -m benchmarks.exactness": runs,
    "make bench": make_runs("-m benchmarks.speed"),
    "make lint": make_runs("ruff check"),
    "make help": runs,
    "python -m benchmarks.speed --sections training --works a b": measures_briefly,
    "python -m benchmarks.speed --sections training --works b --forms": measures_briefly,
    "python -m benchmarks.speed --sections language_models": times_models_briefly,
    "python -m benchmarks.recall --help": runs,
    "python -m benchmarks.recall --tasks mqar --models mixer transformer lstm": asks_briefly,
    "python -m serve.app --help": runs,
    "python -m serve.push you/engram-memory": lists_what_it_would_send,
    "python -m benchmarks.app": watches_briefly,
    "python -m benchmarks.app --apart": watches_briefly,
}


# Run by test_sharing, in order.
SHARING_COMMANDS = (
    "python -m hf_engram.hub push runs/books user/my-model",
    "python -m hf_engram.hub card model_cards/enn-books",
)


def test_all_commands_are_tested():
    commands = [line for block in blocks("bash") for line in block.splitlines()]
    sentences = " ".join(re.sub(r"^```.*?^```", "", README, flags=re.MULTILINE | re.DOTALL).split())
    commands += re.findall(r"`((?:python -m|make) [^`]+)`", sentences)
    assert sorted(set(commands)) == sorted([*COMMANDS, *SHARING_COMMANDS])


def test_an_old_python_is_refused(tmp_path):
    """... and leaves nothing behind that the next try, with another one, would stumble over."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    old = tmp_path / "python3.9"
    old.write_text(f"#!{sys.executable}\nimport sys\nsys.version_info = (3, 9)\nexec(sys.argv[2])\n")
    old.chmod(0o755)
    make = ["make", f"PYTHON={old}", "demo"]
    done = subprocess.run(make, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert "Python 3.11 or newer is needed: make PYTHON=..." in done.stderr
    assert not (tmp_path / ".venv").exists()


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_command(command, tmp_path):
    COMMANDS[command](shlex.split(command), tmp_path)


SHARING_BLOCKS = [code for code in blocks("python") if "user/my-model" in code]


@pytest.mark.slow
@pytest.mark.parametrize(
    "code", [code for code in blocks("python") if code not in SHARING_BLOCKS], ids=lambda code: code.splitlines()[0]
)
def test_code_block(code, tmp_path):
    (tmp_path / "model_cards").symlink_to(ROOT / "model_cards")
    output = run(sys.executable, "-W", "error::UserWarning:hf_engram", "-c", code, cwd=tmp_path)
    assert output


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_sharing(fresh_python, hub, tmp_path):
    """Push and load as the README does; then its commands, on the folder that the first block has written."""
    shutil.copytree(ROOT / "model_cards", tmp_path / "model_cards")
    (tmp_path / "runs").mkdir()
    push, load = SHARING_BLOCKS
    oid = fresh_python(
        "import os; os.chdir(given['folder'])", push, "result = commit.oid", package=True, folder=tmp_path
    )
    assert hub.repository("user/my-model").commit().oid == oid
    opened = fresh_python(load, "result = [type(model).__module__, len(tokenizer), model.config.use_cache]")
    assert opened[0].startswith("transformers_modules.user.my_hyphen_model")
    assert opened[1:] == [4096, True]

    (tmp_path / "my-model").rename(tmp_path / "runs" / "books")
    (tmp_path / "model_cards" / "enn-books" / "README.md").unlink()
    environment = fresh_python.command("", package=True)["env"]
    for command in SHARING_COMMANDS:
        arguments = [sys.executable, "-P", *shlex.split(command)[1:]]
        subprocess.run(arguments, cwd=tmp_path, env=environment, check=True)
    assert hub.repository("user/my-model").commit().oid == oid  # the same files make no new commit
    card = (tmp_path / "model_cards" / "enn-books" / "README.md").read_text()
    assert card == (ROOT / "model_cards" / "enn-books" / "README.md").read_text()


def test_links_lead_somewhere():
    targets = re.findall(r"\]\((?!http)([^)#]+)", README)
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []
