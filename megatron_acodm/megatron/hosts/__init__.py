"""Training scripts of others, driven unedited: one module a host, and what it needs."""
