"""Configuration: `schema` defines the keys, `load` reads files and overrides, `check` compares keys and model.

Importing this package imports neither torch nor any engine.
"""
