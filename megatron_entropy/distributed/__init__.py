"""Ranks: process groups, seeds, and Megatron-Core on machines without CUDA."""
