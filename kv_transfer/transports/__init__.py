"""The channels that carry frames of KV blocks between two agents."""
