"""One forward step over a paged KV cache, and who owns which block."""
