"""Trained adapters behind a server."""
