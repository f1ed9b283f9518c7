"""The op table in JAX: model files run unchanged over a stand-in for tensors, and whole steps are compiled."""
