"""`sat data`: look at data, turn it into tokens, see what a model will see."""

from swissarmy.cli import data_check, data_show, data_tokenize
from swissarmy.cli.command import CommandGroup

COMMAND = CommandGroup(
    summary="check data, turn it into tokens, show what a model will see",
    commands={"check": data_check.COMMAND, "tokenize": data_tokenize.COMMAND, "show": data_show.COMMAND},
)
