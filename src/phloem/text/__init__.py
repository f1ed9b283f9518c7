"""Between text and tokens, on both sides of a request: tokenizers, templates, formats of calls and reasoning."""
