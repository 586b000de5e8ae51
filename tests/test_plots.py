"""Recordings as tables and figures."""

import re
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
import torch
from helpers import ARCHITECTURES, close, tiny_model, tokens

from hf_engram.traces import record

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def recording():
    """Two layers, twelve tokens, a memory from before, and a clip that acts."""
    torch.manual_seed(0)
    model = tiny_model(num_hidden_layers=2, trace_clip=0.15)
    memory = model(tokens(1, 5), use_cache=True).past_key_values
    [made] = record(model, tokens(1, 12), past_key_values=memory)
    assert any(layer.attribution.clip.any() for layer in made.layers)
    return made


def test_attribution_table_has_every_part_of_every_recall(recording):
    table = recording.to_pandas()
    assert list(table.columns) == [
        *("layer", "step", "token", "source", "source_step", "source_token"),
        *("coefficient", "share", "contribution", "exact"),
    ]
    assert len(table) == 2 * (12 * 3 + 12 * 11 // 2)
    sums = table.groupby(["layer", "step"])["contribution"].sum()
    np.testing.assert_allclose(sums, 1)
    for index, layer in enumerate(recording.layers):
        parts = layer.attribution
        mine = table[(table.layer == index) & (table.step == 9)]
        assert (mine.token == recording.tokens[9]).all()
        assert (mine.exact == bool(parts.exact[9])).all()
        for name in ("bank", "carried", "clip"):
            [row] = mine[mine.source == name].to_dict("records")
            assert row["share"] == getattr(parts.share, name)[9]
            assert pd.isna([row["source_step"], row["source_token"], row["coefficient"]]).all()
        written = mine[mine.source == "token"]
        assert written.source_step.tolist() == list(range(9))
        assert written.source_token.tolist() == list(recording.tokens[:9])
        close(torch.tensor(written.coefficient.to_numpy()), parts.coefficients[9, :9])
        close(torch.tensor(written.share.to_numpy()), parts.share.tokens[9, :9])


def test_slot_table_has_every_slot_at_every_token(recording):
    table = recording.to_pandas("slots")
    assert list(table.columns) == ["layer", "step", "token", "slot", "recall", "write", "trace_norm"]
    for index, layer in enumerate(recording.layers):
        mine = table[table.layer == index]
        for name, values in (("recall", layer.recall), ("write", layer.writes), ("trace_norm", layer.trace_norms)):
            close(torch.tensor(mine.pivot(index="step", columns="slot", values=name).to_numpy()), values)


def test_unknown_table_is_refused(recording):
    with pytest.raises(ValueError, match=r"'slot'; allowed: \('attribution', 'slots'\)"):
        recording.to_pandas("slot")


def panels(figure):
    return {axes.get_title(loc="left"): axes for axes in figure.axes if axes.get_title(loc="left")}


@pytest.mark.parametrize("layer", [0, 1])
def test_figure_shows_the_recording(recording, tmp_path, layer):
    figure, shown = recording.plot(layer), recording.layers[layer]
    recall, trace, parts, who = panels(figure).values()
    np.testing.assert_array_equal(recall.images[0].get_array(), shown.recall.T)
    np.testing.assert_array_equal(trace.images[0].get_array(), shown.trace_norms.T)

    share = shown.attribution.share
    names = [label.get_text() for label in who.get_xticklabels()]
    assert names == ["learned bank", "memory carried in", "clip", *recording.tokens]
    assert [label.get_text() for label in who.get_yticklabels()] == list(recording.tokens)
    by_token, whole = (image.get_array() for image in who.images)
    np.testing.assert_array_equal(by_token.filled(0), np.tril(share.tokens, -1))
    np.testing.assert_array_equal(whole, np.stack([share.bank, share.carried, share.clip], 1))

    assert {text.get_text() for text in parts.get_legend().get_texts()} == {
        *("learned bank", "memory carried in", "earlier tokens", "clip", "clipped from here on")
    }
    [line] = [line for line in parts.lines if line.get_label() == "clipped from here on"]
    assert line.get_xdata()[0] == shown.attribution.first_inexact - 0.5
    heights = sum(np.array([bar.get_height() for bar in bars]) for bars in parts.containers)
    np.testing.assert_allclose(heights, 1)

    figure.savefig(tmp_path / "figure.png")
    assert matplotlib.image.imread(tmp_path / "figure.png").std() > 0.1


def test_figure_without_carried_memory_and_clip_does_not_name_them():
    [recording] = record(tiny_model(), tokens(1, 5))
    _, _, parts, who = panels(recording.plot()).values()
    assert [text.get_text() for text in parts.get_legend().get_texts()] == ["learned bank", "earlier tokens"]
    assert [label.get_text() for label in who.get_xticklabels()] == ["learned bank", *recording.tokens]


@pytest.mark.parametrize(("head", "caption"), [(None, "Layer 0, mean over 2 heads"), (1, "Layer 0, head 1")], ids=str)
def test_figure_of_a_mixer_shows_the_mean_over_heads_or_one_head(head, caption, tmp_path):
    model = tiny_model(**ARCHITECTURES["hybrid"])
    memory = model(tokens(1, 5), use_cache=True).past_key_values
    [recording] = record(model, tokens(1, 12), past_key_values=memory)
    figure, shown = recording.plot(head=head), recording.layers[0].of_head(head)
    assert figure.get_suptitle() == caption
    recall, trace, parts, who = panels(figure).values()
    np.testing.assert_array_equal(recall.images[0].get_array(), shown.recall.T)
    np.testing.assert_array_equal(trace.images[0].get_array(), shown.trace_norms.T)
    share = shown.attribution.share
    by_token, whole = (image.get_array() for image in who.images)
    np.testing.assert_array_equal(by_token.filled(0), share.tokens)
    np.testing.assert_array_equal(whole, np.stack([share.bank, share.carried], 1))
    np.testing.assert_allclose(by_token.filled(0).sum(1) + whole.sum(1), 1)
    assert [text.get_text() for text in parts.get_legend().get_texts()] == [
        *("learned bank", "tokens so far", "memory carried in")
    ]
    figure.savefig(tmp_path / "figure.png")
    assert matplotlib.image.imread(tmp_path / "figure.png").std() > 0.1


def test_table_of_a_mixer_says_that_tokens_recall_themselves():
    [recording] = record(tiny_model(**ARCHITECTURES["mixer"]), tokens(1, 12))
    table = recording.to_pandas()
    assert len(table) == 2 * (12 * 3 + 12 * 13 // 2)
    for column in ("share", "contribution"):
        np.testing.assert_allclose(table.groupby(["layer", "step"])[column].sum(), 1)
    itself = table[(table.layer == 1) & (table.source_step == table.step)]
    close(torch.tensor(itself.coefficient.to_numpy()), recording.layers[1].attribution.coefficients.diagonal())
    head = recording.layers[1].heads[0].to_pandas("slots")
    close(torch.tensor(head.write.to_numpy()), recording.layers[1].heads[0].writes.flatten())


@pytest.mark.parametrize("architecture", ["bare", "mixer"])
@pytest.mark.parametrize("steps", [1, 200])
def test_figure_of_any_length_can_be_drawn(steps, architecture, tmp_path):
    [recording] = record(tiny_model(**ARCHITECTURES[architecture]), tokens(1, steps))
    figure = recording.plot()
    figure.savefig(tmp_path / "figure.png")
    assert all(len(axes.get_xticks()) <= 65 for axes in figure.axes)


@pytest.mark.parametrize(("missing", "call"), [("pandas", "to_pandas"), ("matplotlib", "plot")])
def test_missing_package_is_named_with_its_extra(recording, monkeypatch, missing, call):
    for name in [name for name in sys.modules if name.split(".")[0] == missing]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "hf_engram.plots", raising=False)
    with pytest.raises(ImportError, match=rf"{missing}.*pip install 'hf-engram\[traces\]'"):
        getattr(recording, call)()


def test_recording_needs_neither():
    code = "import sys, hf_engram.traces; assert not {'pandas', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_code_of_the_documentation_runs(tmp_path, monkeypatch, capsys):
    guide = (ROOT / "docs/traces.md").read_text("utf-8")
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", guide, re.MULTILINE | re.DOTALL))
    (tmp_path / "model_cards").symlink_to(ROOT / "model_cards")
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert "ProbabilityChange" in capsys.readouterr().out
    assert matplotlib.image.imread("recording.png").std() > 0.1
