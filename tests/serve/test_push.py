"""The Space: what it holds, and that it runs from nothing but what was pushed."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers import free_port, wait_for

ROOT = Path(__file__).parents[2]


def push(*args, **environment):
    done = subprocess.run(
        [sys.executable, "-m", "serve.push", *args],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_what_was_pushed_runs_on_its_own(hub, tmp_path):
    code, output = push("user/engram-memory", HF_ENDPOINT=hub.url, HF_TOKEN=hub.token)
    assert code == 0, output
    assert "user/engram-memory" in output
    files = hub.files("user/engram-memory", "spaces")
    assert len(hub.commits("user/engram-memory", "spaces")) == 1
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)

    front_matter = yaml.safe_load(files["README.md"].decode().split("---")[1])
    assert front_matter["sdk"] == "gradio"
    assert f"gradio=={front_matter['sdk_version']}\n" in (ROOT / "constraints.txt").read_text()
    assert not any("__pycache__" in name or name.startswith("serve/") for name in files)

    port = free_port()
    app = subprocess.Popen(
        [sys.executable, front_matter["app_file"]],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": "", "GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_SERVER_PORT": str(port)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        config = json.loads(wait_for(f"http://127.0.0.1:{port}/config", app))
    finally:
        app.terminate()
        app.wait()
    assert config["title"] == "Engram memory"


@pytest.mark.slow
def test_a_second_push_replaces_the_first(hub):
    for _ in range(2):
        code, output = push("user/twice", "--private", HF_ENDPOINT=hub.url, HF_TOKEN=hub.token)
        assert code == 0, output


def test_a_dry_run_lists_the_files_and_sends_nothing():
    code, output = push("user/nothing", "--dry-run", HF_ENDPOINT="http://127.0.0.1:1")
    assert code == 0
    assert re.search(r"\d+ files, \d+\.\d MB", output)
    for name in ("app.py", "README.md", "live_memory/page.py", "hf_engram/__init__.py", "model.safetensors"):
        assert name in output
    assert "push.py" not in output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("repo_id", "token", "sentence"),
    [("user/refused", "wrong", "the Hub does not know you"), ("a b", "any", "was not pushed: ")],
)
def test_a_refusal_is_a_sentence(hub, repo_id, token, sentence):
    code, output = push(repo_id, HF_ENDPOINT=hub.url, HF_TOKEN=token)
    assert code == 1
    assert sentence in output
    assert "Traceback" not in output


def test_requirements_are_the_versions_that_are_tested():
    lines = (ROOT / "serve" / "requirements.txt").read_text().splitlines()
    pinned = [line for line in lines if line and not line.startswith(("#", "--"))]
    constraints = (ROOT / "constraints.txt").read_text().splitlines()
    assert set(pinned) <= set(constraints)
    assert {line.split("==")[0] for line in pinned} >= {"torch", "transformers", "numba", "matplotlib"}
