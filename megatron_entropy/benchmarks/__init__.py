"""Benchmarks of a model: questions, samples of many engines, grades, tables and reports."""
