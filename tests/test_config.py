"""Which database the settings mean: every source, every fallback, every refusal."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from conftest import MakeProject
from environment import PROJECT

from brain_core.config import (
    DEFAULT_CONNECT_SECONDS,
    SAMPLE_COMMAND,
    ConfigurationError,
    DatabaseConfig,
    Environment,
    Retention,
    Settings,
    detect_environment,
    load_config,
    read_settings,
)

# Stands where a password stood, and must not be seen where one would not be.
SECRET = "geheim-0815"

# What libpq would let win over the settings, in silence.
OVERRIDING = {"PGSERVICE", "PGSERVICEFILE", "PGHOSTADDR", "PGCLIENTENCODING"}


def settings_of(folder: Path, env_local: str | bytes = "", **environ: str) -> Settings:
    """What is read where the process has `environ`, and the folder this .env.local."""
    content = env_local.encode() if isinstance(env_local, str) else env_local
    (folder / ".env.local").write_bytes(content)
    return read_settings(environ, folder)


def config_of(choice: str = "auto", **environ: str) -> DatabaseConfig:
    """The configuration from the environment alone."""
    return load_config(choice, read_settings(environ, Path("/no such folder")))


def refusal_of(folder: Path, env_local: str | bytes) -> str:
    """All that a person is told about a .env.local that is refused."""
    with pytest.raises(ConfigurationError) as caught:
        settings_of(folder, env_local)
    assert caught.value.steps
    return "\n".join([str(caught.value), *caught.value.steps])


# -- which environment ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"ENV_MODE": "dev"}, Environment.DEV),
        ({"ENV_MODE": "development"}, Environment.DEV),
        ({"ENV_MODE": "prod"}, Environment.PROD),
        ({"ENV_MODE": "Production"}, Environment.PROD),
        ({"ENV_MODE": " PROD "}, Environment.PROD),
        ({"ENV_MODE": "prod", "DEV_DB_NAME": "a"}, Environment.PROD),
        ({"ENV_MODE": "dev", "DB_NAME": "b"}, Environment.DEV),
        ({"DEV_DB_NAME": "a"}, Environment.DEV),
        ({"DB_NAME": "b"}, Environment.PROD),
        ({"DEV_DB_NAME": "a", "DB_NAME": "b"}, Environment.DEV),
        ({"DEV_DB_NAME": "", "DB_NAME": "b"}, Environment.PROD),
        ({"ENV_MODE": "", "DEV_DB_NAME": "a"}, Environment.DEV),
    ],
)
def test_auto_detects_the_environment(
    environ: dict[str, str], expected: Environment, tmp_path: Path
) -> None:
    assert detect_environment(read_settings(environ, tmp_path)) is expected


@pytest.mark.parametrize("mode", ["stage", "test", "producti", "0", "dev,prod", "ｄｅｖ"])
def test_another_env_mode_is_refused_and_named(mode: str, tmp_path: Path) -> None:
    settings = settings_of(tmp_path, f"ENV_MODE={mode}\n", DEV_DB_NAME="a")
    with pytest.raises(ConfigurationError, match=f"ENV_MODE is '{mode}'") as caught:
        detect_environment(settings)
    assert caught.value.steps[0] == "Correct it in .env.local: ENV_MODE"


def test_no_configuration_says_what_to_set_and_names_the_sample(tmp_path: Path) -> None:
    folder = tmp_path / "it's here"
    folder.mkdir()
    (folder / ".env.example").write_text("#DB_NAME=\n")
    with pytest.raises(ConfigurationError, match="none of ENV_MODE, DEV_DB_NAME and DB_NAME") as e:
        detect_environment(read_settings({}, folder))
    copy, fill_in, sample = e.value.steps
    subprocess.run(["sh", "-e", "-c", copy.removeprefix("Copy the example: ")], check=True)
    assert (folder / ".env.local").read_text() == "#DB_NAME=\n"
    assert (folder / ".env.local").stat().st_mode & 0o777 == 0o600
    (folder / ".env.local").write_text("DB_NAME=mine\n")  # and pasted once more
    subprocess.run(["sh", "-c", copy.removeprefix("Copy the example: ")], check=False)
    assert (folder / ".env.local").read_text() == "DB_NAME=mine\n"
    assert {"DEV_DB_NAME", "DB_NAME", "DB_HOST", "DB_PORT", "DB_USER", "DB_PASSWORD"} <= set(
        re.findall(r"\w+", fill_in)
    )
    assert str(folder / ".env.local") in fill_in
    assert SAMPLE_COMMAND in sample
    assert (PROJECT / SAMPLE_COMMAND.split()[1]).is_file()


@pytest.mark.parametrize("name", [".env.local", ".env"])
def test_file_that_names_no_database_is_said_to_be_there(name: str, tmp_path: Path) -> None:
    for there in (".env.example", name):
        (tmp_path / there).write_text("DB_USER=u\n")
    with pytest.raises(ConfigurationError, match=f"; {name} is there, but lacks DEV_DB_NAME") as e:
        detect_environment(read_settings({}, tmp_path))
    assert e.value.steps[0].endswith(f", in {tmp_path / name}")
    assert "cp " not in "".join(e.value.steps)


def test_example_that_is_not_there_is_not_copied(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError) as caught:
        detect_environment(read_settings({}, tmp_path))
    assert "cp " not in "".join(caught.value.steps)


@pytest.mark.parametrize(
    ("choice", "environ", "missing", "other"),
    [
        ("dev", {"DB_NAME": "b"}, "DEV_DB_NAME", "prod"),
        ("prod", {"DEV_DB_NAME": "a"}, "DB_NAME", "dev"),
        ("auto", {"ENV_MODE": "prod", "DEV_DB_NAME": "a"}, "DB_NAME", "dev"),
        ("auto", {"ENV_MODE": "dev", "DB_NAME": "b"}, "DEV_DB_NAME", "prod"),
        ("dev", {"DEV_DB_NAME": "", "PGDATABASE": "c"}, "DEV_DB_NAME", "prod"),
    ],
)
def test_missing_database_name_is_refused_and_named(
    choice: str, environ: dict[str, str], missing: str, other: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError, match=f"^{missing} is not set") as caught:
        load_config(choice, read_settings(environ, tmp_path))
    set_it, *another = caught.value.steps
    assert set_it.startswith(f"Set {missing} in {tmp_path}/.env.local")
    # Only where that one is named.
    is_named = any(name.endswith("DB_NAME") and environ[name] for name in environ)
    assert another == [f"Or back up the other environment: --env {other}"] * is_named


def test_choice_wins_over_detection() -> None:
    both = {"DEV_DB_NAME": "a", "DB_NAME": "b", "ENV_MODE": "dev"}
    assert config_of("prod", **both).name == "b"
    assert config_of("dev", **{**both, "ENV_MODE": "nonsense"}).name == "a"


# -- which source, which fallback -----------------------------------------------------------------


def test_sources_from_strongest_to_weakest(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("DB_NAME=1\nDB_USER=1\nDB_HOST=1\nDB_PORT=\n")
    settings = settings_of(
        tmp_path, "DB_NAME=2\nDB_USER=2\nDB_HOST=\nDB_PORT=2\n", DB_NAME="3", DB_USER=""
    )
    assert {name: (settings.values[name], settings.sources[name]) for name in settings.values} == {
        "DB_NAME": ("3", "the environment"),
        "DB_USER": ("2", ".env.local"),
        "DB_HOST": ("1", ".env"),
        "DB_PORT": ("2", ".env.local"),
    }


# For each field, who is asked in turn: each case sets one variable more, the strongest last.
FALLBACKS: dict[str, tuple[str | int, list[str]]] = {
    "host": ("127.0.0.1", ["PGHOST", "DB_HOST", "DEV_DB_HOST"]),
    "port": (5432, ["PGPORT", "DB_PORT", "DEV_DB_PORT"]),
    "user": ("", ["PGUSER", "DB_USER", "DEV_DB_USER"]),
    "password": ("", ["PGPASSWORD", "DB_PASSWORD", "DEV_DB_PASSWORD"]),
}


@pytest.mark.parametrize("environment", list(Environment))
@pytest.mark.parametrize("field", FALLBACKS)
def test_each_field_falls_back(field: str, environment: Environment) -> None:
    default, names = FALLBACKS[field]
    environ = {"DEV_DB_NAME": "a", "DB_NAME": "b"}
    expected = default
    assert getattr(config_of(environment.value, **environ), field) == expected
    for number, name in enumerate(names, 1):
        environ[name] = str(number)
        if environment is Environment.DEV or not name.startswith("DEV_"):
            expected = number if field == "port" else str(number)
        config = config_of(environment.value, **environ)
        assert getattr(config, field) == expected
        own = f"{environment.variable_prefix}DB_{field.upper()}"
        assert config.setting_locations[field].endswith(f": {own if own in environ else name}")


def test_place_names_variable_and_file(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("DB_PORT=1\n")
    settings = settings_of(tmp_path, "DB_USER=u\n", DB_NAME="b")
    assert dict(load_config("prod", settings).setting_locations) == {
        "name": "in the environment: DB_NAME",
        "port": "in .env: DB_PORT",
        "user": "in .env.local: DB_USER",
        # Not set: where to set it.
        "host": "in .env.local: DB_HOST",
        "password": "in .env.local: DB_PASSWORD",
        "compress": "in .env.local: BACKUP_COMPRESS",
        "libpq": "in .env.local",
    }


def test_place_of_what_libpq_alone_reads(tmp_path: Path) -> None:
    settings = settings_of(
        tmp_path,
        "DB_NAME=b\nPGSSLMODE=require\n",
        PGOPTIONS="x",
        PGUSER="u",
        PGDATA="d",
        PG_MAJOR="1",
    )
    config = load_config("prod", settings)
    libpq = config.setting_locations["libpq"]
    assert libpq == "in the environment: PGOPTIONS; in .env.local: PGSSLMODE"
    assert config.location("PGOPTIONS") == "in the environment: PGOPTIONS"
    assert config.location("PGSSLCERT") == "in .env.local: PGSSLCERT"


def test_libpq_gets_its_own_variables_but_none_that_would_override(tmp_path: Path) -> None:
    overriding = "".join(f"{name}=other\n" for name in OVERRIDING)
    settings = settings_of(
        tmp_path,
        "DEV_DB_NAME=a\nDEV_DB_USER=u\nDEV_DB_PASSWORD=p\nPGSSLMODE=require\n" + overriding,
        PGSSLMODE="disable",
        PGSSLROOTCERT="/ca.pem",
        PGDATABASE="other",
        PGUSER="other",
        PGPASSWORD="other",
        PGSERVICE="other",
        PAGER="less",
    )
    assert dict(load_config("dev", settings).libpq) == {
        "PGHOST": "127.0.0.1",
        "PGPORT": "5432",
        "PGDATABASE": "a",
        "PGUSER": "u",
        "PGPASSWORD": "p",
        "PGCONNECT_TIMEOUT": "10",
        "PGSSLMODE": "disable",
        "PGSSLROOTCERT": "/ca.pem",
    }


def test_user_and_password_that_are_not_set_are_left_to_libpq() -> None:
    assert config_of(DB_NAME="b").libpq.keys() & {"PGUSER", "PGPASSWORD", "PGPASSFILE"} == set()


# -- what a password's line is obviously mistyped by ---------------------------------------------

UNQUOTED = 'stands without quotes, and has " #"'
PASSWORD_LINES = {
    "pass #word": UNQUOTED,
    "pass$$word": UNQUOTED,
    "pass`word": UNQUOTED,
    "'pass #word'": "",
    '"pass$$word"': "",
    "pass#word": "",
    "#word": "",
    "pass$word": "",
}


@pytest.mark.parametrize("line", PASSWORD_LINES)
def test_line_of_a_password(line: str, tmp_path: Path) -> None:
    config = load_config("prod", settings_of(tmp_path, f"DB_NAME=b\nDB_PASSWORD={line}\n"))
    assert PASSWORD_LINES[line] in config.password_hint
    assert bool(PASSWORD_LINES[line]) == bool(config.password_hint)
    assert "word`" not in config.password_hint


# -- values that are refused ----------------------------------------------------------------------

NUMBERS: list[tuple[str, str, dict[str, int]]] = [
    ("DB_PORT", "port", {"1": 1, "5432": 5432, "05432": 5432, "65535": 65535, "": 5432}),
    (
        "PGCONNECT_TIMEOUT",
        "connect_seconds",
        {"1": 1, "30": 30, "0": DEFAULT_CONNECT_SECONDS, "": DEFAULT_CONNECT_SECONDS},
    ),
]
NO_NUMBERS = ["-1", "1.5", "1e3", "0x10", "abc", "1 2", " 1", "٣", "²", "9" * 5000, "1_000", "+1"]


@pytest.mark.parametrize(
    ("variable", "field", "text", "number"),
    [
        (variable, field, text, number)
        for variable, field, numbers in NUMBERS
        for text, number in numbers.items()
    ],
)
def test_numbers_are_read(variable: str, field: str, text: str, number: int) -> None:
    assert getattr(config_of(**{"DB_NAME": "b", variable: text}), field) == number


RETENTIONS = {
    "": None,
    "1": Retention(newest=1),
    "14": Retention(newest=14),
    "014": Retention(newest=14),
    "999999999": Retention(newest=999999999),
    "7d": Retention(days=7),
    "7d,4w,6m,2y": Retention(days=7, weeks=4, months=6, years=2),
    "2y,6m,4w,7d": Retention(days=7, weeks=4, months=6, years=2),
    "3,7d,4w": Retention(newest=3, days=7, weeks=4),
    "7d,3": Retention(newest=3, days=7),
}
NO_RETENTIONS = [
    *("0", "0d", "7d,0", "7d,0w", "00"),
    *("7h", "7D", "7dd", "d7", "d", "7 d", "7d, 4w", "-7d", "1.5d", "²d", "٣d", "9999999999d"),
    *(",", "7d,", ",7d", "7d,,4w", "7d;4w", "7d 4w", "7d\n"),
    *("3,14", "7d,7d", "7d,4w,6d"),
]


@pytest.mark.parametrize(("text", "retention"), RETENTIONS.items())
def test_retention_is_read(text: str, retention: Retention | None) -> None:
    assert config_of(DB_NAME="b", BACKUP_KEEP=text).retention == retention


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        *((variable, text) for variable, _field, _numbers in NUMBERS for text in NO_NUMBERS),
        *(("DB_PORT", text) for text in ("0", "65536", "0000065536", "5432,5433")),
        *(("BACKUP_KEEP", text) for text in (*NO_NUMBERS, *NO_RETENTIONS)),
    ],
)
def test_what_is_no_number_is_refused_and_named(variable: str, text: str, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text(f"{variable}='{text}'\n")
    with pytest.raises(ConfigurationError) as caught:
        load_config("prod", read_settings({"DB_NAME": "b"}, tmp_path))
    told = "the port is not a number" if variable == "DB_PORT" else repr(text)
    assert told in str(caught.value)
    assert caught.value.steps[0] == f"Correct it in .env: {variable}"


MISTYPED = {
    "'b'": ("it keeps its quotes", "Remove the quotes"),
    '"b"': ("it keeps its quotes", "Remove the quotes"),
    "b\r": (r"it ends in a carriage return (\r)", "Remove it"),
    "b ": ("it ends in a space", "Remove the space"),
    "${HOME}": ("it still holds ${", "Write the value itself"),
    "a${B}c": ("it still holds ${", "Write the value itself"),
}


@pytest.mark.parametrize("variable", ["DB_NAME", "DB_HOST", "DB_PORT", "DB_USER", "PGHOST"])
@pytest.mark.parametrize("value", MISTYPED)
def test_value_that_is_mistyped_is_refused_by_its_cause(value: str, variable: str) -> None:
    cause, remedy = MISTYPED[value]
    with pytest.raises(ConfigurationError) as caught:
        config_of("prod", **{"DB_NAME": "b", variable: value})
    shown = variable if variable == "DB_PORT" else f"{variable} is {value!r}"
    assert str(caught.value).startswith(f"{shown}: {cause}")
    assert caught.value.steps == (f"{remedy} in the environment: {variable}",)


@pytest.mark.parametrize("value", MISTYPED)
def test_password_that_looks_mistyped_is_taken_with_a_hint(value: str) -> None:
    cause, remedy = MISTYPED[value]
    config = config_of(DB_NAME="b", DB_PASSWORD=value)
    assert config.libpq["PGPASSWORD"] == config.password == value
    assert config.password_hint.startswith(cause.replace("it ", "The password ", 1))
    assert config.password_hint.endswith(f". {remedy} in the environment: DB_PASSWORD")


def test_password_that_looks_right_has_no_hint() -> None:
    assert not config_of(DB_NAME="b", DB_PASSWORD="it's $HOME 'x' y").password_hint


@pytest.mark.parametrize(
    "host", ["db:5432", "db:", "[::1]", "[::1]:5432", "a,b:5432", "127.0.0.1:x", "a:b:c"]
)
def test_host_with_a_port_is_refused_and_not_shown(host: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^DB_HOST holds a port") as caught:
        config_of(DB_NAME="b", DB_HOST=host)
    (step,) = caught.value.steps
    alone = "the host alone, an IPv6 address without brackets"
    assert step == f"Put the port into DB_PORT, and {alone}, in the environment: DB_HOST"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("host", host) for host in ("::1", "fe80::1%eth0", "a,b", "a,::1", "/run/x:1", "@x:1")),
        ("host", "/cloudsql/project:region:db"),
        *(("name", name) for name in ("my chat", " b", "it's", "'b", "a:1", "a@b", "$b", "b'")),
        *(("user", user) for user in ("alice@example.org", "a b")),
    ],
)
def test_value_that_is_odd_and_valid_is_taken(field: str, value: str) -> None:
    config = config_of("prod", **{"DB_NAME": "b", f"DB_{field.upper()}": value})
    assert getattr(config, field) == value


def test_form_that_is_named_for_a_retention_is_one_that_is_read() -> None:
    with pytest.raises(ConfigurationError) as caught:
        config_of(DB_NAME="b", BACKUP_KEEP="weekly")
    forms = re.findall(r"\((.+?)\)", str(caught.value))
    assert forms == ["14", "7d,4w,6m,2y", "3,7d,4w"]
    assert all(RETENTIONS[form] for form in forms)


# -- the .env files -------------------------------------------------------------------------------

# The line, and the value of X in it: no ${...} is expanded, and no escape outside of quotes.
LINES: dict[str, str | None] = {
    "X=plain": "plain",
    "X = spaced ": "spaced",
    "export X=exported": "exported",
    "X=a b c": "a b c",
    "X='single # no comment'": "single # no comment",
    'X="double # no comment"': "double # no comment",
    "X=value # a comment": "value",
    "X=pass#word": "pass#word",
    "X='it\\'s'": "it's",
    "X='back\\\\slash'": "back\\slash",
    "X='\\n stays'": "\\n stays",
    'X="\\n is a line"': "\n is a line",
    "X='two\nlines'": "two\nlines",
    "X=${HOME}": "${HOME}",
    'X="${HOME}"': "${HOME}",
    "X=$HOME`id`$(id)": "$HOME`id`$(id)",
    "X=a=b=c": "a=b=c",
    "X=postgres://u:p@h/d?x=y": "postgres://u:p@h/d?x=y",
    "X=Ünï😀": "Ünï😀",
    "X='  kept  '": "  kept  ",
    "X=first\nX=last": "last",
    "# a comment\n\n  \nX=after": "after",
    "X": None,
    "X=": None,
    "X=''": None,
    "X=   # only a comment": None,
}


@pytest.mark.parametrize(("lines", "value"), LINES.items())
def test_line_is_read_literally(lines: str, value: str | None, tmp_path: Path) -> None:
    assert settings_of(tmp_path, f"{lines}\n").values.get("X") == value


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbfA=1\nB=2\n",  # a byte order mark, as Windows editors write it
        b"A=1\r\nB=2\r\n",
        b"A=1\rB=2",
        b"\n\nA=1\n\nB=2",
    ],
)
def test_file_of_any_editor_is_read(content: bytes, tmp_path: Path) -> None:
    assert dict(settings_of(tmp_path, content).values) == {"A": "1", "B": "2"}


def test_run_reads_the_first_line_behind_a_byte_order_mark(make_project: MakeProject) -> None:
    project = make_project()
    (project.directory / ".env.local").write_bytes(b"\xef\xbb\xbfDB_NAME=first\r\nDB_PORT=1\r\n")
    result = project.run().failed_with(3, "Database connection error")
    assert "port 1 failed" in result.stderr, result


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (f"A=1\nDB_PASSWORD='{SECRET}\n", 2),
        (f'A=1\n\nDB_PASSWORD="{SECRET}\n', 3),
        (f"DB_PASSWORD {SECRET}\n", 1),
        (f"DB_PASSWORD: {SECRET}\n", 1),
        (f"DB_PASSWORD:{SECRET}\n", 1),
        (f"DB_PASSWORD='{SECRET}' more\n", 1),
        (f"A=1\nDB_PASSWORD={SECRET}\0\n", 2),
        (f"A=1\nPG\0X={SECRET}\n", 2),
        (f"export DEV_DB_PASSWORD {SECRET}\n", 1),
        (f"ENV_MODE: {SECRET}\n", 1),
        (f"BACKUP_KEEP: {SECRET}\n", 1),
        # The quote takes in the lines below, up to the next one: ours among them.
        (f"GREETING='hello\nDB_NAME=b\nDB_PASSWORD='{SECRET}'\n", 1),
    ],
)
def test_line_that_cannot_be_parsed_is_named_but_never_shown(
    content: str, line: int, tmp_path: Path
) -> None:
    said = refusal_of(tmp_path, content)
    assert said.startswith(f"line {line} of {tmp_path}/.env.local cannot be parsed\n")
    assert SECRET not in said


@pytest.mark.parametrize(
    "line",
    [
        f"npm run {SECRET}",
        f"={SECRET}",
        f"app.key: {SECRET}",
        f"MY_DB_URL: {SECRET}",
        f"UPGRADE: {SECRET}",
        f"X='{SECRET}",
        f"X={SECRET}\0",
    ],
)
def test_line_of_another_program_is_left_out(line: str, tmp_path: Path) -> None:
    settings = settings_of(tmp_path, f"\nDB_NAME=b\n\n{line}\nDB_USER=u\n")
    assert dict(settings.values) == {"DB_NAME": "b", "DB_USER": "u"}


def test_link_that_leads_nowhere_is_named(tmp_path: Path) -> None:
    (tmp_path / ".env.local").symlink_to("../no.env")
    with pytest.raises(ConfigurationError, match=r"\.env\.local is a link to \.\./no\.env, which"):
        read_settings({"DB_NAME": "b"}, tmp_path)


def test_file_that_is_not_utf_8_is_named_but_never_shown(tmp_path: Path) -> None:
    said = refusal_of(tmp_path, f"DB_PASSWORD={SECRET}ä\n".encode("latin-1"))
    assert said.startswith(f"{tmp_path}/.env.local is not UTF-8 text")
    assert SECRET not in said


def test_directory_in_the_place_of_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / ".env").mkdir()
    with pytest.raises(ConfigurationError, match=re.escape(f"{tmp_path}/.env is a directory")):
        read_settings({}, tmp_path)


def test_password_is_in_no_representation() -> None:
    assert SECRET not in repr(config_of(DB_NAME="b", DB_PASSWORD=SECRET))


def test_name_and_password_that_no_encoding_decodes_reach_libpq_as_they_are() -> None:
    raw = b"\xff\xfe not utf-8".decode(sys.getfilesystemencoding(), "surrogateescape")
    config = config_of(DB_NAME=raw, DB_PASSWORD=raw)
    for value in (config.libpq["PGDATABASE"], config.libpq["PGPASSWORD"]):
        assert value.encode("utf-8", "surrogateescape") == b"\xff\xfe not utf-8"


# -- what is written about it ---------------------------------------------------------------------


class Recorder(Mapping[str, str]):
    """Settings in which nothing but the database names is set; it notes what is asked for."""

    def __init__(self) -> None:
        self.asked: set[str] = set()

    def __getitem__(self, name: str) -> str:
        self.asked.add(name)
        if name in ("DEV_DB_NAME", "DB_NAME"):
            return "a"
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


def variables_that_are_read() -> set[str]:
    recorder = Recorder()
    for choice in ("auto", "dev", "prod"):
        load_config(choice, Settings(recorder, {}, Path()))
    return recorder.asked


def without_libpq(names: set[str]) -> set[str]:
    return {name for name in names if not name.startswith("PG")}


def test_example_documents_exactly_what_is_read() -> None:
    text = (PROJECT / ".env.example").read_text(encoding="utf-8")
    read = variables_that_are_read()
    set_in_it = set(re.findall(r"^#?([A-Z_]+)=", text, re.MULTILINE))
    assert without_libpq(set_in_it) == without_libpq(read)
    assert read | OVERRIDING <= set(re.findall(r"\b[A-Z_]{6,}\b", text))


def test_example_as_it_is_configures_nothing(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, (PROJECT / ".env.example").read_bytes())
    assert dict(settings.values) == {}


def test_example_parses_with_every_line_switched_on(tmp_path: Path) -> None:
    text = (PROJECT / ".env.example").read_text(encoding="utf-8")
    every = re.sub(r"^#(?=[A-Z_]+=)", "", text, flags=re.MULTILINE)
    config = load_config("prod", settings_of(tmp_path, every))
    assert (config.name, config.port) == ("project_chat_prod", 5432)
    assert config.retention == Retention(days=14, weeks=8, months=12)
    assert config.libpq["PGSSLMODE"] == "verify-full"


def test_settings_table_of_the_readme_names_exactly_what_is_read() -> None:
    text = (PROJECT / "README.md").read_text(encoding="utf-8")
    section = text.partition("\n## Settings\n")[2].partition("\n## ")[0]
    cells = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", section, re.MULTILINE)
    table = re.findall(r"\w+", " ".join(cells))
    assert len(table) == len(set(table))
    read = variables_that_are_read()
    assert without_libpq(set(table)) == without_libpq(read)
    assert {name for name in read if name.startswith("PG")} - {"PGCONNECT_TIMEOUT"} <= set(
        re.findall(r"\w+", section)
    )
