"""README and documentation are true: links, commands, keys, metrics and quoted messages exist.

Proved from the texts and the code alone, as are the field's words in both; that the commands do what the pages say is
proved by the tests they name.
"""

import argparse
import ast
import importlib.util
import re
import sys
from functools import cache
from pathlib import Path

import pytest

from megatron_entropy.cli import main as cli
from megatron_entropy.config.schema import Config
from megatron_entropy.methods import METHOD_CONFIGS

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "kernels" / "README.md", *PAGES]

FIELD_WORDS = {
    r"\banew\b": "again",
    r"\bmends?\b": "fix",
    r"\bpassed over\b": "skipped",
    r"\bunasked\b": "by default",
    r"\bcomes? of it\b": "result",
    r"puts? together\b": "builds",
    r"\b(told|wish(es|ed)?)\b": "reported, requirement",
    r"\b[Ii]mitat(e|es|ion)\b|\bpractice\b": "SFT, RL",
    r"\bhangs? in\b": "attach",
    r"held[-_ ]out": "eval",
    r"token_budget": "max_tokens_per_microbatch",
    r"student_share": "ema_alpha",
    r"move_reference": "update_ema",
    r"first_responses": "initial_responses",
    r"importance_cap": "tis_cap",
    r"(?<!adv_)\bby_std\b": "norm_adv_by_std",
    r"WeightPush|weight_push|\bpush(es|ed|ing)?\b": "weight sync",
    r"ModelShape|read_shape": "ModelArchitecture",
    r"on_first_rank": "run_on_rank_zero",
    r"lay_out\b": "init_model_parallel",
    r"no_signal": "zero_advantage",
    r"ratio_clipped": "clip_frac",
    r"\bkl_old\b": "approx_kl",
    r"\bkl_rollout\b": "rollout_kl",
    r"mismatch KL": "rollout_kl",
    r"seconds/": "timing/",
    r"data\.test\b": "data.eval",
    r"\[evaluation\]|EvaluationConfig": "[eval]",
    r"StepClock": "StepTimer",
    r"\bpart_of\b|\bjoined\(": "fraction_to_count, concat_response_tokens",
    r"cut_place|left_out|distance_teacher": "cut_position, skipped, teacher_distance",
    r"_hang\b|_speaks_for|_ask_for_gradients": "attach_adapter, is_primary_replica, enable_input_require_grads",
}
"""Words of before (pattern) and what the field says instead; CHANGELOG.md alone may name them."""


@cache
def generator():
    """docs/generate.py as a module."""
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def keys(section, prefix=""):
    """Dotted names of all keys below a section."""
    for name, field in section.model_fields.items():
        nested = field.annotation
        if isinstance(nested, type) and hasattr(nested, "model_fields") and name != "method":
            yield from keys(nested, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def commands(text):
    """Shell commands in code blocks and code spans, with continued lines joined and comments left out."""
    text = text.replace("\\\n", " ")
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    indented = re.findall(r"^    (python .*)$", text, re.MULTILINE)
    lines = [line for block in blocks for line in block.splitlines()] + indented
    lines += re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
    return [line.split("  #")[0].strip() for line in lines if line.strip()]


@cache
def make_targets():
    """Targets of the Makefile that are no files."""
    found = re.search(r"^\.PHONY:((?:.*\\\n)*.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    return set(found[1].replace("\\\n", " ").split())


def subcommands(parser):
    """Names of a parser's commands, with their parsers."""
    return {
        name: child
        for action in parser._actions
        if isinstance(action, argparse._SubParsersAction)
        for name, child in action.choices.items()
    }


@cache
def messages():
    """All texts in the source; a value inside an f-string is `…`."""

    def text_of(node):
        if isinstance(node, ast.JoinedStr):
            return "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
        return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""

    trees = [ast.parse(path.read_text()) for path in sorted((ROOT / "megatron_entropy").rglob("*.py"))]
    return "\n".join(" ".join(text_of(node).split()) for tree in trees for node in ast.walk(tree) if text_of(node))


def anchors(page):
    """Ids of a page's headings, as mkdocs makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_every_key_is_on_the_configuration_page():
    page = generator().fill((DOCS / "configuration.md").read_text())
    missing = [key for key in keys(Config) if key != "method" and f"`{key}`" not in page]
    assert not missing


def test_every_metric_is_on_the_metrics_page():
    from megatron_entropy.monitor.metric_names import METRICS

    page = generator().fill((DOCS / "metrics.md").read_text())
    assert not [metric.name for metric in METRICS if f"`{metric.name}`" not in page]


@pytest.mark.parametrize("name", sorted(METHOD_CONFIGS))
def test_every_method_has_a_page_with_its_settings_and_a_curve(name):
    sources = [page for page in (DOCS / "methods").glob("*.md") if f"<!-- settings: {name} -->" in page.read_text()]
    assert len(sources) == 1
    text = generator().fill(sources[0].read_text())
    config = METHOD_CONFIGS[name]
    unused = {key for base in config.__mro__ for key in base.__dict__.get("unused", ())}
    assert not [key for key in config.model_fields.keys() - unused - {"name"} if f"| `{key}` |" not in text]
    assert "<svg" in text or "No run" in text
    assert "## What the release does differently" in text or name in ("grpo", "sft")


def test_every_package_is_on_the_architecture_page():
    packages = [folder.name for folder in (ROOT / "megatron_entropy").iterdir() if (folder / "__init__.py").exists()]
    page = (DOCS / "architecture.md").read_text()
    picture = (DOCS / "images" / "architecture.svg").read_text()
    assert not [name for name in packages if f"`{name}/`" not in page or name not in picture]


def test_pages_are_in_the_navigation():
    listed = re.findall(r": ([a-z0-9_/]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(str(page.relative_to(DOCS)) for page in PAGES)


@pytest.mark.parametrize("text", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_internal_links_lead_somewhere(text):
    for target in re.findall(r"\]\(([^)\s]+)\)", text.read_text()):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (text.parent / path).resolve() if path else text
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


@pytest.mark.parametrize("text", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_exist(text):
    known = subcommands(cli._parser())
    for line in commands(text.read_text()):
        for made in re.findall(r"\bmake ((?:[a-z-]+ ?)+)", line if line.startswith("make ") else ""):
            assert made.split()[0] in make_targets(), line
        for name, rest in re.findall(r"(?:megatron-entropy|-m megatron_entropy) ([a-z-]+)(.*)", line):
            assert name in known, line
            if nested := subcommands(known[name]):
                assert not rest.split() or rest.split()[0] in nested, line
            takes = {option for action in known[name]._actions for option in action.option_strings}
            takes |= {
                o for child in subcommands(known[name]).values() for a in child._actions for o in a.option_strings
            }
            for flag in re.findall(r"(?<=\s)--[a-z-]+(?=\s|$)", rest):
                assert flag in takes, line
        for file in re.findall(
            r"\b((?:tools|examples|tests|kernels|requirements)/[\w/.-]+\.(?:py|toml|md|txt|json))\b", line
        ):
            assert "NAME" in file or (ROOT / file).exists(), line


def test_flags_of_tools_exist():
    for text in TEXTS:
        for line in commands(text.read_text()):
            called = re.match(r"(?:\.venv/bin/)?python ((?:tools|kernels|examples)/\w+\.py)(.*)", line)
            for flag in re.findall(r"--[a-z0-9-]+", called[2]) if called else ():
                source = "".join(path.read_text() for path in (ROOT / called[1]).parent.glob("*.py"))
                assert f'"{flag}"' in source, f"{text.name}: {line}"


def test_troubleshooting_quotes_real_messages():
    rows = re.findall(
        r"^\| `([^`]+)` \| ([^|]+) \| ([^|]+) \|$", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE
    )
    assert len(rows) >= 30
    assert not [quoted for quoted, _, _ in rows if quoted not in messages()]


def spoken_files():
    """Files whose words are the field's."""
    yield from TEXTS
    for folder, pattern in (
        ("megatron_entropy", "*.py"),
        ("megatron_entropy", "*.j2"),
        ("tools", "*.py"),
        ("examples", "*.toml"),
    ):
        yield from sorted((ROOT / folder).rglob(pattern))


@pytest.mark.parametrize("pattern", FIELD_WORDS, ids=list(FIELD_WORDS.values()))
def test_words_are_the_fields(pattern):
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in spoken_files()
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if re.search(pattern, line)
    ]
    assert not found, f"say {FIELD_WORDS[pattern]}:\n" + "\n".join(found)


def test_the_changelog_names_present_keys_and_metrics():
    from megatron_entropy.monitor.metric_names import METRICS

    known = {metric.name for metric in METRICS} | set(keys(Config)) | {"timing/NAME"}
    known |= {f"method.{key}" for config in METHOD_CONFIGS.values() for key in config.model_fields}
    rows = re.findall(r"^\| `[^|]+ \| `([^`]+)`", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    named = [name.split(" = ")[0] for name in rows if re.match(r"[a-z]+/[a-z_]+$|(method|data|actor)\.", name)]
    assert len(named) >= 25
    assert not [name for name in named if name not in known and not name.startswith("tests/")]


def test_documents_name_no_registry_and_no_machine():
    for path in [
        *TEXTS,
        ROOT / "CHANGELOG.md",
        ROOT / "Dockerfile",
        ROOT / "mkdocs.yml",
        ROOT / "requirements" / "docs.txt",
    ]:
        assert not re.search(r"pypi\.org|files\.pythonhosted|/(work|home|root|tmp)/\w", path.read_text()), path


def test_the_site_builds_strictly(tmp_path):
    pytest.importorskip("mkdocs", reason="`make docs` installs it")
    import subprocess

    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(tmp_path / "site")]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not re.search(r'(src="|<link[^>]*href=")https?://', (tmp_path / "site" / "index.html").read_text())
