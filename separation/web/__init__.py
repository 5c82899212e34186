"""Servers: the local page, and what the container needs to serve strangers."""
