"""The model being trained: Megatron-Core modules, pipeline schedules, optimizer and reference."""

from megatron_entropy.distributed import cpu

cpu.activate()  # before any module here imports megatron.core
