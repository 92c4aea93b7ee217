"""Recipes: files that name the commands which reproduce a table."""

import shlex
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from sparse_patch.errors import SparsePatchError
from sparse_patch.files import read_yaml


class Recipe(BaseModel):
    """A recipe file.

    Attributes:
        summary: what the commands show.
        needs: what they need beside this package: a hub, a GPU and its memory, hours.
        commands: arguments of `sparse-patch`, one command line each; `{here}` is the recipe's folder.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    summary: str
    needs: str
    commands: list[str]

    def arguments(self, path: Path) -> list[list[str]]:
        """The commands, split as a shell splits them."""
        return [
            [word.replace("{here}", str(path.parent)) for word in shlex.split(command)] for command in self.commands
        ]


def load_recipe(path: Path) -> Recipe:
    """Read and check a recipe.

    Raises:
        SparsePatchError: there is no such file, or a field of it is wrong.
    """
    data = read_yaml(path)
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        known = ", ".join(Recipe.model_fields)
        raise SparsePatchError(f"{path}: {field}: {first['msg'].lower()}; a recipe has the keys {known}") from None
