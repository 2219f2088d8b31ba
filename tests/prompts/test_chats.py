"""Lists of messages as prompts, in every format that can hold them, and what is refused of them."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shipsfast.errors import InputError
from shipsfast.prompts.datasets import load_prompts, read_prompts


def said(*pairs, names=("role", "content")):
    return [dict(zip(names, pair, strict=True)) for pair in pairs]


SHORT = said(("user", "Mend a kettle"))
LONG = said(
    ("system", "Be brief."), ("user", "Mend a kettle"), ("assistant", "Which?"), ("user", "The tin one")
)
ANSWERED = [*LONG, *said(("assistant", "Done."))]
SHARE_GPT = [
    {"from": {"user": "human", "assistant": "gpt"}.get(x["role"], x["role"]), "value": x["content"]}
    for x in ANSWERED
]


def write(path, column, chats):
    """As objects with the chats in a column, or, without a column, as they are."""
    rows = [{"id": i, column: chat} if column else chat for i, chat in enumerate(chats)]
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("column", ["messages", "prompt", "conversation", None])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_chats_in_every_format(tmp_path, suffix, column):
    if column is None and suffix == ".parquet":
        pytest.skip("a row of parquet has columns")
    path = write(tmp_path / f"p{suffix}", column, [SHORT, LONG, ANSWERED])
    found = read_prompts(path)
    assert found.prompts == [SHORT, LONG, LONG]
    assert found.origin["answers_left_off"] == 1
    assert "1 answer at the end of a conversation left off" in str(found)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_share_gpt_is_the_same_in_other_words(tmp_path, suffix):
    path = write(tmp_path / f"p{suffix}", "conversations", [SHARE_GPT])
    assert load_prompts(path) == [LONG]


def test_an_empty_system_prompt_stays(tmp_path):
    chat = said(("system", ""), ("user", "Mend a kettle"))
    assert load_prompts(write(tmp_path / "p.jsonl", "messages", [chat])) == [chat]


def test_nothing_of_an_answer_that_is_left_off_matters(tmp_path):
    answer = {"role": "assistant", "content": None, "tool_calls": [1], "reasoning": "It is tin."}
    assert load_prompts(write(tmp_path / "p.jsonl", "messages", [[*SHORT, answer]])) == [SHORT]


def test_one_part_of_text_is_text_and_notes_beside_it_are_not_kept(tmp_path):
    chat = [
        {"role": "user", "content": [{"type": "text", "text": "Mend a kettle"}], "tool_calls": None, "id": 3}
    ]
    assert load_prompts(write(tmp_path / "p.jsonl", "messages", [chat])) == [SHORT]


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        ([], "is an empty list"),
        (["Mend", "Sure"], "a list whose element 1 is no message: expected role and content, or from and value"),
        ([{"text": "a"}], "element 1 has text: expected role and content"),
        (said(("user", " ")), "element 1 has content that is empty"),
        (said(("user", None)), "element 1 has content that is no text"),
        (said(("user", "a\0")), "element 1 has content that holds a NUL character"),
        (said(("user", "\ud800")), r"element 1 has content that holds half of a surrogate pair, U\+D800"),
        (said((None, "a")), "element 1 has no role"),
        (said(([1], "a")), "element 1 has no role"),
        (said(([1], "a"), names=("from", "value")), r"element 1 is from \[1\]: expected human"),
        ([{"role": "user", "content": "a", "name": "Ann"}], "element 1 has name: only role and text are read"),
        (said(("system", "Be brief.")), "has no message of the user"),
        (said(("assistant", "a")), "has no message of the user"),
        (said(("user", "a"), ("assistant", "b"), ("assistant", "c")), "ends with two answers"),
        (said(("narrator", "a"), names=("from", "value")), "element 1 is from 'narrator': expected human, gpt"),
        ([{"role": "user", "content": "a", "tool_calls": [1]}], "element 1 has tool_calls: only role and text are read"),
        ([{"role": "user", "content": [{"type": "image"}]}], r"1 parts of content \(image\): expected one of text"),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}] * 2}], r"2 parts of content \(text\)"),
        ({"role": "user", "content": "a"}, "is a value of type dict: expected text, or a list of messages"),
        (True, "is a value of type bool"),
        (None, "is empty"),
        ("Mend a kettle", "is text, and column 'messages' by its name a list of messages"),
    ],
)  # fmt: skip
def test_what_is_no_chat_is_refused_with_its_row(tmp_path, chat, message):
    path = write(tmp_path / "p.jsonl", "messages", [SHORT, chat])
    with pytest.raises(InputError, match=f"the prompt in row 2 .*{message}") as error:
        load_prompts(path)
    assert "\n" not in str(error.value)


def test_text_in_a_column_of_chats_is_taken_when_it_is_named(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text('messages\n"[{""role"": ""user""}]"\n')
    with pytest.raises(InputError, match="name the column with --column to have the text as it is"):
        load_prompts(path)
    assert load_prompts(path, "messages") == ['[{"role": "user"}]']


def test_chats_are_not_joined(tmp_path):
    path = write(tmp_path / "p.jsonl", "messages", [SHORT])
    with pytest.raises(InputError, match="has no text in column 'id': only texts can be joined"):
        load_prompts(path, "id,messages")


def test_chats_of_parquet_that_lie(tmp_path):
    """A large text that is written once and meant many times; other types; bytes."""
    path = tmp_path / "p.parquet"
    roles, texts = pa.array(["user"] * 100), pa.array(["x" * (12 << 20)])
    chats = pa.StructArray.from_arrays(
        [roles, pa.DictionaryArray.from_arrays(pa.array([0] * 100), texts)], names=["role", "content"]
    )
    # As a writer that is not Arrow's: only the reader can then keep the text in its dictionary.
    pq.write_table(
        pa.table({"messages": pa.ListArray.from_arrays(pa.array([0, 100]), chats)}), path, store_schema=False
    )
    assert path.stat().st_size < 2 << 20
    pool, before = pa.proxy_memory_pool(pa.default_memory_pool()), pa.default_memory_pool()
    pa.set_memory_pool(pool)
    try:
        with pytest.raises(
            InputError, match="column 'messages' has more text than prompt files are read with"
        ):
            load_prompts(path)
    finally:
        pa.set_memory_pool(before)
    assert pool.max_memory() < 100 << 20  # all of them would be 1.2 GB
    for values, held in [
        ([b"a"], r"holds bytes \(binary\), expected text: decode"),
        ([["a"]], "holds list<"),
    ]:
        pq.write_table(pa.table({"prompt": pa.array(values)}), path)
        with pytest.raises(InputError, match=held):
            load_prompts(path)
