"""Both kinds of tokenizer give exact ids and texts, and a converted SentencePiece model gives the same everywhere.

Shown: ids and decoded text agree between SentencePiece, the tokenizers library and both readers on any text; chat
templates render as in transformers; end tokens are found wherever a folder declares them; tokenizer.json is read as it
is, whatever class the folder names; unfit tokenizers are errors. Not shown: published tokenizers, which need a network.
"""

from __future__ import annotations

import json

import pytest
import sentencepiece
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from mutations import damaged
from sentencepiece_model import save_for_transformers, train_sentencepiece

from megatron_entropy.data.schemas import Message
from megatron_entropy.data.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer, load_tokenizer
from megatron_entropy.errors import ConfigError, TokenizerError

WORDS = "so then and we get gives is aa aab abab ba take".split()
TEXTS = [f"{left} {right}{sign}{number}{end}" for left in WORDS for right in WORDS
         for number, sign, end in ((13, "=", "\n"), (240, ";", " "), (5678, "+", ","), (99, " ", "\n\n"))]  # fmt: skip
VOCAB_SIZE = 64
ADDED_TOKEN = {"__type": "AddedToken", "content": "<|im_end|>", "special": True}
QWEN_TEMPLATE = """\
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == "assistant" %}
        {% generation %}{{ message.content | tojson }}{% endgeneration %}
    {%- else %}{% continue %}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A model folder with the SentencePiece model and its conversion."""
    path = tmp_path_factory.mktemp("model")
    train_sentencepiece(TEXTS, vocab_size=VOCAB_SIZE, path=path / "tokenizer.model")
    save_for_transformers(path / "tokenizer.model", path)
    return path


@pytest.fixture(scope="session")
def three(folder):
    """The same tokenizer by our two readers and by transformers' AutoTokenizer."""
    return (
        load_tokenizer(folder / "tokenizer.model"),
        load_tokenizer(folder),
        transformers.AutoTokenizer.from_pretrained(folder),
    )


def byte_level_folder(path, **files):
    """A folder with a byte-level BPE tokenizer of the Qwen kind; keyword arguments are further JSON files."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, special_tokens=special)
    tokenizer.train_from_iterator(TEXTS, trainer)
    path.mkdir(exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


texts = st.one_of(
    st.text(alphabet="aabbsothen 01239=;+\n\t▁é漢", max_size=60),
    st.lists(st.sampled_from([*WORDS, " ", "\n", "  ", "12", "▁", "\r\n"]), max_size=20).map("".join),
    st.text(max_size=20),
)


@given(text=texts)
def test_all_readers_give_the_same_ids(three, text):
    by_model, by_json, theirs = three
    assert by_model.encode(text) == by_json.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]


@given(ids=st.lists(st.integers(0, VOCAB_SIZE + 5), max_size=40))
def test_all_readers_give_the_same_text(three, ids):
    """Ids beyond the vocabulary are rows of a padded embedding, which a model may sample."""
    by_model, by_json, theirs = three
    known = [index for index in ids if index < VOCAB_SIZE]
    assert by_model.decode(ids) == by_json.decode(ids) == theirs.decode(known, skip_special_tokens=True)


@given(text=st.text(alphabet="abso 0123456789=;+\n", max_size=60))
def test_text_over_known_characters_decodes_to_itself(three, text):
    for tokenizer in three[:2]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_digits_and_line_breaks_stand_alone(three):
    tokenizer = three[0]
    pieces = [tokenizer.piece(index) for index in range(tokenizer.vocab_size)]
    assert [piece for piece in pieces if len(piece) > 1 and (set(piece) & set("0123456789\n"))] == []
    assert [tokenizer.piece(index) for index in tokenizer.encode("2400\n\n")] == ["2", "4", "0", "0", "\n", "\n"]


def test_training_is_deterministic(tmp_path, folder):
    train_sentencepiece(iter(TEXTS), vocab_size=VOCAB_SIZE, path=tmp_path / "again.model")
    assert (tmp_path / "again.model").read_bytes() == (folder / "tokenizer.model").read_bytes()


@pytest.mark.parametrize("vocab_size", [10, 10_000])
def test_vocabularies_that_cannot_be_filled_are_refused(tmp_path, vocab_size):
    with pytest.raises(TokenizerError, match=f"cannot train {vocab_size} ids"):
        train_sentencepiece(TEXTS, vocab_size=vocab_size, path=tmp_path / "t.model")


def test_special_ids_agree(three):
    by_model, by_json, theirs = three
    assert by_model.eos_ids == by_json.eos_ids == (theirs.eos_token_id,) == (1,)
    assert by_model.pad_id == by_json.pad_id == theirs.pad_token_id == 2
    assert by_model.bos_ids == by_json.bos_ids == ()
    assert by_model.vocab_size == by_json.vocab_size == len(theirs) == VOCAB_SIZE
    assert by_model.decode([0, 1, 2]) == by_json.decode([0, 1, 2]) == ""


def test_pieces_agree_also_of_unknown_ids(three):
    by_model, by_json, theirs = three
    for index in range(VOCAB_SIZE):
        assert by_model.piece(index) == by_json.piece(index) == theirs.convert_ids_to_tokens(index)
    assert by_model.piece(VOCAB_SIZE) == by_json.piece(VOCAB_SIZE) == f"<id {VOCAB_SIZE}>"


def test_a_plain_tokenizer_renders_the_question_on_a_line(three):
    for tokenizer in three[:2]:
        assert tokenizer.render([Message("user", "1+2")]) == "1+2\n"
    assert three[2].apply_chat_template([{"role": "user", "content": "1+2"}], tokenize=False) == "1+2\n"


def test_tokenizer_json_is_preferred(folder, tmp_path):
    assert isinstance(load_tokenizer(folder), HuggingFaceTokenizer)
    (tmp_path / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    assert isinstance(load_tokenizer(tmp_path), SentencePieceTokenizer)


def test_other_sentencepiece_models_load_but_are_not_converted(tmp_path):
    prefix = tmp_path / "unigram"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_prefix=str(prefix), vocab_size=50, minloglevel=2, hard_vocab_limit=False
    )
    tokenizer = load_tokenizer(prefix.with_suffix(".model"))
    assert isinstance(tokenizer, SentencePieceTokenizer)
    assert tokenizer.bos_ids == (1,) and tokenizer.eos_ids == (2,) and tokenizer.pad_id == 2
    assert tokenizer.decode([1, *tokenizer.encode("so we get"), 2]) == "so we get"
    with pytest.raises(TokenizerError, match="only byte-pair models"):
        save_for_transformers(prefix.with_suffix(".model"), tmp_path)


@pytest.mark.parametrize("options", [{}, {"enable_thinking": False}])
@pytest.mark.parametrize("source", ["config", "list", "file"])
def test_chat_templates_render_as_in_transformers(tmp_path, source, options):
    template = {"list": [{"name": "default", "template": QWEN_TEMPLATE}], "config": QWEN_TEMPLATE}.get(source)
    config = {"eos_token": "<|im_end|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    if template is not None:
        config["chat_template"] = template
    folder = byte_level_folder(tmp_path, tokenizer_config=config)
    if source == "file":
        (folder / "chat_template.jinja").write_text(QWEN_TEMPLATE)
    turns = [("system", "Be {brief}."), ("user", "1+1?\n"), ("tool", "x"), ("assistant", 'say "2"'), ("user", "é")]
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    expected = theirs.apply_chat_template(
        [{"role": role, "content": content} for role, content in turns],
        tokenize=False,
        add_generation_prompt=True,
        **options,
    )
    tokenizer = load_tokenizer(folder)
    text = tokenizer.render([Message(role, content) for role, content in turns], options)
    assert text == expected
    assert tokenizer.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    ("template", "options", "message"),
    [
        ("{{ raise_exception('no system') }}", {}, "chat template fails: no system"),
        ("{% if %}", {}, "chat template fails"),
        ("{{ messages }}", {"tokenize": True}, "chat template fails: .*tokenize"),
        ("{{ 1 + 'a' }}", {}, "chat template fails: unsupported operand"),
        ("{{ range(10**9) | list }}", {}, "chat template fails: Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", {}, "chat template fails: maximum recursion depth"),
        ("{{ 'x' * 10**15 }}", {}, "chat template fails: MemoryError"),
        ("{{ messages[3].content }}", {}, "chat template fails: "),
        ("{{ 1 / 0 }}", {}, "chat template fails: division by zero"),
        ("{{ ''.__class__.__mro__ }}", {}, "chat template fails: .*unsafe"),
        ('{{ "\\ud83d" }}', {}, "chat template fails: .*surrogates not allowed"),
        ([{"name": "tools", "template": "x"}], {}, "its chat templates are tools, none is named default"),
    ],
)
def test_failing_chat_templates_are_named(tmp_path, template, options, message):
    config = {"eos_token": "<|im_end|>", "chat_template": template}
    with pytest.raises(ConfigError, match=message):
        load_tokenizer(byte_level_folder(tmp_path, tokenizer_config=config)).render([Message("user", "x")], options)


@pytest.mark.parametrize(
    "named", [{"tokenizer_class": "LlamaTokenizerFast"}, {"tokenizer_class": "Qwen2Tokenizer"}, {}]
)
def test_the_file_counts_and_not_the_class_that_the_folder_names(tmp_path, named):
    """Distilled Qwen models have a byte-level file and the class of Llama; AutoTokenizer splits their text wrongly."""
    config = {"eos_token": "<|im_end|>", "auto_map": {"AutoTokenizer": ["theirs.Tokenizer", None]}, **named}
    folder = byte_level_folder(tmp_path, tokenizer_config=config, config={"model_type": "qwen3"})
    library, ours = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")), load_tokenizer(folder)
    for text in (*TEXTS[:20], " 123 'll don't  x\n\n is", "é漢 <|im_end|> a"):
        ids = library.encode(text, add_special_tokens=False).ids
        assert ours.encode(text) == ids and ours.decode(ids) == library.decode(ids)
    assert ours.vocab_size == library.get_vocab_size() and ours.eos_ids == (2,) and ours.bos_ids == ()


def test_truncation_and_padding_of_the_file_do_not_apply(tmp_path):
    folder = byte_level_folder(tmp_path, config={"eos_token_id": 2})
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    expected = library.encode("so then we get\n", add_special_tokens=False).ids
    library.enable_truncation(3)
    library.enable_padding(length=40)
    library.save(str(folder / "tokenizer.json"))
    assert load_tokenizer(folder).encode("so then we get\n") == expected


@pytest.mark.parametrize(
    ("files", "eos_ids", "pad_id"),
    [
        ({"tokenizer_config": {"eos_token": "<|im_end|>"}}, (2,), 2),
        ({"tokenizer_config": {"eos_token": ADDED_TOKEN, "pad_token": "<|endoftext|>"}}, (2,), 0),
        ({"tokenizer_config": {"eos_token": "<|im_end|>"}, "generation_config": {"eos_token_id": [2, 0]}}, (2, 0), 2),
        ({"tokenizer_config": {"eos_token": "<|im_end|>"}, "generation_config": {"eos_token_id": 0}}, (2, 0), 2),
        ({"generation_config": {"eos_token_id": 0}, "config": {"eos_token_id": 2}}, (0,), 0),
        ({"config": {"eos_token_id": 2}}, (2,), 2),
    ],
)
def test_end_ids_are_collected_from_the_folder(tmp_path, files, eos_ids, pad_id):
    tokenizer = load_tokenizer(byte_level_folder(tmp_path, **files))
    assert (tokenizer.eos_ids, tokenizer.pad_id) == (eos_ids, pad_id)
    assert tokenizer.decode([*tokenizer.encode("so é\n"), 2, 0]) == "so é\n"


def test_begin_ids_come_from_the_post_processor(tmp_path):
    folder = byte_level_folder(tmp_path, config={"eos_token_id": 0})
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    loaded = load_tokenizer(folder)
    assert loaded.bos_ids == (1,) and 1 not in loaded.encode("so")


def test_more_ids_than_the_model_has_is_an_error(folder):
    assert load_tokenizer(folder, vocab_size=VOCAB_SIZE).vocab_size == VOCAB_SIZE
    with pytest.raises(TokenizerError, match=r"tokenizer.json: .* 64 ids, but the model's vocab_size is 63"):
        load_tokenizer(folder, vocab_size=63)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"tokenizer_config": {"eos_token": {"__type": "AddedToken"}}},
            "tokenizer_config.json: eos_token '' is not in",
        ),
        ({"tokenizer_config": {"eos_token": "<|nope|>"}}, "tokenizer_config.json: eos_token '<|nope|>' is not in"),
        ({"tokenizer_config": {"eos_token": 5}}, "chat_template.jinja does not fit it"),
        ({"tokenizer_config": ["eos_token"]}, "tokenizer_config.json: expected a JSON object, found list"),
        ({"tokenizer_config": {"chat_template": 5, "eos_token": "<|im_end|>"}}, ""),
        ({"generation_config": {"eos_token_id": 10**9}}, "generation_config.json: eos_token_id must be ids of the"),
        ({"generation_config": {"eos_token_id": [2, -1]}}, "0 to 279, found the int -1"),
        ({"generation_config": {"eos_token_id": True}}, "0 to 279, found the bool True"),
        ({"generation_config": {"eos_token_id": "2"}}, "0 to 279, found a text"),
        ({"config": {"eos_token_id": 10**9}}, "config.json: eos_token_id must be ids of the tokenizer"),
        ({"special_tokens_map": ["x"], "generation_config": {"eos_token_id": 2}}, ""),
    ],
)
def test_wrong_settings_are_named(tmp_path, files, message):
    folder = byte_level_folder(tmp_path, **files)
    with pytest.raises((TokenizerError, ConfigError)) as caught:
        load_tokenizer(folder).render([Message("user", "x")])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_an_end_token_of_the_settings_may_be_added(tmp_path):
    added = {"280": {"content": "<|new|>", "special": True}}
    folder = byte_level_folder(tmp_path, tokenizer_config={"eos_token": "<|new|>", "added_tokens_decoder": added})
    assert load_tokenizer(folder).eos_ids == (280,)


def test_a_chat_template_file_in_another_encoding_is_named(tmp_path):
    folder = byte_level_folder(tmp_path, tokenizer_config={"eos_token": "<|im_end|>"})
    (folder / "chat_template.jinja").write_bytes("{{ 'é' }}".encode("latin-1"))
    with pytest.raises(TokenizerError, match="chat_template.jinja does not fit it: .*utf-8"):
        load_tokenizer(folder)


def test_a_sentencepiece_model_with_invalid_utf8_is_named(folder, tmp_path):
    content = (folder / "tokenizer.model").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(content.replace(b"<pad>", b"<pa\xff>"))
    with pytest.raises(TokenizerError, match="tokenizer.model: not a readable SentencePiece model: .*utf-8"):
        load_tokenizer(tmp_path)


def test_a_text_that_the_tokenizer_cannot_read_is_named(tmp_path):
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"0": 0, "<s>": 1}, unk_token="none"))
    words.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text('{"eos_token_id": 1}')
    with pytest.raises(TokenizerError, match="the tokenizer fails on 'x.xe9'"):
        load_tokenizer(tmp_path).encode("xé")


@given(text=texts)
def test_no_token_stands_for_more_characters_than_stated(three, text):
    """Only `<unk>` (id 0) does: a run of unknown characters is one token."""
    for tokenizer in three[:2]:
        assert tokenizer.max_token_chars == 16
        ids = tokenizer.encode(text)
        assert len(text) <= len(ids) * tokenizer.max_token_chars or 0 in ids or not text.strip("▁ ")


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    config = {"eos_token": "<|im_end|>", "chat_template": QWEN_TEMPLATE}
    return byte_level_folder(tmp_path_factory.mktemp("byte_level"), tokenizer_config=config)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "tokenizer.model"])
@settings(max_examples=60)
@given(data=st.data())
def test_damaged_bytes_are_nothing_but_our_errors(folder, byte_level, name, data):
    source = folder if name == "tokenizer.model" else byte_level
    whole = (source / name).read_bytes()
    (source / name).write_bytes(data.draw(damaged(whole)))
    try:
        tokenizer = load_tokenizer(source / name if name == "tokenizer.model" else source)
        tokenizer.decode(tokenizer.encode(tokenizer.render([Message("user", "so we get 12\n")])))
    except (TokenizerError, ConfigError) as error:
        assert "\n" not in str(error)
    finally:
        (source / name).write_bytes(whole)


def test_missing_broken_and_endless_tokenizers_are_named(tmp_path):
    with pytest.raises(TokenizerError, match="no tokenizer.json and no tokenizer.model"):
        load_tokenizer(tmp_path)
    for name in ("tokenizer.json", "tokenizer.model"):
        broken = tmp_path / name.replace(".", "_")
        broken.mkdir()
        (broken / name).write_text("{broken")
        with pytest.raises(TokenizerError, match=f"{name}: not a readable"):
            load_tokenizer(broken)
    with pytest.raises(TokenizerError, match="no end token: set eos_token"):
        load_tokenizer(byte_level_folder(tmp_path / "endless"))
    with pytest.raises(TokenizerError, match="tokenizer_config.json: not valid JSON"):
        folder = byte_level_folder(tmp_path / "config")
        (folder / "tokenizer_config.json").write_text("{")
        load_tokenizer(folder)
