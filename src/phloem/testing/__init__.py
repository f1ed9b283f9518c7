"""Stand-ins that are good enough to serve: a runner, a tokenizer, tiny checkpoints, an engine."""
