"""The HTTP door: tokenise, submit, stream, detokenise. Neither torch nor the engine is imported here."""
