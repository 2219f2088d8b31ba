"""A transformers model: loading it, finding its layers and heads, reaching its attention and its output head, streaming its
weights, and putting it back. May import prompts, runs and ops."""
