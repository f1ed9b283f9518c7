"""Replicas behind a gateway in virtual time: the real scheduler, cache and policies; steps only take time."""
