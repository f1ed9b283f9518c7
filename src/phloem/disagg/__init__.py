"""Prompts computed by one server and answers by another: prefill offers pages, decode fetches those that it lacks.

`wire.py` what the two say to each other · `bootstrap.py` how they find each other · `rooms.py` the prefill side ·
`arrivals.py` the decode side · `transports/` how pages get from the one to the other.
"""
