"""Record what an ENN's memory does while it reads, or writes in `generate`, and say where every recall came from.

```python
[recording] = record(model, input_ids, tokenizer=tokenizer)  # one recording per row
share = recording.layers[0].attribution.share
share.tokens[9, 4]  # how much of what token 9 recalled was written by token 4
share.bank[9]  # and how much is the learned bank
```

docs/traces.md explains what is recorded and when the attribution is exact.
"""

from .attribution import Attribution, HeadAttribution, MixerAttribution, Parts
from .cell_recordings import CellRecording
from .counterfactuals import Counterfactual, ProbabilityChange, counterfactual
from .mixer_recordings import HeadRecording, MixerRecording
from .packets import MixerWrites, Packet
from .recorder import Recorder, record
from .recordings import LayerRecording, Recording
from .token_memory_recordings import PredictionShares, TokenMemoryRecording, TokenParts

__all__ = [
    "Attribution",
    "CellRecording",
    "Counterfactual",
    "HeadAttribution",
    "HeadRecording",
    "LayerRecording",
    "MixerAttribution",
    "MixerRecording",
    "MixerWrites",
    "Packet",
    "Parts",
    "PredictionShares",
    "ProbabilityChange",
    "Recorder",
    "Recording",
    "TokenMemoryRecording",
    "TokenParts",
    "counterfactual",
    "record",
]
