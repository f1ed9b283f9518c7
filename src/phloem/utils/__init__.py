"""Small tools that know nothing of serving: files, registries, process messages, logs."""
