"""Many servers behind one address: no model, no torch, bytes passed on as they come."""
