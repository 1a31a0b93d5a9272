"""Configuration: a TOML file, dotted command-line overrides, defaults that are the vetted setting.

`load(path, overrides, method_configs)` reads a file into one `Config` per stage. A file describes one training run;
a `[[stages]]` list makes it several in a row, each stage being the file's top level with the stage's own keys laid
over it, and each starting from the model the one before it exported. Overrides (`--actor.parallel.tp=2`) apply to
every stage, `--stages.NAME.KEY=VALUE` to one.

Unknown keys are errors that name the nearest known key; `check` compares the fields with one another and with the
model's shape before anything starts. Importing this module imports neither torch nor any engine.
"""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch


def derive_seed(*parts: int | str) -> int:
    """A seed below 2**31 that is a function of its parts: equal on every machine, different for different parts."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) % (2**31 - 1)


def seed_generators(seed: int) -> None:
    """Seed every generator a rank has; all ranks alike, but for Megatron's, which differ by place as they must."""
    from megatron.core import tensor_parallel

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
