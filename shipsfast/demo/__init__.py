"""A small village told in text, a model trained to live in it, and the prompts that show its safety heads."""
