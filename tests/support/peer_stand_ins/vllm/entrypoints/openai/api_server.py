"""Stands in for vLLM's server."""

from peer_server import serve

if __name__ == "__main__":
    serve("vllm")
