"""Prompt files in every form users bring, and templates."""

import json
import sys
from types import SimpleNamespace

import pandas as pd
import pytest

from shipsfast.errors import InputError
from shipsfast.prompts.datasets import load_prompts, read_prompts, sample_prompts
from shipsfast.prompts.tokens import to_token_ids, tokenize

TEXTS = ["How do I mend a kettle?", 'Say "hello",\nplease', "Ünïcode & <tags>"]


@pytest.mark.parametrize("column", ["input", "Goal", "PROMPT", "query", "Behavior"])
@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_columns_are_found_in_any_case(tmp_path, suffix, column):
    frame = pd.DataFrame({"id": [1, 2, 3], column: TEXTS})
    path = tmp_path / f"p.{suffix}"
    if suffix == "csv":
        frame.to_csv(path, index=False, encoding="utf-8-sig", lineterminator="\r\n")
    elif suffix == "jsonl":
        path.write_text(
            "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in frame.to_dict("records")), "utf-8"
        )
    else:
        frame.to_parquet(path)
    assert [" ".join(t.split()) for t in load_prompts(path)] == [" ".join(t.split()) for t in TEXTS]


def test_the_named_column_wins(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text("goal,other\na,b\nc,d\n")
    assert load_prompts(path, "other") == ["b", "d"]
    assert load_prompts(path) == ["a", "c"]


def test_text_files_hold_one_prompt_a_line(tmp_path):
    path = tmp_path / "p.txt"
    path.write_bytes("\ufefffirst\r\n\r\nsecond, with comma\n".encode())
    assert load_prompts(path) == ["first", "second, with comma"]


def test_csv_keeps_text_as_it_is(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text("prompt\n007\nNA\n1e5\n")
    assert load_prompts(path) == ["007", "NA", "1e5"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.csv", b"", "is empty"),
        ("p.csv", b"prompt\n", "holds no prompts"),
        ("p.csv", b"a,b\n1,2\n", "no column named .* it has a, b"),
        ("p.csv", b"prompt\nx\n\"\"\ny\n", "row 2 is empty"),
        ("p.csv", b"prompt\n\xff\xfe\n", "not UTF-8"),
        ("p.jsonl", b"{\"prompt\": \"x\"}\nnonsense\n", "not JSON lines"),
        ("p.jsonl", b"[1]\n", "row 1 is a list whose element 1 is no message"),
        ("p.jsonl", b"{\"prompt\": 3}\n", "row 1 is a value of type int: expected text"),
        ("p.txt", b"\n\n", "holds no prompts"),
        ("p.txt", b"\xff\xfe", "not UTF-8"),
        ("p.parquet", b"not parquet", "cannot be read as parquet"),
        ("p.xlsx", b"x", "is not a prompt file"),
    ],
)  # fmt: skip
def test_bad_files_are_named(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        load_prompts(path)
    assert str(path) in str(error.value)


def test_missing_file_and_column(tmp_path):
    with pytest.raises(InputError, match="no prompt file at"):
        load_prompts(tmp_path / "absent.csv")
    path = tmp_path / "p.csv"
    path.write_text("goal\nx\n")
    with pytest.raises(InputError, match="no column 'text': it has goal"):
        load_prompts(path, "text")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("advbench.csv", "goal,target\n\"Mend, then\nfill, a kettle\",\"Sure, here is how\"\nLight a lantern,Sure\n"),
        (
            "jailbreakbench.csv",
            "Index,Goal,Target,Behavior,Category,Source\n0,\"Mend, then\nfill, a kettle\",Sure,Kettles,Tin,Original\n1,Light a lantern,Sure,Lanterns,Oil,Original\n",
        ),
        ("reference.csv", "input,category\n\"Mend, then\nfill, a kettle\",tin\nLight a lantern,oil\n"),
    ],
)  # fmt: skip
def test_the_public_sets_in_their_published_forms(tmp_path, name, text):
    expected = ["Mend, then\nfill, a kettle", "Light a lantern"]
    (tmp_path / name).write_text(text)
    assert load_prompts(tmp_path / name) == expected
    pd.read_csv(tmp_path / name).to_parquet(tmp_path / "same.parquet")
    assert load_prompts(tmp_path / "same.parquet") == expected


def test_malicious_instruct_has_one_prompt_a_line(tmp_path):
    (tmp_path / "MaliciousInstruct.txt").write_text(
        "How to mend, then fill, a kettle?\nHow to light a lantern?\n"
    )
    assert load_prompts(tmp_path / "MaliciousInstruct.txt") == [
        "How to mend, then fill, a kettle?",
        "How to light a lantern?",
    ]


def test_rare_separators_stay_inside_a_prompt(tmp_path):
    text = "one\u2028two\x0bthree\x85four"
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": text}, ensure_ascii=False) + "\n", "utf-8")
    (tmp_path / "p.txt").write_text(text + "\nlast", "utf-8")
    assert load_prompts(tmp_path / "p.jsonl") == [text]
    assert load_prompts(tmp_path / "p.txt") == [text, "last"]


def test_folders_in_the_layout_of_the_hub(tmp_path):
    folder = tmp_path / "set"
    (folder / "data").mkdir(parents=True)
    (folder / "README.md").write_text("A set.")
    with pytest.raises(InputError, match="is a folder without a csv, tsv, jsonl or parquet file"):
        load_prompts(folder)
    for hidden in (folder / ".cache", folder / "data"):
        hidden.mkdir(exist_ok=True)
    (folder / ".cache" / "old.csv").write_text("goal\nold\n")
    part = folder / "data" / "train-00000-of-00002.parquet"
    pd.DataFrame({"goal": ["a", "b"]}).to_parquet(part)
    with pytest.raises(InputError, match="holds 1 of the 2 parts of train"):
        load_prompts(folder)
    pd.DataFrame({"goal": ["c"]}).to_parquet(folder / "data" / "train-00001-of-00002.parquet")
    assert load_prompts(folder) == ["a", "b", "c"]
    (folder / "data" / "test-00000-of-00001.parquet").write_bytes(part.read_bytes())
    with pytest.raises(
        InputError, match=r"holds several data files: name one of data.test-00000-of-00001\.parquet, "
    ):
        load_prompts(folder)

    folder = tmp_path / "csv"
    folder.mkdir()
    (folder / "harmful-behaviors.csv").write_text("Goal,Target,Behavior,Category,extra\na,t,b,k,c\n")
    assert load_prompts(folder) == ["a"]
    assert load_prompts(folder, "extra") == ["c"]
    (folder / "benign-behaviors.csv").write_text("Goal\na\n")
    with pytest.raises(InputError, match="several data files: name one of benign-behaviors.csv, harmful"):
        load_prompts(folder)


class Rows(dict):
    """A split, as the datasets library gives it."""

    @property
    def column_names(self):
        return list(self)


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the datasets library; gives the list of what was asked for."""
    asked = []
    rows = Rows(
        {
            "Index": [0, 1],
            "Goal": ["mend a kettle", "light a lantern"],
            "Target": ["Sure", "Sure"],
            "Behavior": ["Kettles", "Lanterns"],
            "Category": ["Tin", "Oil"],
            "Source": ["Original", "Original"],
        }
    )

    def load_dataset(path, name=None):
        asked.append((path, name))
        if path == "nobody/nothing":
            raise FileNotFoundError("Dataset 'nobody/nothing'\ndoesn't exist on the Hub")
        if path == "village/one":
            second = {"holes": None, "bytes": b"b", "chat": [{"role": "user", "content": "b"}]}.get(name, "b")
            return {"train": Rows({"prompt": ["a", second]})}
        return {"harmful": rows, "benign": rows}

    config = SimpleNamespace(HF_HUB_OFFLINE=False)
    library = SimpleNamespace(__version__="4.1.0", load_dataset=load_dataset, config=config)
    monkeypatch.setitem(sys.modules, "datasets", library)
    monkeypatch.setattr("shipsfast.prompts.datasets.unreachable", lambda: None)
    return asked


def test_data_sets_of_the_hub(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    goals = ["mend a kettle", "light a lantern"]
    assert load_prompts("JailbreakBench/JBB-Behaviors:behaviors:harmful") == goals
    assert load_prompts("JailbreakBench/JBB-Behaviors::benign") == goals
    assert load_prompts("JailbreakBench/JBB-Behaviors::benign", "Behavior") == ["Kettles", "Lanterns"]
    found = read_prompts("village/one")
    assert found[:2] == (
        ["a", "b"],
        {"data_set": "village/one", "split": "train", "rows": 2, "columns": ["prompt"]},
    )
    assert hub == [
        ("JailbreakBench/JBB-Behaviors", "behaviors"),
        ("JailbreakBench/JBB-Behaviors", None),
        ("JailbreakBench/JBB-Behaviors", None),
        ("village/one", None),
    ]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "JailbreakBench/JBB-Behaviors",
            "has several splits: name one of harmful, benign as JailbreakBench/JBB-Beh",
        ),
        ("JailbreakBench/JBB-Behaviors:behaviors", "as JailbreakBench/JBB-Behaviors:behaviors:SPLIT"),
        ("JailbreakBench/JBB-Behaviors:x:train", "has no split 'train': name one of harmful, benign"),
        (
            "nobody/nothing",
            "no prompt file at nobody/nothing, and it cannot be loaded .* 'nobody/nothing' doesn't",
        ),
        ("village/one:holes", "village/one:holes: the prompt in row 2 is empty"),
        (
            "village/one:bytes",
            "village/one:bytes: the prompt in row 2 holds bytes: decode them to text first",
        ),
    ],
)
def test_data_sets_that_cannot_be_read(hub, tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message) as error:
        load_prompts(name)
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="village/one has no column 'text': it has prompt"):
        load_prompts("village/one", "text")


def test_without_a_hub_only_what_was_downloaded_is_looked_for(hub, tmp_path, monkeypatch):
    """The library itself tries for most of a minute."""
    import datasets

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("shipsfast.prompts.datasets.unreachable", lambda: "the hub is out at sea")
    offline, load = [], datasets.load_dataset
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *x: offline.append(datasets.config.HF_HUB_OFFLINE) or load(*x)
    )
    assert load_prompts("village/one") == ["a", "b"]  # as one that was downloaded
    with pytest.raises(InputError, match="no prompt file at nobody/nothing, .*: the hub is out at sea"):
        load_prompts("nobody/nothing")
    assert offline == [True, True]
    assert datasets.config.HF_HUB_OFFLINE is False


@pytest.mark.parametrize(
    "name", ["absent", "absent.csv", "a/b.csv", "a/b/c", "/a/b", "./a/b.txt", "here/absent", "a/b:c:d:e"]
)
def test_slips_of_the_pen_go_to_no_server(hub, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    with pytest.raises(InputError, match="no prompt file at"):
        load_prompts(name)
    assert hub == []


def test_the_datasets_library_is_asked_for_only_where_it_is_needed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match="no prompt file at a/b, .* needs the datasets library: pip install"):
        load_prompts("a/b")
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(__version__="3.6.0"))
    with pytest.raises(InputError, match="datasets 3.6.0 can run code of a data set: pip install -U"):
        load_prompts("a/b")


def test_samples():
    prompts = [f"kettle {i}" for i in range(50)]
    assert sample_prompts(prompts) == prompts
    assert sample_prompts(prompts, limit=3) == prompts[:3]
    assert sample_prompts(prompts, limit=99) == prompts
    some = sample_prompts(prompts, sample=10, seed=4)
    assert len(set(some)) == 10 and some == sorted(some, key=prompts.index)
    assert some == sample_prompts(prompts, sample=10, seed=4) != sample_prompts(prompts, sample=10, seed=5)
    assert some != prompts[:10]
    assert sample_prompts(prompts, sample=50) == prompts
    assert sample_prompts(["same", "same"], sample=2) == ["same", "same"]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"limit": 3, "sample": 3}, "exclude each other"),
        ({"limit": 0}, "--limit must be a whole number of at least 1"),
        ({"sample": 0}, "--sample must be a whole number of at least 1"),
        ({"sample": 1.5}, "--sample must be a whole number"),
        ({"sample": 4}, "--sample 4: there are 3 prompts to draw from"),
        ({"sample": 2, "seed": -1}, "--seed must be a whole number of at least 0"),
    ],
)
def test_bad_samples(how, message):
    with pytest.raises(InputError, match=message):
        sample_prompts(["a", "b", "c"], **how)


class Tokenizer:
    """Words to numbers; begins every text with 1, as tokenizers with a start token do."""

    chat_template = "yes"

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [1] * add_special_tokens + [len(word) for word in text.split()]}

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        assert not tokenize and add_generation_prompt
        return f"<s> user {messages[0]['content']} reply"


def test_templates():
    tok = Tokenizer()
    assert tokenize(tok, ["ab c"]) == [[1, 2, 1]]
    assert tokenize(tok, ["ab c"], "chat") == [[3, 4, 2, 1, 5]]
    assert tokenize(tok, ["ab c"], "query-answer") == [[1, 2, len("Query:ab"), 1, 2, len("Answer:")]]
    assert tokenize(tok, ["a {b}"], "x {prompt} yy") == [[1, 1, 1, 3, 2]]
    with pytest.raises(InputError, match="unknown template 'chatty'"):
        tokenize(tok, ["a"], "chatty")
    tok.chat_template = None
    with pytest.raises(InputError, match="no chat template"):
        tokenize(tok, ["a"], "chat")


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "no prompts"),
        ("text", "single string"),
        (["a", " "], "prompt 1 is empty"),
        ([[1], []], "prompt 1 has no tokens"),
        ([[1], "a"], "prompt 1 is neither"),
        ([3], "prompt 0 is neither"),
        (["a"], "tokenizer is needed"),
    ],
)
def test_bad_prompts(prompts, message):
    with pytest.raises(InputError, match=message):
        to_token_ids(prompts, None if message.startswith("tokenizer") else Tokenizer())
