"""Text in, async text out: what the HTTP door, the in-process engine and tools share. Free of HTTP."""
