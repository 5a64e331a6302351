"""Plain parts that know nothing of hooks: norms, rotary, masks, the attention kernel, MLP, the key-value cache."""
