"""The layer as operators of torch: `torch.compile`, fake tensors, threads, dtypes, devices without compiled loops."""

import os
import subprocess
import sys

import pytest
import torch
from helpers import ARCHITECTURES as TINY_ARCHITECTURES
from helpers import gradients, tiny_model, tokens

from hf_engram import integrator_enn, memory_enn, numba_enn, recall_enn
from hf_engram.ops_enn import CellSettings

ARCHITECTURES = {
    "recurrent": {},
    "gated": {"integrator": "gated", "num_hidden_layers": 2, "residual": True},
    "gru": {"integrator": "gru", "num_hidden_layers": 2, "residual": True},
    "clipped": {"trace_clip": 0.15},
    "without_layer_norm": {"use_layer_norm": False},
}
architectures = pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=ARCHITECTURES)
# What inductor would generate C++ from: this backend runs the same traced graphs without a C++ compiler.
compiled = {"fullgraph": True, "backend": "aot_eager"}


@pytest.fixture(autouse=True)
def nothing_compiled_yet():
    """torch counts how often a function of transformers is compiled, over all models, and stops at eight."""
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["stacked", "hybrid", "token_memory"])
def test_models_with_masks_compile_without_graph_breaks(architecture):
    model = tiny_model(**TINY_ARCHITECTURES[architecture])
    input_ids = tokens(3, 7)
    masks = {
        "attention_mask": torch.ones(3, 7, dtype=torch.long),
        "position_ids": torch.tensor([0, 1, 2, 0, 1, 2, 3]).expand(3, 7),
        "write_mask": torch.ones(3, 7, dtype=torch.bool),
    }
    compiled_model = torch.compile(model, **compiled)
    for padding in (0, 2):
        masks["attention_mask"][0, :padding] = 0
        expected = model(input_ids, use_cache=False, **masks).logits[0, padding:]
        found = compiled_model(input_ids, use_cache=False, **masks).logits[0, padding:]
        torch.testing.assert_close(found, expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # of torch's quantization
def test_quantized_layers_inside_a_cell_are_refused():
    model = tiny_model(dtype=torch.float32)
    quantized = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear})
    with pytest.raises(NotImplementedError, match=r"Linear holds a quantized weight, .* outside the cells"):
        quantized(tokens(1, 3))


@pytest.mark.slow
@architectures
def test_a_whole_model_compiles_without_graph_breaks(architecture):
    model, input_ids = tiny_model(**architecture).train(), tokens(2, 70)
    expected = model(input_ids, labels=input_ids, use_cache=False)
    expected.loss.backward()
    wanted = {name: grad.clone() for name, grad in gradients(model).items()}
    model.zero_grad()
    found = torch.compile(model, **compiled)(input_ids, labels=input_ids, use_cache=False)
    found.loss.backward()
    torch.testing.assert_close(found.logits, expected.logits)
    torch.testing.assert_close(gradients(model), wanted)


@pytest.mark.slow
def test_a_loss_without_logits_compiles_without_graph_breaks():
    model, input_ids = tiny_model(**TINY_ARCHITECTURES["token_memory"]).train(), tokens(2, 70)
    inputs = {"input_ids": input_ids, "labels": input_ids, "use_cache": False, "skip_logits": True}
    model(**inputs).loss.backward()
    wanted = {name: grad.clone() for name, grad in gradients(model).items()}
    model.zero_grad()
    torch.compile(model, **compiled)(**inputs).loss.backward()
    torch.testing.assert_close(gradients(model), wanted)


def test_a_layer_without_compiled_loops_compiles_without_graph_breaks(monkeypatch):
    monkeypatch.setenv("HF_ENGRAM_SCAN", "chunkwise")
    model, input_ids = tiny_model(), tokens(2, 70)
    expected = model(input_ids, use_cache=False).logits
    torch.testing.assert_close(torch.compile(model, **compiled)(input_ids, use_cache=False).logits, expected)


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def test_operators_keep_torchs_contract():
    """Schema, fake kernels and autograd registration, by torch's own checks."""
    batch, steps, width, slots = 2, 5, 4, 3
    z, trace, bank = random(batch, steps, width), random(batch, slots, width), random(slots, width)
    constants = (0.05, 0.5, 0.3, 0.1)
    torch.library.opcheck(memory_enn.memory_recurrence, (z, trace, bank, None, None, None, *constants))
    for gate in (0, width):
        weights = (random(6 + gate, width), random(width, 6), random(width), random(width), random(width))
        arguments = (random(batch, steps, 6 + gate), random(batch, width), *weights, 1e-6, None, None)
        torch.library.opcheck(integrator_enn.integrator_recurrence, arguments)
    by_slot = (random(batch, steps, slots), random(batch, steps, steps), random(batch, steps, slots))
    norms = (torch.rand(batch, steps, dtype=torch.float64) + 1, torch.rand(batch, steps, dtype=torch.float64) + 1)
    running = (torch.rand(slots, dtype=torch.float64) + 9, random(batch, slots), random(batch, slots))
    rates = (
        torch.full((batch, steps), 0.95, dtype=torch.float64),
        torch.full((batch, steps), 0.05, dtype=torch.float64),
    )
    torch.library.opcheck(recall_enn.chunk_recall, (*by_slot, *norms, *running, *rates, None, 0.5, 0.3))


@pytest.mark.parametrize("scan", ["auto", "chunkwise"])
def test_bfloat16_model_is_close_to_float32(scan, monkeypatch):
    monkeypatch.setenv("HF_ENGRAM_SCAN", scan)
    model, input_ids = tiny_model(dtype=torch.float32), tokens(2, 70)
    expected = model(input_ids, labels=input_ids).loss
    half = tiny_model(dtype=torch.bfloat16)
    loss = half(input_ids, labels=input_ids).loss
    loss.backward()
    assert abs(loss - expected) < 0.02 * expected
    assert all(grad.isfinite().all() for grad in gradients(half).values())


def test_inference_mode_equals_training_mode():
    model, input_ids = tiny_model(), tokens(2, 70)
    with torch.inference_mode():
        found = model(input_ids).logits
    torch.testing.assert_close(found, model(input_ids).logits, rtol=0, atol=0)


@pytest.mark.parametrize("team", ["torch's threads", "a pool"])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_number_of_threads_changes_nothing(threads, team, monkeypatch):
    if team == "a pool":
        monkeypatch.setattr(numba_enn, "openmp_team", lambda: None)
    model, input_ids, before = tiny_model(), tokens(5, 70), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = model(input_ids).logits
        torch.set_num_threads(threads)
        found = model(input_ids).logits
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(found, expected)


GRADIENTS = """
import sys, torch
from hf_engram import EnnConfig, EnnForCausalLM
torch.set_num_threads(1)
for fields in ({"integrator": "gru"}, {"trace_clip": 0.1}):
    torch.manual_seed(0)
    model = EnnForCausalLM(EnnConfig(vocab_size=50, hidden_size=32, memory_size=8, **fields))
    input_ids = torch.randint(50, (5, 70))
    model(input_ids, labels=input_ids).loss.backward()
    for parameter in model.parameters():
        sys.stdout.buffer.write(parameter.grad.numpy().tobytes())
"""


@pytest.mark.slow
def test_a_process_that_compiles_computes_what_one_does_that_loads_from_the_cache(tmp_path):
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}

    def gradients_of_a_process():
        return subprocess.run(
            [sys.executable, "-c", GRADIENTS], env=environment, check=True, stdout=subprocess.PIPE
        ).stdout

    compiling = gradients_of_a_process()
    assert list(tmp_path.rglob("*.nbc"))
    assert gradients_of_a_process() == compiling


def test_an_error_in_a_thread_is_raised():
    def fail():
        raise ZeroDivisionError("in a thread")

    with pytest.raises(ZeroDivisionError, match="in a thread"):
        numba_enn.run_at_once([lambda: None, fail])


def test_torchs_own_threads_are_used_where_openmp_is_loaded():
    if "OpenMP" in torch.__config__.parallel_info() and torch.backends.openmp.is_available():
        assert numba_enn.openmp_team() is not None


def test_settings_of_the_operator_are_those_of_the_cell():
    settings = memory_enn.memory_settings(0.1, 0.2, 0.3, 0.4)
    assert settings == CellSettings(0.1, 0.2, 0.3, 0.4, "sequence", 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["bare", "gated", "gru", "mixer", "token_memory"])
def test_decoding_is_compiled_once(architecture):
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model, input_ids = tiny_model(**TINY_ARCHITECTURES[architecture]), tokens(1, 12)
    expected = model(input_ids).logits
    step, past_key_values = torch.compile(model, fullgraph=True, backend=counting), None
    with torch.no_grad():
        for t in range(12):
            outputs = step(input_ids[:, t : t + 1], past_key_values=past_key_values, use_cache=True)
            past_key_values = outputs.past_key_values
            torch.testing.assert_close(outputs.logits[:, 0], expected[:, t])
    assert len(graphs) <= 3, "an empty state, a first one, all others"
