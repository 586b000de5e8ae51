"""What goes wrong on the way to the Hub is said clearly, and leaves nothing half published."""

import resource
import signal
import subprocess
from contextlib import contextmanager

import pytest
import torch
from helpers import tiny_model
from hub_scripts import MAKE, WITHOUT_CHECK

from hf_engram import EnnForSequenceClassification
from hf_engram.hub import save_for_hub


@contextmanager
def files_no_larger_than(size):
    """As on a full disk, writing more raises an OSError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("existing", [True, False], ids=["overwriting", "new"])
def test_full_disk_leaves_the_folder_as_it_was(tmp_path, existing):
    features = {"vocab_size": None, "hidden_size": 16}
    if existing:
        save_for_hub(tiny_model(EnnForSequenceClassification, dtype=torch.float32, **features), tmp_path)
    before = contents(tmp_path)
    big = tiny_model(EnnForSequenceClassification, **{**features, "hidden_size": 256})
    with files_no_larger_than(500_000), pytest.raises(OSError, match="could not be written, and is as it was"):
        save_for_hub(big, tmp_path)
    assert contents(tmp_path) == before
    save_for_hub(big, tmp_path)
    assert EnnForSequenceClassification.from_pretrained(tmp_path).config.hidden_size == 256


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_wrong_token_or_name_is_told_before_anything_is_done(fresh_python, hub):
    before = dict(hub.repositories)
    messages = fresh_python(
        MAKE,
        """
        save_for_hub(make_model(), "model", make_tokenizer())
        result = []
        for options in ({"repo_id": "user/refused", "token": "hf_wrong"}, {"repo_id": "not a name"}):
            try:
                push_to_hub("model", **options)
            except (PushError, ValueError) as error:
                result.append(f"{type(error).__name__}: {error}")
        """,
        package=True,
    )
    assert "PushError" in messages[0]
    assert "does not know you: `hf auth login`" in messages[0]
    assert "not a name" in messages[1]
    assert hub.repositories == before


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_refused_or_interrupted_upload_publishes_nothing_and_can_be_repeated(fresh_python, hub):
    """A first version meets a full disk at the Hub, then goes through; the second one meets a Ctrl-C."""
    process = subprocess.Popen(
        **fresh_python.command(
            MAKE,
            WITHOUT_CHECK,
            """
            import signal

            signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in the background

            def say(text):
                print(text, flush=True)
                input()

            save_for_hub(make_model(seed=1), "model", make_tokenizer())
            try:
                push_to_hub("model", "user/versions")
            except PushError as error:
                say(f"refused {error!r}")
            push_to_hub("model", "user/versions", commit_message="First")
            save_for_hub(make_model(seed=2), "model", make_tokenizer())
            say("first")
            try:
                push_to_hub("model", "user/versions", commit_message="Second")
            except KeyboardInterrupt:
                say("interrupted")
            """,
            package=True,
        ),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )

    def next_line(start):
        for line in process.stdout:
            if line.startswith(start):
                return line
        raise AssertionError(process.stderr.read())

    def go_on():
        process.stdin.write("\n")
        process.stdin.flush()

    with hub.refusing("PUT /large-files", 507):
        message = next_line("refused")
    assert "507" in message
    assert "nothing is half published" in message
    assert hub.files("user/versions") == {}
    go_on()
    next_line("first")
    assert hub.commits("user/versions") == ["First"]
    whole = hub.files("user/versions")
    with hub.holding("PUT /large-files") as arrived:
        go_on()
        assert arrived.wait(120)
        process.send_signal(signal.SIGINT)
    next_line("interrupted")
    assert hub.commits("user/versions") == ["First"]
    assert hub.files("user/versions") == whole
    go_on()
    assert process.wait(60) == 0, process.stderr.read()
