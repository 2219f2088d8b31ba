"""The kinds of runs."""

from __future__ import annotations

LABELS = ("complied", "refusal", "degenerate")
