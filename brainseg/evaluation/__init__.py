"""Score several models on the same cases, compare them, and write the report."""
