"""Model-agnostic mixins, one idea a file; each opens with what it changes, which hooks, which parameters."""
