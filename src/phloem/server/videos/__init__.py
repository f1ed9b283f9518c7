"""`/v1/videos`: films as jobs."""
