"""Speculative decoding: a runner around the runner, which puts drafts behind tokens and has them verified.

The parts: `drafters/` (one file each: where drafts come from), `texts` (what is known of each request), `controller`
(how many drafts pay, by measured times and acceptance), `runner` (the runner that the scheduler sees) and `assemble`
(which of this an engine has, and why).

Answers are those of decoding without it, token for token: every position is sampled with its own draw, and a draft only
counts while it is what was drawn (`engine/wanted.py`).
"""
