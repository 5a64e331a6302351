"""From paths to batches.

`sources` opens paths as records by number, `samples` makes of them what models read, `order` says which sample is when,
`loading` puts batches together and resumes. `build` joins them as a `DataConfig` says; `tokenize` and `survey` read
sources ahead of a run. Tokenizers live here too: `tokenizer`, `chat_template`, `encoding`, `text_stream`.
"""
