"""Fuzz targets: what reads files that somebody else made. See docs/fuzzing.md."""
