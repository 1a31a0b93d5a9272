"""Collects the outcome of every GPU case, also of skipped ones, and writes them as JSON and Markdown at the end."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import gpu_report
import pytest
import torch

OUTCOMES: list[gpu_report.Outcome] = []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator:
    report = yield
    if report.when == "call" or (report.when == "setup" and not report.passed):
        reason = ""
        if report.skipped:
            reason = str(report.longrepr[2]).removeprefix("Skipped: ")
        elif report.failed:
            reason = str(call.excinfo.value).strip().splitlines()[-1][:300] if call.excinfo else "failed"
        figures = dict(item.user_properties)
        OUTCOMES.append(gpu_report.Outcome(item.name, report.outcome, call.duration, reason, figures))
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    if OUTCOMES:
        folder = Path(os.environ.get("GPU_RESULTS", session.config.rootpath / "build" / "gpu"))
        gpu_report.write(folder, gpu_report.describe_machine(), OUTCOMES)


@pytest.fixture(scope="session")
def device() -> Iterator[torch.device]:
    """The only rank of this process, on the first GPU."""
    from megatron_entropy.distributed import process_groups

    process_groups.init_process_group()
    yield torch.device("cuda", 0)
    process_groups.destroy_process_group()


@pytest.fixture(scope="session")
def half_billion(device, tmp_path_factory) -> Path:
    """A model folder with Qwen2.5-0.5B's shape and random weights."""
    import gpu_cases

    return gpu_cases.write_model(tmp_path_factory.mktemp("model"), gpu_cases.QWEN_05B, device)
