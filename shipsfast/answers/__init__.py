"""What whole answers say: generation with heads off, judges, attack success rates, control. May import results and what is
below; knows nothing of scans."""
