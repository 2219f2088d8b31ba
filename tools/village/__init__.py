"""How the embedded model was made, and the pages of docs/ that are about it."""
