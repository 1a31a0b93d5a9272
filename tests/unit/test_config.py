"""Configuration errors name the key to change, the numbers and the nearest right name; every key is described.

Checks against a model use a made-up architecture; that the trainer obeys the settings is tested where they are used.
"""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_entropy.config import check, describe
from megatron_entropy.config.architecture import ModelArchitecture
from megatron_entropy.config.load import load, suggest, write
from megatron_entropy.config.schema import Config, MethodConfig
from megatron_entropy.distributed import seeds
from megatron_entropy.errors import ConfigError
from megatron_entropy.methods import METHOD_CONFIGS, load_method_config

ROOT = Path(__file__).parents[2]


class PlainConfig(MethodConfig):
    name: Literal["plain"] = "plain"
    clip: float = 0.2


class OtherConfig(MethodConfig):
    name: Literal["other"] = "other"
    teacher: str = ""


METHODS = {"plain": PlainConfig, "other": OtherConfig}


def load_method(name):
    if name not in METHODS:
        raise ConfigError(f"method.name={name!r} is unknown{suggest(name, METHODS)}")
    return METHODS[name]


MINIMAL = 'steps = 5\nmodel.path = "m"\nmethod.name = "plain"\ndata.train = ["t.jsonl"]\n'
TWO_STAGES = (
    MINIMAL
    + """
[batch]
prompts = 32
[[stages]]
name = "first"
steps = 7
[[stages]]
name = "second"
method = {name = "other", teacher = "t"}
actor.parallel.tp = 2
"""
)
ARCH = ModelArchitecture(
    architecture="Qwen3ForCausalLM",
    family="qwen3",
    num_layers=6,
    hidden_size=64,
    ffn_size=96,
    num_heads=8,
    num_query_groups=4,
    head_dim=8,
    vocab_size=50,
    max_positions=4096,
    norm_eps=1e-6,
    rope_theta=1e4,
    rope_kind="default",
    rope_scaling={},
    tied_embeddings=True,
    qkv_bias=False,
    qk_norm=True,
)


@pytest.fixture
def load_text(tmp_path):
    """Loads a text as if it were a file."""

    def load_it(text, *overrides):
        path = tmp_path / "config.toml"
        path.write_text(text)
        return load(path, overrides, load_method)

    return load_it


def one(load_text, *overrides):
    (config,) = load_text(MINIMAL, *overrides)
    return config


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("step = 3", "step: unknown key; did you mean steps?"),
        ("actor.paralel.tp = 2", "actor.paralel: unknown key; did you mean actor.parallel?"),
        ("actor.parallel.ttp = 2", "actor.parallel.ttp: unknown key; did you mean actor.parallel.tp?"),
        ("rollout.temprature = 0.7", "rollout.temprature: unknown key; did you mean rollout.temperature?"),
        ("method.clipp = 1.0", "method.clipp: unknown key; did you mean method.clip?"),
        ("checkpoint.xyzzy = 1", "checkpoint.xyzzy: unknown key; known are asynchronous, every, keep"),
        ('data.test = ["t.jsonl"]', "data.test: unknown key; did you mean data.eval?"),
        ("evaluation.every = 5", "evaluation: unknown key; did you mean eval?"),
    ],
)
def test_unknown_key_names_the_nearest(load_text, line, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_text(MINIMAL + line)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--steps=many", "steps: input should be a valid integer.*'many'"),
        ("--steps=0", "steps: input should be greater than 0.*0"),
        ("--actor.parallel.tp=1.5", r"actor\.parallel\.tp: .*valid integer.*1\.5"),
        ("--rollout.temperature=0", r"rollout\.temperature: .*greater than 0"),
        ("--rollout.top_p=1.5", r"rollout\.top_p: .*less than or equal to 1"),
        ("--actor.optimizer.schedule=step", r"actor\.optimizer\.schedule: .*'constant', 'linear' or 'cosine'.*'step'"),
        ("--method.clip=high", r"method\.clip: .*valid number.*'high'"),
        (
            "--data.train=5",
            r"data\.train: .*valid list \(got 5\); write data\.train = \[\"a\", \"b\"\], or --data\.train=a,b",
        ),
        ("--actor=3", "actor: .*3.*it is a table"),
        ("--method=dapo", r"method is a table, found 'dapo'; write .* --method\.name="),
        ("--method.name=5", r"method\.name must be a text .*found 5"),
        ("--method.name=plane", r"method\.name='plane' is unknown; did you mean plain\?"),
    ],
)
def test_wrong_value_names_the_key_and_what_was_given(load_text, override, message):
    with pytest.raises(ConfigError, match=message):
        load_text(MINIMAL, override)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps = ", "not valid TOML"),
        ('steps = 1\ndata.train = ["t"]', r"method\.name is missing; set it to a method such as"),
        ('method.name = "plain"', "steps: field required"),
        ("stages = 3", r"written as \[\[stages\]\]"),
        (MINIMAL + '[[stages]]\nname = "a"\n[[stages]]\nname = "a"', "different names, found a, a"),
    ],
)
def test_broken_file_says_how_to_write_it(load_text, text, message):
    with pytest.raises(ConfigError, match=message):
        load_text(text)


BAD_VALUES = [
    *[f"--name={name}" for name in ("../../escaped", "a/b", ".hidden", "..", "", "x" * 65, "a b", "a\\0", "ü")],
    *["--name=[1]", "--name=3", '--output="a\\u0000b"', '--model.path="\\u0000"', '--data.eval=["\\u0000"]'],
    *[f"--{key}={value}" for key in ("steps", "seed", "batch.prompts", "reward.workers") for value in ("true", 10**30)],
    *["--steps=-1", "--steps=1.0", f"--seed={'1' * 5000}", f"--seed=0x{'f' * 5000}", "--actor.parallel.dp=100000000"],
    *[
        f"--{key}={value}"
        for key in ("rollout.temperature", "actor.optimizer.lr", "reward.timeout", "method.clip")
        for value in ("nan", "inf", "-inf", "true", "text")
    ],
    *["--actor.optimizer.betas=[0.9, nan]", "--actor.optimizer.betas=[0.9, 1.0]", "--actor.optimizer.betas=[0.9]"],
    *["--rollout.colocate=1", "--checkpoint=true", "--model.path=3", f"--steps={'[' * 5000}{']' * 5000}"],
    f"--data.chat_options.{'a.' * 3000}b=1",
]


@pytest.mark.parametrize("override", BAD_VALUES, ids=lambda text: text[:40])
def test_values_out_of_bounds_or_of_another_type_are_one_short_line(load_text, override):
    with pytest.raises(ConfigError) as caught:
        load_text(MINIMAL, override)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("name", METHOD_CONFIGS)
def test_no_method_accepts_numbers_that_are_not_finite_or_flags_as_numbers(tmp_path, name):
    path = tmp_path / "config.toml"
    path.write_text(f'steps = 1\nmethod.name = "{name}"\n')
    fields = METHOD_CONFIGS[name].model_fields
    numbers = [key for key, field in fields.items() if isinstance(field.default, int | float | tuple)]
    for key in numbers:
        wrong = ["nan", "inf", "-1e30", str(-(10**30)), str(10**30), "[nan, nan]"]
        wrong = wrong if not isinstance(fields[key].default, bool) else []
        for value in [*wrong, "[true]", '"text"']:
            if value.startswith("-") and ("reward" in key or key in ("entropy_coefficient", "high_threshold")):
                continue  # may be negative
            if value[-1] == "0" and fields[key].annotation is float:
                continue  # a large number
            with pytest.raises(ConfigError, match=rf"method\.{key}"):
                load(path, [f"--method.{key}={value}"], load_method_config)


@pytest.mark.parametrize(
    ("key", "value"),
    [("clip_low", -0.1), ("clip_high", -0.1), ("dual_clip", -1), ("overlong_buffer", -1), ("max_rounds", 0)],
)
def test_bounds_of_methods(tmp_path, key, value):
    path = tmp_path / "config.toml"
    path.write_text('steps = 1\nmethod.name = "dapo"\n')
    with pytest.raises(ConfigError, match=rf"method\.{key}: input should be greater than"):
        load(path, [f"--method.{key}={value}"], load_method_config)


def test_an_integer_is_a_number_and_a_text_is_a_list(load_text):
    config = one(
        load_text, "--rollout.temperature=1", "--data.train=[a.jsonl, b.jsonl]", "--data.eval=", "--name=x-1.a_b"
    )
    assert config.rollout.temperature == 1.0 and config.name == "x-1.a_b"
    assert config.data.train == ["a.jsonl", "b.jsonl"] and config.data.eval == []
    (config,) = load_text(MINIMAL + 'data.eval = "c.jsonl"\nactor.lora.targets = "q_proj"')
    assert config.data.eval == ["c.jsonl"] and config.actor.lora.targets == ["q_proj"]


@pytest.mark.parametrize(
    "text",
    [
        f"steps = {'1' * 5000}",
        f"x = {'[' * 5000}",
        f"x = {'{a=' * 5000}",
        f"{'a.' * 5000}b = 1",
        f"[{'a.' * 5000}b]",
        "stages = [3]",
        "[[stages]]\nname = []\n[[stages]]\nname = {}",
        "stages = {a = 1}",
        "steps = 2\xff",
        "method = [1]",
        "method.name = 1979-05-27",
    ],
    ids=lambda text: text[:20],
)
def test_a_hostile_file_is_one_line(tmp_path, text):
    path = tmp_path / "config.toml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError) as caught:
        load(path, [], load_method)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400 + len(str(path))


def test_what_is_no_file_is_refused(tmp_path):
    for path in (tmp_path, "/dev/zero", tmp_path / ("x" * 300)):
        with pytest.raises(ConfigError, match="not a regular file|no such file"):
            load(path, [], load_method)


def test_several_files_are_merged_from_left_to_right(tmp_path):
    files = [tmp_path / name for name in ("base.toml", "mine.toml", "last.toml")]
    files[0].write_text(TWO_STAGES)
    files[1].write_text('seed = 7\n[batch]\nsamples = 2\n[[stages]]\nname = "second"\nsteps = 11\n')
    files[2].write_text("seed = 8\n")
    first, second = load(files, ["--batch.updates=2"], load_method)
    assert (first.steps, second.steps, first.seed, second.seed) == (7, 11, 8, 8)
    assert first.batch.prompts == 32 and second.batch.samples == 2 and second.batch.updates == 2
    assert second.method == OtherConfig(teacher="t") and second.actor.parallel.tp == 2


def test_stages_renamed_to_one_name_are_refused(load_text):
    with pytest.raises(ConfigError, match=r"different names, found a, a; rename with"):
        load_text(TWO_STAGES, "--name=a")


def test_secrets_of_the_environment_are_not_written(load_text, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "secret-of-mine")
    monkeypatch.setenv("HF_TOKEN", "secret-of-mine")
    write(load_text(MINIMAL, "--log.wandb_project=p", "--output=$WANDB_API_KEY"), tmp_path / "out.toml")
    assert "secret-of-mine" not in (tmp_path / "out.toml").read_text()


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.toml: no such file"):
        load(tmp_path / "nowhere.toml", [], load_method)


@pytest.mark.parametrize("override", ["steps=3", "--steps", "--=3", "-steps=3"])
def test_override_of_another_form_is_an_error(load_text, override):
    with pytest.raises(ConfigError, match="written --key.path=value"):
        load_text(MINIMAL, override)


def test_override_of_unknown_stage_names_the_nearest(load_text):
    with pytest.raises(ConfigError, match=r"stages\.secnd: no such stage; did you mean second\?"):
        load_text(TWO_STAGES, "--stages.secnd.steps=3")


def test_overrides_win_and_read_toml_values_or_bare_words(load_text):
    config = one(
        load_text,
        "--output=runs/of mine",
        "--actor.parallel.tp=2",
        '--data.eval=["a", "b"]',
        "--actor.optimizer.betas=[0.9, 0.95]",
        "--actor.parallel.sequence_parallel=true",
        "--log.wandb_project=",
    )
    assert config.output == "runs/of mine" and config.actor.parallel.tp == 2 and config.data.eval == ["a", "b"]
    assert config.actor.optimizer.betas == (0.9, 0.95) and config.actor.parallel.sequence_parallel
    assert config.log.wandb_project == ""


def test_stage_is_the_file_with_its_own_keys_laid_over(load_text):
    first, second = load_text(TWO_STAGES, "--batch.samples=3", "--stages.second.steps=9", "--seed=4")
    assert (first.name, first.steps, second.name, second.steps) == ("first", 7, "second", 9)
    assert first.method == PlainConfig() and second.method == OtherConfig(teacher="t")
    assert (first.actor.parallel.tp, second.actor.parallel.tp) == (1, 2)
    for config in (first, second):
        assert (config.batch.prompts, config.batch.samples, config.seed) == (32, 3, 4)


def test_stages_that_cannot_run_in_a_row_are_refused(load_text):
    with pytest.raises(ConfigError, match="same number of ranks, found first: 1, second: 2"):
        check.check_stages(load_text(TWO_STAGES))
    check.check_stages(load_text(TWO_STAGES, "--stages.first.actor.parallel.dp=2"))
    with pytest.raises(ConfigError, match="one folder"):
        check.check_stages(load_text(TWO_STAGES, "--stages.first.output=a", "--stages.first.actor.parallel.dp=2"))
    with pytest.raises(ConfigError, match=r"model\.path is empty"):
        check.check_stages(load_text(MINIMAL, "--model.path="))
    one_size = "--stages.first.actor.parallel.dp=2"
    with pytest.raises(ConfigError, match=r"^stage second: model\.path=other: a stage trains the model that the one"):
        check.check_stages(load_text(TWO_STAGES, "--stages.second.model.path=other", one_size))
    check.check_stages(load_text(TWO_STAGES, "--stages.second.model.path=", one_size))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--actor.parallel.tp=3"], r"actor\.parallel\.tp=3 does not divide the model's 8 attention heads"),
        (
            ["--actor.parallel.pp=7"],
            r"actor\.parallel\.pp \* actor\.parallel\.vpp = 7 pipeline stages for the model's 6 layers",
        ),
        (["--actor.parallel.pp=4", "--actor.parallel.vpp=2"], r"vpp = 8 pipeline stages for the model's 6 layers"),
        (["--actor.moe.z_loss_coeff=0.1"], r"actor\.moe\.z_loss_coeff=0\.1 has no effect: the model has no experts"),
        (["--actor.parallel.ep=2"], r"actor\.parallel\.ep=2, etp=1: the model has no experts"),
        (["--actor.parallel.vpp=2"], r"actor\.parallel\.vpp=2 needs actor\.parallel\.pp of at least 2"),
        (["--actor.parallel.sequence_parallel=true"], r"sequence_parallel=true needs actor\.parallel\.tp of at least"),
        (["--rollout.tensor_parallel=3"], r"rollout\.tensor_parallel=3 does not divide the model's 8 attention"),
        (["--rollout.max_response_tokens=4000"], r"rollout\.max_response_tokens = 5024 is more than the model's 4096"),
        (["--eval.max_response_tokens=4000"], r"eval\.max_response_tokens = 5024 is more than the model's 4096"),
        (
            ["--eval.max_response_tokens=3000", "--actor.max_tokens_per_microbatch=4000"],
            r"max_tokens_per_microbatch=4000 cannot hold .* eval\.max_response_tokens = 4024 tokens",
        ),
        (
            ["--actor.max_tokens_per_microbatch=3000"],
            r"actor\.max_tokens_per_microbatch=3000 cannot hold .* = 3072 tokens",
        ),
        (["--batch.updates=3"], r"batch\.updates=3 does not divide batch\.prompts=128"),
        (["--data.train=[]"], r"data\.train is empty"),
    ],
)
def test_what_does_not_fit_the_model_names_key_and_numbers(load_text, overrides, message):
    with pytest.raises(ConfigError, match=message):
        check.check(one(load_text, *overrides), ARCH)


def test_number_of_running_ranks_must_be_that_of_the_layout(load_text):
    config = one(load_text, "--actor.parallel.cp=2", "--actor.parallel.dp=3")
    check.check(config, ARCH, world_size=6)
    with pytest.raises(ConfigError, match=r"started 4 ranks, but .* 1\*1\*2\*3 = 6"):
        check.check(config, ARCH, world_size=4)


@given(tp=st.integers(1, 9), pp=st.integers(1, 7), vpp=st.integers(1, 3), dp=st.integers(1, 3), sequence=st.booleans())
def test_a_layout_passes_exactly_when_it_fits_the_model(tp, pp, vpp, dp, sequence):
    layout = {"tp": tp, "pp": pp, "vpp": vpp, "dp": dp, "sequence_parallel": sequence}
    config = Config(steps=1, method=PlainConfig(), data={"train": ["t"]}, actor={"parallel": layout})
    fits = (
        tp in (1, 2, 4, 8)  # of 8 heads; at 8 two ranks share each of the 4 key/value heads
        and pp * vpp <= 6
        and (vpp == 1 or pp > 1)
        and (tp > 1 or not sequence)
    )
    if fits:
        check.check(config, ARCH, world_size=tp * pp * dp)
    else:
        with pytest.raises(ConfigError):
            check.check(config, ARCH)


@given(
    seed=st.integers(0, 2**31),
    lr=st.floats(0, 1),
    output=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=20),
    betas=st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)),
    teacher=st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
)
def test_written_configuration_reads_back_equal(tmp_path_factory, seed, lr, output, betas, teacher):
    optimizer = {"lr": lr, "betas": betas}
    first = Config(name="a", output=output, seed=seed, steps=3, method=PlainConfig(), actor={"optimizer": optimizer})
    second = first.model_copy(update={"name": "b", "method": OtherConfig(teacher=teacher)})
    path = tmp_path_factory.mktemp("config") / "config.toml"
    write([first, second], path)
    assert load(path, [], load_method) == [first, second]


def test_fingerprint_changes_with_settings_that_change_the_numbers(load_text):
    base = one(load_text)
    same = one(load_text, "--output=elsewhere", "--steps=9", "--actor.parallel.dp=2", "--log.rollouts_every=5")
    assert same.fingerprint() == base.fingerprint()
    for override in ("--seed=9", "--method.clip=0.3", "--rollout.temperature=0.7", "--actor.optimizer.lr=0.1"):
        assert one(load_text, override).fingerprint() != base.fingerprint()


def test_seeds_differ_with_every_argument_and_stay_in_range():
    derived = {seeds.derive_seed(1, "sample", a, b) for a in range(20) for b in range(20)}
    assert len(derived) == 400 and all(0 <= seed < 2**31 - 1 for seed in derived)
    assert seeds.derive_seed(1, 23) != seeds.derive_seed(12, 3)


def test_parameter_count_of_an_architecture():
    embedding, attention, norms = 50 * 64, 8 * 64 * 2 * (8 + 4) + 2 * 8, 2 * 64
    assert ARCH.num_parameters == embedding + 6 * (attention + 3 * 64 * 96 + norms) + 64
    assert dataclasses.replace(ARCH, tied_embeddings=False).num_parameters == ARCH.num_parameters + embedding


EXAMPLES = ROOT / "examples"
BASES = {"quickstart_plain.toml": ("quickstart.toml",), "short.toml": ("quickstart.toml", "quickstart_plain.toml")}
"""Files that are put over others."""


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("**/*.toml")), ids=lambda path: path.name)
def test_every_example_loads(path):
    files = [*(EXAMPLES / name for name in BASES.get(path.name, ())), path]
    check.check_stages(load(files, [], load_method_config))


@pytest.mark.parametrize("name", METHOD_CONFIGS)
def test_every_method_has_defaults_of_its_own_name(name):
    config = METHOD_CONFIGS[name].model_validate({"name": name})
    assert config.name == name


def test_importing_the_configuration_imports_no_torch():
    heavy = ("torch", "transformers", "vllm", "ray", "megatron", "matplotlib")
    code = "import sys, megatron_entropy.launch.prepare, megatron_entropy.methods, megatron_entropy.config.describe\n"
    code += f"print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_key_has_a_meaning():
    tables = describe.list_tables(METHOD_CONFIGS)
    assert {"", "data", "actor.parallel", "actor.lora", "method"} <= {table.name for table in tables}
    without = [f"{table.title}: {key.name}" for table in tables for key in table.keys if not key.meaning]
    assert not without


def test_description_shows_type_and_default():
    (lr,) = (key for table in describe.select(describe.list_tables({}), "actor.optimizer.lr") for key in table.keys)
    assert (lr.type, lr.default, lr.meaning) == ("float >= 0 and <= 1000", "1e-06", "Peak learning rate.")
    (top_level,) = describe.select(describe.list_tables({}), "steps")
    assert top_level.keys[0].default is None and top_level.keys[0].type == "int > 0"
    (betas,) = describe.select(describe.list_tables({}), "actor.optimizer.betas")
    assert (betas.keys[0].type, betas.keys[0].default) == ("2 x float", "[0.9, 0.999]")


def test_unknown_prefix_names_the_nearest_key():
    with pytest.raises(ConfigError, match=r"actor\.paralel: no such key; did you mean actor\.parallel\?"):
        describe.select(describe.list_tables({}), "actor.paralel")


@pytest.mark.parametrize("name", METHOD_CONFIGS)
def test_toml_template_holds_the_defaults(tmp_path, name):
    text = describe.to_toml(describe.list_tables({name: METHOD_CONFIGS[name]}))
    path = tmp_path / "config.toml"
    path.write_text(text.replace("# steps =  (required)", "steps = 3"))
    (config,) = load(path, [], load_method_config)
    assert config == Config(steps=3, method=METHOD_CONFIGS[name]())
    assert not config.method.unused_keys().keys() & config.method.model_fields_set
