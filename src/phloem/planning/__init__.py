"""What a model needs of many devices, and how long its steps take there: arithmetic, nothing is run."""
