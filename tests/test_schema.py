"""lib/schema.py and lib/run_log.py: JSON and logs of the wrong shape are refused with place and field."""

from typing import Annotated, Any, Literal

import pytest

from lib import run_log, schema


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        *((1, int, True), (True, int, False), (1.0, int, False), ("1", int, False), (None, int, False)),
        *((1, float, True), (1.5, float, True), (False, float, False), (None, int | None, True)),
        *((1, Literal[0, 1], True), (True, Literal[0, 1], False), (1.0, Literal[0, 1], False)),
        *(("auto", int | Literal["auto"], True), ("none", int | Literal["auto"], False)),
        *(
            (["a"], list[str], True),
            ("a", list[str], False),
            (["a", 1], list[str], False),
            ([], list[str], True),
        ),
        *(({"a": "b"}, dict[str, str], True), ({"a": 1}, dict[str, str], False), ([], dict, False)),
        *((True, Annotated[bool, "switch"], True), (0, Annotated[bool, "switch"], False), ([], Any, True)),
    ],
)
def test_a_value_fits_its_type_and_no_other(value, hint, expected):
    assert schema.fits(value, hint) is expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{...,}", "x.json is not JSON: Expecting property name"),
        ("[" * 100_000, "x.json is not JSON: "),
        ("\x00", "x.json is not JSON: "),
        ("[1]", "x.json: it is [1]; it must be an object"),
        ('{"n": null, "s": "a"}', "x.json: the field n is null; it must be a whole number"),
        ('{"n": 1}', "x.json: the field s is missing; it must be a string"),
        ('{"n": "' + "9" * 1000 + '", "s": "a"}', 'x.json: the field n is "99999'),
    ],
)
def test_json_of_another_shape_is_refused_with_file_and_field(tmp_path, text, message):
    (tmp_path / "x.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError) as error:
        schema.read_json(tmp_path / "x.json", {"n": int, "s": str, "more": str | None})
    assert message in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize(
    "line", ["3 train", "x train 1.0", "3 train much", "a note", "3 train 1.0 4", "\x00" * 9_000_000]
)
def test_a_damaged_log_is_refused_with_file_and_line(tmp_path, line):
    path = tmp_path / "log.txt"
    path.write_text(f"1 train 2.5\n{line}\n2 train nan\n3 tra", encoding="utf-8")
    with pytest.raises(ValueError, match=r"log\.txt, line 2: ") as error:
        list(run_log.read(path))
    assert len(str(error.value)) < 500
    path.write_text("1 train 2.5\n\n2 val inf\n3 tra", encoding="utf-8")
    facts = list(run_log.read(path))
    assert facts == [(1, "train", 2.5, "1 train 2.5"), (2, "val", float("inf"), "2 val inf")]


@pytest.mark.parametrize(
    "number, kind", [(None, None), (1, None), (2, schema.LaterVersionError), (0, ValueError)]
)
def test_a_format_is_known_later_or_none(number, kind):
    if kind is None:
        schema.check_format({"format": number}, 1, "a.json")
        return
    with pytest.raises(ValueError, match=f"a.json: format is {number}; ") as caught:
        schema.check_format({"format": number}, 1, "a.json")
    assert caught.type is kind
