"""Recording: the verifier writes, every drafter reads along; and the live loop that proves the replay.

lane, sampling               a model with its ragged KV cache; distributions and draws
generate, reading, rollouts  the verifier's text, the teacher-forced pass over it, the drafters' free runs
record, recorded_drafts      from there to the columns of a TraceSet
shards                       a recording in progress, on disk
live                         speculative decoding with real KV caches
"""
