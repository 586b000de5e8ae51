"""Memory files: the state on disk."""

import json

import pytest
import torch
from helpers import ARCHITECTURES, close, same, state, tiny_config, tiny_model, tokens
from safetensors.torch import load_file, save_file
from transformers import DynamicCache

from hf_engram import EnnForCausalLM, EnnModel, load_memory, save_memory
from hf_engram.cache_enn import state_on


@pytest.fixture
def memory_file(tmp_path):
    model = tiny_model(num_hidden_layers=2)
    path = tmp_path / "memory.safetensors"
    save_memory(model(tokens(2, 9)).past_key_values, path, model.config)
    return path


def load(path, **kwargs):
    return load_memory(path, tiny_config(**{"num_hidden_layers": 2, **kwargs}))


@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=ARCHITECTURES)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("as_string", [True, False])
def test_loaded_memory_goes_on_as_the_saved_one(tmp_path, architecture, batch, as_string):
    model, prompt, new = tiny_model(**architecture), tokens(batch, 9), tokens(batch, 4)
    path = tmp_path / "memory.safetensors"
    path = str(path) if as_string else path
    past_key_values = model(prompt).past_key_values
    save_memory(past_key_values, path, model.config)
    loaded = load_memory(path, model.config)
    same(state(loaded), state(past_key_values))
    same(
        model(new, past_key_values=loaded).logits,
        model(new, past_key_values=past_key_values).logits,
    )


@pytest.mark.parametrize("device", ["cpu", "cpu:0", torch.device("cpu", 0), "meta"], ids=str)
def test_the_state_is_put_where_it_is_asked_for(memory_file, device):
    loaded = load_memory(memory_file, tiny_config(num_hidden_layers=2), device)
    assert {value.device.type for value in state(loaded)} == {torch.device(device).type}


def test_a_layer_takes_its_state_to_where_it_computes(memory_file):
    [layer, _] = load(memory_file).layers
    same(state_on(torch.device("cpu"), layer), layer.state)
    moved = state_on(torch.device("meta"), layer)  # there is no other device everywhere
    assert {value.device.type for value in moved} == {"meta"}
    assert {value.device.type for value in layer.state} == {"cpu"}


def test_generation_on_a_loaded_memory(memory_file):
    model, prompt = tiny_model(num_hidden_layers=2), tokens(2, 5)
    generated = model.generate(prompt, past_key_values=load(memory_file), max_new_tokens=5, pad_token_id=0)
    first = model(prompt, past_key_values=load(memory_file)).logits[:, -1].argmax(-1)
    same(generated[:, 5], first)


@pytest.mark.parametrize("wrong", [None, DynamicCache(), "other"], ids=["none", "empty", "other"])
def test_what_is_no_state_of_the_model_is_not_saved(tmp_path, wrong):
    model = tiny_model(num_hidden_layers=2)
    wrong = tiny_model(layer_types=["engram_mixer"])(tokens(1, 3)).past_key_values if wrong == "other" else wrong
    with pytest.raises(ValueError, match=r"past_key_values \(\w+\) is not the state of a model with this config"):
        save_memory(wrong, tmp_path / "memory.safetensors", model.config)
    wider = tiny_model(num_hidden_layers=2, memory_size=9)(tokens(1, 3)).past_key_values
    with pytest.raises(
        ValueError, match="past_key_values does not fit config: it holds, in layer 0, a state of shapes"
    ):
        save_memory(wider, tmp_path / "memory.safetensors", model.config)
    assert not list(tmp_path.iterdir())


def test_memory_counts_all_tokens_it_has_seen_and_none_of_the_new_sequence(tmp_path, memory_file):
    memory = load(memory_file)
    assert memory.get_seq_length() == 0
    model = tiny_model(num_hidden_layers=2)
    again = tmp_path / "again.safetensors"
    save_memory(model(tokens(2, 3), past_key_values=memory).past_key_values, again, model.config)
    assert [layer.tokens_seen for layer in load(again).layers] == [12, 12]


@pytest.mark.parametrize(
    ("saved", "loaded"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str
)
def test_memory_moves_between_dtypes(tmp_path, saved, loaded):
    path = tmp_path / "memory.safetensors"
    writer, reader = tiny_model(dtype=saved), tiny_model(dtype=loaded)
    past_key_values = writer(tokens(1, 9)).past_key_values
    save_memory(past_key_values, path, writer.config)
    memory = load_memory(path, reader.config)
    assert memory.layers[0].state.trace.dtype == torch.float32
    same(state(memory), state(past_key_values))
    assert reader(tokens(1, 2), past_key_values=memory).logits.isfinite().all()


def test_memory_of_a_language_model_serves_any_model_of_its_architecture(memory_file):
    model = tiny_model(EnnModel, num_hidden_layers=2, vocab_size=None)
    features = torch.randn(2, 3, 16, dtype=torch.float64)
    with_memory = model(inputs_embeds=features, past_key_values=load(memory_file)).last_hidden_state
    assert (with_memory != model(inputs_embeds=features).last_hidden_state).any()


@pytest.mark.parametrize(
    "other",
    [
        {"hidden_size": 12},
        {"memory_size": 4},
        {"num_hidden_layers": 1},
        {"hebbian_lr": 0.1},
        {"trace_scale": 1.0},
        {"trace_clip": 0.1},
        {"trace_scope": "batch"},
    ],
    ids=str,
)
def test_memory_of_another_architecture_is_refused(memory_file, other):
    [(field, value)] = other.items()
    written = getattr(tiny_config(num_hidden_layers=2), field)
    with pytest.raises(ValueError, match=f"{field} is {written!r} in the file, {value!r} here"):
        load(memory_file, **other)


def test_a_token_memory_is_not_dropped(tmp_path):
    writer = tiny_model(EnnForCausalLM, token_memory_size=6)
    memory = writer(tokens(1, 5), use_cache=True).past_key_values
    save_memory(memory, tmp_path / "memory", writer.config)
    with pytest.raises(ValueError, match="token_memory_size is 6 in the file, None here"):
        load_memory(tmp_path / "memory", tiny_config())


def truncated(path):
    path.write_bytes(path.read_bytes()[:-1])


def cut_in_the_header(path):
    path.write_bytes(path.read_bytes()[:40])


def empty(path):
    path.write_bytes(b"")


def text(path):
    path.write_text("not a memory")


def tensors_of_something_else(path):
    save_file({"weight": torch.zeros(2)}, path)


def without_a_layer(path):
    rewrite(path, lambda tensors, metadata: tensors.pop("layers.1.trace"))


def with_a_wrong_shape(path):
    rewrite(path, lambda tensors, metadata: tensors.update({"layers.1.trace": torch.zeros(2, 8, 15)}))


def with_rows_that_differ(path):
    rewrite(path, lambda tensors, metadata: tensors.update({"layers.1.trace": torch.zeros(3, 8, 16)}))


def with_a_damaged_architecture(path):
    rewrite(path, lambda tensors, metadata: metadata.update(architecture="{"))


def without_architecture(path):
    rewrite(path, lambda tensors, metadata: metadata.pop("architecture"))


def with_a_damaged_count(path):
    rewrite(path, lambda tensors, metadata: metadata.update(tokens_seen="many"))


def with_an_architecture_of_another_type(path):
    rewrite(path, lambda tensors, metadata: metadata.update(architecture="[1]"))


def with_a_count_of_another_type(path):
    rewrite(path, lambda tensors, metadata: metadata.update(tokens_seen="[9]"))


def with_a_negative_count(path):
    rewrite(path, lambda tensors, metadata: metadata.update(tokens_seen="-1"))


def rewrite(path, change):
    tensors = load_file(path)
    metadata = {
        "format": "hf_engram.memory.v1",
        "architecture": json.dumps(architecture_of(path)),
        "tokens_seen": "9",
    }
    change(tensors, metadata)
    save_file(tensors, path, metadata)


def architecture_of(path):
    header = path.read_bytes()
    size = int.from_bytes(header[:8], "little")
    return json.loads(json.loads(header[8 : 8 + size])["__metadata__"]["architecture"])


@pytest.mark.parametrize(
    "damage",
    [
        truncated,
        cut_in_the_header,
        empty,
        text,
        tensors_of_something_else,
        without_a_layer,
        with_a_wrong_shape,
        with_rows_that_differ,
        with_a_damaged_architecture,
        without_architecture,
        with_a_damaged_count,
        with_an_architecture_of_another_type,
        with_a_count_of_another_type,
        with_a_negative_count,
    ],
)
def test_damaged_file_is_refused_by_name(memory_file, damage):
    damage(memory_file)
    with pytest.raises(ValueError, match=r"memory\.safetensors.*(memory file|state of shapes)"):
        load(memory_file)


@pytest.mark.parametrize("name", ["missing.safetensors", "."])
def test_missing_file_is_named(tmp_path, name):
    with pytest.raises(FileNotFoundError, match="no memory file at"):
        load(tmp_path / name)


def test_empty_memory_is_not_saved(tmp_path):
    config = tiny_config()
    with pytest.raises(ValueError, match="empty"):
        save_memory(DynamicCache(config=config), tmp_path / "memory.safetensors", config)
    assert list(tmp_path.iterdir()) == []


def test_failed_save_leaves_the_old_file_and_no_other(memory_file, monkeypatch):
    def fail(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("disk full")

    before = memory_file.read_bytes()
    monkeypatch.setattr("hf_engram.memory_files.save_file", fail)
    model = tiny_model(num_hidden_layers=2)
    with pytest.raises(OSError, match="disk full"):
        save_memory(model(tokens(2, 4)).past_key_values, memory_file, model.config)
    assert list(memory_file.parent.iterdir()) == [memory_file]
    assert memory_file.read_bytes() == before


def test_memory_of_a_row_can_be_saved_alone(tmp_path):
    model, prompt, new = tiny_model(), tokens(3, 9), tokens(1, 2)
    past_key_values = model(prompt).past_key_values
    past_key_values.batch_select_indices(torch.tensor([1]))
    save_memory(past_key_values, tmp_path / "row", model.config)
    expected = model(torch.cat([prompt[1:2], new], 1)).logits[:, -2:]
    close(model(new, past_key_values=load_memory(tmp_path / "row", model.config)).logits, expected)
