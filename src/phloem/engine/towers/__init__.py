"""What stands for pictures and sounds in a step."""
