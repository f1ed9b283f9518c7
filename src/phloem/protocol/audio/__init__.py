"""`/v1/audio/*` as data: bodies, the windows of a long audio, answers."""
