"""What `save_pretrained` wrote, the Auto classes open, whole and bit-equal."""

import json

import pytest
import torch
from helpers import (
    MODEL_CLASSES,
    TINY_IMAGES,
    close,
    same,
    state,
    tiny_config,
    tiny_inputs,
    tiny_model,
    tokens,
)
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
)

from hf_engram import EnnConfig, EnnForCausalLM, EnnForImageClassification, EnnForSequenceClassification, EnnModel

AUTO_CLASSES = {
    EnnModel: AutoModel,
    EnnForCausalLM: AutoModelForCausalLM,
    EnnForSequenceClassification: AutoModelForSequenceClassification,
    EnnForImageClassification: AutoModelForImageClassification,
}
VARIANTS = {
    "plain": {},
    "stacked_residual": {"num_hidden_layers": 2, "residual": True, "embedding_size": 7, "tie_word_embeddings": False},
    "attention_pooling": {"pooling": "attention", "use_layer_norm": False},
    "paper": {"trace_scope": "batch", "trace_clip": 0.1, "trace_noise": 0.01},
    "padding_token": {"pad_token_id": 1},
}
model_classes = pytest.mark.parametrize("model_class", MODEL_CLASSES)


def first(outputs):
    return outputs.last_hidden_state if isinstance(outputs.get("last_hidden_state"), torch.Tensor) else outputs.logits


@model_classes
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_loaded_model_equals_the_saved_one(tmp_path, model_class, variant):
    if model_class is EnnForImageClassification:
        variant = {name: value for name, value in variant.items() if name not in ("embedding_size", "pad_token_id")}
    model = tiny_model(model_class, dtype=torch.float32, **variant)
    inputs = tiny_inputs(model)
    model.save_pretrained(tmp_path)
    for opener in (AUTO_CLASSES[model_class], model_class):
        loaded, report = opener.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(report.values())
        assert type(loaded) is model_class
        assert not loaded.training
        same(loaded.state_dict(), model.state_dict())
        same(first(loaded(**inputs)), first(model(**inputs)))


def test_config_opens_as_enn(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is EnnConfig


@model_classes
def test_auto_class_builds_from_a_config(model_class):
    fields = TINY_IMAGES if model_class is EnnForImageClassification else {}
    assert type(AUTO_CLASSES[model_class].from_config(tiny_config(**fields))) is model_class


@pytest.mark.parametrize("tied", [True, False])
def test_head_is_saved_only_when_it_is_not_tied(tmp_path, tied):
    model = tiny_model(tie_word_embeddings=tied, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert "model.embed_tokens.weight" in saved
    assert ("lm_head.weight" in saved) is not tied
    loaded = EnnForCausalLM.from_pretrained(tmp_path)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied
    same(loaded.lm_head.weight, model.lm_head.weight)


def test_tying_is_kept_through_training_and_resizing():
    model = tiny_model()
    model.resize_token_embeddings(45)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model(tokens(2, 5), labels=tokens(2, 5)).loss.backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    same(model.get_output_embeddings().weight, model.get_input_embeddings().weight)


def test_weights_can_be_tied_again():
    model = tiny_model()
    model.set_input_embeddings(torch.nn.Embedding(40, 16).double())
    model.tie_weights()
    assert model.lm_head.weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("opened", [EnnModel, EnnForCausalLM, EnnForSequenceClassification], ids=lambda c: c.__name__)
@pytest.mark.parametrize("saved", [EnnModel, EnnForCausalLM, EnnForSequenceClassification], ids=lambda c: c.__name__)
def test_backbone_moves_between_heads(tmp_path, saved, opened):
    writer = tiny_model(saved, dtype=torch.float32, pooling="attention", pad_token_id=1)
    writer.save_pretrained(tmp_path)
    reader = AUTO_CLASSES[opened].from_pretrained(tmp_path)
    input_ids = tokens(2, 9)
    backbone = reader.base_model(input_ids).last_hidden_state
    same(backbone, writer.base_model(input_ids).last_hidden_state)
    assert all(tensor.isfinite().all() for tensor in reader.state_dict().values())
    assert first(reader(input_ids)).isfinite().all()


@model_classes
@pytest.mark.parametrize("variant", ["stacked_residual", "attention_pooling", "padding_token"])
def test_everything_missing_from_a_file_is_initialised_as_in_a_new_model(tmp_path, model_class, variant):
    fields = {**(TINY_IMAGES if model_class is EnnForImageClassification else {}), **VARIANTS[variant]}
    fields = {
        name: value
        for name, value in fields.items()
        if model_class is not EnnForImageClassification or (name not in ("embedding_size", "pad_token_id"))
    }
    fields |= {"hidden_size": 64, "memory_size": 32}
    new = model_class(tiny_config(**fields))
    tiny_config(**fields).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(EMPTY_SAFETENSORS)
    loaded = model_class.from_pretrained(tmp_path)
    for name, tensor in loaded.state_dict().items():
        expected = new.state_dict()[name]
        assert tensor.isfinite().all(), name
        close(tensor.mean(), expected.mean(), tolerance=0.2)
        close(tensor.std(correction=0), expected.std(correction=0), tolerance=0.2)


EMPTY_SAFETENSORS = (2).to_bytes(8, "little") + b"{}"


def test_cell_starts_with_the_initialisers_of_the_paper():
    cell = EnnModel(EnnConfig(vocab_size=10, hidden_size=64, memory_size=32)).layers[0].cell
    for linear in (cell.encoder, cell.integrator, cell.output):
        close(linear.weight.std().item(), (2 / linear.in_features) ** 0.5, tolerance=0.1)
        assert not linear.bias.any()
    bound = (6 / (32 + 64)) ** 0.5
    assert 0.95 * bound < cell.memory_bank.abs().max() <= bound


def test_half_precision_model_keeps_its_trace_in_float32(tmp_path):
    tiny_model(dtype=torch.float32).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path)
    input_ids = tokens(2, 70)
    for steps in (70, 1):
        outputs = model(input_ids[:, :steps])
        assert outputs.logits.dtype == torch.bfloat16
        assert [tensor.dtype for tensor in state(outputs.past_key_values)] == [torch.bfloat16, torch.float32]
        error = (outputs.logits - whole(input_ids[:, :steps]).logits).abs().mean()
        assert error < 0.1 * outputs.logits.abs().mean()
    assert model.generate(input_ids, max_new_tokens=3, pad_token_id=1).shape == (2, 73)


def test_saved_dtype_is_the_loaded_dtype(tmp_path):
    tiny_model(dtype=torch.bfloat16).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16


def test_sharded_checkpoint(tmp_path):
    model = tiny_model(num_hidden_layers=3, dtype=torch.float32)
    model.save_pretrained(tmp_path, max_shard_size="5KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    same(EnnForCausalLM.from_pretrained(tmp_path).state_dict(), model.state_dict())


def test_model_loads_through_a_device_map(tmp_path):
    model = tiny_model(num_hidden_layers=2, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    loaded, input_ids = EnnForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu"}), tokens(2, 5)
    same(loaded(input_ids).logits, model(input_ids).logits)
