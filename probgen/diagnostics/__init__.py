"""Diagnostics: one question put to a posterior a file."""
