"""The role that admits KV blocks and writes tokens."""
