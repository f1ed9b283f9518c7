"""KV pages: who owns which, where they are stored, which prefixes they hold."""
