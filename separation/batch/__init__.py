"""Many songs: found, separated, recorded, spread over a cluster."""
