"""LoRA adapters of PEFT inside and outside the cells."""

import pytest
import torch
from helpers import close, same, tiny_model, tokens
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model

from hf_engram import EnnForImageClassification, EnnForSequenceClassification
from hf_engram.traces import Recorder, record

EVERYTHING = {"target_modules": "all-linear", "target_parameters": ["cell.memory_bank"]}
TARGETS = {
    "all_linear": {"target_modules": "all-linear"},
    "one_layer_of_the_cell": {"target_modules": ["integrator"]},
    "bank": {"target_modules": [], "target_parameters": ["cell.memory_bank"]},
    "everything": EVERYTHING,
}
ARCHITECTURES = {
    "bare": {},
    "gru_residual": {"num_hidden_layers": 2, "residual": True, "integrator": "gru"},
    "gated_residual": {"num_hidden_layers": 2, "residual": True, "integrator": "gated"},
}


def with_lora(model, **kwargs):
    return get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 16, **kwargs}))


def train(model, inputs, labels, steps=8):
    """Losses of some steps on one batch."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(steps):
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return losses


@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=ARCHITECTURES)
@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
def test_lora_learns_and_merges_to_the_same_logits(architecture, targets):
    model, ids = tiny_model(**architecture), tokens(2, 70)
    before = model(ids).logits
    model = with_lora(model, task_type="CAUSAL_LM", **targets)
    close(model(ids).logits, before)
    losses = train(model, {"input_ids": ids}, ids)
    assert losses[-1] < losses[0] - 0.01
    trained = model(ids).logits
    with model.disable_adapter():
        close(model(ids).logits, before)
    generated = model.generate(input_ids=ids[:, :5], max_new_tokens=8)
    model.merge_adapter()
    close(model(ids).logits, trained)
    with model.disable_adapter():  # takes the merged weights out again
        close(model(ids).logits, before)
    close(model(ids).logits, trained)
    merged = model.merge_and_unload()
    close(merged(ids).logits, trained)
    same(merged.generate(ids[:, :5], max_new_tokens=8), generated)
    assert type(merged).__name__ == "EnnForCausalLM"


def test_every_adapter_of_a_cell_gets_a_gradient():
    model = with_lora(tiny_model(num_hidden_layers=2, residual=True, integrator="gated"), **EVERYTHING)
    ids = tokens(2, 20)
    train(model, {"input_ids": ids}, ids, steps=1)  # the second matrix of a pair starts at zero
    model(input_ids=ids, labels=ids).loss.backward()
    trainable = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    adapted = {name.split(".lora_")[0].split(".")[-1] for name in trainable}
    assert adapted == {"cell", "encoder", "integrator", "output", "gate"}  # "cell" is its memory bank
    assert [name for name, gradient in trainable.items() if gradient is None or not gradient.any()] == []


def test_gradients_of_adapters_are_those_of_the_merged_weights():
    model, ids = with_lora(tiny_model(), target_modules=["integrator"]), tokens(2, 20)
    train(model, {"input_ids": ids}, ids, steps=2)
    model(input_ids=ids, labels=ids).loss.backward()
    [adapted] = [module for name, module in model.named_modules() if name.endswith("cell.integrator")]
    first, second, scale = (
        adapted.lora_A["default"].weight,
        adapted.lora_B["default"].weight,
        adapted.scaling["default"],
    )
    merged = model.merge_and_unload()
    merged.requires_grad_()
    merged(ids, labels=ids).loss.backward()
    gradient = merged.model.layers[0].cell.integrator.weight.grad
    close(first.grad, scale * second.T @ gradient)
    close(second.grad, scale * gradient @ first.T)


def test_adapter_is_saved_and_loaded(tmp_path):
    ids = tokens(2, 20)
    model = with_lora(tiny_model(), task_type="CAUSAL_LM", **EVERYTHING)
    train(model, {"input_ids": ids}, ids, steps=3)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path).eval()
    close(loaded(ids).logits, model(ids).logits)


def test_two_adapters_are_switched_and_added():
    ids = tokens(2, 20)
    model = with_lora(tiny_model(), target_modules="all-linear")
    train(model, {"input_ids": ids}, ids, steps=3)
    first = model(ids).logits
    model.add_adapter("second", LoraConfig(r=2, target_modules=["encoder"]))
    model.set_adapter("second")
    train(model, {"input_ids": ids}, ids.flip(1), steps=3)
    assert (model(ids).logits - first).abs().max() > 1e-3
    model.set_adapter("default")
    same(model(ids).logits, first)
    model.base_model.set_adapter(["default", "second"])
    both = model(ids).logits
    close(model.merge_and_unload(adapter_names=["default", "second"])(ids).logits, both)


def test_dropout_of_lora_acts_in_training_only():
    ids = tokens(2, 20)
    model = with_lora(tiny_model(), target_modules=["encoder", "integrator", "output"], lora_dropout=0.5)
    train(model, {"input_ids": ids}, ids, steps=3)
    same(model(ids).logits, model(ids).logits)
    model.train()
    assert (model(ids).logits - model(ids).logits).abs().max() > 1e-3


@pytest.mark.parametrize("head", [EnnForSequenceClassification, EnnForImageClassification])
def test_classifiers_learn_with_lora(head):
    model = tiny_model(head, num_labels=3)
    inputs = (
        {"input_ids": tokens(6, 12)}
        if head is EnnForSequenceClassification
        else {"pixel_values": torch.rand(6, 3, 8, 8, dtype=torch.float64)}
    )
    labels = torch.tensor([0, 1, 2] * 2)
    model = with_lora(model, target_modules=["encoder", "integrator", "output"], modules_to_save=["classifier"])
    losses = train(model, inputs, labels, steps=10)
    assert losses[-1] < losses[0] - 0.05
    trained = model(**inputs).logits
    close(model.merge_and_unload()(**inputs).logits, trained)


def test_adapters_in_bfloat16():
    ids = tokens(2, 20)
    model = with_lora(tiny_model(dtype=torch.bfloat16), target_modules="all-linear")
    losses = train(model, {"input_ids": ids}, ids)
    assert losses[-1] < losses[0] - 0.05
    assert model(ids).logits.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, target_modules=["encoder"], use_dora=True),
        LoraConfig(r=2, target_modules=["encoder"], lora_bias=True),
        IA3Config(target_modules=["encoder"], feedforward_modules=[]),
    ],
    ids=["dora", "bias", "ia3"],
)
def test_other_adapters_inside_a_cell_are_refused(config):
    model, ids = get_peft_model(tiny_model(), config).eval(), tokens(2, 6)
    with pytest.raises(NotImplementedError, match="of a layer inside an engram cell is not plain LoRA"):
        model(ids)
    model.merge_and_unload()(ids)


def test_an_adapter_for_each_row_is_refused():
    model = with_lora(tiny_model(), target_modules=["encoder"])
    model.add_adapter("second", LoraConfig(r=2, target_modules=["encoder"]))
    model.eval()
    with pytest.raises(NotImplementedError, match="adapter_names"):
        model(input_ids=tokens(2, 6), adapter_names=["default", "second"])


def test_adapters_learn_the_same_under_activation_checkpointing():
    ids, gradients = tokens(2, 20), []
    for checkpointing in (False, True):
        torch.manual_seed(1)
        model = with_lora(tiny_model(num_hidden_layers=2), init_lora_weights=False, **EVERYTHING).train()
        if checkpointing:
            model.base_model.model.activation_checkpointing_enable()
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    close(gradients[1], gradients[0])


def test_prompt_tuning():
    prompt = PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, num_layers=1, token_dim=16, num_attention_heads=1
    )
    model, ids = get_peft_model(tiny_model(), prompt), tokens(2, 20)
    losses = train(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, ids)
    assert losses[-1] < losses[0]
    expected = prefix = ids[:, :5]
    for _ in range(4):
        logits = model(input_ids=expected, attention_mask=torch.ones_like(expected)).logits[:, -1]
        expected = torch.cat([expected, logits.argmax(-1, keepdim=True)], 1)
    same(model.generate(input_ids=prefix, attention_mask=torch.ones_like(prefix), max_new_tokens=4), expected)


@pytest.mark.parametrize("targets", [["mixer.bank_keys"], ["mixer.conv_weight"], ["cell.memory_bank"]], ids=str)
def test_adapters_of_parameters_learn_and_are_recorded_once_merged(targets):
    layers = ["engram" if "cell" in targets[0] else "engram_mixer", "full_attention"]
    model = tiny_model(layer_types=layers, num_hidden_layers=2, num_attention_heads=2).train()
    adapted = get_peft_model(model, LoraConfig(target_modules=[], target_parameters=targets, r=2))
    ids = tokens(2, 7)
    adapted(input_ids=ids, labels=ids).loss.backward()
    gradients = [weight.grad for name, weight in adapted.named_parameters() if "lora_B" in name]
    assert gradients
    assert all(gradient.abs().max() > 0 for gradient in gradients)
    model = adapted.base_model.model.eval()
    with pytest.raises(ValueError, match=r"The memory of layer 0 is wrapped in a ParamWrapper .*merge the adapter"):
        Recorder(model)
    assert len(record(adapted.merge_and_unload(), ids)) == 2


def test_other_adapters_outside_the_cells_work():
    model = get_peft_model(
        tiny_model(residual=True, embedding_size=8, tie_word_embeddings=False),
        LoraConfig(r=2, target_modules=["embedding_projection"], use_dora=True),
    )
    ids = tokens(2, 20)
    losses = train(model, {"input_ids": ids}, ids)
    assert losses[-1] < losses[0]
