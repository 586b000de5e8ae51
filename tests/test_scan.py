"""The fast scan equals the definition: values, states and gradients."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from hf_engram import dispatch_enn
from hf_engram.chunkwise_enn import CHUNK_SIZE
from hf_engram.configuration_enn import INTEGRATORS
from hf_engram.ops_enn import CellSettings, CellState, CellWeights, StepMasks, encode, enn_loop
from hf_engram.scan_enn import enn_scan

INPUTS, WIDTH, SLOTS = 6, 16, 8
TOLERANCES = {torch.float32: 2e-5, torch.float64: 1e-11}
LENGTHS = [2, CHUNK_SIZE - 1, CHUNK_SIZE, CHUNK_SIZE + 1, 2 * CHUNK_SIZE + 5]

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


class Case(NamedTuple):
    x: torch.Tensor
    state: CellState
    weights: CellWeights
    settings: CellSettings
    masks: StepMasks

    def leaves(self):
        flat = [self.x, *self.state]
        for weight in self.weights:
            flat += list(weight) if isinstance(weight, tuple) else [weight] if weight is not None else []
        return flat


def make_case(
    steps,
    batch=3,
    dtype=torch.float64,
    padding=None,
    restarts=False,
    erased=False,
    trace_clip=None,
    use_layer_norm=True,
    integrator="recurrent",
    seed=2,
):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape, std=1.0):
        return (std * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()

    def norm():
        return (random(WIDTH), random(WIDTH, std=0.1)) if use_layer_norm else None

    is_gru = integrator == "gru"
    weights = CellWeights(
        random(WIDTH, INPUTS, std=0.6),
        random(WIDTH, std=0.1),
        norm(),
        random(SLOTS, WIDTH, std=0.2),
        random(3 * WIDTH, WIDTH if is_gru else 3 * WIDTH, std=0.2),
        random(3 * WIDTH, std=0.1),
        None if is_gru else random(WIDTH, 3 * WIDTH, std=0.2),
        None if is_gru else random(WIDTH, std=0.1),
        None if is_gru else norm(),
        (random(WIDTH, 3 * WIDTH, std=0.2), random(WIDTH, std=0.1)) if integrator == "gated" else None,
        (random(3 * WIDTH, WIDTH, std=0.4), random(3 * WIDTH, std=0.1)) if is_gru else None,
    )
    settings = CellSettings(0.05, 0.5, 0.3, trace_clip, "sequence", 1e-6)
    state = CellState(random(batch, WIDTH), random(batch, SLOTS, WIDTH, std=0.01))
    random_flags = torch.rand(3, batch, steps, generator=generator)
    half = torch.arange(steps) < steps // 2
    valid = {
        None: None,
        "left": ~half.expand(batch, -1),
        "right": half.expand(batch, -1),
        "interior": random_flags[0] > 0.3,
    }[padding]
    restart = random_flags[1] > 0.95 if restarts else None
    writes = random_flags[2] > 0.3 if erased else None
    return Case(random(batch, steps, INPUTS), state, weights, settings, StepMasks(valid, restart, writes))


def run(scan, case):
    """All results and all gradients of a scan under a fixed random cotangent."""
    result = scan(*case)
    values = [result.outputs, result.recall, result.encodings, *result.state]
    generator = torch.Generator().manual_seed(1)
    loss = sum((v * torch.randn(v.shape, generator=generator, dtype=v.dtype)).sum() for v in values)
    return values + list(torch.autograd.grad(loss, case.leaves()))


def assert_equals_definition(case):
    tolerance = TOLERANCES[case.x.dtype]
    for ours, definition in zip(run(enn_scan, case), run(enn_loop, case), strict=True):
        scale = definition.abs().max()
        assert (ours - definition).abs().max() <= tolerance * scale


@pytest.fixture(autouse=True)
def default_scan(monkeypatch):
    monkeypatch.delenv("HF_ENGRAM_SCAN", raising=False)


@pytest.fixture
def scan(request, monkeypatch):
    monkeypatch.setenv("HF_ENGRAM_SCAN", request.param)


@dtypes
@pytest.mark.parametrize("scan", ["auto", "chunkwise"], indirect=True)
@pytest.mark.parametrize("steps", LENGTHS)
@pytest.mark.parametrize("integrator", ["recurrent", "gru"])
def test_equals_definition_at_every_length(scan, integrator, steps, dtype):
    assert_equals_definition(make_case(steps, dtype=dtype, integrator=integrator))


@dtypes
@pytest.mark.parametrize("scan", ["auto", "chunkwise"], indirect=True)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("restarts", [False, True], ids=["", "restarts"])
@pytest.mark.parametrize("padding", ["left", "right", "interior"])
@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_equals_definition_with_padding_and_documents(scan, integrator, padding, restarts, batch, dtype):
    assert_equals_definition(make_case(CHUNK_SIZE + 20, batch, dtype, padding, restarts, integrator=integrator))


@pytest.mark.parametrize("scan", ["auto", "chunkwise"], indirect=True)
@pytest.mark.parametrize("trace_clip", [None, 0.1], ids=["", "clip"])
@pytest.mark.parametrize("padding", [None, "interior"])
def test_equals_definition_with_erased_writes(scan, padding, trace_clip):
    assert_equals_definition(make_case(CHUNK_SIZE + 20, padding=padding, erased=True, trace_clip=trace_clip))


@pytest.mark.parametrize("scan", ["auto", "chunkwise"], indirect=True)
@pytest.mark.parametrize("trace_clip", [10.0, 0.1, 0.02], ids=["never", "sometimes", "always"])
@pytest.mark.parametrize("padding", [None, "interior"])
def test_clip_is_exact(scan, trace_clip, padding):
    assert_equals_definition(make_case(CHUNK_SIZE + 20, padding=padding, trace_clip=trace_clip))


def test_clip_active_in_some_rows_only_leaves_the_others_bit_equal():
    case = make_case(CHUNK_SIZE + 20, dtype=torch.float32, trace_clip=5.0)
    quiet = enn_scan(*case)
    loud = case.x.detach().clone()
    trace = case.state.trace.detach().clone()
    trace[1] += 20.0
    clipped = enn_scan(loud, CellState(case.state.hidden, trace), *case[2:])
    for before, after in zip(
        [quiet.outputs, quiet.recall, *quiet.state], [clipped.outputs, clipped.recall, *clipped.state], strict=True
    ):
        assert torch.equal(before[0], after[0])
        assert torch.equal(before[2], after[2])
        assert not torch.equal(before[1], after[1])
    assert_equals_definition(case._replace(state=CellState(case.state.hidden, trace.requires_grad_())))


@pytest.mark.parametrize("scan", ["auto", "chunkwise"], indirect=True)
@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_equals_definition_without_layer_norm(scan, integrator):
    assert_equals_definition(make_case(CHUNK_SIZE + 20, use_layer_norm=False, integrator=integrator))


@pytest.mark.parametrize("scan", ["auto", "chunkwise"], indirect=True)
def test_zero_encodings_are_exact(scan):
    """Without layer norm an all-zero input encodes to zero, where the cosine's floor acts."""
    case = make_case(CHUNK_SIZE + 20, use_layer_norm=False)
    weights = case.weights._replace(encoder_bias=torch.zeros(WIDTH, dtype=torch.float64, requires_grad=True))
    x = case.x.detach().clone()
    x[:, 3:9] = 0
    assert_equals_definition(case._replace(x=x.requires_grad_(), weights=weights))


def test_the_gru_is_that_of_torch_where_nothing_is_recalled():
    case = make_case(CHUNK_SIZE + 20, integrator="gru")
    weights = case.weights._replace(memory_bank=torch.zeros(SLOTS, WIDTH, dtype=torch.float64))
    gru = torch.nn.GRU(WIDTH, WIDTH, batch_first=True, dtype=torch.float64)
    names = ("weight_ih_l0", "bias_ih_l0", "weight_hh_l0", "bias_hh_l0")
    values = (weights.integrator_weight, weights.integrator_bias, *weights.recurrence)
    gru.load_state_dict(dict(zip(names, values, strict=True)))
    ours = enn_scan(case.x, case.state, weights, case.settings._replace(trace_scale=0.0))
    theirs, _ = gru(ours.encodings, case.state.hidden[None])
    torch.testing.assert_close(ours.outputs, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_runs_in_pytorch_alone_where_numba_is_missing(monkeypatch, integrator):
    monkeypatch.setattr(dispatch_enn, "has_numba", lambda: False)
    assert_equals_definition(make_case(CHUNK_SIZE + 20, integrator=integrator))


def test_a_numba_that_cannot_be_imported_is_told_and_not_used(tmp_path):
    (tmp_path / "numba").mkdir()
    (tmp_path / "numba" / "__init__.py").write_text("raise ImportError('Numba needs NumPy 2.2 or less.')")
    code = (
        "import torch; from hf_engram import EnnConfig, EnnModel;"
        "model = EnnModel(EnnConfig(hidden_size=8, vocab_size=9));"
        "print(model(torch.arange(9)[None]).last_hidden_state.isfinite().all().item())"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path.cwd())])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr
    assert done.stderr.count("numba is installed but not used: Numba needs NumPy 2.2 or less.") == 1


def test_several_threads_may_scan_at_once():
    cases = [make_case(CHUNK_SIZE + 20, batch=4, seed=seed) for seed in range(8)]
    expected = [enn_scan(*case).outputs for case in cases]
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda case: enn_scan(*case).outputs, cases * 4))
    for ours, theirs in zip(found, expected * 4, strict=True):
        assert torch.equal(ours, theirs)


def test_unknown_scan_is_refused(monkeypatch):
    monkeypatch.setenv("HF_ENGRAM_SCAN", "fastest")
    case = make_case(4)
    with pytest.raises(ValueError, match=r"'fastest'; allowed: .*chunkwise"):
        enn_scan(*case)


def test_memory_of_a_single_step_is_float32_under_autocast():
    """A write in bfloat16 would be off by 4e-3."""
    case = make_case(1, dtype=torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        result = enn_scan(*case)
        z = encode(case.x[:, 0], case.weights, case.settings)
    written = 0.95 * case.state.trace + 0.05 * result.recall[:, 0, :, None] * z[:, None].float()
    torch.testing.assert_close(result.state.trace, written, rtol=1e-5, atol=1e-6)


@dtypes
@pytest.mark.parametrize("noise", [False, True], ids=["", "noise"])
@pytest.mark.parametrize("trace_clip", [None, 0.05], ids=["", "clip"])
@pytest.mark.parametrize("batch", [1, 3])
def test_trace_shared_by_the_batch_equals_definition(batch, trace_clip, noise, dtype):
    case = make_case(9, batch=batch, dtype=dtype, trace_clip=trace_clip)
    shared = case.state.trace[:1].detach().expand(batch, -1, -1)
    case = case._replace(state=case.state._replace(trace=shared), settings=case.settings._replace(trace_scope="batch"))
    noises = torch.randn(9, SLOTS, WIDTH, dtype=dtype) * 0.01 if noise else None
    leaves = [leaf for leaf in case.leaves() if leaf is not shared]
    results = []
    for scan in (enn_scan, enn_loop):
        result = scan(*case, noises)
        values = [result.outputs, result.recall, result.encodings, *result.state]
        loss = sum(
            (value * torch.linspace(-1, 1, value.numel(), dtype=dtype).view(value.shape)).sum() for value in values
        )
        results.append(values + list(torch.autograd.grad(loss, leaves)))
    for ours, definition in zip(*results, strict=True):
        assert (ours - definition).abs().max() <= TOLERANCES[dtype] * definition.abs().max()


def test_rows_that_do_not_share_their_trace_are_not_taken_to():
    case = make_case(9)
    case = case._replace(settings=case.settings._replace(trace_scope="batch"))
    assert_equals_definition(case)
    state = case.state._replace(trace=case.state.trace.detach())
    close = torch.testing.assert_close
    close(enn_scan(*case._replace(state=state)).outputs, enn_loop(*case._replace(state=state)).outputs)
