"""The shared vocabulary: ids, errors, sampling, configuration, models, and the public client."""
