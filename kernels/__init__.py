"""Tensors in, tensors out: paged attention, GEMM, norms, rotary embedding, KV copies."""
