"""The one Transformer: its options, the default of every hook, the layer, the stack, and models made of it."""
