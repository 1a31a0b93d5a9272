"""From files to prompts: `schemas` reads rows, `tokenizer` makes tokens, `dataset` joins both and orders them."""
