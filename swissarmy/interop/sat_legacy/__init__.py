"""Checkpoints of the older SAT (SwissArmyTransformer, 2021 to 2024): read safely, and brought along."""
