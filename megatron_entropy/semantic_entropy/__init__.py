"""Measure the semantic entropy of a data set's questions: `megatron-entropy semantic-entropy`.

`measure` samples answers with rollout engines, `clusters` groups equal answers, `tables` writes the results beside the
rows. The formula itself is in `methods.semantic_entropy`.
"""
