"""Between Megatron's shards and Hugging Face tensors: names, folders, streams."""

from megatron_entropy import cpu

cpu.activate()  # before any module here imports megatron.core
