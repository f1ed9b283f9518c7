"""One file per endpoint group."""
