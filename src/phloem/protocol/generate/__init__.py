"""`/generate`, the native API."""
