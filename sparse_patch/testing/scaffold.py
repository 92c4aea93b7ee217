"""`sparse-patch new-method`: the files that a method begins with. They pass `check_method` as they are."""

import re
from dataclasses import dataclass
from pathlib import Path
from string import Template

from sparse_patch.call import Phase
from sparse_patch.errors import SparsePatchError, short
from sparse_patch.files.writing import check_writable, write_file
from sparse_patch.methods.base.registry import find_method

_TEMPLATES = Path(__file__).parent / "new_method"
_NAME = re.compile(r"[a-z][a-z0-9_]*")
_BASES = {"prefill": ("PrefillMethod", "Selection"), "decode": ("BudgetedMethod",)}


@dataclass(frozen=True)
class Scaffold:
    """Where the files of a method go.

    Attributes:
        name: of the method.
        phase: its phase.
        folder: a folder of its own, or the root of a checkout of sparse_patch.
    """

    name: str
    phase: Phase
    folder: Path

    @property
    def in_checkout(self) -> bool:
        """Whether the folder is a checkout of sparse_patch, which has a place for each file."""
        return all((self.folder / place).is_dir() for place in ("sparse_patch/methods", "configs", "tests/oracles"))

    @property
    def class_name(self) -> str:
        """The name as a class: `my_method` is `MyMethod`."""
        return "".join(word.capitalize() for word in self.name.split("_"))

    @property
    def files(self) -> dict[str, Path]:
        """The path of each file, by what it is."""
        if self.in_checkout:
            places = {
                ".py": f"sparse_patch/methods/{self.name}.py",
                ".yaml": f"configs/{self.name}.yaml",
                "_oracle.py": f"tests/oracles/{self.name}.py",
                "_test.py": f"tests/methods/test_{self.name}.py",
            }
        else:
            places = {
                ".py": f"{self.name}.py",
                ".yaml": f"{self.name}.yaml",
                "_oracle.py": f"oracle_{self.name}.py",
                "_test.py": f"test_{self.name}.py",
            }
        return {kind: self.folder / place for kind, place in places.items()}

    def write(self) -> list[Path]:
        """Write the files, all or none.

        Returns:
            Their paths.

        Raises:
            SparsePatchError: the name is none or taken, or a file exists or cannot be written.
        """
        self._check()
        texts = {path: self._text(kind) for kind, path in self.files.items()}
        check_writable(*texts)
        for path, text in texts.items():
            write_file(path, text)
        return list(texts)

    def _check(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise SparsePatchError(
                f"NAME: expected lower-case letters, digits and underscores, a letter first, got {short(self.name)}"
            )
        if find_method(self.name) is not None:
            raise SparsePatchError(f"NAME: {self.name} is a method already; choose another name")
        if there := [path for path in self.files.values() if path.exists()]:
            raise SparsePatchError(f"{there[0]}: exists already; choose another name or folder")

    def _text(self, kind: str) -> str:
        template = Template((_TEMPLATES / f"{self.phase}{kind}.txt").read_text(encoding="utf-8"))
        return template.substitute(
            {"class": self.class_name},
            name=self.name,
            from_base=self._import_of_bases(),
            decorator="" if self.in_checkout else "@register_method\n",
            before_package=self._imports_of_test(),
        )

    def _imports_of_test(self) -> str:
        """The method and its oracle, sorted as ruff does it."""
        oracle = {"prefill": "selected_blocks", "decode": "selected_pages"}[self.phase]
        name, method = self.name, self.class_name
        if self.in_checkout:
            return f"from oracles.{name} import {oracle}\n\nfrom sparse_patch.methods.{name} import {method}\n"
        return "".join(sorted([f"from {name} import {method}\n", f"from oracle_{name} import {oracle}\n"]))

    def _import_of_bases(self) -> str:
        if not self.in_checkout:
            names = sorted({*_BASES[self.phase], *(("Count",) if self.phase == "decode" else ()), "register_method"})
            return f"from sparse_patch.methods import {', '.join(names)}"
        if self.phase == "decode":
            return "from sparse_patch.methods.base.budget import BudgetedMethod, Count"
        return (
            "from sparse_patch.methods.base.bound import Selection\n"
            "from sparse_patch.methods.base.settings import PrefillMethod"
        )
