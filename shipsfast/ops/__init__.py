"""Tensors only: prefix trees, mask vectors, attention by every backend, operations between matrix products, divergences and
subspaces. Knows no model. May import kernels, csrc's extension, and the modules beside the rooms (errors, text, memory)."""
