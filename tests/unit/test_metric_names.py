"""The glossary of metrics covers every metric that the code emits, and nothing else."""

import ast
import re
from collections import Counter
from pathlib import Path

from megatron_entropy.monitor.metric_names import AREAS, METRICS, metric_table_markdown, unknown_metrics
from megatron_entropy.monitor.timer import PHASES
from megatron_entropy.records import Metric
from megatron_entropy.trainer.step_log import throughput

PACKAGE = Path(__file__).parents[2] / "megatron_entropy"
LITERAL = re.compile(rf"({'|'.join(AREAS)})/[a-z0-9_@]+")


def names_in_code():
    """Metric names in string literals; a field of an f-string reads `0`."""
    names = set()
    for path in PACKAGE.rglob("*.py"):
        if path.name == "metric_names.py":
            continue
        nodes = list(ast.walk(ast.parse(path.read_text())))
        fragments = {id(value) for node in nodes if isinstance(node, ast.JoinedStr) for value in node.values}
        for node in nodes:
            if isinstance(node, ast.JoinedStr):
                text = "".join(value.value if isinstance(value, ast.Constant) else "0" for value in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in fragments:
                text = node.value
            else:
                continue
            if LITERAL.fullmatch(text):
                names.add(text)
    return names - {"timing/0"}


def test_every_metric_of_the_code_is_in_the_glossary():
    names = names_in_code()
    assert {"train/loss", "eval/pass_at_0", "policy/entropy"} <= names
    assert unknown_metrics([dict.fromkeys(names, 0.0)]) == []


def test_every_metric_of_the_glossary_is_in_the_code():
    names = {re.sub("[A-Z]+", "0", metric.name) for metric in METRICS}
    assert names - names_in_code() - {f"timing/{phase}" for phase in PHASES} == set()


def test_every_phase_is_in_the_glossary():
    assert unknown_metrics([{f"timing/{phase}": 0.0 for phase in PHASES}]) == []


def test_unknown_metric_is_found():
    rows = [{"stage": "rl", "step": 1, "eval/pass_at_16": 0.5, "reward/error_timeout": 0.1}, {"policy/kl_old": 0.0}]
    assert unknown_metrics(rows) == ["policy/kl_old"]


def test_markdown_holds_every_metric_once():
    names = Counter(re.findall(r"^\| `(.+?)` \| \S+ \| .+ \|$", metric_table_markdown(), flags=re.MULTILINE))
    assert names == Counter(metric.name for metric in METRICS)


def test_a_replay_has_no_rate_of_generation():
    rates = throughput([], {"rollout/tokens": Metric(10.0)}, {"step": 2.0})
    assert not rates
    assert throughput([], {"rollout/tokens": Metric(10.0)}, {"step": 2.0, "generate": 1.0})
