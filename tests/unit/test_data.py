"""Rows of every schema become prompts in an order that (seed, epoch) determines; errors name file and line.

Shown: rows in the published form of each data set, from JSONL and parquet; external schemas; length limits that count
the rows they skip; permutations and exact resumption. Not shown: the published files themselves.
"""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece_model import train_sentencepiece

from megatron_entropy.data.dataset import PromptStream, epoch_order, load_prompts, read_prompts
from megatron_entropy.data.schemas import SCHEMAS, Message, load_schema, read_rows
from megatron_entropy.data.tokenizer import load_tokenizer
from megatron_entropy.errors import ConfigError, DataError
from megatron_entropy.records import Prompt

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]
TURNS = (Message("system", "Be brief."), Message("user", "1+1?"))
USER = (Message("user", "1+1?"),)

# schema -> a row in its published form, and the expected messages, answer and target
ROWS = {
    "dapo": (
        {"prompt": CHAT, "reward_model": {"ground_truth": "2", "style": "rule"}, "data_source": "math_dapo"},
        (TURNS, "2", None),
    ),
    "openr1": (
        {
            "prompt": CHAT,
            "target": [{"role": "assistant", "content": "it is 2"}],
            "reward_model": {"ground_truth": "2"},
        },
        (TURNS, "2", "it is 2"),
    ),
    "gsm8k": ({"question": "1+1?", "answer": "1+1=<<1+1=2>>2\n#### 2"}, (USER, "2", "1+1=<<1+1=2>>2\n#### 2")),
    "plain": ({"question": "1+1?", "solution": "so 2\n#2", "answer": "2"}, (USER, "2", "so 2\n#2")),
    "math": ({"problem": "1+1?", "answer": "2", "solution": "it is 2", "level": 1}, (USER, "2", "it is 2")),
    "aime": ({"ID": "2024-I-1", "Problem": "1+1?", "Answer": 2}, (USER, "2", None)),
}


def write_jsonl(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """A SentencePiece model over printable ASCII with hardly any merges."""
    characters = "".join(chr(code) for code in range(33, 127))
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_sentencepiece([f"{characters} \n", "it is so"] * 3, vocab_size=100, path=path)
    return load_tokenizer(path)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("schema", ["auto", "named"])
def test_each_schema_reads_its_rows(tmp_path, name, suffix, schema):
    raw, expected = ROWS[name]
    path = tmp_path / f"train.{suffix}"
    if suffix == "jsonl":
        write_jsonl(path, [raw, raw])
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([raw, raw]), path)
    rows = list(read_rows(path, schema=name if schema == "named" else "auto"))
    assert [(row.messages, row.answer, row.target) for row in rows] == [expected] * 2


def test_every_schema_is_tested():
    assert set(ROWS) == set(SCHEMAS)


def test_openr1_target_may_be_text_without_an_answer(tmp_path):
    (row,) = read_rows(write_jsonl(tmp_path / "a.jsonl", [{"prompt": "1+1?", "target": "2"}]))
    assert (row.messages, row.answer, row.target) == (USER, None, "2")


def test_question_and_answer_without_marker_is_plain(tmp_path):
    (row,) = read_rows(write_jsonl(tmp_path / "a.jsonl", [{"question": "1+1?", "answer": "2"}]))
    assert (row.answer, row.target) == ("2", None)


@pytest.mark.parametrize(
    ("rows", "schema", "message"),
    [
        ([{"problem": "1", "answr": "2"}], "math", r"a.jsonl:1: column 'answer' is missing; found problem, answr"),
        ([{"problem": "1", "answr": "2"}], "auto", r"a.jsonl:1: no schema has the columns problem, answr"),
        ([ROWS["math"][0], {"problem": "1"}], "auto", r"a.jsonl:2: column 'answer' is missing; found problem"),
        ([ROWS["math"][0], "{broken"], "auto", r"a.jsonl:2: not a line of JSON"),
        (["[1, 2]"], "auto", r"a.jsonl:1: expected one JSON object per line, found a list"),
        ([], "auto", r"a.jsonl: the file has no rows"),
        ([], "math", r"a.jsonl: the file has no rows"),
        (["", ""], "auto", r"a.jsonl: the file has no rows"),
        ([{"problem": None, "answer": "2"}], "math", r"a.jsonl:1: column 'problem' must hold a text, found nothing"),
        ([{"problem": ["x"], "answer": "2"}], "math", r"a.jsonl:1: column 'problem' must hold a text, found a list"),
        ([{"prompt": CHAT, "reward_model": {}}], "dapo", r"a.jsonl:1: column 'reward_model' must hold"),
        ([{"prompt": [{"role": "user"}], "target": "2"}], "openr1", r"a.jsonl:1: column 'prompt' must hold"),
        ([{"prompt": CHAT, "target": [{}]}], "openr1", r"a.jsonl:1: column 'target' must hold"),
        ([{"question": "1", "answer": "2"}], "gsm8k", r"a.jsonl:1: column 'answer' must end in '#### <number>'"),
    ],
)
def test_mistakes_name_file_line_and_column(tmp_path, rows, schema, message):
    with pytest.raises(DataError, match=message):
        list(read_rows(write_jsonl(tmp_path / "a.jsonl", rows), schema=schema))


def test_missing_file_unknown_suffix_and_corrupt_parquet(tmp_path):
    (tmp_path / "a.csv").write_text("x")
    (tmp_path / "a.parquet").write_text("not parquet")
    for name, message in (("b.jsonl", "no such file"), ("a.csv", "cannot read .csv"), ("a.parquet", "parquet")):
        with pytest.raises(DataError, match=message):
            list(read_rows(tmp_path / name))


def test_parquet_mistakes_name_the_row(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([ROWS["math"][0], {"problem": None, "answer": "2"}]), path)
    with pytest.raises(DataError, match="a.parquet row 2: column 'problem'"):
        list(read_rows(path))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("maths", "data.format: unknown name 'maths'; use one of openr1, dapo, gsm8k, plain, math, aime"),
        ("no_such_module:SCHEMA", "data.format: .* cannot be imported .*no_such_module"),
        ("megatron_entropy.records:SCHEMA", "data.format: .* cannot be imported .*SCHEMA"),
        ("megatron_entropy.records:Prompt", "data.format: .* must be a Schema, found type"),
    ],
)
def test_unknown_schemas_are_named(tmp_path, name, message):
    with pytest.raises(ConfigError, match=message):
        list(read_rows(write_jsonl(tmp_path / "a.jsonl", [ROWS["math"][0]]), schema=name))


EXTERNAL_SCHEMA = """
from megatron_entropy.data.schemas import Message, Row, Schema

def read(row):
    if row["a"] < 0:
        raise ValueError("column 'a' must not be negative")
    return Row((Message("user", row["q"]),), str(row["a"]), None)

SCHEMA = Schema(("q", "a"), read)
"""


def test_a_schema_may_come_from_another_package(tmp_path, monkeypatch):
    """By its module, and by the entry point of an installed package."""
    (tmp_path / "their_schema.py").write_text(EXTERNAL_SCHEMA)
    installed = tmp_path / "theirs-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text("[megatron_entropy.schemas]\ntheirs = their_schema:SCHEMA\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    file = write_jsonl(tmp_path / "a.jsonl", [{"q": "1+1?", "a": 2}, {"q": "1-2?", "a": -1}])
    for name in ("their_schema:SCHEMA", "theirs"):
        rows = read_rows(file, schema=name)
        assert next(rows) == load_schema(name).read({"q": "1+1?", "a": 2})
        with pytest.raises(DataError, match="a.jsonl:2: column 'a' must not be negative"):
            next(rows)


def test_prompts_are_tokens_of_template_question_and_solution(tmp_path, tokenizer):
    file = write_jsonl(tmp_path / "a.jsonl", [ROWS["plain"][0]])
    (prompt,) = load_prompts([file], tokenizer, max_prompt_tokens=99, template="Q: {question} {x}\n").prompts
    assert prompt.text == "Q: 1+1? {x}\n"
    assert prompt.tokens == tuple(tokenizer.encode(prompt.text))
    assert prompt.target == (*tokenizer.encode("so 2\n#2"), tokenizer.eos_ids[0])
    assert prompt.answer == "2"


def test_without_a_template_the_chat_template_is_used(tmp_path, tokenizer):
    file = write_jsonl(tmp_path / "a.jsonl", [ROWS["plain"][0]])
    (prompt,) = load_prompts([file], tokenizer, max_prompt_tokens=99, system="Think.").prompts
    assert prompt.text == "Think.\n1+1?\n"


def test_rows_over_the_limits_are_counted_and_never_truncated(tmp_path, tokenizer):
    rows = [
        {"question": "1" * length, "solution": "2" * target, "answer": "2"}
        for length, target in ((4, 4), (5, 4), (6, 4), (4, 5), (4, 6), (9, 9))
    ]
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    loaded = load_prompts([file], tokenizer, max_prompt_tokens=6, max_target_tokens=6)  # a line break, an end token
    assert [prompt.index for prompt in loaded.prompts] == [0, 1, 3]
    assert (loaded.skipped.prompt, loaded.skipped.target) == (2, 1)
    assert str(loaded.skipped) == "skipped 2 rows with too long a prompt, 1 with too long a target"
    assert max(len(prompt.tokens) for prompt in loaded.prompts) == 6


def test_indices_count_rows_over_all_files(tmp_path, tokenizer):
    files = [write_jsonl(tmp_path / f"{name}.jsonl", [ROWS[name][0]] * 2) for name in ("plain", "math")]
    assert [prompt.index for prompt in load_prompts(files, tokenizer, max_prompt_tokens=99).prompts] == [0, 1, 2, 3]


def test_a_set_with_nothing_left_is_an_error(tmp_path, tokenizer):
    file = write_jsonl(tmp_path / "a.jsonl", [ROWS["plain"][0]])
    for files, message in (([file], "a.jsonl: no row is left: skipped 1 rows"), ([], "data.train is an empty list")):
        with pytest.raises(DataError, match=message):
            load_prompts(files, tokenizer, max_prompt_tokens=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"template": "Q:"}, "{question}"), ({"template": "{question}", "system": "Think."}, "data.system")],
)
def test_bad_templates_are_named(tmp_path, tokenizer, options, message):
    file = write_jsonl(tmp_path / "a.jsonl", [ROWS["plain"][0]])
    with pytest.raises(ConfigError, match=message):
        load_prompts([file], tokenizer, max_prompt_tokens=99, **options)


def test_prompts_without_tokens_are_the_same_rows(tmp_path, tokenizer):
    files = [write_jsonl(tmp_path / f"{name}.jsonl", [ROWS[name][0]]) for name in ROWS]
    bare, loaded = read_prompts(files), load_prompts(files, tokenizer, max_prompt_tokens=999).prompts
    assert len(bare) == len(ROWS) and {prompt.target is None for prompt in bare} == {True, False}
    for one, other in zip(bare, loaded, strict=True):
        assert (one.index, one.answer, one.semantic_entropy) == (other.index, other.answer, other.semantic_entropy)
        assert (one.target is None) == (other.target is None) and one.tokens == ()


@given(st.integers(1, 300), st.integers(0, 2**40), st.integers(0, 1000))
def test_order_is_a_permutation_and_a_function(n, seed, epoch):
    first = epoch_order(n, seed=seed, epoch=epoch)
    assert sorted(first) == list(range(n))
    assert np.array_equal(first, epoch_order(n, seed=seed, epoch=epoch))


def test_order_differs_by_seed_and_epoch():
    orders = {tuple(epoch_order(50, seed=seed, epoch=epoch)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_order_never_changes():
    """An old run can be repeated with a new version."""
    assert epoch_order(6, seed=1, epoch=0).tolist() == [2, 0, 1, 4, 5, 3]


@given(st.integers(1, 9), st.lists(st.integers(0, 7), max_size=8), st.integers(0, 99))
def test_stream_resumes_from_its_position(n, counts, seed):
    prompts = [Prompt(index, "", ()) for index in range(n)]
    straight = PromptStream(prompts, seed=seed)
    whole = straight.take(sum(counts))
    position, parts = 0, []
    for count in counts:
        stream = PromptStream(prompts, seed=seed, position=position)
        parts += stream.take(count)
        position = stream.position
    assert parts == whole and position == straight.position == sum(counts)


def test_stream_shows_each_prompt_once_an_epoch():
    prompts = [Prompt(index, "", ()) for index in range(7)]
    taken = PromptStream(prompts, seed=3).take(21)
    for epoch in range(3):
        assert sorted(prompt.index for prompt in taken[7 * epoch : 7 * epoch + 7]) == list(range(7))


def test_loading_data_imports_neither_torch_nor_transformers():
    code = (
        "import sys, megatron_entropy.data.dataset, megatron_entropy.data.tokenizer;"
        "print([name for name in ('torch', 'transformers', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
