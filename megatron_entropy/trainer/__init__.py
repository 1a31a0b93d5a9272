"""The training loop of a stage, what it is built from, and where its samples come from."""
