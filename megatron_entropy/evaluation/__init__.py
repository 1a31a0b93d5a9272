"""Measuring the policy on the eval questions."""
