"""Stands in for SGLang's server."""

from peer_server import serve

if __name__ == "__main__":
    serve("sglang")
