"""Puts the parts together: processes, membership, state, operators."""
