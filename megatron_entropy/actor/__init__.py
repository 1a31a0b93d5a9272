"""The model being trained: Megatron-Core modules, schedules and optimizer."""

from megatron_entropy.distributed import cpu

cpu.activate()  # before any module here imports megatron.core
