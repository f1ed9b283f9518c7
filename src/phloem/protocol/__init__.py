"""What HTTP and the engine in this process (`llm.py`) share: bodies and their checks, and the native API as data."""
