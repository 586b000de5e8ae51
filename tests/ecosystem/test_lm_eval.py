"""EleutherAI's evaluation harness on a folder that carries its own code, in a process that never imports hf_engram."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
import yaml
from helpers import BOOKS
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_engram import EnnConfig, EnnForCausalLM

TEXTS = [
    "It is a truth universally acknowledged, that a single man in possession of a good fortune must want a wife.",
    "The cell writes.",
]
CHOICES = [
    {"context": "It is a truth universally", "choices": [" acknowledged", " zx qq"], "answer": 0},
    {"context": "Mr. Darcy", "choices": [" ww zz qq", " was not"], "answer": 1},
    {"context": "Elizabeth said", "choices": [" zz", " x x x"], "answer": 0},
]
PROMPTS = ["Mr. Darcy was", "The ship"]
TASKS = {
    "perplexity": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}],
    },
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}],
    },
    "continuation": {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "",
        "generation_kwargs": {"max_gen_toks": 12, "until": ["\n\n"], "do_sample": False},
        "metric_list": [{"metric": "bypass"}],
    },
}
DOCUMENTS = {
    "perplexity": [{"text": text} for text in TEXTS],
    "choice": CHOICES,
    "continuation": [{"text": prompt} for prompt in PROMPTS],
}
EVALUATE = (
    "import sys; from lm_eval.__main__ import cli_evaluate; cli_evaluate(); "
    "assert any('modeling_enn' in m for m in sys.modules) and not any(m.startswith('hf_engram') for m in sys.modules)"
)


@pytest.fixture
def folder_with_code(tmp_path, monkeypatch):
    monkeypatch.setattr(EnnConfig, "_auto_class", "AutoConfig")
    monkeypatch.setattr(EnnForCausalLM, "_auto_class", "AutoModelForCausalLM")
    for auto_class in (AutoModelForCausalLM, AutoTokenizer):
        auto_class.from_pretrained(BOOKS).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def write_tasks(folder):
    folder.mkdir()
    for name, task in TASKS.items():
        documents = folder / f"{name}.jsonl"
        documents.write_text("".join(f"{json.dumps(document)}\n" for document in DOCUMENTS[name]))
        data = {
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(documents)}},
            "test_split": "test",
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **data, **task, "metadata": {"version": 1}}))


def log_likelihood(model, tokenizer, context, continuation):
    """Sum over the tokens of `continuation`."""
    ids = tokenizer(context + continuation, return_tensors="pt")["input_ids"]
    if not context:
        ids = torch.cat([torch.tensor([[tokenizer.eos_token_id]]), ids], 1)
    seen = len(tokenizer(context)["input_ids"]) or 1
    log_probabilities = model(ids[:, :-1]).logits.log_softmax(-1)[0]
    return log_probabilities.gather(1, ids[0, 1:, None])[seen - 1 :].sum().item()


@pytest.mark.slow
def test_tasks_score_as_the_model_itself(tmp_path, folder_with_code):
    write_tasks(tmp_path / "tasks")
    arguments = ["--model", "hf", "--model_args", f"pretrained={folder_with_code},trust_remote_code=True"]
    arguments += ["--tasks", ",".join(TASKS), "--include_path", str(tmp_path / "tasks"), "--device", "cpu"]
    arguments += ["--batch_size", "2", "--output_path", str(tmp_path / "results"), "--log_samples"]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", EVALUATE, *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    [report] = (tmp_path / "results").rglob("results_*.json")
    results = json.loads(report.read_text())["results"]

    model, tokenizer = (auto.from_pretrained(folder_with_code) for auto in (AutoModelForCausalLM, AutoTokenizer))
    total = sum(log_likelihood(model, tokenizer, "", text) for text in TEXTS)
    words = sum(len(text.split()) for text in TEXTS)
    assert results["perplexity"]["word_perplexity,none"] == pytest.approx(math.exp(-total / words), rel=1e-4)

    right = 0
    for task in CHOICES:
        scores = [log_likelihood(model, tokenizer, task["context"], choice) for choice in task["choices"]]
        right += max(range(2), key=scores.__getitem__) == task["answer"]
    assert results["choice"]["acc,none"] == pytest.approx(right / len(CHOICES))

    [samples] = (tmp_path / "results").rglob("samples_continuation_*.jsonl")
    for line in samples.read_text().splitlines():
        sample = json.loads(line)
        inputs = tokenizer(sample["doc"]["text"], return_tensors="pt")
        new = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert sample["resps"][0][0] == tokenizer.decode(new, skip_special_tokens=True).split("\n\n")[0]
