"""The listening page of a song, and the picture of it."""
