"""JSON schemas: what they ask for, and rewriting what no grammar engine has."""
