"""Judges: who says whether an answer is a refusal. May import what answers may."""
