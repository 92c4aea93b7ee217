"""What pydantic found wrong with settings, in one line."""

from collections.abc import Iterable, Mapping

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from sparse_patch.errors import FieldError, described, nearest, one_line


def problem_of(
    error: ValidationError,
    fields: Mapping[str, FieldInfo],
    forms: Mapping[str, str] | None = None,
    renamed: Mapping[str, str] | None = None,
    known: Iterable[str] | None = None,
) -> FieldError:
    """The first problem.

    Args:
        error: what validation raised.
        fields: the fields of the model.
        forms: what a field may be, if pydantic does not say it well.
        renamed: earlier names of fields, and what they are called now.
        known: the keys that a message about an unknown one lists; `fields` by default.
    """
    first = error.errors(include_url=False)[0]
    field = one_line(first["loc"][0]) if first["loc"] else ""
    if forms and field in forms:
        return FieldError(field, f"expected {forms[field]}, got {described(first['input'])}")
    if first["type"] == "extra_forbidden":
        if renamed and field in renamed:
            return FieldError(field, f"is called {renamed[field]} now")
        names = list(fields if known is None else known)
        return FieldError(field, f"unknown key{nearest(field, names)}; known keys: {', '.join(names)}")
    if first["type"] == "value_error":  # raised by a validator of ours
        raised = first["ctx"]["error"]
        return raised if isinstance(raised, FieldError) else FieldError(field, str(raised))
    expected = first["msg"].removeprefix("Input should be ")
    optional = " or null" if field in fields and fields[field].default is None else ""
    return FieldError(field, f"expected {expected}{optional}, got {described(first['input'])}")
