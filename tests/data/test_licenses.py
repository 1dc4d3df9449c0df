from email.message import Message

import pytest

from longcat_jax.data.licenses import permissive, permissive_expression


def metadata(*fields: tuple[str, str]) -> Message:
    message = Message()
    for name, value in fields:
        message[name] = value
    return message


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("MIT", True),
        ("apache-2.0", True),
        ("GPL-3.0-only", False),
        ("BSD-3-Clause AND 0BSD AND MIT AND Zlib AND CC0-1.0", True),
        ("MPL-2.0 AND MIT", False),
        ("MIT OR AFL-2.1", True),
        ("GPL-2.0-only OR LGPL-3.0-only", False),
        ("MIT AND (GPL-2.0-only OR BSD-2-Clause)", True),
        ("GPL-2.0-only AND (MIT OR BSD-2-Clause)", False),
        ("MIT OR GPL-2.0-only AND LGPL-3.0-only", True),
        ("Apache-2.0 WITH LLVM-exception", True),
        ("GPL-3.0-only WITH GCC-exception-3.1", False),
        ("(MIT", False),
        ("MIT)", False),
        ("MIT BSD-3-Clause", False),
        ("", False),
    ],
)
def test_expressions(expression: str, expected: bool) -> None:
    assert permissive_expression(expression) is expected


def classifier(name: str) -> tuple[str, str]:
    return "Classifier", f"License :: OSI Approved :: {name}"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ([("License-Expression", "GPL-3.0-only"), classifier("MIT License")], False),
        ([classifier("MIT License"), classifier("Apache Software License")], True),
        ([classifier("MIT License"), classifier("GNU General Public License v3 (GPLv3)")], False),
        ([classifier("MIT License"), ("License", "GPL")], True),
        ([("Classifier", "License :: OSI Approved"), ("License", "MIT")], True),
        ([("Classifier", "Programming Language :: Python"), ("License", "GPLv3")], False),
        ([("License", "Apache License\n   Version 2.0, January 2004\n ...")], True),
        ([("License", "The MIT License")], True),
        ([("License", "3-Clause BSD License")], True),
        ([("License", "Apache 2.0")], True),
        ([("License", "MIT/GPL")], False),
        ([("License", "Proprietary")], False),
        ([("License", "LGPL-3.0")], False),
        ([], False),
    ],
)
def test_metadata(fields: list[tuple[str, str]], expected: bool) -> None:
    assert permissive(metadata(*fields)) is expected
