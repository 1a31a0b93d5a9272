"""The death of an engine's core is noticed, and its cause is read from the log; vLLM is a stand-in here."""

import subprocess
import sys
import threading
import types

import pytest

from megatron_entropy.errors import EngineDied
from megatron_entropy.rollout import vllm_core
from megatron_entropy.rollout.vllm_core import CoreCalls, EngineLog, find_error

WORKER = "(Worker_TP1 pid=7) ERROR 11-28 05:36:48 [multiproc_executor.py:700] "
CORE = "(EngineCore pid=5) ERROR 11-28 05:36:49 [core.py:1510] "


@pytest.mark.parametrize(
    ("lines", "error"),
    [
        (
            [WORKER + "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.", CORE + "Traceback:"],
            "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.",
        ),
        (
            [WORKER + "ValueError: no such layer", CORE + "Exception: initialization failed. See stack trace for root"],
            "ValueError: no such layer",
        ),
        (
            ["RuntimeError: first", CORE + "RuntimeError: Engine core initialization failed. See root cause above. {}"],
            "RuntimeError: first",
        ),
        (["CUDA error: an illegal memory access was encountered"],) * 1
        + ("CUDA error: an illegal memory access was encountered",),
        (["Fatal Python error: Segmentation fault"], "Fatal Python error: Segmentation fault"),
        (["loading weights", "an error: of no class"], ""),
    ],
)
def test_the_last_error_that_is_no_pointer_is_found(lines, error):
    assert find_error(lines) == error


def test_only_what_is_written_after_the_log_was_opened_counts(tmp_path):
    code = (
        "from megatron_entropy.rollout.vllm_core import EngineLog; import os, sys\n"
        "os.write(2, b'ValueError: of before\\n'); log = EngineLog(); dead = RuntimeError('See root cause above.')\n"
        "first = log.explain(dead); os.write(1, b'prefix KeyError: of now\\n')\n"
        "print(first, log.explain(dead), log.explain(OSError('gone')), sep='|', file=open(sys.argv[1], 'w'))"
    )
    with open(tmp_path / "out", "w") as out, open(tmp_path / "err", "w") as err:
        subprocess.run([sys.executable, "-c", code, tmp_path / "found"], stdout=out, stderr=err, check=True)
    first, now, other = (tmp_path / "found").read_text().strip().split("|")
    assert "it may have been killed" in first
    assert (now, other) == ("KeyError: of now", "OSError: gone")


class DeadError(Exception):
    """Stands in for vLLM's EngineDeadError."""


@pytest.fixture
def core(monkeypatch):
    """What tells whether the core is dead, and the calls of an engine with such a core."""
    for name in ("vllm", "vllm.v1", "vllm.v1.engine"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    exceptions = types.ModuleType("vllm.v1.engine.exceptions")
    exceptions.EngineDeadError = DeadError  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, exceptions.__name__, exceptions)
    monkeypatch.setattr(vllm_core, "DEATH_SECONDS", 0.05)
    resources = types.SimpleNamespace(engine_dead=False)
    engine = types.SimpleNamespace(engine_core=types.SimpleNamespace(resources=resources))
    return resources, CoreCalls(engine, EngineLog())


def test_a_call_that_waits_for_a_dead_core_ends(core):
    resources, calls = core
    release = threading.Event()
    threading.Timer(0.1, setattr, (resources, "engine_dead", True)).start()
    with pytest.raises(EngineDied, match="its log names no error|Error"):
        calls.run(release.wait)
    release.set()


def test_calls_of_a_living_core_return_and_raise_as_they_are(core):
    resources, calls = core
    assert calls.run(lambda a, b: a + b, 1, b=2) == 3
    with pytest.raises(KeyError):
        calls.run(dict().__getitem__, "no")

    def die():
        resources.engine_dead = True
        raise DeadError("EngineCore encountered an issue. See stack trace (above) for the root cause.")

    with pytest.raises(EngineDied):
        calls.run(die)


def test_a_core_in_this_process_is_called_directly(core):
    calls = CoreCalls(types.SimpleNamespace(engine_core=object()), EngineLog())
    assert calls.run(threading.current_thread) is threading.current_thread()
