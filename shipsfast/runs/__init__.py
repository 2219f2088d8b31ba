"""Run folders: the manifest, its form, parts, the lock, what makes two runs the same, and checking one. Knows neither models
nor prompts nor what the numbers mean."""
