"""What tests of command line share."""

import shutil
import sys

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from shipsfast import cli
from shipsfast.demo.run import MODEL
from tests.support.models import _GQA


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A model folder and prompts that the repository does not contain."""
    folder = tmp_path_factory.mktemp("model")
    config = LlamaConfig(
        **(_GQA | dict(vocab_size=768, pad_token_id=None, bos_token_id=None, eos_token_id=None))
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / name, folder / name)
    return folder


def run(capsys, *args: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of the command, run in this process."""
    before = sys.argv
    sys.argv = ["shipsfast", *map(str, args)]
    try:
        cli.main()
        status = 0
    except SystemExit as stop:
        status = stop.code or 0
    finally:
        sys.argv = before
    out, err = capsys.readouterr()
    return status, out, err


def refused(capsys, *args: str) -> str:
    """The one line that a refusal prints; nothing else may be on either stream."""
    status, out, err = run(capsys, *args, "--quiet")
    assert status == 2, (out, err)
    assert out == ""
    assert err.startswith("shipsfast: ") and err.count("\n") == 1, err
    return err
