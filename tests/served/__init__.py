"""Tests of the HTTP API on Cog's real server."""
