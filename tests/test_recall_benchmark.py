import json
import math

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PIL

from benchmarks import recall, recall_runs
from benchmarks.recall_images import QUERIES, SHOTS, WAYS, episode, few_shot_task
from benchmarks.recall_runs import MODELS, TRACES, Settings, answers, run
from benchmarks.recall_tasks import IGNORED, KEYS, MARK, NOISE, VALUES, Questions, Task, copying, long_gap, mqar
from train.models import LanguageModelArguments, make_model

SMALL = ["--steps", "2", "--parameters", "40000", "--learning_rates", "4e-3"]


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


@pytest.fixture
def few_questions(monkeypatch):
    monkeypatch.setattr(recall_runs, "EXAM_ROWS", 8)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def members(inputs, tokens):
    return (inputs >= tokens.start) & (inputs < tokens.stop)


def dark_to_light(folder, classes):
    """A dataset whose images are all of the grey level of their class, in `folder`."""
    labels = [label for label in range(classes) for _ in range(SHOTS[-1] + QUERIES)]
    images = [PIL.fromarray(np.full((6, 6), 40 * label, dtype=np.uint8)) for label in labels]
    features = Features({"image": Image(), "label": ClassLabel(names=[f"level {n}" for n in range(classes)])})
    for split in ("train", "test"):
        Dataset.from_dict({"image": images, "label": labels}, features=features).to_parquet(folder / f"{split}.parquet")
    return str(folder)


@pytest.mark.parametrize(
    ("questions", "pairs", "length"),
    [
        (mqar(5, seeded(), pairs=4, length=20), 4, 20),
        (mqar(5, seeded(), pairs=6, length=18), 6, 18),
        (mqar(5, seeded(), pairs=len(KEYS), length=200), len(KEYS), 200),
        (long_gap(5, seeded(), pairs=4, gap=9), 4, 21),
        (long_gap(5, seeded(), pairs=3, gap=0), 3, 9),
    ],
)
def test_every_key_asks_once_for_the_value_it_was_paired_with(questions, pairs, length):
    inputs, labels, first = questions
    assert inputs.shape == labels.shape == (5, length)
    for row, answer in zip(inputs.tolist(), labels.tolist(), strict=True):
        paired = dict(zip(row[0 : 2 * pairs : 2], row[1 : 2 * pairs : 2], strict=True))
        asked = {key: value for key, value in zip(row, answer, strict=True) if value != IGNORED}
        assert asked == paired
        assert len(paired) == pairs
        assert sum(value != IGNORED for value in answer) == pairs
    assert (labels[:, :first] == IGNORED).all()
    assert members(inputs, KEYS)[:, :first:2][:, :pairs].all()
    assert members(inputs, VALUES)[:, 1:first:2][:, :pairs].all()
    # What follows the pairs says nothing about values.
    rest = inputs[:, 2 * pairs :]
    assert (members(rest, NOISE) | (labels[:, 2 * pairs :] != IGNORED)).all()
    assert not members(rest, VALUES).any()


def test_questions_of_a_gap_come_after_it_and_those_of_mqar_within():
    assert (long_gap(4, seeded(), pairs=2, gap=50).labels[:, :54] == IGNORED).all()
    asking = (mqar(50, seeded(), pairs=2, length=54).labels != IGNORED).any(0)
    assert asking[4:].float().mean() > 0.7


def test_a_copy_is_what_came_before_the_mark():
    inputs, labels, first = copying(3, seeded(), symbols=7)
    assert inputs.shape == labels.shape == (3, 14)
    assert first == 7
    assert (inputs[:, 7] == MARK).all()
    assert members(inputs[:, :7], VALUES).all()
    assert torch.equal(labels[:, 7:], inputs[:, :7])
    assert torch.equal(inputs[:, 8:], inputs[:, :6])
    assert (labels[:, :7] == IGNORED).all()


def test_an_episode_asks_for_other_images_of_the_classes_it_shows():
    # Two pixels: the class, and the number of the image in it.
    images = [torch.tensor([[float(label), float(number)] for number in range(12)]) for label in range(5)]
    inputs, labels, first = episode(60, seeded(), images, shots=3)
    assert first == 3 * WAYS
    assert inputs.shape == (60, WAYS * (3 + QUERIES), 2 + WAYS)
    assert labels.shape == inputs.shape[:2]
    pixels, shown = inputs[..., :2], inputs[..., 2:]
    assert ((shown[:, :first] > 0).sum(-1) == 1).all()
    torch.testing.assert_close(shown[:, :first].sum(-1), torch.full((60, first), math.sqrt(2)))  # of two pixels
    assert (shown[:, first:] == 0).all()
    assert (labels[:, :first] == IGNORED).all()
    meanings = set()
    for row in range(60):
        means = dict(zip(pixels[row, :first, 0].tolist(), shown[row, :first].argmax(-1).tolist(), strict=True))
        assert sorted(means.values()) == list(range(WAYS))
        assert [means[level] for level in pixels[row, first:, 0].tolist()] == labels[row, first:].tolist()
        assert len(pixels[row].unique(dim=0)) == WAYS * (3 + QUERIES)  # no image comes twice
        meanings |= set(means.items())
    assert len(meanings) == 5 * WAYS  # any class may have any label


def test_the_held_out_classes_are_never_trained_on(tmp_path):
    task = few_shot_task(dark_to_light(tmp_path, classes=7))

    mean, std = 60.0, 40 * torch.tensor([0.0, 1, 2, 3]).repeat(10 * 36).std()  # of levels 0 to 3, as bytes

    def levels(draw):
        return set(draw(20, seeded()).inputs[..., 0].mul(std).add(mean).div(40).round().int().unique().tolist())

    assert set.union(*map(levels, task.training)) == {0, 1, 2, 3}
    novel, known = task.exams.values()
    assert levels(novel[1]) == {4, 5, 6}
    assert levels(known[5]) == {0, 1, 2, 3}
    assert list(novel) == list(known) == [1, 2, 3, 4, 5]


def test_a_seed_draws_the_same_questions():
    for draw in (lambda g: mqar(4, g, pairs=4, length=30), lambda g: copying(4, g, symbols=9)):
        assert torch.equal(draw(seeded(1)).inputs, draw(seeded(1)).inputs)
        assert not torch.equal(draw(seeded(1)).inputs, draw(seeded(2)).inputs)


def test_sizes_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(ValueError, match="pairs is 33; allowed: 1 to 32"):
        mqar(2, seeded(), pairs=33, length=200)
    with pytest.raises(ValueError, match="pairs is 0; allowed: 1 to 32"):
        long_gap(2, seeded(), pairs=0, gap=3)
    with pytest.raises(ValueError, match="length is 11; allowed: at least 12"):
        mqar(2, seeded(), pairs=4, length=11)
    with pytest.raises(ValueError, match="4 classes; allowed: at least 6"):
        few_shot_task("tests/fixtures/shapes")


@pytest.mark.parametrize("name", ["enn", "mixer"])
def test_a_trace_can_be_off_or_frozen_from_the_questions_on(name):
    arguments = LanguageModelArguments(**recall_runs.SHARED, **MODELS[name].options)
    model = make_model(arguments, "language", vocab_size=73).eval()
    questions = mqar(2, seeded(), pairs=4, length=24)
    with torch.no_grad():
        on, off, frozen = (answers(model, questions, trace) for trace in TRACES)
    torch.testing.assert_close(frozen[:, :8], on[:, :8])
    assert (frozen - on)[:, 10:].abs().amax() > 1e-5
    assert (off - on)[:, 1:].abs().amax() > 1e-5


def test_training_ends_when_all_answers_are_right():
    def always_one(rows, generator):
        return Questions(torch.randint(5, (rows, 4), generator=generator), torch.ones(rows, 4, dtype=torch.long), 1)

    task = Task("Always 1", {"vocab_size": 5}, (always_one,), {"": {1: always_one}}, 1)
    result = run(task, "gru", 1, Settings(200, 30_000, 4e-3), "")
    assert recall_runs.LAST_BATCHES <= result["steps"] < 200
    assert result["training_accuracy"] >= recall_runs.SOLVED
    assert result["accuracy"] == {"none": {"": {"1": 1.0}}}


@pytest.mark.parametrize(
    ("task", "models"),
    [
        ("mqar", ["enn", "gru"]),
        ("long_gap", ["mixer"]),
        ("copying", ["transformer"]),
        ("few_shot", ["enn_gated", "hybrid", "lstm"]),
    ],
)
def test_a_run_leaves_tables_plots_and_numbers(task, models, tmp_path, few_questions, capsys):
    data = tmp_path / "data"
    data.mkdir()
    options = ["--tasks", task, "--models", *models, *SMALL, "--dataset_name", dark_to_light(data, classes=6)]
    recall.main([*options, "--output_dir", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert (tmp_path / "out" / "results.md").read_text().strip() in printed
    assert (tmp_path / "out" / f"{task}.png").stat().st_size > 5000
    results = json.loads((tmp_path / "out" / "results.json").read_text())[task]
    assert list(results) == models
    for model, [result] in results.items():
        assert result["steps"] == 2
        assert abs(result["parameters"] - 40_000) <= 800
        assert result["state_bytes"] > 0
        assert tuple(result["accuracy"]) == (MODELS[model].traces or ("none",))
        for trace, exams in result["accuracy"].items():
            for difficulties in exams.values():
                row = " | ".join(f"{share:.3f}" for share in difficulties.values())
                assert f"| {model} | {trace.replace('none', '')} | {row} |" in printed


def test_finished_runs_are_read_and_not_repeated(tmp_path, few_questions, monkeypatch, capsys):
    options = ["--tasks", "copying", "--models", "gru", *SMALL, "--output_dir", str(tmp_path)]
    recall.main([*options, "--seeds", "1"])
    seeds = []
    monkeypatch.setattr(
        recall, "run", lambda task, model, seed, *others: seeds.append(seed) or run(task, model, seed, *others)
    )
    recall.main([*options, "--seeds", "1", "2"])
    assert seeds == [2]
    assert " ± " in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"other settings.*choose another --output_dir"):
        recall.main([*options, "--steps", "3"])


def test_a_model_takes_the_rate_with_which_its_training_ends_best(tmp_path, few_questions, monkeypatch, capsys):
    tried = []

    def recorded(task, model, seed, settings, name):
        tried.append((seed, settings.learning_rate))
        shares = {1e-3: (0.5, 9), 2e-3: (0.9999, 9), 4e-3: (0.999, 7), 8e-3: (0.9, 9)}[settings.learning_rate]
        return run(task, model, seed, settings, name) | dict(zip(("training_accuracy", "steps"), shares, strict=True))

    monkeypatch.setattr(recall, "run", recorded)
    options = ["--tasks", "copying", "--models", "gru", *SMALL, "--output_dir", str(tmp_path)]
    recall.main([*options, "--learning_rates", "1e-3", "4e-3", "2e-3", "--seeds", "3", "5"])
    # With 2e-3 and 4e-3 all answers are right, with 4e-3 sooner; the rate beyond it is worse.
    assert tried == [(3, 1e-3), (3, 4e-3), (3, 2e-3), (3, 8e-3), (5, 4e-3)]
    trainings = "0.001: 0.500 (9), 0.002: 1.000 (9), **0.004: 0.999 (7)**, 0.008: 0.900 (9); other seeds: 0.999 (7)"
    assert f"| {trainings} |" in capsys.readouterr().out
    rates = {path.parent.name for path in tmp_path.glob("copying/gru/*/seed-*.json")}
    assert rates == {f"learning-rate-{rate}" for rate in (0.001, 0.002, 0.004, 0.008)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "sorting"], "mqar"),
        (["--models", "rwkv"], "enn_gated"),
        (["--steps", "0"], "steps is 0; allowed: a positive integer"),
        (["--learning_rates", "4e-3", "0"], "learning_rates is [0.004, 0.0]; allowed: positive numbers"),
    ],
)
def test_unknown_names_are_refused_with_those_that_are_known(options, message, capsys):
    with pytest.raises(SystemExit):
        recall.main(options)
    assert message in capsys.readouterr().err


def test_the_help_says_what_is_measured(capsys):
    with pytest.raises(SystemExit):
        recall.main(["--help"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*recall.TASKS, *MODELS, *TRACES))
