"""Cross-entropy of a causal language model without its logits: see `deferred` for how, `chunked` for the arithmetic."""
