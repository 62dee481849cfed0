"""Text for people, and the names of files: what is made of sizes, tables and odd characters."""

from __future__ import annotations

import subprocess

import pytest
from support import program

import backup_db


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (1023, "1023 B"),
        (1024, "1.0 KB"),
        (1024 * 1024 - 53, "1023.9 KB"),
        (1024 * 1024 - 51, "1.0 MB"),  # never "1024.0 KB"
        (50 * 1024**2, "50.0 MB"),
        (int(125.3 * 1024**2), "125.3 MB"),
        (1024**3, "1.0 GB"),
        (1024**4, "1.0 TB"),
        (5000 * 1024**4, "5000.0 TB"),
    ],
)
def test_format_size(size: int, shown: str) -> None:
    assert backup_db.format_size(size) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "plain"),
        ("ünï 日本 😀", "ünï 日本 😀"),
        ("a\nb\tc\r\x00\x7f\x1b[2J", r"a\nb\tc\r\x00\x7f\x1b[2J"),
        ("\u202egnp.exe\u2028\ufeff", r"\u202egnp.exe\u2028\ufeff"),  # what reorders or hides text
        ("\udcff", r"\xff"),  # a byte that Python could not decode
        ("\ud800", r"\ud800"),
        ("back\\slash", "back\\slash"),
        ("", ""),
    ],
)
def test_printable_shows_what_would_not_show(text: str, shown: str) -> None:
    assert backup_db.printable(text) == shown
    assert backup_db.printable(shown) == shown


def test_printable_lines_keeps_lines_alone() -> None:
    assert backup_db.printable_lines(" a\r\nb\x1b\n\tc\n\n") == "a\nb\\x1b\n    c"


@pytest.mark.parametrize(
    ("database", "environment", "prefix"),
    [
        ("project_chat_dev", "dev", "project_chat_dev"),
        ("project_chat_dev", "prod", "project_chat_dev_prod"),
        ("project_chat", "prod", "project_chat_prod"),
        ("dev", "dev", "dev_dev"),
        ("_dev", "dev", "_dev"),
        ("a/b", "dev", "a%2Fb_dev"),
        ("../../etc/passwd", "dev", "%2E./../etc/passwd_dev".replace("/", "%2F")),
        (".hidden", "dev", "%2Ehidden_dev"),
        ("-rf", "dev", "%2Drf_dev"),
        ("50%", "dev", "50%25_dev"),
        ("a\nb\x00\x7f\x85", "dev", "a%0Ab%00%7F%C2%85_dev"),
        ("ünï 😀", "dev", "ünï 😀_dev"),
        ("\udcff", "dev", "%FF_dev"),
    ],
)
def test_file_prefix_is_safe(database: str, environment: str, prefix: str) -> None:
    assert backup_db.file_prefix(database, environment) == prefix


@pytest.mark.parametrize("shell", ["dash", "bash"])
def test_shell_words_are_printable_and_read_as_they_are(shell: str) -> None:
    words = ["a b", "kun\xa0den", "\u202e'\\302%s\\\n-\t\"$x`", "-\x1b[2J", "100%\x07 \\"]
    line = backup_db.shell_words("printf", r"%s\n.", *words)
    assert line.isprintable()
    done = subprocess.run([program(shell, shell), "-c", line], capture_output=True, check=True)
    assert done.stdout.decode() == "\n.".join([*words, ""])


@pytest.mark.parametrize(
    ("counts", "shown"),
    [
        ({}, "0"),
        ({"a": 0}, "1 (0 a)"),
        ({"b": 1, "a": 2}, "2 (1 b, 2 a)"),
        (dict.fromkeys("abcdef", 1), "6 (1 a, 1 b, 1 c, 1 d, 1 e, 1 f)"),
        (dict.fromkeys("abcdefg", 1), "7 (1 a, 1 b, 1 c, 1 d, 1 e, 1 f, and 1 more)"),
        (
            dict(zip("abcdefgh", range(8), strict=True)),
            "8 (2 c, 3 d, 4 e, 5 f, 6 g, 7 h, and 2 more)",
        ),
        ({'"a\nb"': 3}, r'1 (3 "a\nb")'),
    ],
)
def test_describe_tables(counts: dict[str, int], shown: str) -> None:
    assert backup_db.describe_tables(counts) == shown
