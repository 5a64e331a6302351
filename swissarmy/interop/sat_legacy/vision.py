"""ViT: patches, a class token among the words, and tables of positions that one release named after their grid."""

import re
from collections.abc import Mapping

from swissarmy.core.errors import ConfigError
from swissarmy.core.weight_map import WeightMap, joined, same
from swissarmy.interop.sat_legacy.facts import ArgumentName, Arguments, shape_of
from swissarmy.interop.sat_legacy.layout import (
    DEFAULT_EPSILON,
    POSITIONS,
    WORDS,
    Checkpoint,
    Found,
    backbone_rules,
)


def vit(checkpoint: Checkpoint) -> Found:
    """ViT: the class token is a word, and positions are a table of their own name in 0.1.9."""
    facts, arguments = checkpoint.facts(), checkpoint.arguments
    patches, table = "mixins.patch_embedding.proj.weight", _vit_positions(checkpoint)
    channels, rows, columns = shape_of(checkpoint.source, patches, dims=4)[1:]
    classifier = next(
        (name for name in ("classifier", "mixins.cls.classifier") if checkpoint.has(f"{name}.weight")), None
    )
    labels = 0 if classifier is None else shape_of(checkpoint.source, f"{classifier}.weight")[0]
    config = {
        "model_type": "vit",
        "architectures": ["ViTModel" if classifier is None else "ViTForImageClassification"],
        "hidden_size": facts.hidden_size,
        "num_hidden_layers": facts.num_layers,
        "num_attention_heads": facts.num_attention_heads,
        "intermediate_size": facts.intermediate_size,
        "hidden_act": "gelu",
        "layer_norm_eps": facts.epsilon or DEFAULT_EPSILON,
        "image_size": _vit_image_size(checkpoint, table, (rows, columns)),
        "patch_size": rows if rows == columns else [rows, columns],
        "num_channels": channels,
        "qkv_bias": facts.query_key_value_bias,
        **({"id2label": {str(label): f"LABEL_{label}" for label in range(labels)}} if labels else {}),
    }
    one_token_in_front: Mapping[ArgumentName, int] = {"pre_len": 1, "post_len": 0}
    for name, expected in one_token_in_front.items():
        if arguments.get(name, int, expected) != expected:
            raise ConfigError(
                f"{arguments.where}: {name} is not {expected}: ViT has one class token, in front; use --family generic"
            )
    ours = "mixins.patches"
    rules = (
        *backbone_rules(facts),
        same(WORDS, f"{ours}.first_tokens.0"),
        same("mixins.patch_embedding.proj.{p}", f"{ours}.projection.{{p}}"),
        joined(table, ("mixins.positions.first", "mixins.positions.table")),
        *([] if classifier is None else [same(f"{classifier}.{{p}}", "mixins.head.classifier.{p}")]),
    )
    unused = (POSITIONS,) if table != POSITIONS else ()
    return Found(config=config, weights=WeightMap(rules=rules, ignored=unused))


def _vit_positions(checkpoint: Checkpoint) -> str:
    """The table that serves: the one named for the grid, or the backbone's."""
    start = "mixins.pos_embedding.position_embeddings."
    named = [name for name in checkpoint.source.names() if name.startswith(start)]
    if len(named) < 2:
        return named[0] if named else POSITIONS
    size, patch = _said_size(checkpoint.arguments), checkpoint.arguments.get("patch_size", int, 0)
    if size is not None and patch > 0:
        grid = f"{size[0] // patch}x{size[1] // patch}_"
        chosen = [name for name in named if name.startswith(start + grid)]
        if len(chosen) == 1:
            return chosen[0]
    raise ConfigError(
        f"{checkpoint.arguments.where}: there are several tables of positions ({', '.join(named)}), and image_size and "
        "patch_size do not say which serves: say --set image_size=[H,W] patch_size=N"
    )


def _said_size(arguments: Arguments) -> tuple[int, int] | None:
    """Height and width as the arguments have them; some releases wrote a single number, or nothing."""
    match arguments.values.get("image_size"):
        case None:
            return None
        case int(side):
            return side, side
        case [int(height), int(width)]:
            return height, width
        case other:
            raise ConfigError(f"{arguments.where}: image_size={other!r} is not [height, width]")


def _vit_image_size(checkpoint: Checkpoint, table: str, patch: tuple[int, int]) -> int | list[int]:
    """Height and width in pixels, from the table's name, the arguments, or a square grid."""
    count = shape_of(checkpoint.source, table)[0] - 1
    named = re.search(r"\.(\d+)x(\d+)_pre(\d+)_post(\d+)\.", table)
    said = _said_size(checkpoint.arguments)
    side = int(count**0.5)
    if named is not None:
        grid = (int(named[1]), int(named[2]))
    elif said is not None:
        grid = (said[0] // patch[0], said[1] // patch[1])
    else:
        grid = (side, side)
    if grid[0] * grid[1] != count:
        raise ConfigError(
            f"{checkpoint.arguments.where}: {table} has {count + 1} positions, which are no class token and a grid of "
            f"{grid[0]} x {grid[1]} patches: say --set image_size=[H,W]"
        )
    height, width = grid[0] * patch[0], grid[1] * patch[1]
    return height if height == width else [height, width]
