"""The listening page and its picture."""
