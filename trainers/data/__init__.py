"""Rows, columns, tokenizers, samples and their order."""
