"""Verifiers that really hang, crash or raise, as the response says; the reward workers import them."""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time

from megatron_entropy.records import Grade


def misbehave(response: str, answer: str) -> Grade | bool | str:
    """Hang, crash or raise as `response` says; anything else is graded by equality."""
    if response == "slow":
        time.sleep(1)
    if response == "hang":
        while True:
            time.sleep(1)
    if response == "hang in compiled code":
        return bool(10 ** (10**9))
    if response == "exit":
        os._exit(3)
    if response == "segfault":
        ctypes.string_at(0)
    if response == "memory":
        return bool(bytearray(2**40))
    if response == "sys.exit":
        sys.exit(1)
    if response == "raise":
        raise ValueError("two\nlines " + 200 * "x")
    if response == "wrong type":
        return "yes"
    if response == "wrong grade":
        return Grade("yes")  # type: ignore[arg-type]
    if response == "bool":
        return True
    return Grade(response == answer, response)


def modules(response: str, answer: str) -> Grade:
    """Whether the worker has imported the module named by the response."""
    return Grade(response in sys.modules, str(getattr(sys.modules["__main__"], "__file__", None)))


def one_argument(response: str) -> bool:
    """Lacks the ground truth."""
    return bool(response)


def hangs(response: str, answer: str) -> bool:
    """Never returns."""
    return bool(misbehave("hang", answer))


def exits(response: str, answer: str) -> bool:
    """Ends its process."""
    return bool(misbehave("exit", answer))


def returns_text(response: str, answer: str) -> str:
    """Returns neither a Grade nor a bool."""
    return response


def misspelled(response: str, answer: str) -> bool:
    """Uses a name that does not exist."""
    return response == anwser  # type: ignore[name-defined]  # noqa: F821


def needs_json(response: str, answer: str) -> bool:
    """Reads the ground truth as a table, so it raises on `1`."""
    return bool(json.loads(answer)["tests"])
