"""The README's table of what a memory is for says what the runs that are kept in docs/results/recall found."""

import json
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import datasets
import pytest
from helpers import table_cells

from benchmarks import recall

KEPT = Path("docs/results/recall").resolve()  # a fixture changes the working directory
README = Path("README.md").read_text(encoding="utf-8")
# What README calls a task at a difficulty, and a model with its trace on or off.
ROWS = {
    "associative recall (MQAR), 8 pairs in 32 steps, as in training": ("mqar", "pairs", 8),
    "the same in 512 steps, 16 times the training length": ("mqar", "steps, with 8 pairs", 512),
    "16 pairs, twice as many as in training": ("mqar", "pairs", 16),
    "4 pairs, a gap of 512 steps (training: up to 32), then all keys": (
        "long_gap",
        "steps of the gap, with 4 pairs",
        512,
    ),
    "copying 16 symbols, as in training": ("copying", "symbols", 16),
    "copying 64 symbols": ("copying", "symbols", 64),
    "few-shot: digits 7, 8, 9, never trained on, 5 labelled images of each": ("few_shot", "shots, novel classes", 5),
}
COLUMNS = {
    "mixer": ("mixer", "on"),
    "the same without its trace": ("mixer", "off"),
    "hybrid": ("hybrid", "on"),
    "cell with a GRU": ("enn_gru", "on"),
    "gated cell": ("enn_gated", "on"),
    "the paper's cell": ("enn", "on"),
    "Transformer": ("transformer", "none"),
    "GRU": ("gru", "none"),
    "LSTM": ("lstm", "none"),
}

KEPT_TASKS = [name for name in recall.TASKS if (KEPT / name).is_dir()]
NEEDS = {recall.FEW_SHOT: [pytest.mark.data]}


class Kept(NamedTuple):
    task: str
    runs: dict  # by model, as in results.json
    report: str  # results.md


@pytest.fixture(params=[pytest.param(name, marks=NEEDS.get(name, [])) for name in KEPT_TASKS])
def kept(request, tmp_path, monkeypatch):
    """What `benchmarks.recall` makes of a task's kept runs; it must not make runs."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(recall, "run", None)
    folder = shutil.copytree(KEPT, tmp_path / "recall")
    options = ["--tasks", request.param, "--output_dir", str(folder)]
    if request.param == recall.FEW_SHOT:
        # Runs note what their data were called.
        (tmp_path / "data").symlink_to(os.environ["HF_ENGRAM_DATA"])
        monkeypatch.chdir(tmp_path)
        options += ["--dataset_name", "data/mnist"]
    recall.main(options)
    results = json.loads((folder / "results.json").read_text())
    return Kept(request.param, results[request.param], (folder / "results.md").read_text())


def readme_table():
    """For every task in README's table, the cells under the models' names."""
    begin = README.index("| task |")
    header, _, *rows = README[begin : README.index("\n\n", begin)].splitlines()
    _, *models = table_cells(header)
    return {task: dict(zip(models, shares, strict=True)) for task, *shares in map(table_cells, rows)}


def test_the_readme_says_what_the_kept_runs_found(kept):
    said = readme_table()
    assert said.keys() == {row for row, (task, _, _) in ROWS.items() if task in KEPT_TASKS}
    for row, (task, axis, difficulty) in ROWS.items():
        if task == kept.task:
            exams = {name: kept.runs[model][0]["accuracy"][trace] for name, (model, trace) in COLUMNS.items()}
            found = {name: f"{exam[axis][str(difficulty)]:.3f}" for name, exam in exams.items()}
            assert said[row] == found


def test_the_table_beside_the_kept_runs_is_what_the_command_prints(kept):
    assert kept.report.strip() in (KEPT / "results.md").read_text()
