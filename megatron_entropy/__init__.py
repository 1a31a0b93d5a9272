"""A Megatron-Core trainer for reasoning models in which token entropy is a first-class quantity.

The life of a step, and where it is written:

1. `sampler.Sampler` pushes the actor's weights to the engines if they have changed (`resharding`, `transport`).
2. The method's `generate` draws prompts (`data`), has the engines answer them (`rollout`) and the verifier grade the
   answers (`rewards`); every rank then holds the same `records.Group` list.
3. `actor.Actor.score` fills in log-probability and full-vocabulary entropy of every response token.
4. The method's `teacher`, `reward` and `credit` fill in reward, advantage and weight.
5. `packing` cuts the samples into micro-batches that are the same under every layout.
6. `actor.Actor.update` runs Megatron's schedules; the loss sees `entropy_kernels.TokenStats`, never logits.
7. `trainer.Stage` logs, evaluates, saves.
"""
