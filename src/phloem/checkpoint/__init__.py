"""What can be known of a checkpoint without torch: its configuration, its tensors, its GGUF metadata."""
