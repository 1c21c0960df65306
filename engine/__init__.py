"""What computes: the model over a paged KV cache, the sampler, and the step interface to them."""
