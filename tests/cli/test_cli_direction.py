"""The command direction, and scans along the direction that it found."""

import json

import shipsfast
from shipsfast import Direction
from shipsfast.demo.run import MODEL, PROMPTS
from tests.support.command_line import refused, run

SETS = (PROMPTS / "taboo.csv", PROMPTS / "ordinary.csv")


def test_direction_of_the_embedded_model(capsys, tmp_path):
    path = tmp_path / "refusal.safetensors"
    status, text, err = run(capsys, "direction", MODEL, *SETS, "--out", path)
    assert status == 0, err
    assert "AUROC" in text and "48 prompts less 48 prompts" in text and f"direction: {path}" in text
    assert "48 prompts of ordinary.csv" in err and "100%" in err
    found = Direction.load(path)
    assert found.record["template"] == "chat"
    assert found.auroc[found.layer] == 1
    few = tmp_path / "few.safetensors"
    status, text, err = run(
        capsys, "direction", MODEL, *SETS, "--limit", 4, "--layer", 2, "--position", -3,
        "--out", few, "--json", "--quiet",
    )  # fmt: skip
    assert status == 0, err
    said, found = json.loads(text), Direction.load(few)
    assert (said["layer"], said["position"], said["file"]) == (2, -3, str(few))
    assert (found.layer, found.position) == (2, -3)
    assert [len(said["identity"][name]) for name in ("prompts_a", "prompts_b")] == [4, 4]
    assert [said["record"]["prompts_from"][name] for name in ("limit",)] == [4]
    assert said["record"]["prompts_from"]["prompts_b"]["file"].endswith("ordinary.csv")


def test_scan_along_the_direction_of_a_file(capsys, tmp_path):
    path, out = tmp_path / "refusal.safetensors", tmp_path / "run"
    assert run(capsys, "direction", MODEL, *SETS, "--out", path, "--quiet")[0] == 0
    args = ("scan", MODEL, SETS[0], "--limit", 4, "--metric", f"projection:{path}", "--out", out)
    status, text, err = run(capsys, *args)
    assert status == 0, err
    assert "change along refusal after layer 1" in text and "0-2" in text
    found = shipsfast.load(out)
    assert found.metric["name"] == "refusal@1" and (found.scores[:, 2:] == 0).all()
    assert found.top(1)[0][:2] == (0, 2)
    status, text, err = run(
        capsys, "scan", MODEL, SETS[0], "--limit", 4, "--metric", "kl", "--metric", f"projection:{path},3", "--quiet"
    )  # fmt: skip
    assert status == 0, err
    assert "change along refusal after layer 3" in text
    status, text, err = run(
        capsys, "scan", MODEL, SETS[0], "--limit", 4, "--metric", f"projection:{path},0", "--plan", "--quiet"
    )
    assert status == 0, err
    assert "16 heads of 4 layers" in text and "1 block of at most 4 heads" in text


def test_refusals(capsys, tmp_path):
    assert "layer 4: the model has 4 decoder layers" in refused(
        capsys, "direction", MODEL, *SETS, "--layer", 4
    )
    assert "same tokens" in refused(capsys, "direction", MODEL, SETS[0], SETS[0])
    line = refused(capsys, "direction", MODEL, *SETS, "--out", SETS[0] / "d.safetensors")
    assert "is not a folder that can be written to" in line
    assert "cannot be read as a direction" in refused(
        capsys, "scan", MODEL, SETS[0], "--metric", f"projection:{SETS[0]}"
    )
    assert "nothing.csv" in refused(capsys, "direction", MODEL, SETS[0], tmp_path / "nothing.csv")
