"""What measurements return: result objects, statistics, tables, plots and pages. May import engine and what is below."""
