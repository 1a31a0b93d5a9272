"""A method from outside the package: SFT that writes down what lives in a rank before each stage's model is built."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import psutil
import torch

from megatron_entropy.launch.rank import is_rank
from megatron_entropy.methods.base import Method
from megatron_entropy.methods.sft import Sft, SftConfig
from megatron_entropy.records import Prompt


class Probe(Sft["ProbeConfig"]):
    """SFT; `select` is called when the stage's process groups exist and its model does not."""

    def select(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """Write a line for this rank and stage; the launcher, which checks the data, is no rank."""
        if not is_rank():
            return super().select(prompts)
        names = [Path(f"/proc/self/task/{task}/comm").read_text() for task in os.listdir("/proc/self/task")]
        line = {
            "parameters": sum(isinstance(item, torch.nn.Parameter) for item in gc.get_objects()),
            "threads": sum("gloo" in name for name in names),
            "resident": psutil.Process().memory_info().rss,
        }
        with open(f"{self.settings.lines}.{os.environ['RANK']}", "a") as file:
            print(json.dumps(line), file=file)
        return super().select(prompts)


class ProbeConfig(SftConfig):
    """Settings. `lines`: the file to write, without the rank."""

    method: ClassVar[type[Method[Any]]] = Probe
    lines: str
