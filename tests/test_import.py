"""The package is found wherever Python is started."""

import site
import subprocess
import sys
from pathlib import Path

import pytest

import shipsfast

BESIDE = Path(site.getsitepackages()[0]) / "shipsfast-checkout.pth"


@pytest.mark.skipif(not BESIDE.is_file(), reason="the environment was not made by make env")
def test_a_folder_of_the_same_name_is_no_package(tmp_path):
    """As that of a checkout is, in the folder that holds it."""
    (tmp_path / "shipsfast" / "shipsfast").mkdir(parents=True)
    code = "import shipsfast, shipsfast.kernels; print(shipsfast.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == shipsfast.__file__
