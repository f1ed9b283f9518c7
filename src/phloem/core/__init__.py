"""Floor 0: plain types that every other floor shares."""
