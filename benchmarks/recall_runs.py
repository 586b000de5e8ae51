"""One model trained on one task, and what it then answers: with its trace on, off and frozen."""

import time
from collections import deque
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, get_cosine_schedule_with_warmup

from train.models import LanguageModelArguments, make_model
from train.trainer import state_bytes

from .recall_tasks import IGNORED, Draw, Questions, Task

TRACES = {
    "on": "every step writes",
    "off": "no step writes: the bank, the hidden state and a mixer's convolution are what is left",
    "frozen": "from the first question on, the trace neither decays nor is written",
}


class Variant(NamedTuple):
    """A model of the benchmark."""

    options: dict[str, Any]  # those of `ModelArguments` in which it differs
    traces: tuple[str, ...] = ()  # which of `TRACES` it is asked with; none: it has no trace


SHARP_RECALL = {"architecture": "enn", "recall_temperature": 0.1, "sparsity_strength": 0.0}
MODELS = {
    "enn": Variant({"architecture": "enn"}, tuple(TRACES)),
    "enn_gated": Variant({**SHARP_RECALL, "integrator": "gated"}, tuple(TRACES)),
    "enn_gru": Variant({**SHARP_RECALL, "integrator": "gru"}, tuple(TRACES)),
    "mixer": Variant({"architecture": "mixer"}, tuple(TRACES)),
    "hybrid": Variant({"architecture": "hybrid"}, ("on",)),  # its attention would answer in place of the trace
    "transformer": Variant({"architecture": "transformer"}),
    "lstm": Variant({"architecture": "lstm"}),
    "gru": Variant({"architecture": "gru"}),
}
SHARED = {
    "hidden_size": 48,  # of the engram cell, whose integrator `parameters` widens; of all others `parameters` solves it
    "num_hidden_layers": 2,
    "hidden_dropout": 0.0,
    "embedding_dropout": 0.0,
    "sliding_window": 4096,  # more than the longest sequence: attention sees all of it
    "initializer_range": 0.1,  # about 1 / sqrt(hidden_size); the usual 0.02 is for models ten times as wide
}
WITHOUT_TRACE = "none"
TRAINING_ROWS = 32
WARMUP_STEPS = 20
EXAM_ROWS, EXAM_BATCH = 64, 8  # small batches: attention over the longest sequences takes memory
EXAM_SEED = 12_345  # the same questions for all models and seeds
SOLVED, LAST_BATCHES = 0.999, 20


@dataclass(frozen=True)
class Settings:
    """What all runs of a comparison share.

    Attributes:
        steps: most training steps, of `TRAINING_ROWS` sequences each.
        parameters: of every model, within 2 %.
        learning_rate: the highest; it falls to 0 on a cosine.
    """

    steps: int
    parameters: int
    learning_rate: float


def run(task: Task, model: str, seed: int, settings: Settings, name: str) -> dict[str, Any]:
    """Train a model and ask it.

    Args:
        task: what to train on and to ask.
        model: one of `MODELS`.
        seed: of weights and training sequences.
        settings: what all runs share.
        name: what the progress bar says.

    Returns:
        `parameters`, `state_bytes` (of one row, after a training sequence of the longest kind), `steps`,
        `cpu_seconds` and `training_accuracy` of the training (right answers over its last batches), and `accuracy`:
        for every trace and way to be difficult, the share of right answers by difficulty.
    """
    variant = MODELS[model]
    torch.manual_seed(seed)
    arguments = LanguageModelArguments(**SHARED, **variant.options, parameters=settings.parameters)
    network = make_model(arguments, "language", **task.fields)
    begin = time.process_time()
    steps, training_accuracy = train(network, task, seed, settings, name)
    seconds = time.process_time() - begin
    network.eval()
    return {
        "parameters": network.num_parameters(),
        "state_bytes": measure_state(network, task),
        "steps": steps,
        "cpu_seconds": seconds,
        "training_accuracy": training_accuracy,
        "accuracy": {
            trace: {
                axis: {str(value): accuracy(network, draw, trace) for value, draw in draws.items()}
                for axis, draws in task.exams.items()
            }
            for trace in variant.traces or (WITHOUT_TRACE,)
        },
    }


def train(model: PreTrainedModel, task: Task, seed: int, settings: Settings, name: str) -> tuple[int, float]:
    """AdamW on fresh sequences at every step, until `settings.steps`, or until all answers are right.

    Returns:
        the steps taken, and the share of right answers over the last `LAST_BATCHES` of them.
    """
    model.train()
    generator = Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), settings.learning_rate, betas=(0.9, 0.98))
    schedule = get_cosine_schedule_with_warmup(optimizer, WARMUP_STEPS, settings.steps)
    right: deque[float] = deque(maxlen=LAST_BATCHES)
    steps = 0
    with tqdm(total=settings.steps, desc=name, mininterval=2) as bar:
        while steps < settings.steps and not (len(right) == LAST_BATCHES and sum(right) >= SOLVED * len(right)):
            draw = task.training[int(torch.randint(len(task.training), (), generator=generator))]
            questions = draw(TRAINING_ROWS, generator)
            logits = answers(model, questions)
            loss = F.cross_entropy(logits.flatten(0, 1), questions.labels.flatten(), ignore_index=IGNORED)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            right.append(share_right(logits.detach(), questions.labels))
            steps += 1
            bar.update()
            bar.set_postfix(loss=f"{loss.item():.3f}", right=f"{sum(right) / len(right):.1%}", refresh=False)
    return steps, sum(right) / len(right)


def answers(model: PreTrainedModel, questions: Questions, trace: str = "on") -> Tensor:
    """Logits `[B, T, answers]` of a model whose trace is in one of the ways of `TRACES`."""
    if trace == "off":
        nowhere = torch.zeros(1, questions.inputs.shape[1], dtype=torch.bool)
        return model(**as_inputs(questions.inputs), use_cache=False, write_mask=nowhere).logits
    if trace == "frozen":
        before, after = questions.inputs[:, : questions.first], questions.inputs[:, questions.first :]
        first = model(**as_inputs(before), use_cache=True)
        second = model(**as_inputs(after), past_key_values=first.past_key_values, plastic=False)
        return torch.cat([first.logits, second.logits], 1)
    return model(**as_inputs(questions.inputs), use_cache=False).logits


def as_inputs(inputs: Tensor) -> dict[str, Tensor]:
    """Tokens or features by the name that a model takes them by."""
    return {"inputs_embeds" if inputs.is_floating_point() else "input_ids": inputs}


def share_right(logits: Tensor, labels: Tensor) -> float:
    """Share of the questions that are answered right."""
    asked = labels != IGNORED
    return (logits.argmax(-1) == labels)[asked].float().mean().item()


@torch.no_grad()
def accuracy(model: PreTrainedModel, draw: Draw, trace: str) -> float:
    """Share of right answers over `EXAM_ROWS` sequences."""
    generator = Generator().manual_seed(EXAM_SEED)
    batches = [draw(EXAM_BATCH, generator) for _ in range(EXAM_ROWS // EXAM_BATCH)]
    shares = [share_right(answers(model, questions, trace), questions.labels) for questions in batches]
    return sum(shares) / len(shares)  # every batch asks as many questions


@torch.no_grad()
def measure_state(model: PreTrainedModel, task: Task) -> int:
    """Bytes of the state after one training sequence of the longest kind."""
    inputs = task.training[-1](1, Generator().manual_seed(EXAM_SEED)).inputs
    return state_bytes(model(**as_inputs(inputs), use_cache=True).past_key_values)
