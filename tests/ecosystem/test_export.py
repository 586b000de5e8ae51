"""One step of a model, exported by torch.export with its state going in and coming out."""

import pytest
import torch
from helpers import same, tiny_model, tokens
from torch import nn
from transformers import DynamicCache

GATED = {"num_hidden_layers": 2, "residual": True, "integrator": "gated"}


class Step(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, hidden, trace):
        past_key_values = DynamicCache(config=self.model.config)
        for layer, *state in zip(past_key_values.layers, hidden, trace, strict=True):
            for index, value in enumerate(state):
                layer.update_recurrent_state(value, index)
        output = self.model(input_ids, past_key_values=past_key_values, use_cache=True)
        states = [layer.state for layer in output.past_key_values.layers]
        return output.logits, torch.stack([s.hidden for s in states]), torch.stack([s.trace for s in states])


def first_state(model, batch):
    config = model.config
    hidden = torch.zeros(config.num_hidden_layers, batch, config.hidden_size)
    return hidden, torch.zeros(config.num_hidden_layers, batch, config.memory_size, config.hidden_size)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [{}, GATED], ids=["bare", "gated_residual_stack"])
def test_exported_step_reads_a_sequence_as_the_model_does(architecture, tmp_path):
    model = tiny_model(dtype=torch.float32, **architecture)
    batch = torch.export.Dim("batch", min=1)
    inputs = (tokens(2, 1), *first_state(model, 2))
    with torch.no_grad():
        program = torch.export.export(Step(model), inputs, dynamic_shapes=({0: batch}, {1: batch}, {1: batch}))
    torch.export.save(program, tmp_path / "step.pt2")
    step = torch.export.load(tmp_path / "step.pt2").module()
    for rows in (1, 5):
        ids, state = tokens(rows, 6), first_state(model, rows)
        for t in range(6):
            logits, *state = step(ids[:, t : t + 1], *state)
        past_key_values = None
        for t in range(6):
            expected = model(ids[:, t : t + 1], past_key_values=past_key_values)
            past_key_values = expected.past_key_values
        same(logits, expected.logits)
        for index, layer in enumerate(past_key_values.layers):
            same((state[0][index], state[1][index]), tuple(layer.state))


class Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids, use_cache=False).logits


@pytest.mark.slow
def test_exported_sequence_of_a_fixed_length():
    model = tiny_model(dtype=torch.float32, **GATED)
    with torch.no_grad():
        sizes = ({0: torch.export.Dim("batch", min=1)},)
        program = torch.export.export(Logits(model), (tokens(2, 40),), dynamic_shapes=sizes).module()
    for rows in (1, 5):
        ids = tokens(rows, 40)
        same(program(ids), model(ids).logits)
