"""The growing batch: ablations, the rows that carry them, the layers they pass, and the memory they take. Knows layers, not
scores. May import models and what is below."""
