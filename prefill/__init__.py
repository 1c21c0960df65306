"""The prefill node: computes a prompt's KV chunk by chunk and hands it over while computing."""
