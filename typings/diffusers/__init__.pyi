# Its own file names thousands of modules, which took a type checker a third of its time; we use a few names of it.
from typing import Any

def __getattr__(name: str) -> Any: ...
