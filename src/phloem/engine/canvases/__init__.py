"""Texts that are written by diffusion: blocks of places that are filled, or drawn anew."""
