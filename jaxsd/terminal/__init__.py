"""Pictures among the lines of a terminal that can show them, and nothing in one that cannot."""
