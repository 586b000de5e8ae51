"""TRL's SFTTrainer fine-tunes the checkpoint of this repository."""

from itertools import pairwise

import pytest
import torch
from datasets import Dataset
from helpers import BOOKS, close, same
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

TEXTS = ["the cell writes a trace. " * repeats for repeats in range(1, 13)]

pytestmark = pytest.mark.slow


def trainer(tmp_path, data, peft_config=None, **options):
    settings = {
        "output_dir": str(tmp_path),
        "max_steps": 5,
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "max_length": 64,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
    }
    return SFTTrainer(
        AutoModelForCausalLM.from_pretrained(BOOKS),
        SFTConfig(**{**settings, **options}),
        train_dataset=Dataset.from_dict(data),
        processing_class=AutoTokenizer.from_pretrained(BOOKS),
        peft_config=peft_config,
    )


def losses(trainer):
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_fine_tuning_on_texts(tmp_path):
    sft = trainer(tmp_path, {"text": TEXTS})
    first, *_, last = losses(sft)
    assert last < 0.5 * first
    sft.save_model()
    loaded, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    inputs = tokenizer("the cell", return_tensors="pt")
    same(loaded(**inputs).logits, sft.model.eval()(**inputs).logits)
    assert "writes" in tokenizer.decode(loaded.generate(**inputs, max_new_tokens=8)[0])


def test_fine_tuning_on_completions_only(tmp_path):
    sft = trainer(tmp_path, {"prompt": ["the cell writes"] * 8, "completion": [f" a trace {k}." for k in range(8)]})
    batch = next(iter(sft.get_train_dataloader()))
    prompt = len(sft.processing_class("the cell writes")["input_ids"])
    assert (batch["labels"][:, :prompt] == -100).all()
    assert (batch["labels"][:, prompt:] >= 0).any(1).all()
    first, *_, last = losses(sft)
    assert last < 0.5 * first


def test_packed_texts_do_not_see_each_other(tmp_path):
    sft = trainer(tmp_path, {"text": TEXTS}, packing=True)
    batch = next(iter(sft.get_train_dataloader()))
    assert (batch["position_ids"] == 0).sum() > len(batch["input_ids"])  # several texts in a row
    model = sft.model.eval()
    logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits[0]
    starts = [*(batch["position_ids"][0] == 0).nonzero().flatten().tolist(), batch["input_ids"].shape[1]]
    for start, end in pairwise(starts):
        close(logits[start:end], model(batch["input_ids"][:, start:end]).logits[0], tolerance=1e-4)
    first, *_, last = losses(sft)
    assert last < 0.5 * first


def test_fine_tuning_with_lora(tmp_path):
    lora = LoraConfig(r=8, lora_alpha=64, target_modules="all-linear", task_type="CAUSAL_LM")
    sft = trainer(tmp_path, {"text": TEXTS}, lora, learning_rate=1e-2, max_steps=10)
    before = {name: p.clone() for name, p in sft.model.named_parameters() if "lora" not in name}
    first, *_, last = losses(sft)
    assert last < 0.8 * first
    assert all(torch.equal(p, before[name]) for name, p in sft.model.named_parameters() if "lora" not in name)
