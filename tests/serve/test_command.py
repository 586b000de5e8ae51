"""The command that serves the page."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import free_port, wait_for

ROOT = Path(__file__).parents[2]


def run_app(*args):
    command = [sys.executable, "-m", "serve.app", *args]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
def test_the_command_serves_checkpoint_folders(text_folder, image_folder):
    port = free_port()
    app = run_app("--model", str(text_folder), "--image-model", str(image_folder), "--port", str(port))
    try:
        config = json.loads(wait_for(f"http://127.0.0.1:{port}/config", app))
    finally:
        app.terminate()
        app.wait()
    shown = json.dumps(config["components"])
    assert str(text_folder) in shown
    assert config["title"] == "Engram memory"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--help"], "--trust-remote-code"),
        (["--model", "model_cards/no-such-model"], "There is no checkpoint folder 'model_cards/no-such-model'"),
        (["--image-model", "model_cards/no-such-model"], "name another checkpoint with --image-model, or train one"),
        (["--model", "{images}"], "--model takes a language model"),
        (["--port", "x"], "invalid int value: 'x'"),
    ],
)
def test_the_command_explains_itself(args, says, image_folder):
    app = run_app(*(arg.format(images=image_folder) for arg in args))
    output, _ = app.communicate(timeout=100)
    assert says in output
    assert "Traceback" not in output
    assert (app.returncode == 0) == (args == ["--help"])
