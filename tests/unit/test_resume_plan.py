"""What `--resume` continues with, stage by stage; the checkpoints hold no tensors."""

import json
import shutil
from dataclasses import asdict

import pytest

from megatron_entropy.config.schema import Config
from megatron_entropy.errors import CheckpointError, ConfigError
from megatron_entropy.methods import METHOD_CONFIGS
from megatron_entropy.monitor.run_folder import RunFolder
from megatron_entropy.monitor.summary import Change, StageSummary, write_summary
from megatron_entropy.trainer.resume import plan_stages
from megatron_entropy.weights import manifest
from megatron_entropy.weights.manifest import Content, FileRecord, ModelFacts, StageProgress

NOT_MEASURED = Change(None, None)


def config(name, steps=2, **changes):
    return Config.model_validate({"name": name, "steps": steps, "method": METHOD_CONFIGS["sft"](), **changes})


def save(folder, settings, step):
    checkpoint = folder.checkpoints(settings.name) / f"step_{step:06d}"
    (checkpoint / "shards").mkdir(parents=True)
    (checkpoint / "shards" / "data").write_bytes(b"x" * 100)
    model = ModelFacts(architecture="Qwen3ForCausalLM", num_layers=1, hidden_size=8, vocab_size=16)
    progress = StageProgress(step, step, 0, "", {}, settings.model_dump(mode="json"))
    content = Content(progress=progress, layout=settings.actor.parallel, model=model)
    manifest.write(checkpoint, content, {"shards/data": FileRecord.of(checkpoint / "shards" / "data")})
    return checkpoint


def finish(folder, *stages, last=True):
    """Make stages finished after two steps."""
    entries = []
    for settings in stages:
        save(folder, settings, 1)
        save(folder, settings, 2)
        folder.export(settings.name, last and settings is stages[-1]).mkdir(parents=True)
        entries.append(StageSummary(settings.name, "sft", 2, 1.0, *[NOT_MEASURED] * 3, layout={}, versions={}, seed=1))
    write_summary(folder, entries)


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path)


def test_without_resume_nothing_is_read(folder):
    finish(folder, config("a"))
    (plan,) = plan_stages([config("a", seed=9)], folder, resume=False)
    assert plan.checkpoint is None and plan.summary is None and plan.settings["seed"] == 9


def test_a_finished_stage_is_skipped_with_the_settings_it_was_trained_with(folder, caplog):
    finish(folder, config("a", checkpoint={"every": 1}))
    (plan,) = plan_stages([config("a", checkpoint={"every": 5})], folder, resume=True)
    assert plan.summary is not None and plan.settings["checkpoint"]["every"] == 1
    assert "checkpoint.every=5 has no effect: stage a is finished" in caplog.text


def test_more_steps_continue_from_the_newest_checkpoint(folder):
    finish(folder, config("a"))
    (plan,) = plan_stages([config("a", 3, actor={"parallel": {"dp": 2}})], folder, resume=True)
    assert plan.summary is None and plan.checkpoint[1].step == 2 and plan.settings["steps"] == 3


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([config("a", seed=9)], "^seed: stage a was trained with 1, the configuration has 9; set it back"),
        ([config("a", model={"path": "x" * 999})], "^model.path: stage a was trained with '', the configuration has"),
        ([config("a", 1)], "^steps=1: stage a has trained 2 steps already"),
        ([config("b")], "has finished the stages a, but the configuration has b; resume it with the stages"),
        ([config("b"), config("a")], "has finished the stages a, but the configuration has b, a;"),
    ],
)
def test_other_settings_are_refused(folder, stages, message):
    finish(folder, config("a"))
    with pytest.raises(ConfigError, match=message) as refusal:
        plan_stages(stages, folder, resume=True)
    assert len(str(refusal.value)) < 500 and "\n" not in str(refusal.value)


def test_an_unfinished_stage_has_the_same_rules(folder):
    save(folder, config("a", 9), 4)
    (plan,) = plan_stages([config("a", 7)], folder, resume=True)
    assert plan.checkpoint[1].step == 4
    for other in (config("a", 9, seed=9), config("a", 3)):
        with pytest.raises(ConfigError, match="^seed: stage a|^steps=3: stage a has trained 4 steps already"):
            plan_stages([other], folder, resume=True)


def test_a_stage_below_a_later_one_keeps_its_steps(folder):
    finish(folder, config("a"), config("b"))
    with pytest.raises(ConfigError, match=r"^steps=3: stage a was finished after 2 steps and stage b started from its"):
        plan_stages([config("a", 3), config("b", 3)], folder, resume=True)
    first, second = plan_stages([config("a"), config("b", 3)], folder, resume=True)
    assert first.summary is not None and second.summary is None and second.checkpoint[1].step == 2
    shutil.rmtree(folder.export("a", False))
    assert plan_stages([config("a"), config("b")], folder, resume=True)[0].summary is not None


def test_a_stage_is_added_after_the_last_one(folder):
    """The last stage's model lies elsewhere, so it is exported again, without a step of training."""
    finish(folder, config("a"))
    first, second = plan_stages([config("a"), config("b")], folder, resume=True)
    assert first.checkpoint[1].step == 2 and second.checkpoint is None


def test_checkpoints_of_a_finished_stage_may_be_gone_or_damaged(folder):
    finish(folder, config("a"))
    for checkpoint in folder.checkpoints("a").iterdir():
        (checkpoint / "state.json").write_text("{}")
    assert plan_stages([config("a")], folder, resume=True)[0].summary is not None
    with pytest.raises(CheckpointError, match="every checkpoint is damaged"):
        plan_stages([config("a", 3)], folder, resume=True)
    shutil.rmtree(folder.checkpoints("a"))
    assert plan_stages([config("a")], folder, resume=True)[0].summary is not None
    with pytest.raises(ConfigError, match="has no checkpoint left to continue from"):
        plan_stages([config("a", 3)], folder, resume=True)


def test_a_forged_summary_is_one_line(folder):
    finish(folder, config("a"))
    body = json.loads(folder.summary.read_text())
    assert body["stages"][0]["accuracy"] == asdict(NOT_MEASURED)
    body["stages"][0]["steps"] = 7
    folder.summary.write_text(json.dumps(body))
    (plan,) = plan_stages([config("a")], folder, resume=True)
    assert plan.summary is None and plan.checkpoint[1].step == 2, "it is exported again"
