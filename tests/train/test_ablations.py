import pytest
import torch
from helpers import same, tokens

from train.ablations import ABLATIONS
from train.models import ImageModelArguments, LanguageModelArguments, make_model


def mixer_model(ablation=None, **options):
    torch.manual_seed(0)
    arguments = LanguageModelArguments(
        architecture="mixer", hidden_size=32, memory_size=8, ablation=ablation, hidden_dropout=0.0, **options
    )
    return make_model(arguments, "language", vocab_size=40)


def what_was_recalled(model):
    """Recall weights of the first mixer `[B, T, heads, N]`, and how its outputs change when nothing may be written."""
    text = tokens(2, 20)
    with torch.no_grad():
        read = model.eval()(text, output_recall=True)
        frozen = model(text, plastic=False)
    return read.recall[0], read.logits - frozen.logits


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_what_was_taken_out_does_not_come_back(ablation):
    model, whole = mixer_model(ablation), mixer_model()
    assert model.num_parameters() == whole.num_parameters()
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(2):
        text = tokens(2, 20)
        model(text, labels=text).loss.backward()
        optimizer.step()
    for name, weight in model.named_parameters():
        assert torch.isfinite(weight).all() or not weight.requires_grad
        assert torch.equal(weight, before[name]) != weight.requires_grad
    beginning = dict(whole.named_parameters())
    assert any(not torch.equal(weight, beginning[name]) for name, weight in before.items())


def test_each_ablation_does_what_it_says():
    _, difference = what_was_recalled(mixer_model())
    assert difference.abs().max() > 1e-3
    _, difference = what_was_recalled(mixer_model("no_trace"))
    assert difference.abs().max() < 1e-6
    recall, _ = what_was_recalled(mixer_model("uniform_recall"))
    torch.testing.assert_close(recall, torch.full_like(recall, 1 / 8), rtol=1e-4, atol=0)

    def reads(ablation):
        return mixer_model(ablation).eval()(tokens(2, 20), output_reads=True).reads[0]

    same(reads(None).queries, reads(None).keys)
    assert not torch.equal(reads("free_queries").queries, reads("free_queries").keys)
    assert reads("one_timescale").log_decays.exp().mean((0, 2)).std() < 1e-3
    assert reads("constant_plasticity").strengths.std() == 0 < reads(None).strengths.std()
    bank = mixer_model("no_bank").model.layers[0].mixer.bank_values
    assert not bank.any()
    scale = mixer_model("faint_writes").model.layers[0].mixer.bank(torch.float32).trace_scale
    assert (scale == 1).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "mixer", "ablation": "no_luck"}, r"ablation is 'no_luck'; allowed: one of \('no_trace', "),
        ({"architecture": "enn", "ablation": "no_trace"}, "'no_trace'; allowed: None, since the model has no engram_"),
    ],
)
def test_what_cannot_be_taken_out_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_model(ImageModelArguments(hidden_size=16, **options), "images", image_sequence="row", num_labels=2)
