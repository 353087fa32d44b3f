"""Tables and pages of results without truth, and of the scores of a run."""
