"""Weights that change while the engine runs, and memory that it lends out: what reinforcement learning asks for."""
