"""The models in the `Trainer` of transformers."""

import pytest
import torch
from helpers import close, same, tiny_model, tokens
from transformers import Trainer, TrainingArguments

from hf_engram import EnnForCausalLM, EnnForImageClassification, EnnForSequenceClassification


def examples(model_class, count=8, padded=False):
    torch.manual_seed(1)
    if model_class is EnnForImageClassification:
        return [{"pixel_values": torch.rand(3, 8, 8), "labels": n % 2} for n in range(count)]
    texts = [{"input_ids": text, "labels": n % 2} for n, text in enumerate(tokens(count, 12))]
    for n, text in enumerate(texts):
        if padded:
            text["attention_mask"] = (torch.arange(12) < 12 - n).long()
        if model_class is EnnForCausalLM:
            text["labels"] = text["input_ids"].where(text.get("attention_mask", torch.ones(12)) > 0, -100)
    return texts


def trainer_for(model, folder, train=None, evaluation=None, compute_metrics=None, **kwargs):
    arguments = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "max_grad_norm": 0}
    return Trainer(
        model,
        TrainingArguments(str(folder), **{**arguments, **kwargs}),
        train_dataset=train,
        eval_dataset=evaluation,
        compute_metrics=compute_metrics,
    )


TASKS = {
    "language_model": (EnnForCausalLM, {}, {}),
    "padded_language_model": (EnnForCausalLM, {}, {"padded": True}),
    "text_classes": (EnnForSequenceClassification, {}, {}),
    "padded_text_classes": (EnnForSequenceClassification, {"pooling": "mean"}, {"padded": True}),
    "images": (EnnForImageClassification, {}, {}),
    "regression": (EnnForImageClassification, {"num_labels": 1}, {}),
    "label_sets": (EnnForImageClassification, {"num_labels": 3}, {}),
}


def relabelled(data, num_labels):
    """`data` with targets for regression (1) or label sets (3) in place of classes (2)."""
    if num_labels == 2:
        return data
    return [{**example, "labels": torch.randint(2, (num_labels,)).float()} for example in data]


@pytest.mark.parametrize(("model_class", "fields", "options"), TASKS.values(), ids=TASKS)
@pytest.mark.parametrize("weight", [0.0, 0.5], ids=["plain", "entropy"])
def test_accumulated_gradients_equal_those_of_the_big_batch(tmp_path, model_class, fields, options, weight):
    data = relabelled(examples(model_class, **options), fields.get("num_labels", 2))

    def trained(batch_size, accumulation):
        model = tiny_model(model_class, dtype=torch.float32, recall_entropy_weight=weight, **fields)
        trainer_for(
            model,
            tmp_path,
            data,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            learning_rate=0.1,
            optim="sgd",
        ).train()
        return model.state_dict()

    big = trained(8, 1)
    close(trained(2, 4), big, tolerance=1e-5)
    start = tiny_model(model_class, dtype=torch.float32, **fields).state_dict()
    assert any((big[name] != start[name]).any() for name in big)


@pytest.mark.parametrize("model_class", [EnnForCausalLM, EnnForSequenceClassification, EnnForImageClassification])
def test_evaluation_gathers_logits_and_nothing_else(tmp_path, model_class):
    model = tiny_model(model_class, dtype=torch.float32, recall_entropy_weight=0.1)
    model.config.output_hidden_states = model.config.output_recall = model.config.output_traces = True
    data, seen = examples(model_class, 6), []

    def compute_metrics(prediction):
        seen.append(prediction.predictions.shape)
        return {"mean": float(prediction.predictions.mean())}

    trainer = trainer_for(
        model, tmp_path, evaluation=data, compute_metrics=compute_metrics, per_device_eval_batch_size=4
    )
    model.config.use_cache = True  # the Trainer turned it off
    metrics = trainer.evaluate()
    assert seen == [(6, 12, 40) if model_class is EnnForCausalLM else (6, 2)]
    assert {"eval_loss", "eval_mean"} <= metrics.keys()


def test_trained_checkpoint_goes_on_as_an_unbroken_run(tmp_path):
    data = examples(EnnForCausalLM, 24)

    def losses(folder, model, resume=None, **kwargs):
        trainer = trainer_for(
            model,
            folder,
            data,
            per_device_train_batch_size=4,
            num_train_epochs=2,
            logging_steps=1,
            **{"save_strategy": "steps", "save_steps": 5, **kwargs},
        )
        trainer.train(resume_from_checkpoint=resume)
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    unbroken = losses(tmp_path / "a", tiny_model(dtype=torch.float32))
    resumed = losses(tmp_path / "b", tiny_model(dtype=torch.float32), str(tmp_path / "a" / "checkpoint-5"))
    same(resumed, unbroken)


@pytest.mark.parametrize("option", ["bf16", "activation_checkpointing"])
def test_trainer_options_train(tmp_path, option):
    model = tiny_model(dtype=torch.float32, num_hidden_layers=2)
    trainer = trainer_for(model, tmp_path, examples(EnnForCausalLM), max_steps=2, learning_rate=0.01, **{option: True})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert torch.isfinite(torch.tensor(trainer.train().training_loss))
    assert all((model.state_dict()[name] != before[name]).any() for name in before)
