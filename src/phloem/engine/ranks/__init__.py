"""Steps that several ranks compute together."""
