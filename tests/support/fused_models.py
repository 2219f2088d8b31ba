"""Families whose layers have a fused way, and prompts that share a stem."""

SHARED = [5, 9, 17, 23]
PROMPTS = [SHARED + [3, 8, 40, 41], SHARED + [7], SHARED + [3, 8, 11, 50, 51, 52, 9, 4, 1], SHARED]
FUSED = [
    "llama-mha", "llama-gqa", "llama-mqa", "mistral-window", "qwen2-gqa", "qwen3-qknorm", "gemma2-softcap-window",
]  # fmt: skip
