"""The classification and regression heads, for tokens, features and images."""

import pytest
import torch
import torch.nn.functional as F
from helpers import IMAGE_SEQUENCES, TINY, TINY_IMAGES, close, same, state, tiny_config, tiny_inputs, tiny_model, tokens
from huggingface_hub.errors import StrictDataclassError

from hf_engram import EnnConfig, EnnForCausalLM, EnnForImageClassification, EnnForSequenceClassification
from hf_engram.images_enn import image_to_sequence

POOLINGS = ("last", "mean", "attention")
poolings = pytest.mark.parametrize("pooling", POOLINGS)
HEADS = (EnnForSequenceClassification, EnnForImageClassification)


@pytest.mark.parametrize("model_class", HEADS)
def test_class_labels_give_cross_entropy(model_class):
    model, labels = tiny_model(model_class, num_labels=4), torch.tensor([3, 0, 1])
    outputs = model(**tiny_inputs(model), labels=labels)
    assert outputs.logits.shape == (3, 4)
    close(outputs.loss, F.cross_entropy(outputs.logits, labels))


@pytest.mark.parametrize("model_class", HEADS)
def test_label_sets_give_binary_cross_entropy(model_class):
    model, labels = tiny_model(model_class, num_labels=4), torch.randint(2, (3, 4)).double()
    outputs = model(**tiny_inputs(model), labels=labels)
    assert model.config.problem_type == "multi_label_classification"
    close(outputs.loss, F.binary_cross_entropy_with_logits(outputs.logits, labels))


@pytest.mark.parametrize("model_class", HEADS)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("with_axis", [True, False])
def test_one_label_is_regression(model_class, batch, with_axis):
    model, targets = tiny_model(model_class, num_labels=1), torch.randn(batch, dtype=torch.float64)
    outputs = model(**tiny_inputs(model, batch), labels=targets[:, None] if with_axis else targets)
    assert outputs.logits.shape == (batch, 1)
    close(outputs.loss, F.mse_loss(outputs.logits[:, 0], targets))


def test_regression_of_several_numbers():
    model = tiny_model(EnnForSequenceClassification, num_labels=3, problem_type="regression")
    targets = torch.randn(2, 3, dtype=torch.float64)
    outputs = model(tokens(2, 5), labels=targets)
    close(outputs.loss, F.mse_loss(outputs.logits, targets))


@poolings
@pytest.mark.parametrize("model_class", HEADS)
@pytest.mark.parametrize("width", [1, 5, 16, 24, 33])
@pytest.mark.parametrize("residual", [True, False])
def test_features_of_any_width(pooling, model_class, width, residual):
    images = {"image_sequence": "row", "image_size": width, "num_channels": 1}
    fields = images if model_class is EnnForImageClassification else {"vocab_size": None, "embedding_size": width}
    model = tiny_model(model_class, pooling=pooling, residual=residual, **fields)
    features = torch.randn(2, 7, width, dtype=torch.float64)
    outputs = model(inputs_embeds=features, labels=torch.tensor([0, 1]))
    outputs.loss.backward()
    assert outputs.logits.shape == (2, 2)
    with pytest.raises(ValueError, match="inputs_embeds has shape"):
        model(inputs_embeds=features[..., :0])


@poolings
@pytest.mark.parametrize("num_labels", [1, 4], ids=["regression", "classes"])
def test_every_pooling_and_task_returns_the_sequence_and_the_state_too(pooling, num_labels):
    """In the original package attention pooling of a returned sequence, and a regressor with its state, raise."""
    model = tiny_model(
        EnnForSequenceClassification, pooling=pooling, num_labels=num_labels, vocab_size=None, embedding_size=1
    )
    outputs = model(inputs_embeds=torch.randn(2, 7, 1, dtype=torch.float64), output_hidden_states=True, use_cache=True)
    assert outputs.logits.shape == (2, num_labels)
    assert outputs.hidden_states[-1].shape == (2, 7, 16)
    assert [tuple(tensor.shape) for tensor in state(outputs.past_key_values)] == [(2, 16), (2, 8, 16)]


def test_language_model_reads_features_of_any_width():
    model = tiny_model(EnnForCausalLM, embedding_size=5, tie_word_embeddings=False)
    assert model(inputs_embeds=torch.randn(2, 7, 5, dtype=torch.float64)).logits.shape == (2, 7, 40)


@poolings
@pytest.mark.parametrize("model_class", HEADS)
@pytest.mark.parametrize(
    "valid", [[1, 1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1, 1], [0, 1, 0, 1, 1, 1, 0]], ids=["right", "left", "interior"]
)
@pytest.mark.parametrize("batch", [1, 3])
def test_pooling_of_a_padded_sequence_equals_unpadded(pooling, model_class, valid, batch):
    model = tiny_model(model_class, pooling=pooling)
    features = torch.randn(batch, 7, model.config.embedding_size, dtype=torch.float64)
    attention_mask = torch.ones(batch, 7, dtype=torch.long)
    attention_mask[0] = torch.tensor(valid)
    padded = model(inputs_embeds=features, attention_mask=attention_mask).logits
    for row, kept in enumerate(attention_mask.bool()):
        close(padded[row : row + 1], model(inputs_embeds=features[row : row + 1, kept]).logits)


def test_poolings_read_what_they_say():
    features = torch.randn(2, 5, 16, dtype=torch.float64)
    for pooling in POOLINGS:
        model = tiny_model(EnnForSequenceClassification, pooling=pooling)
        hidden_states = model.model(inputs_embeds=features).last_hidden_state
        if pooling == "attention":
            [score] = [module for name, module in model.named_modules() if name.endswith("score")]
            weights = torch.tanh(score(hidden_states)).softmax(1)
        elif pooling == "mean":
            weights = torch.full((2, 5, 1), 1 / 5).double()
        else:
            weights = torch.tensor([0, 0, 0, 0, 1.0]).double()[:, None]
        pooled = (weights * hidden_states).sum(1)
        close(model(inputs_embeds=features).logits, model.classifier(pooled), tolerance=1e-7)


def test_dropout_before_the_head_acts_in_training_only():
    model, input_ids = tiny_model(EnnForSequenceClassification, classifier_dropout=0.5), tokens(2, 5)
    same(model(input_ids).logits, model(input_ids).logits)
    model.train()
    assert (model(input_ids).logits != model(input_ids).logits).any()


@pytest.mark.parametrize("model_class", HEADS)
def test_classifier_of_the_paper_is_noisy_in_training_only(model_class):
    images = TINY_IMAGES if model_class is EnnForImageClassification else {}
    model = model_class(EnnConfig.paper(**TINY, **images)).eval()
    inputs = tiny_inputs(model)
    same(model(**inputs).logits, model(**inputs).logits)
    model.train()
    model.dropout.p = 0.0
    assert (model(**inputs).logits != model(**inputs).logits).any()
    model(**inputs, labels=torch.tensor([0, 1, 0])).loss.backward()


@pytest.mark.parametrize("fields", IMAGE_SEQUENCES.values(), ids=IMAGE_SEQUENCES)
def test_images_are_classified_as_their_sequences(fields):
    model = tiny_model(EnnForImageClassification, **fields)
    pixel_values = tiny_inputs(model)["pixel_values"]
    sequence = model.embed_images(pixel_values)
    same(model(inputs_embeds=sequence).logits, model(pixel_values).logits)
    close(model(pixel_values[:1]).logits, model(pixel_values).logits[:1])


def numbered_image(config):
    """An image whose values name channel, row and column: 100 c + 10 y + x."""
    channels, size = config.num_channels, config.image_size
    c, y, x = torch.meshgrid(torch.arange(channels), torch.arange(size), torch.arange(size), indexing="ij")
    return (100 * c + 10 * y + x)[None].double()


def test_rows_are_read_from_the_top_with_the_channels_of_a_pixel_together():
    config = tiny_config(image_sequence="row", image_size=3, num_channels=2)
    sequence = image_to_sequence(numbered_image(config), config)
    same(sequence[0].long().tolist(), [[10 * y + x + 100 * c for x in range(3) for c in range(2)] for y in range(3)])


def test_pixels_are_read_row_by_row():
    config = tiny_config(image_sequence="pixel", image_size=3, num_channels=2)
    sequence = image_to_sequence(numbered_image(config), config)
    same(sequence[0].long().tolist(), [[10 * y + x, 10 * y + x + 100] for y in range(3) for x in range(3)])


def test_patches_are_read_row_by_row_outside_and_inside():
    config = tiny_config(image_sequence="patch", image_size=4, patch_size=2, num_channels=2)
    sequence = image_to_sequence(numbered_image(config), config)
    corners = [(y, x) for y in (0, 2) for x in (0, 2)]
    expected = [
        [10 * (y + dy) + x + dx + 100 * c for dy in range(2) for dx in range(2) for c in range(2)] for y, x in corners
    ]
    same(sequence[0].long().tolist(), expected)


def test_permutation_is_fixed_by_its_seed():
    def order(seed):
        config = tiny_config(image_sequence="pixel", image_size=5, num_channels=1, pixel_permutation_seed=seed)
        return image_to_sequence(torch.arange(25.0).view(1, 1, 5, 5), config).flatten().long().tolist()

    torch.manual_seed(1)
    first = order(3)
    torch.manual_seed(2)
    assert order(3) == first
    assert sorted(first) == order(None) == list(range(25))
    assert first != order(4) != order(None)


def test_every_step_also_reads_where_it_is():
    fields = {"image_sequence": "pixel", "image_size": 4, "num_channels": 2, "pixel_permutation_seed": 1}
    model = tiny_model(EnnForImageClassification, position_embedding_size=3, **fields)
    pixel_values = torch.rand(2, 2, 4, 4).double()
    sequence = model.embed_images(pixel_values)
    same(sequence[..., :2], image_to_sequence(pixel_values, model.config))
    places = sequence[..., 2:]
    same(places[0], places[1])
    assert places.shape[1:] == (16, 3)
    assert (torch.cdist(places[0], places[0]) + torch.eye(16) > 0.1).all()  # no two places look alike

    blank = torch.zeros(1, 2, 4, 4).double()
    model(blank, labels=torch.tensor([0])).loss.backward()
    assert (model.position_embeddings.weight.grad.abs().sum(1) > 0).all()
    with torch.no_grad():
        model.position_embeddings.weight.zero_()
    without = tiny_model(EnnForImageClassification, **fields)
    weights = model.state_dict()
    weights["model.layers.0.cell.encoder.weight"] = weights["model.layers.0.cell.encoder.weight"][:, :2]
    del weights["position_embeddings.weight"]
    without.load_state_dict(weights)
    close(without(pixel_values).logits, model(pixel_values).logits)


@pytest.mark.parametrize("size", [0, -1])
def test_a_position_embedding_has_a_width(size):
    with pytest.raises(StrictDataclassError, match=f"`position_embedding_size` is {size}; allowed: a positive integer"):
        EnnConfig(image_sequence="row", position_embedding_size=size)


def test_only_images_have_positions_to_embed():
    with pytest.raises(StrictDataclassError, match=r"allowed: .* None where there are no images"):
        EnnConfig(vocab_size=10, position_embedding_size=4)


@pytest.mark.parametrize("shape", [(2, 3, 8, 7), (2, 1, 8, 8), (3, 8, 8), (2, 8, 8, 3)], ids=str)
def test_image_of_a_wrong_size_is_refused(shape):
    with pytest.raises(ValueError, match=r"pixel_values has shape .* expected \[batch, 3, 8, 8\]"):
        tiny_model(EnnForImageClassification)(torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.uint8], ids=str)
def test_images_may_have_any_dtype(dtype):
    pixel_values = torch.randint(2, (2, 3, 8, 8))
    model = tiny_model(EnnForImageClassification)
    same(model(pixel_values.to(dtype)).logits, model(pixel_values.double()).logits)


@pytest.mark.parametrize("given", ["neither", "both"])
def test_exactly_one_of_images_and_features(given):
    model = tiny_model(EnnForImageClassification)
    both = {**tiny_inputs(model), "inputs_embeds": torch.zeros(3, 8, 24).double()}
    with pytest.raises(ValueError, match="pixel_values and inputs_embeds"):
        model(**(both if given == "both" else {}))


def test_image_may_be_read_on_with_its_state():
    model = tiny_model(EnnForImageClassification)
    pixel_values = tiny_inputs(model)["pixel_values"]
    rows = model.embed_images(pixel_values)
    past_key_values = model(inputs_embeds=rows[:, :3], use_cache=True).past_key_values
    close(
        model(inputs_embeds=rows[:, 3:], past_key_values=past_key_values).logits,
        model(pixel_values).logits,
    )
