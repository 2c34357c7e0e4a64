"""How KV blocks move between workers: handoff, migration, transports."""
