"""What clients may ask and what they are answered, as data and without HTTP: bodies, their checks, conversions.

The routes of `server` and the engine in this process (`llm.py`) speak it alike.
"""
