"""Generation: filling sequences with the cache, strategies that choose tokens, text in and text out."""
