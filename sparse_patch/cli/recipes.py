"""Recipes: files with the commands that reproduce a table."""

import shlex
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sparse_patch.errors import SparsePatchError, one_line, short
from sparse_patch.files.reading import read_yaml


class Recipe(BaseModel):
    """A recipe file.

    Attributes:
        summary: what the commands show.
        needs: what the commands need besides this package: a hub, a GPU and its memory, hours.
        commands: command lines, each the arguments of `sparse-patch`; `{here}` is the recipe's folder.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    summary: str
    needs: str
    commands: list[str] = Field(min_length=1)

    def arguments(self, path: Path) -> list[list[str]]:
        """The commands, split as a shell splits them.

        Raises:
            SparsePatchError: a command is empty, or a quote in it is not closed.
        """
        return [_split(command, path, number) for number, command in enumerate(self.commands)]


def _split(command: str, path: Path, number: int) -> list[str]:
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise SparsePatchError(
            f"{one_line(path)}: commands[{number}]: {str(error).lower()} in {short(command)}; "
            "close the quote or escape it"
        ) from None
    if not words:
        raise SparsePatchError(f"{one_line(path)}: commands[{number}]: is empty; write what follows `sparse-patch`")
    return [word.replace("{here}", str(path.parent)) for word in words]


def load_recipe(path: Path) -> Recipe:
    """Read and check a recipe.

    Raises:
        SparsePatchError: the file does not exist, or a field of it is wrong.
    """
    data = read_yaml(path)
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        field = one_line(".".join(map(str, first["loc"]))) or "the file"
        known = ", ".join(Recipe.model_fields)
        raise SparsePatchError(
            f"{one_line(path)}: {field}: {first['msg'].lower()}; a recipe has the keys {known}"
        ) from None
