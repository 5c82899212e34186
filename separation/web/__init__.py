"""The local page, and what servers share."""
