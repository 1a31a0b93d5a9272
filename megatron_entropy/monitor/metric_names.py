"""Glossary of metrics: name, unit and meaning of everything a run writes into `metrics.jsonl`.

`python -m megatron_entropy.monitor.metric_names` prints it as Markdown. A new metric gets a line here; a test compares
the table with the code. Capital letters in a name stand for any text: `eval/pass_at_K` covers `eval/pass_at_4`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple


class MetricInfo(NamedTuple):
    """A metric, or with capital letters in its name a family of metrics. Unit "-": a pure number."""

    name: str
    unit: str
    meaning: str


AREAS = {
    "eval": "The policy on eval questions, after a step with an evaluation; step 0 is the policy before training.",
    "rollout": "Responses sampled for training in this step, those that the method drops included.",
    "reward": "Grades and rewards of these responses.",
    "policy": "Means over the trained tokens of all updates of the step. Entropy is that of the full vocabulary.",
    "train": "The optimizer, and which samples and tokens it saw.",
    "perf": "Speed and memory. Only these values and those of `timing/` differ between two runs of one seed.",
    "timing": "Wall-clock time of a step.",
}

METRICS = (
    MetricInfo("eval/accuracy", "fraction", "correct responses among those that the verifier could grade"),
    MetricInfo("eval/entropy", "nats", "entropy of the policy at `eval.temperature`, mean over response tokens"),
    MetricInfo("eval/length", "tokens", "mean response length, end token included"),
    MetricInfo("eval/truncated", "fraction", "responses that reached the token limit"),
    MetricInfo("eval/errors", "fraction", "responses that the verifier could not grade"),
    MetricInfo("eval/pass_at_K", "fraction", "chance that one of K responses is correct, unbiased (K = 1, 2, 4, ...)"),
    MetricInfo("rollout/length", "tokens", "mean response length, end token included"),
    MetricInfo("rollout/tokens", "tokens", "response tokens of the step in all"),
    MetricInfo("rollout/truncated", "fraction", "responses that reached the token limit"),
    MetricInfo("rollout/entropy", "nats", "entropy while sampling (`rollout.entropy`), mean over response tokens"),
    MetricInfo("rollout/entropy_diff", "nats", "entropy, engine against trainer: mean absolute difference"),
    MetricInfo("rollout/entropy_diff_max", "nats", "the same, largest difference"),
    MetricInfo("rollout/logprob_diff", "nats", "log-prob before top-p, engine against trainer: mean difference"),
    MetricInfo("rollout/logprob_diff_max", "nats", "the same, largest difference"),
    MetricInfo("rollout/mixed_groups", "fraction", "DAPO, CURE, Cov: groups with both correct and wrong responses"),
    MetricInfo("rollout/rounds", "count", "DAPO, CURE, Cov: rounds of sampling until the batch was full"),
    MetricInfo("rollout/cut_at_start", "fraction", "CURE: responses without a critical token, branched at their start"),
    MetricInfo("rollout/cut_shortened", "fraction", "CURE: prefixes shortened to `data.max_prompt_tokens`"),
    MetricInfo("rollout/cut_position", "fraction", "CURE: mean position of the cut, relative to the response length"),
    MetricInfo("rollout/cut_entropy", "nats", "CURE: mean entropy at the cut"),
    MetricInfo("reward/mean", "reward", "mean reward of the samples that have one"),
    MetricInfo("reward/accuracy", "fraction", "correct responses among those that the verifier could grade"),
    MetricInfo("reward/errors", "fraction", "responses that the verifier could not grade"),
    MetricInfo("reward/error_KIND", "fraction", "no grade: `timeout`, `crash`, `budget`, `server` or an exception"),
    MetricInfo("reward/teca", "nats", "CER: token entropy of a response averaged cumulatively, at its last token"),
    MetricInfo("policy/entropy", "nats", "entropy of the policy"),
    MetricInfo("policy/clip_frac", "fraction", "tokens without gradient because their probability ratio was clipped"),
    MetricInfo("policy/approx_kl", "nats", "k3 estimate of the KL between the policy before the step and now"),
    MetricInfo("policy/rollout_kl", "nats", "k3 estimate of the KL between the rollout engine and the trainer"),
    MetricInfo("policy/kl_penalty", "nats", "KL penalty, mean over penalized tokens, before its coefficient"),
    MetricInfo("policy/penalized_frac", "fraction", "tokens with a KL penalty"),
    MetricInfo("policy/reference_kl", "nats", "SENT: k3 estimate of the KL between policy and reference"),
    MetricInfo("policy/covariance", "nats", "SENT, Clip-Cov, KL-Cov: covariance of log-probability and advantage"),
    MetricInfo("policy/high_covariance", "nats", "SENT, KL-Cov: the same, mean over the chosen tokens"),
    MetricInfo("policy/teacher_distance", "nats", "CurioSFT: distance between policy and EMA teacher"),
    MetricInfo("policy/teacher_temperature", "-", "CurioSFT: temperature of the teacher's distribution"),
    MetricInfo("train/loss", "-", "weighted sum of the token losses, mean over updates"),
    MetricInfo("train/grad_norm", "-", "norm of the gradient before clipping, mean over updates"),
    MetricInfo("train/lr", "-", "learning rate, mean over updates"),
    MetricInfo("train/fp8_emulated", "-", "1 with emulated FP8 (`actor.fp8.emulate`): numbers, not speed, are FP8's"),
    MetricInfo("train/skipped", "-", "1 where an update was skipped because no sample was left"),
    MetricInfo("train/zero_advantage", "fraction", "groups without a learning signal: every advantage is 0"),
    MetricInfo("train/empty", "fraction", "samples without a response token"),
    MetricInfo("train/dropped_frac", "fraction", "Clip-Cov: tokens whose gradient was dropped"),
    MetricInfo("train/low_entropy_frac", "fraction", "SENT: tokens penalized for their low entropy"),
    MetricInfo("train/high_covariance_frac", "fraction", "SENT: tokens penalized for their high covariance"),
    MetricInfo("perf/throughput", "tokens/s", "tokens of the step with prompts, without the time of eval and save"),
    MetricInfo("perf/generate_throughput", "tokens/s", "response tokens of the step over `timing/generate`"),
    MetricInfo("perf/memory", "GB", "peak of a trainer rank so far, the largest: of its GPU, else resident memory"),
    MetricInfo("timing/generate", "s", "sampling from the rollout engines"),
    MetricInfo("timing/weight_sync", "s", "sending the policy's weights to the rollout engines"),
    MetricInfo("timing/score", "s", "log-probability and entropy of the response tokens"),
    MetricInfo("timing/ref_logprob", "s", "the reference's log-probabilities, the EMA update included"),
    MetricInfo("timing/reward", "s", "grading, rewards and advantages"),
    MetricInfo("timing/update", "s", "forward, backward and optimizer"),
    MetricInfo("timing/eval", "s", "evaluation, without the phases above that it contains"),
    MetricInfo("timing/save", "s", "checkpoint, as long as training waits for it"),
    MetricInfo("timing/other", "s", "the rest of the step"),
    MetricInfo("timing/step", "s", "the whole step"),
)


def metric_table_markdown() -> str:
    """Return the glossary as Markdown: one section with a table for each area."""
    lines = []
    for area, meaning in AREAS.items():
        lines += [f"## `{area}/`", "", meaning, "", "| metric | unit | meaning |", "|---|---|---|"]
        lines += [f"| `{m.name}` | {m.unit} | {m.meaning} |" for m in METRICS if m.name.startswith(f"{area}/")]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def unknown_metrics(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the metric names of `metrics.jsonl` rows that the glossary lacks."""
    pattern = re.compile("|".join(re.sub("[A-Z]+", ".+", metric.name) for metric in METRICS))
    names = {name for row in rows for name in row} - {"stage", "step"}
    return sorted(name for name in names if not pattern.fullmatch(name))


if __name__ == "__main__":
    print(metric_table_markdown(), end="")
