#!/usr/bin/env bash
# The sdist builds a wheel, the wheel installs into an empty environment with what it declares, and from another folder a
# scan, a run folder, a page and the kernels' files are there. Also: no module of the tree is missing from the wheel.
set -euo pipefail
cd "$(dirname "$0")/.."
root="$PWD" python="$PWD/.venv/bin/python" place="$(mktemp -d)"
trap 'rm -rf "$place"' EXIT
pip="-m pip --disable-pip-version-check --quiet"

"$python" -c "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])" "$place" >"$place/log" 2>&1 ||
  { tail -20 "$place/log"; exit 1; }
mkdir "$place/unpacked" && tar -xzf "$place"/shipsfast-*.tar.gz -C "$place/unpacked" --strip-components=1
"$python" $pip wheel --no-build-isolation --no-deps -w "$place" "$place/unpacked"
echo "built $(basename "$place"/*.whl) from the sdist"

"$python" - "$place" <<'END'
import subprocess, sys, zipfile
from pathlib import Path

(wheel,) = Path(sys.argv[1]).glob("*.whl")
inside = set(zipfile.ZipFile(wheel).namelist())
tracked = subprocess.run(["git", "ls-files", "shipsfast", "kernels"], capture_output=True, text=True, check=True).stdout.split()
wanted = {f"shipsfast/{file}" if file.startswith("kernels/") else file for file in tracked}
missing = sorted(wanted - inside)
sys.exit(f"not in the wheel: {', '.join(missing)}" if missing else 0)
END

"$python" -m venv "$place/empty"
empty="$place/empty/bin"
"$empty/python" $pip install -c constraints.txt "$place"/*.whl
cd "$place"
unset PYTHONPATH
info="$("$empty/shipsfast" info)"
[[ "$info" == *"native extension: loaded"* ]] || { echo "$info"; exit 1; }
model="$("$empty/python" -c 'from shipsfast.demo.run import MODEL; print(MODEL)')"
printf 'How do I mend a kettle?\nTell me about the mill.\n' >prompts.txt
"$empty/shipsfast" scan "$model" prompts.txt --out run --plot heads.png -q
"$empty/shipsfast" verify run
"$empty/shipsfast" evaluate "$model" prompts.txt --groups "0-2" --max-new-tokens 8 --view answers.html -q >/dev/null
"$empty/python" - "$root" <<'END'
import sys
from pathlib import Path

import shipsfast
from shipsfast.kernels.launch_config import launch_config
import torch

place = Path(shipsfast.__file__).resolve()
assert Path(sys.argv[1]) not in place.parents, place
assert launch_config("tree_attention", torch.float32, 64, torch.device("cpu"), "leaves").block_m > 0
assert Path("answers.html").read_text("utf-8").startswith("<!doctype html>")
END
echo "the wheel works in an empty environment"
