"""Many songs: finds them, separates them, records what is done, and spreads the work over a cluster."""
