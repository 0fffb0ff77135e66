"""DeepSeek sparse attention as vLLM sees it: caches, batch metadata and backends over ``kernels/``.

vLLM gives each cache of each layer a backend class, asks its builder for the metadata of a step, and binds
the cache's memory. There are two caches a layer, the latent one and the index keys; both have the same pages
and so the same metadata.
"""
