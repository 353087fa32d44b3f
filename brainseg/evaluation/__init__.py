"""Scores of several models on the same cases, compared, and the report."""
