"""Data: `schemas` reads rows, `tokenizer` makes token ids, `dataset` builds prompts, `packing` builds micro-batches."""
