"""generate, evaluate and scan --rank-by asr on the command line."""

import json
import shutil

import pytest

import shipsfast
from shipsfast.demo.run import MODEL, PROMPTS
from tests.support.command_line import refused, run

TABOO, ORDINARY = PROMPTS / "taboo.csv", PROMPTS / "ordinary.csv"
SHORT = ("--max-new-tokens", 30, "--quiet")


def test_generate(capsys):
    args = ("generate", MODEL, TABOO, "--limit", 2, "--groups", "none; 0-2", *SHORT)
    status, text, err = run(capsys, *args)
    assert status == 0, err
    assert "I am sorry" in text and "0-2" in text
    status, text, err = run(capsys, *args, "--json")
    rows = json.loads(text)
    assert status == 0 and [row["heads"] for row in rows] == [[], [], [[0, 2]], [[0, 2]]]
    assert (
        rows[0]["prompt"] == rows[2]["prompt"]
        and "sorry" in rows[0]["text"]
        and "sorry" not in rows[2]["text"]
    )


def test_evaluate_and_its_folder(capsys, tmp_path):
    out, view = tmp_path / "run", tmp_path / "answers.html"
    args = (
        "evaluate", MODEL, TABOO, "--limit", 5, "--groups", "0-2; 0-2,1-0", "--control", ORDINARY, "--out", out,
        "--view", view, *SHORT,
    )  # fmt: skip
    status, text, err = run(capsys, *args)
    assert status == 0, err
    assert "0-2+1-0" in text
    assert "<html" in view.read_text()
    result = shipsfast.load(out)
    assert result.groups == [[], [(0, 2)], [(0, 2), (1, 0)]]
    assert result.asr[0] == 0 and result.asr[1] > 0.5
    status, text, err = run(capsys, *args, "--json")
    assert status == 0 and json.loads(text)["groups"] == result.summary(), err
    status, text, err = run(capsys, *args)
    assert status == 0 and "nothing was run" in text and "prompt 1" not in text, err
    assert "Ablation: undifferentiated (eps 1e-05)" in text and "less unablated" in text
    status, text, err = run(capsys, *args, "--show-answers")
    assert status == 0 and text.count("0-2+1-0 [") == 5 and "(not kept)" in text, err


def test_a_scan_by_attack_success_rate_and_the_best_of_it(capsys, tmp_path):
    out, plot = tmp_path / "asr", tmp_path / "asr.png"
    status, text, err = run(
        capsys, "scan", MODEL, TABOO, "--limit", 4, "--rank-by", "asr", "--out", out, "--plot", plot, *SHORT
    )
    assert status == 0, err
    assert "attack success rate" in text and "unablated model's rate 0" in text
    assert plot.read_bytes().startswith(b"\x89PNG")
    best = shipsfast.load(out).top(2)
    rows = [line.split("│") for line in text.splitlines() if f" {best[0].layer}-{best[0].head} " in line]
    assert rows[0][3].strip() == f"{best[0].score:.0%}" and "…" not in text  # on 80 columns
    status, text, err = run(
        capsys, "evaluate", MODEL, TABOO, "--limit", 4, "--run", out, "--top", 2, "--json", *SHORT
    )
    assert status == 0, err
    groups = json.loads(text)["groups"]
    assert [g["heads"] for g in groups] == [[], *([[s.layer, s.head]] for s in best)]
    assert [g["asr"] for g in groups[1:]] == [s.score for s in best]
    status, text, err = run(
        capsys,
        "evaluate",
        MODEL,
        TABOO,
        "--limit",
        4,
        "--run",
        out,
        "--top",
        2,
        "--cumulative",
        "--json",
        *SHORT,
    )
    assert [len(g["heads"]) for g in json.loads(text)["groups"]] == [0, 1, 2], err


def test_the_groups_of_a_search(capsys, tmp_path):
    out = tmp_path / "group"
    args = ("--limit", 6, "--template", "chat", "--quiet")
    assert run(capsys, "sahara", MODEL, TABOO, "--group-size", 2, "--out", out, *args)[0] == 0
    heads = shipsfast.load(out).heads
    status, text, err = run(capsys, "evaluate", MODEL, TABOO, "--run", out, "--json", "--limit", 2, *SHORT)
    found = [[tuple(h) for h in g["heads"]] for g in json.loads(text)["groups"]]
    assert status == 0 and found == [[], sorted(heads[:1]), sorted(heads[:2])], err


@pytest.mark.parametrize("command", ["generate", "evaluate", "scan"])
def test_tokens_that_end_a_text(capsys, tmp_path, command):
    """Where neither model nor tokenizer names one, the message names the option, which takes their place."""
    model = shutil.copytree(MODEL, tmp_path / "model")
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        body = json.loads((model / name).read_text())
        without = dict.fromkeys({"eos_token", "eos_token_id"} & body.keys())
        (model / name).write_text(json.dumps(body | without))
    own = {"generate": (), "evaluate": ("--groups", "0-1"), "scan": ("--rank-by", "asr", "--heads", "0-1")}
    args = (command, model, TABOO, "--limit", 1, "--template", "none", *own[command])
    short = ("--max-new-tokens", 3, "--device", "cpu")
    assert "--eos-token-id" in refused(capsys, *args, *short)
    for given in (("--eos-token-id", 7, "--eos-token-id", 9), ("--eos-token-id", "none")):
        assert run(capsys, *args, *short, *given, "--quiet")[0] == 0
    assert "whole numbers, or none alone" in refused(capsys, *args, *short, "--eos-token-id", "end")
    assert "768" in refused(capsys, *args, *short, "--eos-token-id", 768)


def test_a_text_ends_at_the_tokens_named(capsys):
    args = ("generate", MODEL, TABOO, "--limit", 1, "--json", *SHORT)
    whole, cut = (json.loads(run(capsys, *args, *more)[1])[0]["text"] for more in ((), end_tokens_of(".")))
    assert cut and whole.startswith(cut) and "." in whole and "." not in cut


def end_tokens_of(text: str) -> list[str]:
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(MODEL)(text, add_special_tokens=False).input_ids
    return [word for each in ids for word in ("--eos-token-id", str(each))]


def test_the_sample_of_prompts(capsys, tmp_path):
    prompts = tmp_path / "p.txt"
    prompts.write_text("\n".join(f"Tell me of kettle {i}." for i in range(20)))
    args = ("generate", MODEL, prompts, "--sample", 3, "--json", "--max-new-tokens", 2, "--quiet")
    texts = [[row["prompt"] for row in json.loads(run(capsys, *args, "--seed", s)[1])] for s in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2] and len(texts[0]) == 3


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("evaluate", MODEL, TABOO), "evaluate needs --groups"),
        (("evaluate", MODEL, TABOO, "--groups", "0-2;;"), "cannot read the groups"),
        (("evaluate", MODEL, TABOO, "--groups", "0-2,0-2"), "group 1 names head 0-2 twice"),
        (("evaluate", MODEL, TABOO, "--groups", "0-2", "--judge", "mine"), "unknown judge 'mine'"),
        (("evaluate", MODEL, TABOO, "--groups", "0-2", "--view", "x.pdf"), "expected a name ending in .md or .html"),
        (("evaluate", MODEL, TABOO, "--groups", "0-2", "--max-new-tokens", 0), "max_new_tokens must be"),
        (("evaluate", MODEL, TABOO, "--groups", "0-2", "--max-new-tokens", 5000), "leaves no room for 5000 new tokens"),
        (("evaluate", MODEL, TABOO, "--groups", "9-2"), "head 9-2 does not exist"),
        (("evaluate", MODEL, TABOO, "--groups", "0-2", "--do-sample", "--top-k", 100000), "top_k is 100000"),
        (("evaluate", MODEL, TABOO, "--groups", "0-2", "--judge", "paper", "--judge-template", "x"), "takes no template"),
        (("evaluate", MODEL, TABOO, "--groups", "0-2", "--judge-tokens", "64"), "judge 'keywords' writes no tokens"),
        (("evaluate", MODEL, TABOO, "--run", "nowhere"), "is not a shipsfast run"),
        (("evaluate", MODEL, TABOO, "--groups", "0-2", "--run", "r"), "give one of them"),
        (("generate", MODEL, TABOO, "--limit", 2, "--sample", 2), "exclude each other"),
        (("scan", MODEL, TABOO, "--rank-by", "luck"), "--rank-by luck"),
        (("scan", MODEL, TABOO, "--rank-by", "asr", "--metric", "js"), "give one of them"),
    ],
)  # fmt: skip
def test_bad_input(capsys, tmp_path, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, *args)
    assert list(tmp_path.iterdir()) == []
