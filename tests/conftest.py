"""Set-up that must happen before any test module is imported."""

import os

import torch

# With SHIPSFAST_TEST_GPU=1 and a GPU the kernel tests run compiled; otherwise Triton's interpreter runs them
# on the CPU, and it must be asked for before triton is imported.
TEST_GPU = os.environ.get("SHIPSFAST_TEST_GPU") == "1" and torch.cuda.is_available()
if not TEST_GPU:
    os.environ["TRITON_INTERPRET"] = "1"
