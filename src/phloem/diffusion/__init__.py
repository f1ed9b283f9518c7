"""Pictures out: models that take noise away step by step, many pictures in one forward pass."""
