"""What the next token says: Ships, dataset-level Ships, Sahara, other metrics, and their checks. May import results and what is
below; knows nothing of answers."""
