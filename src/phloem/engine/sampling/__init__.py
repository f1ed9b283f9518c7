"""How a token is chosen from logits, and what each request has asked of that."""
