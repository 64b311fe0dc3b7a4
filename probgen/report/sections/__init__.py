"""The sections of a run's report, one a file: each has `tell(story)` and takes what it finds."""
