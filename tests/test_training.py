"""Training: gradients reach everything, through every option, and the regulariser does what it says."""

import copy

import pytest
import torch
from helpers import (
    ARCHITECTURES,
    IMAGE_SEQUENCES,
    MODEL_CLASSES,
    close,
    gradients,
    same,
    state,
    tiny_inputs,
    tiny_model,
    tokens,
)

from hf_engram import EnnForCausalLM, EnnForImageClassification, EnnForSequenceClassification, EnnModel

HEADS = MODEL_CLASSES[1:]
model_classes = pytest.mark.parametrize("model_class", MODEL_CLASSES)
PATHS = {
    "tied": (EnnForCausalLM, {}),
    "untied": (EnnForCausalLM, {"tie_word_embeddings": False}),
    "narrow": (EnnForCausalLM, {"tie_word_embeddings": False, "embedding_size": 7}),
    "narrow_residual": (EnnForCausalLM, {"tie_word_embeddings": False, "embedding_size": 7, "residual": True}),
    "stacked": (EnnForCausalLM, {"num_hidden_layers": 3}),
    "stacked_residual": (EnnForCausalLM, {"num_hidden_layers": 3, "residual": True}),
    "scaled": (EnnForCausalLM, {"num_hidden_layers": 2, "residual": True, "layer_scale_init_value": 0.02}),
    "without_layer_norm": (EnnForCausalLM, {"use_layer_norm": False}),
    "clipped": (EnnForCausalLM, {"trace_clip": 0.15}),
    "paper": (EnnForCausalLM, {"trace_clip": 0.15, "trace_scope": "batch", "trace_noise": 0.001}),
    **{pooling: (EnnForSequenceClassification, {"pooling": pooling}) for pooling in ("last", "mean", "attention")},
    "regression": (EnnForSequenceClassification, {"num_labels": 1}),
    **{name: (EnnForImageClassification, fields) for name, fields in IMAGE_SEQUENCES.items()},
}


def task(model, batch=3, steps=12):
    """Inputs with labels that the model can be trained on."""
    inputs = tiny_inputs(model, batch, steps)
    if isinstance(model, EnnForCausalLM):
        return {**inputs, "labels": inputs["input_ids"]}
    labels = torch.randn(batch).double() if model.config.num_labels == 1 else torch.randint(2, (batch,))
    return {**inputs, "labels": labels}


@pytest.mark.parametrize(("model_class", "fields"), PATHS.values(), ids=PATHS)
def test_every_parameter_gets_a_gradient(model_class, fields):
    model = tiny_model(model_class, **fields).train()
    model(**task(model)).loss.backward()
    for name, gradient in gradients(model).items():
        assert gradient is not None, name
        assert gradient.isfinite().all(), name
        assert gradient.any(), name


@model_classes
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "dropout"])
def test_activation_checkpointing_changes_no_gradient(model_class, use_reentrant, architecture):
    dropout = {"num_hidden_layers": 2, "residual": True, "hidden_dropout": 0.3, "embedding_dropout": 0.3}
    fields = {**ARCHITECTURES, "dropout": dropout}[architecture]
    model = tiny_model(model_class, recall_entropy_weight=0.1, **fields).train()
    inputs = tiny_inputs(model) if model_class is EnnModel else task(model)

    def loss_and_gradients():
        torch.manual_seed(1)
        model.zero_grad()
        outputs = model(**inputs, output_recall=True, use_cache=False)
        loss = outputs.last_hidden_state[..., 0].sum() if model_class is EnnModel else outputs.loss
        loss.backward()
        return loss, gradients(model)

    expected = loss_and_gradients()
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    assert model.is_activation_checkpointing
    close(loss_and_gradients(), expected)
    model.activation_checkpointing_disable()
    close(loss_and_gradients(), expected)


def test_activation_checkpointing_runs_each_layer_again():
    model = tiny_model(num_hidden_layers=2).train()
    calls = []
    for index, layer in enumerate(model.model.layers):
        layer.cell.register_forward_pre_hook(lambda *_, index=index: calls.append(index))
    model.activation_checkpointing_enable()
    model(**task(model), use_cache=False).loss.backward()
    assert calls == [0, 1, 1, 0]


@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_activation_checkpointing_carries_no_state_and_says_so(architecture):
    model = tiny_model(**architecture).train()
    past_key_values = model(tokens(2, 5), use_cache=True).past_key_values
    model.activation_checkpointing_enable()
    with pytest.raises(ValueError, match=r"past_key_values cannot be carried on .*activation_checkpointing_disable"):
        model(tokens(2, 5), past_key_values=past_key_values)
    assert model(tokens(2, 5), use_cache=True).past_key_values is None
    model.eval()
    assert model(tokens(2, 5), past_key_values=past_key_values).past_key_values is past_key_values


@model_classes
def test_training_mode_with_state_can_be_called_twice_and_back_propagated(model_class):
    model = tiny_model(model_class, num_hidden_layers=2).train()
    inputs = tiny_inputs(model)
    first = model(**inputs, use_cache=True)
    second = model(**inputs, use_cache=True, past_key_values=copy.deepcopy(first.past_key_values))
    third = model(**inputs, use_cache=True, past_key_values=second.past_key_values)
    sum(outputs[0].pow(3).sum() for outputs in (first, second, third)).backward()
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())
    assert (second[0] != first[0]).any()


def test_gradient_stops_at_the_state():
    model, input_ids = tiny_model(EnnModel).train(), tokens(2, 5)
    features = torch.randn(2, 5, 16, dtype=torch.float64, requires_grad=True)
    past_key_values = model(inputs_embeds=features).past_key_values
    model(input_ids, past_key_values=past_key_values).last_hidden_state[..., 0].sum().backward()
    assert features.grad is None


@pytest.mark.parametrize("model_class", HEADS)
def test_loss_is_the_task_and_the_weighted_entropy(model_class):
    plain = tiny_model(model_class)
    regularised = tiny_model(model_class, recall_entropy_weight=0.7)
    inputs = task(plain)
    loss, outputs = plain(**inputs).loss, regularised(**inputs, output_recall=True)
    entropy = torch.distributions.Categorical(outputs.recall[0]).entropy()
    close(outputs.recall_entropy, entropy.mean(1))
    close(outputs.loss, loss + 0.7 * entropy.mean())
    assert plain(**inputs).recall_entropy is None


def test_entropy_counts_valid_steps_of_all_layers():
    model = tiny_model(EnnModel, num_hidden_layers=2, recall_entropy_weight=1.0)
    attention_mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    outputs = model(tokens(2, 5), attention_mask=attention_mask, output_recall=True)
    entropy = torch.distributions.Categorical(torch.stack(outputs.recall)).entropy()
    close(outputs.recall_entropy, torch.stack([entropy[:, 0, 2:].mean(), entropy[:, 1].mean()]))


def test_rows_weigh_in_the_regulariser_as_in_the_loss():
    plain, regularised = tiny_model(), tiny_model(recall_entropy_weight=0.7)
    input_ids = tokens(2, 9)
    labels = input_ids.clone()
    labels[0, :7] = -100  # 2 targets against 8
    loss, outputs = plain(input_ids, labels=labels).loss, regularised(input_ids, labels=labels)
    close(outputs.loss, loss + 0.7 * (0.2 * outputs.recall_entropy[0] + 0.8 * outputs.recall_entropy[1]))


@pytest.mark.parametrize("model_class", HEADS)
def test_entropy_weight_makes_recall_sparser(model_class):
    def entropy_after_training(weight):
        model = tiny_model(model_class, recall_entropy_weight=weight).train()
        torch.manual_seed(1)
        inputs, optimizer = task(model), torch.optim.Adam(model.parameters(), lr=0.03)
        for _ in range(30):
            optimizer.zero_grad()
            model(**inputs).loss.backward()
            optimizer.step()
        recall = model(**inputs, output_recall=True).recall[0]
        return torch.special.entr(recall).sum(-1).mean()

    assert entropy_after_training(1.0) < entropy_after_training(0.0) - 0.03


def test_a_language_model_learns_a_sequence_by_heart():
    model, input_ids = tiny_model(dtype=torch.float32).train(), tokens(2, 20)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(100):
        loss = model(input_ids, labels=input_ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.3


@pytest.mark.parametrize("model_class", HEADS)
@pytest.mark.parametrize("architecture", ["bare", "residual", "clipped", "without_layer_norm", "gated", "gru"])
@pytest.mark.parametrize("steps", [2, 70])
@pytest.mark.parametrize("scan", ["auto", "chunkwise"])
def test_bfloat16_autocast_trains_and_keeps_the_trace_in_float32(model_class, architecture, steps, scan, monkeypatch):
    monkeypatch.setenv("HF_ENGRAM_SCAN", scan)
    model = tiny_model(model_class, dtype=torch.float32, **ARCHITECTURES[architecture]).train()
    inputs = task(model, steps=steps)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        first = model(**inputs, use_cache=True)
        second = model(**inputs, use_cache=True, past_key_values=first.past_key_values)
    second.loss.backward()
    traces = state(second.past_key_values)[1::2]
    assert {trace.dtype for trace in traces} == {torch.float32}
    for name, gradient in gradients(model).items():
        assert gradient.dtype == torch.float32
        assert gradient.isfinite().all(), name


def test_autocast_reads_in_parts_as_at_once():
    model, input_ids = tiny_model(dtype=torch.float32), tokens(2, 9)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        whole = model(input_ids)
        past_key_values = None
        for step in range(9):
            outputs = model(input_ids[:, step : step + 1], past_key_values=past_key_values)
            past_key_values = outputs.past_key_values
    trace, expected = (outputs.past_key_values.layers[0].state.trace for outputs in (outputs, whole))
    close(trace, expected, tolerance=2e-3)


@model_classes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_models_train_in_every_dtype(model_class, dtype):
    model = tiny_model(model_class, dtype=dtype, num_hidden_layers=2).train()
    outputs = model(**tiny_inputs(model))
    outputs[0].pow(3).sum().backward()
    assert outputs[0].dtype == dtype
    assert {trace.dtype for trace in state(outputs.past_key_values)[1::2]} == {
        torch.float64 if dtype == torch.float64 else torch.float32
    }
    assert all(gradient.dtype == dtype and gradient.isfinite().all() for gradient in gradients(model).values())


def test_frozen_backbone_keeps_its_weights():
    model = tiny_model(EnnForSequenceClassification).train()
    model.model.requires_grad_(False)
    model(**task(model)).loss.backward()
    assert {name for name, gradient in gradients(model).items() if gradient is not None} == {
        "classifier.weight",
        "classifier.bias",
    }


@pytest.mark.parametrize("field", ["hidden_dropout", "embedding_dropout"])
def test_dropout_acts_in_training_only(field):
    model, input_ids = tiny_model(**{field: 0.5}), tokens(2, 6)
    same(model(input_ids).logits, tiny_model()(input_ids).logits)
    model.train()
    assert (model(input_ids).logits != model(input_ids).logits).any()
