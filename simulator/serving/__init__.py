"""The serving engine: scheduler, KV cache, batching, replicas and the pieces put together."""
