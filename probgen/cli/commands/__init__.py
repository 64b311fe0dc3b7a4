"""The commands, one a file: `run(words, progress) -> Answer`."""
