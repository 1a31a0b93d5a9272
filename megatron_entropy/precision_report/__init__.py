"""Measure what FP8 does to log-probs, entropies and what methods select by them: `megatron-entropy fp8-report`.

`responses` samples or reads a batch, `measure` computes it once for each precision, `compare` turns two passes into
numbers with intervals, `page` writes them. The selections are those of `methods`, never copies.
"""
