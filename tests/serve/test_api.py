"""The API, and what the server refuses: four clients at once, a full queue, files, logs."""

import concurrent.futures
import json
import logging
import os
import re
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import weakref

import numpy as np
import pytest
import torch
from gradio import networking, processing_utils
from gradio_client import Client
from gradio_client.exceptions import AppError
from huggingface_hub import constants

from hf_engram.traces import Attribution, record
from serve.live_memory.limits import Limits
from serve.live_memory.models import LoadedModel, ModelChoice

PROMPT = "the memory of a recurrent network"
GREEDY = {"temperature": 0, "max_new_tokens": 12}


@pytest.fixture(scope="module", autouse=True)
def silent_client():
    """`gradio_client` tells the Hub of its use, which is not the page's doing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        patch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
        yield


@pytest.fixture(scope="module")
def page(serve, loaded):
    return serve(loaded, limits=Limits(new_tokens=100, prompt_tokens=50, api_tokens=112))


@pytest.fixture(scope="module")
def client(page):
    return Client(page.local_url, verbose=False)


def test_the_api_returns_text_and_trace_as_json(client, model, tokenizer):
    answer = client.predict(PROMPT, api_name="/generate", **GREEDY)
    json.dumps(answer)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    generated = model.generate(ids, do_sample=False, max_new_tokens=12)
    assert answer["text"] == tokenizer.decode(generated[0])
    assert answer["finish_reason"] == "length"
    tokens = answer["tokens"]
    assert "".join(token["text"] for token in tokens) == answer["text"]
    assert [token["is_prompt"] for token in tokens] == [True] * ids.shape[1] + [False] * 12
    assert [token["probability"] is None for token in tokens] == [token["is_prompt"] for token in tokens]

    with torch.no_grad():
        read = model(generated, output_recall=True, output_traces=True)
    np.testing.assert_allclose(answer["trace"], torch.cat(read.traces), atol=2e-5)
    recall = np.array([token["recall"] for token in tokens])
    np.testing.assert_allclose(recall, torch.cat(read.recall).transpose(0, 1), atol=2e-5)


def test_the_example_in_the_documentation_runs(page, request):
    readme = (request.config.rootpath / "serve" / "README.md").read_text("utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    script = code.replace("http://127.0.0.1:7860", page.local_url)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "It is a truth universally acknowledged" in done.stdout


def test_the_sources_of_every_token_in_the_answer_add_up(client):
    for token in client.predict(PROMPT, api_name="/generate", **GREEDY)["tokens"]:
        for layer in token["sources"]:
            written = sum(contribution for _, contribution in layer["tokens"])
            total = layer["bank"] + layer["carried"] + layer["clip"] + layer["others"] + written
            assert total == pytest.approx(1, abs=1e-3)


def test_the_attribution_of_one_memory_at_a_time_is_held(client, monkeypatch):
    """Each holds matrices of all pairs of tokens."""
    contribution, alive, counts = Attribution.contribution.func, weakref.WeakSet(), []

    def counting(attribution):
        alive.add(attribution)
        counts.append(len(alive))
        return contribution(attribution)

    monkeypatch.setattr(Attribution, "contribution", property(counting))
    answer = client.predict(PROMPT, api_name="/generate", **GREEDY)
    assert counts == [1] * len(answer["memories"]) == [1, 1]


def test_a_model_with_a_token_memory_says_who_makes_its_predictions(serve, make_model, tokenizer):
    model = make_model(token_memory_size=8)
    page = serve(LoadedModel(ModelChoice("tiny"), model, tokenizer, "text"))
    answer = Client(page.local_url, verbose=False).predict(PROMPT, api_name="/generate", **GREEDY)
    with torch.no_grad():
        [recording] = record(model, tokenizer(answer["text"], return_tensors="pt")["input_ids"])
    shares = recording.token_memory.shares
    for index, token in enumerate(answer["tokens"]):
        said = token["prediction"]
        assert said["network"] == pytest.approx(float(shares.network[index]), abs=1e-4)
        assert said["carried"] == 0
        written = sum(share for _, share in said["tokens"])
        assert said["network"] + written + said["others"] == pytest.approx(1, abs=2e-3)
        for writer, share in said["tokens"]:
            assert share == pytest.approx(float(shares.tokens[index, writer]), abs=1e-4)
    assert answer["tokens"][-1]["prediction"]["tokens"]


def test_the_same_seed_gives_the_same_answer_and_interventions_count(client):
    def text(**options):
        return client.predict(PROMPT, api_name="/generate", max_new_tokens=12, **options)

    assert text(seed=1) == text(seed=1)
    assert text(seed=1)["text"] != text(seed=2)["text"]
    assert not np.any(text(freeze_plasticity=True)["trace"])
    assert not np.array(text(slots_off="3, 7-8")["trace"])[:, [3, 7, 8]].any()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"max_new_tokens": 101}, "`max_new_tokens` is 101; allowed: 1 to 100"),
        ({"temperature": -1}, "`temperature` is -1"),
        ({"prompt": ""}, "The prompt is empty"),
        ({"prompt": "a " * 60}, "at most 50 are allowed"),
        ({"prompt": "a " * 15, "max_new_tokens": 100}, r"and `max_new_tokens` is 100; at most 112 together"),
        ({"slots_off": "99"}, "'99' is out of range"),
    ],
)
def test_what_cannot_be_done_is_answered_with_a_sentence(client, options, sentence):
    with pytest.raises(AppError, match=sentence):
        client.predict(**{"prompt": PROMPT, **GREEDY, **options}, api_name="/generate")


def test_the_api_is_documented_and_nothing_else_is_public(client):
    described = client.view_api(return_format="dict", print_info=False)
    assert list(described["named_endpoints"]) == ["/generate"]
    assert described["unnamed_endpoints"] == {}
    names = [parameter["parameter_name"] for parameter in described["named_endpoints"]["/generate"]["parameters"]]
    assert names[:2] == ["prompt", "max_new_tokens"]
    assert "slots_off" in names


def test_four_visitors_at_once_each_make_progress(serve, make_model, tokenizer):
    """With room for four, all four are in the middle of their texts at the same time."""
    model = make_model()
    inside, together = set(), []

    def watch(*_):
        inside.add(threading.get_ident())
        together.append(len(inside))
        time.sleep(0.005)

    model.register_forward_pre_hook(watch)
    page = serve(LoadedModel(ModelChoice("tiny"), model, tokenizer, "text"))
    clients = [Client(page.local_url, verbose=False) for _ in range(4)]
    jobs = [c.submit(PROMPT, 30, 0, api_name="/generate") for c in clients]
    answers = [job.result(timeout=150) for job in jobs]
    assert len({answer["text"] for answer in answers}) == 1
    assert max(together) == 4
    assert together.index(4) < len(together) / 2


def test_whoever_waits_knows_their_place_and_a_full_queue_says_so(serve, slow_model, tokenizer):
    limits = Limits(concurrent_runs=1, queued_runs=3)
    page = serve(LoadedModel(ModelChoice("tiny"), slow_model, tokenizer, "text"), limits=limits)
    client = Client(page.local_url, verbose=False)
    jobs = [client.submit(PROMPT, 60, 0, api_name="/generate") for _ in range(3)]
    deadline = time.monotonic() + 30
    places = set()
    while time.monotonic() < deadline and not {0, 1} <= places:
        places |= {job.status().rank for job in jobs}
        time.sleep(0.02)
    assert {0, 1} <= places
    refused = [client.submit(PROMPT, 1, 0, api_name="/generate") for _ in range(4)]
    messages = [str(job.exception(timeout=60)) for job in refused]
    assert any("queue" in message.lower() for message in messages)
    concurrent.futures.wait([job.future for job in jobs], timeout=60)


def test_no_tunnel_is_opened_whatever_the_environment_asks_for(serve, loaded, monkeypatch):
    tunnels = []
    monkeypatch.setenv("GRADIO_SHARE", "True")
    monkeypatch.setattr(networking, "setup_tunnel", lambda *args, **kwargs: tunnels.append(args) or "https://tunnel")
    page = serve(loaded)
    assert tunnels == []
    assert page.share_url is None


def fetch(url):
    try:
        with urllib.request.urlopen(url) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file=README.md",
        "/gradio_api/file={root}/pyproject.toml",
        "/gradio_api/file=serve/live_memory/page.py",
        "/gradio_api/file=../../../../etc/passwd",
        "/gradio_api/file=%2e%2e/%2e%2e/etc/passwd",
        "/static/../../../../etc/passwd",
        "/static/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
        "/assets/..%2f..%2f..%2f..%2fetc%2fpasswd",
        "/gradio_api/proxy=http://127.0.0.1:1/",
        "/gradio_api/file=http://127.0.0.1:1/",
        "/gradio_api/file=HTTPS://example.org/",
        "/gradio_api/file=https%3A//example.org/",
    ],
)
def test_no_file_of_the_server_can_be_read_through_the_page(page, request, path):
    status, content = fetch(page.local_url.rstrip("/") + path.format(root=request.config.rootpath))
    assert status in (400, 403, 404, 405, 422)
    assert b"root:" not in content
    assert b"hf-engram" not in content


def ask(page, path, body):
    """The events with which the page answers a request to run something."""
    headers = {"Content-Type": "application/json"}
    status, answer = fetch(urllib.request.Request(page.local_url + path, json.dumps(body).encode(), headers))
    assert status == 200
    followed = (
        f"{path}/{json.loads(answer)['event_id']}" if "/call/" in path else "gradio_api/queue/data?session_hash=s"
    )
    return fetch(page.local_url + followed)[1].decode()


@pytest.mark.parametrize("component", ["uploadbutton", "textbox", "api"])
def test_a_file_on_another_machine_is_not_downloaded_for_a_visitor(page, monkeypatch, component):
    asked = []

    async def download(url, **kwargs):
        asked.append(url)
        raise OSError("There is no network here.")

    monkeypatch.setattr(processing_utils, "async_ssrf_protected_download", download)
    file = {"path": "https://example.org/memory.safetensors", "meta": {"_type": "gradio.FileData"}}
    if component == "api":
        answer = ask(page, "gradio_api/call/generate", {"data": [[{"deep": file}]]})
    else:
        config = page.config
        (first, *_) = [part["id"] for part in config["components"] if part["type"] == component]
        event = next(event for event in config["dependencies"] if first in event["inputs"] and event["backend_fn"])
        body = {"data": [file] * len(event["inputs"]), "fn_index": event["id"], "session_hash": "s"}
        answer = ask(page, "gradio_api/queue/join", body)
    assert asked == []
    assert "This page fetches nothing from elsewhere." in answer


def test_too_large_an_upload_is_refused(serve, loaded, tmp_path):
    page = serve(loaded, limits=Limits(upload_bytes=1000))
    path = tmp_path / "memory.safetensors"
    path.write_bytes(b"0" * 5000)
    boundary = b'--b\r\nContent-Disposition: form-data; name="files"; filename="m.safetensors"\r\n\r\n'
    body = boundary + path.read_bytes() + b"\r\n--b--\r\n"
    request = urllib.request.Request(
        f"{page.local_url}gradio_api/upload", body, {"Content-Type": "multipart/form-data; boundary=b"}
    )
    status, _ = fetch(request)
    assert status == 413


def test_prompts_are_not_logged_by_the_server(client, caplog, capfd):
    secret = "the memory of a page is written"
    with caplog.at_level(logging.DEBUG):
        answer = client.predict(secret, api_name="/generate", **GREEDY)
    captured = capfd.readouterr()
    server = "\n".join(r.getMessage() for r in caplog.records if not r.name.startswith(("httpx", "httpcore")))
    for text in (secret, answer["text"][-15:]):
        assert text not in server + captured.out + captured.err


@pytest.mark.browser
def test_whoever_closes_the_page_frees_what_they_held(serve, visit, slow_model, tokenizer):
    page = serve(LoadedModel(ModelChoice("tiny"), slow_model, tokenizer, "text"))
    visitor = visit(page.local_url)
    visitor.fill(PROMPT, max_new_tokens=2000)
    visitor.press("Generate")
    visitor.wait_for_tokens(5)
    (session,) = page.visitors.sessions()
    assert session.memory is not None
    visitor.page.close()
    deadline = time.monotonic() + 20
    while len(page.visitors) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(page.visitors) == 0
    assert session.memory is None
    assert session.controls.stop
