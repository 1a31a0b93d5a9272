"""The explorer of a run (`megatron-entropy view`): a local page that shows curves, rollouts and what decided them.

`index` reads a run folder by offsets, `explain` says why a response was cut, penalized or rewarded, `server` answers
the requests of the page in `static/`, `export` writes page and answers into one file.
"""
