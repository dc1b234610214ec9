"""Our own engine: continuous batching and speculative decoding in torch; see `calibration.engines.own.engine`.

engine.py      the loop: plan, draft, verify, accept, roll back
scheduler.py   who is prefilled and who decodes, as in the simulated engine
drafting.py    drafters in a batch: models with KV caches, and proposers of given tokens
decoder.py     a Llama-like forward pass over the tokens of all requests, laid end to end
batch.py       where these tokens stand, and what each may look at
cache.py       their keys and values, paged or padded
blocks.py      the bookkeeping of that memory
"""
