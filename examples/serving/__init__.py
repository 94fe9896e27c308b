"""The parts of `examples/serve_many.py`.

adapters    which adapter is in which slot: loading, changed files, eviction by use
jobs        what the engine is asked for, and what it says to that
engine      the thread that decodes: rows of a cache, admission, one step for all
protocol    OpenAI's JSON: what a request may ask for, and how answers look
streams     bodies with a limit, server-sent events, clients that hang up
errors      errors as answers
http        the endpoints
"""
