"""What the memories of a recording recall, by the definition of a step: what attributions are held against."""

import torch

from hf_engram.ops_enn import memory_step


def memories(recording):
    """Every memory of a recording: of a mixer, that of each head."""
    return [memory for layer in recording.layers for memory in layer.heads or [layer]]


def recalled_by_definition(memory):
    """The memory of every step `[T, H]`, from what was written and recalled alone; nothing switched off or cleared."""
    return recalled_by_head(memory) if memory.recalls_itself else recalled_by_cell(memory)


def recalled_by_cell(layer):
    trace, recalled = layer.carried_trace[None], []
    for z in layer.encodings:
        step, _, trace = memory_step(z[None], trace, layer.bank, layer.settings)
        recalled.append(step[0])
    return torch.stack(recalled)


def recalled_by_head(head, values=None):
    """The memory of every step of a head of a mixer, if its tokens had written `values`."""
    values = head.values if values is None else values
    bank, width = head.bank, values.shape[1]
    keys_of_slots = torch.nn.functional.normalize(bank.keys, dim=-1)
    trace, recalled = head.carried_trace, []
    for t, recall in enumerate(head.recall):
        address = torch.softmax(keys_of_slots @ head.keys[t] / bank.write_temperature, 0)
        entry = torch.cat([head.keys[t], values[t], values.new_ones(1)])
        trace = head.log_decays[t].exp() * trace + torch.outer(head.strengths[t] * address, entry)
        recalled.append(recall @ mixer_slots(bank.values, bank.trace_scale, trace, width))
    return torch.stack(recalled)


def mixer_slots(bank_values, trace_scale, trace, width):
    """What the slots of a mixer return: means `[..., N, D]` of the bank's values and of those in the trace."""
    return (bank_values + trace_scale * trace[..., width : 2 * width]) / (1 + trace_scale * trace[..., 2 * width :])


def sum_of_parts(parts):
    return parts.bank + parts.carried + parts.coefficients @ parts.encodings + parts.clip
