"""Floor 1: where a process stands among the ranks of a model, as values that are passed down."""
