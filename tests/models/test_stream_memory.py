"""A model several times larger than the memory allowed is scanned, and cannot be loaded.

The limit is the hard RLIMIT_AS of a process of its own: all address space, so mapped files and the allocator's reserves
count too, and neither the page cache nor a lazy mapping can hide weights. What imports and thread pools take is measured
first, after a scan of a tiny model, and the allowance is added to it.
"""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import shipsfast
from shipsfast.models.loading import load_model
from tests.support.checkpoints import save

ALLOWED = 126 << 20
LAYERS, HEADS = 48, 4
PROMPTS = [[5, 6, 7, 8, 9, 10], [5, 6, 9, 11]]
PLAN = {"max_memory": 20 << 20, "progress": False, "heads": [[layer, 0] for layer in range(0, LAYERS, 4)]}

CHILD = """
import json, os, resource, sys, threading
os.environ["OMP_NUM_THREADS"] = "2"  # the pool of threads that the scan will use must be there before the limit is set
import numpy as np, torch
import shipsfast
from shipsfast.models.loading import load_model

folder, tiny, out, allowed, prompts, plan = sys.argv[1:4] + [json.loads(x) for x in sys.argv[4:7]]
stream = sys.argv[7] == "stream"
torch.set_num_threads(2)
threading.stack_size(1 << 20)  # a thread's stack is a reserve too: 8 MiB, of which next to nothing is used
shipsfast.scan(load_model(tiny, stream=stream, device="cpu"), prompts, **plan | {"heads": None})
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + allowed, size + allowed))
try:
    torch.empty(2 * allowed, dtype=torch.uint8)
except RuntimeError:
    pass
else:
    sys.exit("the limit does not hold")
result = shipsfast.scan(load_model(folder, stream=stream, device="cpu"), prompts, **plan)
np.save(out, result.kl)
size_after = next(int(x.split()[1]) for x in open("/proc/self/status") if x.startswith("VmPeak")) * 1024
print(f"{(size_after - size) / 2**20:.0f} MiB more than before", file=sys.stderr)
"""


def config(**how) -> LlamaConfig:
    return LlamaConfig(vocab_size=256, num_attention_heads=HEADS, max_position_embeddings=64, **how)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and RLIMIT_AS is not enforced elsewhere")
def test_a_model_larger_than_the_memory_allowed(tmp_path):
    torch.manual_seed(0)
    wide = config(
        hidden_size=384, intermediate_size=1408, num_hidden_layers=LAYERS, num_key_value_heads=HEADS
    )
    folder = save(LlamaForCausalLM(wide), tmp_path / "wide", "9MB")
    tiny = save(
        LlamaForCausalLM(config(hidden_size=32, intermediate_size=64, num_hidden_layers=2)), tmp_path / "tiny"
    )
    size = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    assert size > 3 * ALLOWED and len(list(folder.glob("*.safetensors"))) >= LAYERS
    expected = shipsfast.scan(load_model(str(folder), device="cpu"), PROMPTS, **PLAN).kl

    def child(how: str):
        command = [
            sys.executable,
            "-c",
            CHILD,
            folder,
            tiny,
            tmp_path / how,
            *map(json.dumps, (ALLOWED, PROMPTS, PLAN)),
            how,
        ]
        env = os.environ | {"MALLOC_ARENA_MAX": "1", "PYTHONPATH": os.getcwd()}
        return subprocess.run(command, env=env, capture_output=True, text=True, check=False)

    whole = child("memory")
    assert whole.returncode != 0 and "the limit does not hold" not in whole.stderr
    assert "memory" in whole.stderr.lower(), whole.stderr[-2000:]
    assert not (tmp_path / "memory.npy").exists()
    streamed = child("stream")
    assert streamed.returncode == 0, streamed.stderr[-2000:]
    assert np.array_equal(np.load(tmp_path / "stream.npy"), expected, equal_nan=True)
