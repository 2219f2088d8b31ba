"""Prompts: files and data sets, templates, token ids. Knows neither models nor runs nor tensors."""
