"""Assembles the engine and runs it: `core.py` the whole, in one thread; `process.py` that thread in a process of its
own, as the door sees it; `__main__.py` that process; `thread.py` it in this process.

`EngineProcess` and `EngineThread` are the two links a door may hold; both serve one core, so both serve alike.
"""
