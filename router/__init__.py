"""Requests in, placements and tokens out."""
