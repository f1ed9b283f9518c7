"""Tool-call formats: the file name is the parser's name."""
