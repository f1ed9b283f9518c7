"""A stand-in; see `peer_server.py`."""
