"""A Megatron-Core trainer for reasoning models that treats token entropy as a first-class quantity.

The life of a step (`trainer/loop.py`), and where each part of it is written:

1. The method's `generate` (`methods`) takes prompts (`data`) and samples responses: `trainer/rollout_service.py` syncs
   the actor's weights to the engines if they have changed (`weights`), the engines answer (`rollout`), the verifier
   grades (`rewards`). Afterwards every rank has the same list of `records.Group`.
2. `actor.Actor.score` fills log-probability and full-vocabulary entropy of every response token.
3. The method's `score_reference`, `reward` and `compute_advantages` fill reference log-probability, reward, advantage
   and weight.
4. `data/packing.py` packs the samples into micro-batches, the same ones under every parallel layout.
5. `actor.Actor.update` runs Megatron's schedule; the method's `loss` gets `entropy_kernels.TokenStats`, never logits.
6. The loop evaluates (`evaluation`), logs (`monitor`) and saves (`checkpoint`).
"""
