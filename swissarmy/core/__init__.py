"""The idea: hooks, mixins, how they compose, configurations, weight maps, errors. Knows no network."""
