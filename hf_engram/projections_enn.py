"""Linear layers of blocks, by how they begin. The models' `_init_weights` goes by these types.

They are types because transformers passes a checkpoint's code only those modules that hold parameters of their own: a
feed-forward layer, whose parameters are all its projections', is never seen.
"""

import torch.nn as nn


class Projection(nn.Linear):
    """What a block reads by: begins with standard deviation 1 / sqrt(inputs), which keeps the size of its input."""


class ResidualProjection(nn.Linear):
    """What a block adds to the residual stream: begins small, with outputs of about `initializer_range`.

    A network that begins as its embeddings, which have that size, learns sooner (docs/log.md, 2026-11-25).
    """
