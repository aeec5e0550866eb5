"""Data: source files, rows, columns, tokenizers, sample files and the order of samples."""
