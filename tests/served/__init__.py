"""The HTTP API, proved on Cog's real server."""
