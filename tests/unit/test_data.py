"""Rows of every schema become prompts in an order that (seed, epoch) determines; errors name file and line.

Shown: rows in the published form of each data set, from JSONL, JSON arrays, CSV and parquet; columns with other names;
external schemas; length limits that count the rows they skip; whatever bytes a file has, nothing but a DataError comes
out; permutations and exact resumption. Not shown: the published files themselves.
"""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from mutations import damaged
from sentencepiece_model import train_sentencepiece

from megatron_entropy.benchmarks.questions import Question
from megatron_entropy.benchmarks.run import encode_questions
from megatron_entropy.config.schema import DataConfig
from megatron_entropy.data import limits
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


def write_rows(path, rows):
    """Write a file of the kind that its suffix names."""
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=2))
    else:
        write_jsonl(path, rows)
    return path


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """A SentencePiece model over printable ASCII with hardly any merges."""
    characters = "".join(chr(code) for code in range(33, 127))
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_sentencepiece([f"{characters} \n", "it is so"] * 3, vocab_size=100, path=path)
    return load_tokenizer(path)


NESTED = [name for name, (raw, _) in ROWS.items() if any(isinstance(value, list | dict) for value in raw.values())]
SUFFIXES = [(name, suffix) for name in ROWS for suffix in ("jsonl", "json", "csv", "parquet")
            if suffix != "csv" or name not in NESTED]  # fmt: skip


@pytest.mark.parametrize(("name", "suffix"), SUFFIXES)
@pytest.mark.parametrize("schema", ["auto", "named"])
def test_each_schema_reads_its_rows(tmp_path, name, suffix, schema):
    raw, expected = ROWS[name]
    path = write_rows(tmp_path / f"train.{suffix}", [raw, raw])
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
        (
            [{"problem": None, "answer": "2"}],
            "math",
            r"column 'problem' must hold a text or a finite number, found nothing",
        ),
        (
            [{"problem": ["x"], "answer": "2"}],
            "math",
            r"column 'problem' must hold a text or a finite number, found a list",
        ),
        (['{"problem": "1", "answer": NaN}'], "math", r"a.jsonl:1: column 'answer' .* found the float nan"),
        (['{"problem": "1", "answer": -Infinity}'], "math", r"a.jsonl:1: column 'answer' .* found the float -inf"),
        ([{"problem": "1", "answer": " \t"}], "math", r"a.jsonl:1: column 'answer' .* found only white space"),
        ([{"problem": "1", "answer": ""}], "math", r"a.jsonl:1: column 'answer' .* found an empty text"),
        ([{"problem": "1", "answer": True}], "math", r"a.jsonl:1: column 'answer' .* found the bool True"),
        ([{"problem": "1", "answer": "\ud83d"}], "math", r"a.jsonl:1: a text is not valid Unicode: .* '\\ud83d'"),
        ([{"problem": "1 \udc00", "answer": "2"}], "math", r"a.jsonl:1: a text is not valid Unicode: character 2 is"),
        ([ROWS["math"][0], "[" * 100_000], "math", r"a.jsonl:2: not a line of JSON: nested too deeply"),
        (['{"problem": ' + "9" * 5000 + "}"], "math", r"a.jsonl:1: not a line of JSON: Exceeds the limit"),
        ([{**ROWS["math"][0], "semantic_entropy": 10**400}], "math", r"a.jsonl:1: column 'semantic_entropy' must"),
        ([{**ROWS["math"][0], "semantic_entropy": "x"}], "math", r"a.jsonl:1: column 'semantic_entropy' must"),
        (
            [{"question": "1", "answer": "so\n#### "}],
            "gsm8k",
            r"a.jsonl:1: column 'answer' must end in '#### <number>'",
        ),
        ([{"question": "1", "answer": "so\n####"}], "auto", r"a.jsonl:1: column 'answer' must end in '#### <number>'"),
        ([{"prompt": CHAT, "reward_model": {}}], "dapo", r"a.jsonl:1: column 'reward_model' must hold"),
        ([{"prompt": [{"role": "user"}], "target": "2"}], "openr1", r"a.jsonl:1: column 'prompt' must hold"),
        ([{"prompt": CHAT, "target": [{}]}], "openr1", r"a.jsonl:1: column 'target' must hold"),
        ([{"question": "1", "answer": "2"}], "gsm8k", r"a.jsonl:1: column 'answer' must end in '#### <number>'"),
    ],
)
def test_mistakes_name_file_line_and_column(tmp_path, rows, schema, message):
    with pytest.raises(DataError, match=message):
        list(read_rows(write_jsonl(tmp_path / "a.jsonl", rows), schema=schema))


def test_large_and_whole_numbers_become_text(tmp_path):
    answers = [2, 2.0, -0.5, 10**400, 1e300]
    rows = read_rows(write_jsonl(tmp_path / "a.jsonl", [{"problem": "1", "answer": answer} for answer in answers]))
    assert [row.answer for row in rows] == ["2", "2", "-0.5", str(10**400), str(int(1e300))]


def test_missing_file_unknown_suffix_and_corrupt_parquet(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "a.parquet").write_text("not parquet")
    (tmp_path / "folder.csv").mkdir()
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "loop.json").symlink_to(tmp_path / "loop.json")
    for name, message in (
        ("b.jsonl", "no such file"),
        (f"{'x' * 300}.jsonl", "no such file"),
        ("a.txt", "cannot read .txt; use .jsonl, .ndjson, .json, .csv, .parquet"),
        ("a.parquet", "not a readable parquet file"),
        ("folder.csv", "not a regular file"),
        ("pipe.jsonl", "not a regular file"),
        ("loop.json", "not a regular file"),
    ):
        with pytest.raises(DataError, match=message):
            list(read_rows(tmp_path / name))


@pytest.mark.parametrize("suffix", ["json", "csv", "parquet"])
def test_mistakes_in_other_files_name_the_row_too(tmp_path, suffix):
    path = write_rows(tmp_path / f"a.{suffix}", [{"problem": "1", "answer": "2"}, {"problem": "", "answer": "2"}])
    where = {"json": "a.json item 2", "csv": "a.csv:3", "parquet": "a.parquet row 2"}[suffix]
    with pytest.raises(DataError, match=f"{where}: column 'problem' must hold a text"):
        list(read_rows(path))


def test_parquet_with_invalid_utf8_is_named(tmp_path):
    texts = pyarrow.array([b"1+1?", b"\xff\xfe"]).view(pyarrow.string())
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"problem": texts, "answer": ["2", "2"]}), path)
    with pytest.raises(DataError, match="a.parquet: not a readable parquet file .*utf-8"):
        list(read_rows(path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"[", "a.json: not a JSON array"),
        ("a.json", b"[]", "a.json: the file has no rows"),
        ("a.json", b"[1]", "a.json item 1: expected a JSON object, found the int 1"),
        ("a.json", b"\xef\xbb\xbf[" + b"[" * 9999, "a.json: not a JSON array: nested too deeply"),
        ("a.json", b'{"rows": []}', "a.json:1: no schema has the columns rows"),
        ("a.csv", b"", "a.csv: the file has no rows"),
        ("a.csv", b"problem,answer\n", "a.csv: the file has no rows"),
        ("a.csv", b"problem,answer\n1\n", "a.csv:2: 1 values for 2 columns"),
        ("a.csv", b"problem,answer\n1,2,3\n", "a.csv:2: 3 values for 2 columns"),
        ("a.csv", b"problem,problem\n1,2\n", "a.csv:1: the first line must name each column once"),
        ("a.csv", b'problem,answer\n"1,2\n', "a.csv:2: not valid CSV"),
        ("a.csv", b"problem,answer\n1,\xff\n", "a.csv:1: not valid CSV: .*utf-8"),
    ],
)
def test_broken_arrays_and_tables_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(read_rows(tmp_path / name))


def test_csv_takes_quotes_empty_lines_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'\xef\xbb\xbfquestion,answer,solution,semantic_entropy\r\n"a, ""b""\n?",2,,0.5\r\n\r\n')
    (row,) = read_rows(path)
    assert (row.messages[0].content, row.answer, row.target) == ('a, "b"\n?', "2", None)
    assert row.semantic_entropy == 0.5


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
@settings(max_examples=100)
@given(data=st.data())
def test_damaged_bytes_are_nothing_but_data_errors(tmp_path_factory, suffix, data):
    folder = tmp_path_factory.getbasetemp()
    raw = {"question": "1+1?", "answer": "2", "solution": "it is 2", "semantic_entropy": 0.5}
    whole = write_rows(folder / f"whole.{suffix}", [raw] * 3).read_bytes()
    (folder / f"damaged.{suffix}").write_bytes(data.draw(damaged(whole)))
    try:
        for row in read_rows(folder / f"damaged.{suffix}", schema="plain"):
            assert row.answer.encode() and (row.semantic_entropy is None or math.isfinite(row.semantic_entropy))
    except DataError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("schema", ["auto", "plain"])
@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_columns_may_have_other_names(tmp_path, suffix, schema):
    raw = {"q": "1+1?", "a": "2", "question": "another one", "worked": "so 2"}
    path = write_rows(tmp_path / f"a.{suffix}", [raw, raw])
    columns = {"question": "q", "answer": "a", "solution": "worked"}
    rows = list(read_rows(path, schema=schema, columns=columns))
    assert [(row.messages, row.answer, row.target) for row in rows] == [(USER, "2", "so 2")] * 2
    assert [prompt.answer for prompt in read_prompts([path], schema=schema, columns=columns)] == ["2", "2"]


def test_columns_may_be_swapped(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"question": "2", "answer": "1+1?"}])
    (row,) = read_rows(path, columns={"question": "answer", "answer": "question"})
    assert (row.messages, row.answer) == (USER, "2")


@pytest.mark.parametrize(
    ("columns", "schema", "error", "message"),
    [
        ({"question": "qq"}, "auto", DataError, "a.jsonl:1: column 'qq' is missing, which data.columns.question names"),
        ({"question": "q"}, "plain", DataError, "column 'answer' is missing; found q, a; data.columns.answer names it"),
        ({}, "auto", DataError, 'no schema has the columns q, a; .*data.columns.question = "NAME" reads a column'),
        (
            {"qestion": "q"},
            "plain",
            ConfigError,
            "data.columns.qestion: data.format='plain' has no such column; it has",
        ),
        ({"qestion": "q"}, "auto", ConfigError, "data.columns.qestion: data.format='auto' has no such column"),
    ],
)
def test_wrong_names_of_columns_are_named(tmp_path, columns, schema, error, message):
    with pytest.raises(error, match=message):
        list(read_rows(write_jsonl(tmp_path / "a.jsonl", [{"q": "1+1?", "a": 2}]), schema=schema, columns=columns))


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
    with pytest.raises(DataError, match="a.jsonl:1: data.format='theirs' cannot read it: TypeError"):
        list(read_rows(write_jsonl(file, [{"q": "1+1?", "a": None}]), schema="theirs"))
    (row,) = read_rows(write_jsonl(file, [{"text": "1+1?", "a": 2}]), schema="theirs", columns={"q": "text"})
    assert row.messages == USER


def test_prompts_are_tokens_of_template_question_and_solution(tmp_path, tokenizer):
    file = write_jsonl(tmp_path / "a.jsonl", [ROWS["plain"][0]])
    (prompt,) = load_prompts(
        [file], tokenizer, DataConfig(max_prompt_tokens=99, template="Q: {question} {x}\n")
    ).prompts
    assert prompt.text == "Q: 1+1? {x}\n"
    assert prompt.tokens == tuple(tokenizer.encode(prompt.text))
    assert prompt.target == (*tokenizer.encode("so 2\n#2"), tokenizer.eos_ids[0])
    assert prompt.answer == "2"


def test_without_a_template_the_chat_template_is_used(tmp_path, tokenizer):
    file = write_jsonl(tmp_path / "a.jsonl", [ROWS["plain"][0]])
    (prompt,) = load_prompts([file], tokenizer, DataConfig(max_prompt_tokens=99, system="Think.")).prompts
    assert prompt.text == "Think.\n1+1?\n"


def test_rows_over_the_limits_are_counted_and_never_truncated(tmp_path, tokenizer):
    rows = [
        {"question": "1" * length, "solution": "2" * target, "answer": "2"}
        for length, target in ((4, 4), (5, 4), (6, 4), (4, 5), (4, 6), (9, 9))
    ]
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    loaded = load_prompts(
        [file], tokenizer, DataConfig(max_prompt_tokens=6), max_target_tokens=6
    )  # a line break, an end token
    assert [prompt.index for prompt in loaded.prompts] == [0, 1, 3]
    assert (loaded.skipped.prompt, loaded.skipped.target) == (2, 1)
    assert str(loaded.skipped) == "skipped 2 rows with too long a prompt, 1 with too long a target"
    assert max(len(prompt.tokens) for prompt in loaded.prompts) == 6


def test_a_text_that_cannot_fit_is_not_given_to_the_tokenizer(tmp_path, tokenizer, monkeypatch):
    """A tokenizer needs gigabytes for a text of 100 MB."""
    long = "1" * 100_000
    rows = [{"question": long, "answer": "2"}, {"question": "1", "solution": long, "answer": "2"}, ROWS["plain"][0]]
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    lengths = []
    encode = tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda text: lengths.append(len(text)) or encode(text))
    loaded = load_prompts([file], tokenizer, DataConfig(max_prompt_tokens=50), max_target_tokens=50)
    assert (loaded.skipped.prompt, loaded.skipped.target, [prompt.index for prompt in loaded.prompts]) == (1, 1, [2])
    assert max(lengths) < 50 * tokenizer.max_token_chars == 800


def test_first_only_reads_each_file_up_to_the_first_row_that_fits(tmp_path, tokenizer):
    long, good = {"question": "1" * 99, "answer": "2"}, ROWS["plain"][0]
    files = [write_jsonl(tmp_path / f"{n}.jsonl", [long] * n + [good, "{broken"]) for n in range(3)]
    loaded = load_prompts(files, tokenizer, DataConfig(max_prompt_tokens=20), first_only=True)
    assert len(loaded) == 3 and loaded.skipped.prompt == 3
    with pytest.raises(DataError, match="only.jsonl: no row is left: skipped 2 rows"):
        load_prompts(
            [write_jsonl(tmp_path / "only.jsonl", [long, long])],
            tokenizer,
            DataConfig(max_prompt_tokens=20),
            first_only=True,
        )


@pytest.mark.parametrize(
    ("template", "limit"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "1 s of CPU time"),
        ("{{ 10 ** (10 ** 9) }}", "1 s of CPU time"),
        ("{{ ('x' * (3 * 10 ** 9)) | length }}", "1 GiB of memory"),
    ],
    ids=["loop", "compiled code", "memory"],
)
def test_a_chat_template_that_hangs_or_fills_the_memory_is_refused(tmp_path, monkeypatch, template, limit):
    monkeypatch.setattr(limits, "CPU_SECONDS", 1)
    monkeypatch.setattr(limits, "MEMORY_GIB", 1)
    ids = tokenizers.models.WordLevel({"1": 0, "<s>": 1, "<unk>": 2}, unk_token="<unk>")
    tokenizers.Tokenizer(ids).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<s>", "chat_template": template}))
    file = write_jsonl(tmp_path / "a.jsonl", [ROWS["plain"][0]])
    with pytest.raises(ConfigError, match=f"chat template fails: it needs more than {limit}"):
        load_prompts([file], load_tokenizer(tmp_path), DataConfig(max_prompt_tokens=20), first_only=True)
    with pytest.raises(ConfigError, match=f"chat template fails: it needs more than {limit}"):
        encode_questions([Question("own", "1", "1", "1")], load_tokenizer(tmp_path), max_tokens=20)


def test_indices_count_rows_over_all_files(tmp_path, tokenizer):
    files = [write_jsonl(tmp_path / f"{name}.jsonl", [ROWS[name][0]] * 2) for name in ("plain", "math")]
    assert [prompt.index for prompt in load_prompts(files, tokenizer, DataConfig(max_prompt_tokens=99)).prompts] == [
        0,
        1,
        2,
        3,
    ]


def test_a_set_with_nothing_left_is_an_error(tmp_path, tokenizer):
    file = write_jsonl(tmp_path / "a.jsonl", [ROWS["plain"][0]])
    for files, message in (([file], "a.jsonl: no row is left: skipped 1 rows"), ([], "data.train is an empty list")):
        with pytest.raises(DataError, match=message):
            load_prompts(files, tokenizer, DataConfig(max_prompt_tokens=2))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"template": "Q:"}, "{question}"), ({"template": "{question}", "system": "Think."}, "data.system")],
)
def test_bad_templates_are_named(tmp_path, tokenizer, options, message):
    file = write_jsonl(tmp_path / "a.jsonl", [ROWS["plain"][0]])
    with pytest.raises(ConfigError, match=message):
        load_prompts([file], tokenizer, DataConfig(max_prompt_tokens=99, **options))


def test_prompts_without_tokens_are_the_same_rows(tmp_path, tokenizer):
    files = [write_jsonl(tmp_path / f"{name}.jsonl", [ROWS[name][0]]) for name in ROWS]
    bare, loaded = read_prompts(files), load_prompts(files, tokenizer, DataConfig(max_prompt_tokens=999)).prompts
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
