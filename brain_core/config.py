"""Which database to back up: read from the environment and the .env files.

Nothing here prints, exits, or touches `os.environ`: the environment and the folder of the
.env files come in as arguments, a frozen record or a `ConfigurationError` goes out.

Sources, strongest first: the process environment, `.env.local`, `.env`.
"""

from __future__ import annotations

import enum
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

ENV_FILES = (".env.local", ".env")
DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 5432
DEFAULT_CONNECT_SECONDS = 10

# libpq reads these too, and lets them win over the host, the database or the encoding that the
# settings name (PostgreSQL documentation, "Environment Variables" and "The Connection Service
# File"): with PGSERVICE set, pg_dump dumps the service's database and exits 0.
OVERRIDING_LIBPQ_VARIABLES = ("PGSERVICE", "PGSERVICEFILE", "PGHOSTADDR", "PGCLIENTENCODING")

SAMPLE_COMMAND = "python3 tests/sample.py"

# A line that does not parse is an error where one of these stands in it.
OUR_NAMES = re.compile(r"\b(?:(?:DEV_)?DB_|ENV_MODE|BACKUP_|PG)")

# What a value is obviously mistyped by, and what to do: also in what a shell or a container hands
# on, where no parser of .env files takes quotes and line ends away.
MISTYPED = (
    (r"""(['"]).*\1""", "keeps its quotes", "Remove the quotes"),
    (r".*\r", r"ends in a carriage return (\r), as Windows ends its lines", "Remove it"),
    (r".* ", "ends in a space", "Remove the space"),
    (r".*\$\{.*", "still holds ${, and nothing is expanded here", "Write the value itself"),
)
# The same of a line in a file: what other programs, or the person who typed it, read otherwise.
AMBIGUOUS = (
    (
        r"[^=]+=\s*[^'\"\s].*(\s#|\$\$|`).*",
        'stands without quotes, and has " #" (at which it ends), $$ or a backtick behind it',
        "Write it as it is meant, in single quotes",
    ),
)


class ConfigurationError(ValueError):
    """A setting is missing or invalid; `steps` say what to do about it."""

    def __init__(self, problem: str, *steps: str) -> None:
        super().__init__(problem)
        self.steps = steps


class Environment(enum.Enum):
    """The two kinds of database that the settings tell apart."""

    DEV = "dev"
    PROD = "prod"

    @property
    def variable_prefix(self) -> str:
        """What stands before `DB_NAME` in the variables of this environment."""
        return "DEV_" if self is Environment.DEV else ""


ENV_MODES = {
    "development": Environment.DEV,
    "dev": Environment.DEV,
    "production": Environment.PROD,
    "prod": Environment.PROD,
}


@dataclass(frozen=True)
class Settings:
    """Every variable that is set, with the name of the place that it comes from."""

    values: Mapping[str, str]
    sources: Mapping[str, str]
    folder: Path
    lines: Mapping[str, str] = field(default_factory=dict)  # as they stand in the file, if in one

    def first(self, *names: str) -> tuple[str, str] | None:
        """The first of `names` that is set, as (name, value); None where none is."""
        return next(((name, self.values[name]) for name in names if name in self.values), None)

    def location(self, name: str) -> str:
        """`name`, behind the place where it is set, or is to be set: "in .env.local: DB_NAME"."""
        return f"in {self.sources.get(name, ENV_FILES[0])}: {name}"


@dataclass(frozen=True)
class Retention:
    """Which backups BACKUP_KEEP keeps: the newest so many, and the newest of each of the last so
    many days, weeks, months and years that have one."""

    newest: int = 0
    days: int = 0
    weeks: int = 0
    months: int = 0
    years: int = 0


# What stands behind the number in a part of BACKUP_KEEP.
RETENTION_UNITS = {"": "newest", "d": "days", "w": "weeks", "m": "months", "y": "years"}


@dataclass(frozen=True)
class DatabaseConfig:
    """One database and the way to it. An empty field is left to libpq's own default."""

    environment: Environment
    name: str
    host: str
    port: int
    user: str
    password: str = field(repr=False)
    password_hint: str  # what it is obviously mistyped by, for when it is refused
    compress: str
    retention: Retention | None  # None keeps every backup
    connect_seconds: int
    # Where each field comes from: field name to "in .env.local: DEV_DB_NAME"; of each PG* variable
    # too; and "libpq", the further ones together.
    setting_locations: Mapping[str, str]
    # Every PG* variable that libpq is to see, the connection settings included.
    libpq: Mapping[str, str] = field(repr=False)

    def location(self, variable: str) -> str:
        """Where a PG* variable is set, or is to be set."""
        return self.setting_locations.get(variable, f"in {ENV_FILES[0]}: {variable}")


def read_settings(environ: Mapping[str, str], folder: Path) -> Settings:
    """Merge the environment with the .env files in `folder`; an empty variable counts as unset.

    Raises ConfigurationError for a file in which a setting of ours cannot be parsed, OSError for
    one that cannot be read, ModuleNotFoundError where there is a file but no python-dotenv.
    """
    layers = [("the environment", {name: (value, "") for name, value in environ.items()})]
    layers += [(name, _read_env_file(folder / name)) for name in ENV_FILES]
    values: dict[str, str] = {}
    sources: dict[str, str] = {}
    lines: dict[str, str] = {}
    for source, layer in layers:
        for name, (value, line) in layer.items():
            if value and name not in values:
                values[name], sources[name], lines[name] = value, source, line
    return Settings(MappingProxyType(values), MappingProxyType(sources), folder, lines)


def _read_env_file(path: Path) -> dict[str, tuple[str, str]]:
    """The variables of one .env file, taken literally, with their lines; nothing where there is no
    such file. What does not parse, and is another program's, is left out."""
    try:
        # utf-8-sig: an editor's byte order mark is no part of the first name.
        stream = path.open(encoding="utf-8-sig")
    except FileNotFoundError:
        if path.is_symlink():
            raise ConfigurationError(
                f"{path} is a link to {os.readlink(path)}, which is not there",
                f"Link it to the file that is meant, or remove it: {shlex.join(['rm', str(path)])}",
            ) from None
        return {}
    except IsADirectoryError:
        raise ConfigurationError(
            f"{path} is a directory, not a file", f"Remove or rename it: {path}"
        ) from None
    with stream:
        from dotenv.parser import parse_stream  # a bare machine with no .env file needs no package

        try:
            bindings = list(parse_stream(stream))
        except UnicodeDecodeError as error:
            raise ConfigurationError(
                f"{path} is not UTF-8 text: {error}", f"Save it as UTF-8: {path}"
            ) from None
    values: dict[str, tuple[str, str]] = {}
    for binding in bindings:
        # A bare NAME is a variable that is not set; `NAME: value` or `NAME:value` is a mistake.
        is_bare_text = binding.value is None and not (binding.key or "_").isidentifier()
        if binding.error or is_bare_text or "\0" in binding.original.string:
            text = binding.original.string
            if not OUR_NAMES.search(text):
                continue
            # The line itself is not shown: it may be the one with the password.
            blank_lines = text[: len(text) - len(text.lstrip())].count("\n")
            raise ConfigurationError(
                f"line {binding.original.line + blank_lines} of {path} cannot be parsed",
                f"Write it as NAME=value, a value with spaces or quotes in single quotes: {path}",
                "See .env.example for every variable",
            )
        if binding.key is not None and binding.value is not None:
            values[binding.key] = binding.value, binding.original.string.strip()
    return values


def detect_environment(settings: Settings) -> Environment:
    """What `--env auto` means: ENV_MODE, else the environment whose database name is set."""
    if mode := settings.values.get("ENV_MODE"):
        try:
            return ENV_MODES[mode.strip().lower()]
        except KeyError:
            raise ConfigurationError(
                f"ENV_MODE is {mode!r}; it must be one of: {', '.join(ENV_MODES)}",
                f"Correct it {settings.location('ENV_MODE')}",
                "Or name the environment: --env dev or --env prod",
            ) from None
    for environment in Environment:
        if f"{environment.variable_prefix}DB_NAME" in settings.values:
            return environment
    raise _unset_error(
        settings,
        "no database is configured: none of ENV_MODE, DEV_DB_NAME and DB_NAME is set",
        "DEV_DB_NAME or DB_NAME",
        "Set DEV_DB_NAME (development) or DB_NAME (production), and DB_HOST, DB_PORT, DB_USER, "
        "DB_PASSWORD, in {file}",
        f"Or see it work on a throw-away server first: {SAMPLE_COMMAND}",
    )


def _unset_error(
    settings: Settings, problem: str, names: str, set_it: str, *steps: str
) -> ConfigurationError:
    """No database is named: which of the files are there, and what to set in which {file}."""
    there = [name for name in ENV_FILES if (settings.folder / name).exists()]
    example = settings.folder / ".env.example"
    own = shlex.quote(str(settings.folder / ENV_FILES[0]))
    copy = f"cp -n {shlex.quote(str(example))} {own} && chmod 600 {own}"
    found = "".join(f"; {name} is there, but lacks {names}" for name in there)
    found = found or f"; there is no {ENV_FILES[0]} in {settings.folder}"
    if "DATABASE_URL" in settings.values:
        found += "; DATABASE_URL is not read, put its parts into variables of their own"
    return ConfigurationError(
        problem + found,
        *([f"Copy the example: {copy}"] if not there and example.exists() else []),
        set_it.format(file=settings.folder / (there or ENV_FILES)[0]),
        *steps,
    )


def load_config(choice: str, settings: Settings) -> DatabaseConfig:
    """The database that `choice` (`dev`, `prod` or `auto`) means.

    Raises ConfigurationError naming the variable that is missing or invalid.
    """
    environment = detect_environment(settings) if choice == "auto" else Environment(choice)
    prefix = environment.variable_prefix
    # By field, the variable that sets it, or is to set it.
    variables = {"name": f"{prefix}DB_NAME", "compress": "BACKUP_COMPRESS"}

    def lookup(field_name: str, *libpq_names: str) -> str:
        """DEV_DB_X, then DB_X, then libpq's own variable."""
        name = f"DB_{field_name.upper()}"
        found = settings.first(*dict.fromkeys([prefix + name, name]), *libpq_names)
        variables[field_name] = found[0] if found else prefix + name
        if found and field_name != "password":
            _require_plain(settings, *found)
        return found[1] if found else ""

    name = _database_name(settings, environment)
    host = lookup("host", "PGHOST") or DEFAULT_HOST
    port_text = lookup("port", "PGPORT")
    user = lookup("user", "PGUSER")
    password = lookup("password", "PGPASSWORD")
    locations = {key: settings.location(variable) for key, variable in variables.items()}
    port = _parse_port(port_text, locations["port"])
    line = settings.lines.get(variables["password"], "")
    mistake = _find_mistake(password) or _find_mistake(line, AMBIGUOUS)
    hint = f"The password {mistake[0]}. {mistake[1]} {locations['password']}" if mistake else ""
    own = {"PGHOST": host, "PGPORT": str(port), "PGDATABASE": name}
    own |= {"PGUSER": user} if user else {}
    own |= {"PGPASSWORD": password} if password else {}
    connect_seconds = _parse_connect_timeout(settings)
    own["PGCONNECT_TIMEOUT"] = str(connect_seconds)
    return DatabaseConfig(
        environment=environment,
        name=name,
        host=host,
        port=port,
        user=user,
        password=password,
        password_hint=hint,
        compress=settings.values.get("BACKUP_COMPRESS", ""),
        retention=_parse_retention(settings),
        connect_seconds=connect_seconds,
        setting_locations=MappingProxyType(locations),
        libpq=_libpq_variables(settings, own, locations),
    )


def _database_name(settings: Settings, environment: Environment) -> str:
    variable = f"{environment.variable_prefix}DB_NAME"
    if variable not in settings.values:
        (other,) = set(Environment) - {environment}
        is_other_set = f"{other.variable_prefix}DB_NAME" in settings.values
        raise _unset_error(
            settings,
            f"{variable} is not set: it names the database to back up "
            f"in the {environment.value} environment",
            variable,
            f"Set {variable} in {{file}} (see .env.example)",
            *([f"Or back up the other environment: --env {other.value}"] if is_other_set else []),
        )
    _require_plain(settings, variable, settings.values[variable])
    return settings.values[variable]


def _libpq_variables(
    settings: Settings, own: Mapping[str, str], locations: dict[str, str]
) -> Mapping[str, str]:
    """`own`, and every further PG* variable that is set; `locations` gets where."""
    inherited = {
        variable: value
        for variable, value in settings.values.items()
        if variable.startswith("PG") and variable not in OVERRIDING_LIBPQ_VARIABLES
    }
    # PG_VERSION, PGDATA and the like are the server's.
    further = [name for name in inherited.keys() - own.keys() - {"PGDATA"} if name.isalpha()]
    listed = "; ".join(settings.location(variable) for variable in sorted(further))
    locations["libpq"] = listed or f"in {ENV_FILES[0]}"
    locations |= {variable: settings.location(variable) for variable in inherited}
    return MappingProxyType({**inherited, **own})


def _find_mistake(
    value: str, mistakes: Sequence[tuple[str, str, str]] = MISTYPED
) -> tuple[str, str] | None:
    """What `value` is obviously mistyped by, and what to do."""
    for pattern, cause, remedy in mistakes:
        if re.fullmatch(pattern, value, re.DOTALL):
            return cause, remedy
    return None


def _holds_address(variable: str, value: str) -> bool:
    """Whether it is a URL or a connection string, or a piece of one, where one name belongs."""
    if "%" in value:
        from urllib.parse import unquote

        value = unquote(value)
    if re.search(r"://|^//|pass\w*\s*=|pwd\s*=", value, re.IGNORECASE):
        return True
    if variable.endswith("HOST"):  # or a list of hosts; sockets are paths, or begin with an @
        return any(re.match(r"[^/@].*[/@]", host, re.DOTALL) for host in value.split(","))
    if variable.endswith("USER"):
        return ":" in value
    if variable.endswith("NAME"):
        return re.search(r":.*@|@.*/", value, re.DOTALL) is not None
    return False


def _is_ipv6_address(host: str) -> bool:
    import ipaddress

    try:
        return ipaddress.ip_address(host).version == 6
    except ValueError:
        return False


def _require_plain(settings: Settings, variable: str, value: str) -> None:
    """What holds a URL, a connection string or a piece of one is never shown: it has a password in
    it, which libpq's words, a file name and the metadata would repeat."""
    location = settings.location(variable)
    if _holds_address(variable, value.strip("'\" \r\n")):
        raise ConfigurationError(
            f"{variable} holds a URL or a connection string, or a piece of one; it must be one name"
            " alone",
            f"Put host, port, name, user and password each into a variable of its own, {location}",
        )
    if mistake := _find_mistake(value):
        cause, remedy = mistake
        shown = variable if variable.endswith("PORT") else f"{variable} is {value!r}"
        raise ConfigurationError(f"{shown}: it {cause}", f"{remedy} {location}")
    hosts = value.split(",") if variable.endswith("HOST") else ()
    for host in hosts:
        if ":" in host and host[0] not in "/@" and not _is_ipv6_address(host):
            alone = "the host alone, an IPv6 address without brackets"
            raise ConfigurationError(
                f"{variable} holds a port, or brackets; it must be {alone}",
                f"Put the port into {variable.replace('HOST', 'PORT')}, and {alone}, {location}",
            )


def _parse_port(text: str, location: str) -> int:
    if not text:
        return DEFAULT_PORT
    if text.isascii() and text.isdigit() and len(text) <= 5 and 1 <= int(text) <= 65535:
        return int(text)
    raise ConfigurationError("the port is not a number from 1 to 65535", f"Correct it {location}")


def _parse_connect_timeout(settings: Settings) -> int:
    text = settings.values.get("PGCONNECT_TIMEOUT")
    if text is None:
        return DEFAULT_CONNECT_SECONDS
    if text.isascii() and text.isdigit() and len(text) <= 9:
        return int(text) or DEFAULT_CONNECT_SECONDS  # libpq's own 0 waits for ever
    raise ConfigurationError(
        f"PGCONNECT_TIMEOUT is {text!r}; it must be a number of seconds",
        f"Correct it {settings.location('PGCONNECT_TIMEOUT')}",
        f"Or leave it out; then it is {DEFAULT_CONNECT_SECONDS}",
    )


def _parse_retention(settings: Settings) -> Retention | None:
    text = settings.values.get("BACKUP_KEEP")
    if text is None:
        return None
    parts = [re.fullmatch(r"([0-9]{1,9})([dwmy]?)", part) for part in text.split(",")]
    counts = {RETENTION_UNITS[part[2]]: int(part[1]) for part in parts if part}
    if len(counts) == len(parts) and all(counts.values()):
        return Retention(**counts)
    raise ConfigurationError(
        f"BACKUP_KEEP is {text!r}; it must be a number of backups (14), or numbers of days, weeks,"
        " months and years (7d,4w,6m,2y), or both (3,7d,4w): each 1 or more, and each once",
        f"Correct it {settings.location('BACKUP_KEEP')}",
        "Or leave it out; then every backup is kept",
    )
