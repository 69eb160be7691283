"""Tests of train.py from outside: real processes, a real PostgreSQL, a real Prefect server, a server in Discord's place."""
import base64
import contextlib
import http.server
import json
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
from types import SimpleNamespace

import httpx
import pandas as pd
import psycopg2
import pytest

import db
import models

# ---- shared --------------------------------------------------------------------------------------------------------
ROOT = Path(__file__).resolve().parent
TRAIN, MODELS = ROOT / "train.py", ROOT / "models.py"
TOKEN = "aVerySecretToken_0123456789-abcdefghij"
SECRETS = TOKEN, "s3cr:et", "s3cr%3Aet"
DEAD = f"http://127.0.0.1:9/api/webhooks/1/{TOKEN}"
GREEN, YELLOW, RED = 0x2ECC71, 0xF1C40F, 0xE74C3C
slow = pytest.mark.slow


def wait_until(condition, seconds=10):
    end = time.time() + seconds
    while time.time() < end and not condition():
        time.sleep(.1)
    return condition()


def execute(url, query):
    with contextlib.closing(psycopg2.connect(url)) as connection, connection.cursor() as cursor:
        connection.autocommit = True
        cursor.execute(query)
        return cursor.fetchall() if cursor.description else None


def pg_folder():
    folder = Path(tempfile.mkdtemp(prefix="pg"))
    os.chmod(folder, 0o755)
    return folder / "x"


@pytest.fixture(scope="session")
def postgres():
    """URI of an embedded server in a temporary folder, with the database name left open: {}."""
    return db.start_server(pg_folder(), "tests").replace("/tests?", "/{}?").replace("@", ":s3cr%3Aet%2F%40@", 1)


def a_table(postgres, table="spotify_songs"):
    """Make a database with 600 demo songs in the table; return its URI."""
    name = f"t{time.monotonic_ns()}"
    execute(postgres.format("tests"), f"CREATE DATABASE {name}")
    db.load_demo(600, postgres.format(name), table)
    return postgres.format(name)


@pytest.fixture
def table(prefect, postgres, monkeypatch):
    """600 demo songs in the table spotify_songs of the database that DATABASE_URL names."""
    monkeypatch.setenv("DATABASE_URL", a_table(postgres))
    return os.environ["DATABASE_URL"]


class Discord(http.server.BaseHTTPRequestHandler):
    """Discord on loopback: `got` has the embed and the whole body of each message, None for a GET."""

    log_message = lambda *_: None

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.server.got.append((json.loads(re.search(rb"\{.*\}", body)[0])["embeds"][0], body) if body else None)
        self.send_response(200)
        self.end_headers()
    do_GET = do_POST


@contextlib.contextmanager
def a_discord():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Discord) as server:
        server.got, server.url = [], f"http://127.0.0.1:{server.server_port}/api/webhooks/1/{TOKEN}"
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def discord(monkeypatch):
    with a_discord() as server:
        monkeypatch.setenv("DISCORD_WEBHOOK_URL", server.url)
        yield server


class Run:
    """`python PROGRAM LINE` in another folder: `text` is what it has written, `left` what it started and still runs."""

    def __init__(self, line="", program=TRAIN, cwd="/", **environment):
        self.log, self.mark = Path(tempfile.mkstemp()[1]), f"MARK={time.monotonic_ns()}"
        given = os.environ | environment | {"MARK": self.mark[5:]}
        self.process = subprocess.Popen([sys.executable, program, *shlex.split(line)], cwd=cwd, start_new_session=True,
                                        stdout=self.log.open("w"), stderr=subprocess.STDOUT,
                                        env={name: str(value) for name, value in given.items() if value is not None})

    @property
    def text(self):
        return self.log.read_text()

    @property
    def left(self):
        looked = subprocess.run(f"grep -las {self.mark} /proc/[0-9]*/environ", shell=True, capture_output=True, text=True)
        return looked.stdout.split()

    def at(self, phase):
        """Wait until it has written that."""
        wait_until(lambda: phase in self.text or self.process.poll() is not None, 120)
        assert phase in self.text, self.text
        return self

    def end(self, status=0, *sentences, seconds=200):
        """Wait for its end with that status; return its text: the sentences, no secret, tracebacks where a toy is broken."""
        assert self.process.wait(seconds) == status, self.text
        assert wait_until(lambda: not self.left), self.left
        assert all(sentence in " ".join(self.text.split()) for sentence in sentences), f"{sentences} in {self.text}"
        assert ("Traceback" in self.text) == ("KeyError" in self.text), self.text
        assert not any(secret in self.text for secret in SECRETS), self.text
        return self.text


def pasted(text, words, more="", **environment):
    """Start the command that the text prints and that has these words, as it stands there but in another folder."""
    command = next(found for found in re.findall(f"{sys.executable} [^`\n]*", text) if words in found)
    _, program, line = command.split(" ", 2)
    return Run(line + more, program, **environment)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def answers(address):
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(address).is_success


@contextlib.contextmanager
def prefect_server(home, port):
    """A Prefect server with its scheduler, that of every run meanwhile: a temporary one of its own takes a run 5 s."""
    server, api = Run(f"prefect server start --port {port}", "-m", PREFECT_HOME=home), f"http://127.0.0.1:{port}/api"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_API_URL", api)
        patch.setenv("PREFECT_HOME", str(home))
        assert wait_until(lambda: answers(f"{api}/health"), 120), server.text
        yield api
    server.process.terminate()
    server.process.wait()


@pytest.fixture(scope="session")
def prefect(tmp_path_factory):
    with prefect_server(tmp_path_factory.mktemp("prefect"), free_port()) as api:
        yield api


def kept(what, run=None, **filters):
    """What the Prefect server knows of flow_runs, task_runs, logs, artifacts or deployments; those of one flow run."""
    filters |= {"flow_runs": {"id": {"any_": [run["id"]]}}} if run else {}
    return httpx.post(f"{os.environ['PREFECT_API_URL']}/{what}/filter", json=filters).json()


def last_run(table="songs"):
    return kept("flow_runs", flow_runs={"name": {"like_": table}}, sort="START_TIME_DESC")[0]


def tasks_of(run):
    return {task["name"]: task for task in kept("task_runs", run)}


def logged(task, text):
    """Whether the text comes to stand in the task's log."""
    of_it = {"task_run_id": {"any_": [task["id"]]}}
    return wait_until(lambda: any(text in line["message"] for line in kept("logs", logs=of_it)), 30)


# ---------------------------------------------------------------------------------------------------------------------
# Two nights, at the same time. The good one: a run on a dirty CSV, and what it leaves
# ---------------------------------------------------------------------------------------------------------------------

HOSTILE = ['say "hi"', "two\nlines", "🎸 émoji 🏳️‍🌈", "@everyone", "**bold** `code`", "[link](http://evil.example)", "=cmd()",
           "NA", "null", "'; DROP TABLE spotify_songs; --", "\\", "%s {} {0}"]


def copied(folder, **settings):
    """Copy the program into the folder, with a .env; return its train.py."""
    for module in "train", "models", "db", "notify":
        shutil.copy(ROOT / f"{module}.py", folder)
    (folder / ".env").write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
    return folder / "train.py"


EMBEDDED = "'import db; url = db.database_url(); print(ascii(sorted(db.{})))'"


@pytest.fixture(scope="module")
def night(prefect, bad_run, tmp_path_factory):
    """What a run leaves that loads a CSV into the embedded database. Its folder has a space, its settings are in .env."""
    folder = tmp_path_factory.mktemp("good night")
    songs = db.demo_songs(500)
    songs.loc[:len(HOSTILE) - 1, "track_name"] = HOSTILE
    broken = songs[20:22].assign(track_id=["a", "b"], energy=["much", 0.5], artist_name=["A", ""])
    pd.concat([songs, broken, songs.head(1)]).to_csv(folder / "songs.csv", index=False)
    with open(folder / "songs.csv", "a") as file:
        file.write("only,three,fields\n")
    with a_discord() as discord:
        program = copied(folder, DISCORD_WEBHOOK_URL=discord.url, PREFECT_API_URL=prefect)
        Run(EMBEDDED.format('load_demo(50, url, "my songs", seed=1)'), "-c", folder).end()
        line = f"--csv-path '{folder}/songs.csv' --table-name 'my songs' --truncate --n-clusters 3"
        text = Run(line, program, PREFECT_API_URL=None).end(
            0, "5 of 5 models trained", "504 rows read, 500 songs loaded, 1 repeated, 3 rejected")
        yield SimpleNamespace(models=folder / "models", program=program, songs=songs, text=text, got=discord.got)


def test_the_songs_are_in_the_table_and_the_others_are_not(night):
    names = EMBEDDED.format('load_songs(url, "my songs").track_name')
    Run(names, "-c", night.models.parent).end(0, " ".join(ascii(sorted(night.songs.track_name)).split()))
    assert len((night.models / "rejected_rows.csv").read_text().splitlines()) == 4


def test_every_model_is_there_with_its_metrics(night):
    assert [path.name for path in night.models.rglob(".*")] == [".lock"], "nothing left over"
    loaded = {name: models.load_model(name, night.models) for name in models.MODELS}
    assert {(model["rows"], model["table"]) for model in loaded.values()} == {(500, "my songs")}
    assert len(loaded["clusters"]["metrics"]["sizes"]) == 3
    assert [line["status"] for line in models.read_history(night.models)] == ["started"] * 5 + ["trained"] * 5


def test_the_result_is_one_file(night):
    result = json.loads((night.models / "metrics" / "run.json").read_text())
    assert [result[key] for key in ("status", "exit_status", "rows", "finish_command")] == ["completed", 0, 500, None]


def test_the_message_is_green_and_has_the_picture(night):
    (embed, body), picture = night.got[0], (night.models / "report.png").read_bytes()
    assert (embed["color"], len(embed["fields"]), len(night.got)) == (GREEN, 5, 1) and "5 of 5 models trained" in embed["title"]
    assert embed["image"]["url"] == "attachment://report.png" and b'filename="report.png"' in body
    assert picture.startswith(b"\x89PNG") and picture in body


def test_prefect_shows_the_run(night):
    run = last_run("my songs")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d my songs", run["name"]) and run["state"]["name"] == "Completed"
    tasks, shown = tasks_of(run), {found["key"]: found["description"] for found in kept("artifacts", run)}
    assert set(tasks) == {*models.MODELS, "load CSV", "load songs"}
    assert {task["state_type"] for task in tasks.values()} == {"COMPLETED"} and logged(tasks["genre"], "genre: fitting on")
    assert set(shown) == {"metrics"} | {f"model-{name}" for name in models.MODELS}
    assert re.match(r"clusters:? .*silhouette 0\.\d+ \(first\)", shown["model-clusters"])


def test_the_log_begins_at_once_is_plain_and_has_every_line_once(night):
    said = [line.split(" | ", 2)[-1] for line in night.text.splitlines()]
    assert said[0].startswith("starting"), "before Prefect or scikit-learn is imported"
    assert "\x1b" not in night.text and sorted(set(said)) == sorted(said)


def test_show_similar_and_predict(night, tmp_path):
    given, out = tmp_path / "in.csv", tmp_path / "out.csv"
    night.songs.to_csv(given, index=False)
    runs = [Run(f"{line} --models-dir '{night.models}'", MODELS) for line in (
        "show", "show --json", "similar 'say \"hi\"' -k 7 --json",
        f"predict {given}", f"predict {given} --json", f"predict {given} --out {out}")]
    shown, reports, alike, predicted, rows, _ = [run.end() for run in runs]
    assert re.search("^similar .* 500 .* ago", shown, re.M) and len(json.loads(reports)) == 5
    assert len(json.loads(alike)["similar"]) == 7 and "500 songs; --out FILE writes them all" in predicted
    written = pd.read_csv(out, keep_default_na=False)
    added = ["genre_predicted", "genre_confidence", "cluster", "energy_predicted", "popularity_predicted"]
    assert list(written) == list(json.loads(rows.splitlines()[0])) == [*night.songs, *added]
    assert written.track_name.tolist() == night.songs.track_name.tolist()
    assert (written.genre_predicted == written.genre).mean() > 0.8


def test_after_a_good_night_there_is_nothing_left_to_do(night):
    Run("--check --table-name 'my songs'", night.program).end(0, "table ok my songs has 500 rows", "Discord ok the")
    Run("--failed", night.program).end(0, f"nothing to do: the last run of every model in {night.models} trained it")


def test_every_setting_may_stand_in_dot_env(prefect, tmp_path, discord):
    """Also: a database that stays away is tried twice more, then the night is red."""
    program = copied(tmp_path, DATABASE_URL="postgresql://me:s3cr%3Aet%2F%40@localhost:1/music", DATABASE_RETRY_SECONDS="0.2",
                     DISCORD_WEBHOOK_URL=discord.url, PREFECT_API_URL=prefect)
    Run("--only clusters", program, PREFECT_API_URL=None, DISCORD_WEBHOOK_URL=None).end(
        3, "retrying in 0.2 s (2 of 2)", "Nothing was trained: PostgreSQL at localhost:1", f"{program} --failed")
    embed, body = discord.got[0]
    assert embed["color"] == RED and "--failed" in embed["description"] and b"s3cr" not in body
    assert last_run()["state"]["name"] == "Failed"


# ---------------------------------------------------------------------------------------------------------------------
# The bad one: toy models that fail in every way
# ---------------------------------------------------------------------------------------------------------------------

TOYS = """
import ctypes, os, sys, time
sys.path.insert(0, {root!r})
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
        return {{"toy": name}}, {{"figure": 0.5}}
    return train

def fails(error, calls=99):
    def act(call):
        if call <= calls:
            raise error
    return act

def die(call):
    os.kill(os.getpid(), 9)

def devour(call):
    with open(os.environ["GROUP"], "w") as group:
        group.write(str(os.getpid()))
    eaten = [b"x" * (1 << 24) for _ in iter(int, 1)]

secrets = os.environ.get("DATABASE_URL", "") + " " + os.environ.get("DISCORD_WEBHOOK_URL", "")
for name, act in {{
    "flaky": fails(OSError("the fan fell off " + secrets), 3), "steady": lambda call: time.sleep(2),
    "swinging": lambda call: None, "hopeless": fails(db.DataError("no song is long enough")), "value": fails(ValueError("no")),
    "type": fails(TypeError("no")), "key": fails(KeyError("no")), "hungry": fails(MemoryError()),
    "endless": lambda call: time.sleep(600), "fragile": lambda call: call > 1 or die(call), "deadly": die,
    "crash": lambda call: ctypes.string_at(0), "greedy": devour,
}}.items():
    if name in os.environ["TOYS"].split(","):
        models.MODELS[name] = toy(name, act)
"""


@pytest.fixture(scope="session")
def toys(tmp_path_factory):
    """toys("flaky,steady") is the environment of a run whose processes know these models, which note in TOY_LOG what they do."""
    folder = tmp_path_factory.mktemp("toys")
    (folder / "sitecustomize.py").write_text(TOYS.format(root=str(ROOT)))
    return lambda names: {"PYTHONPATH": folder, "TOYS": names, "TOY_LOG": tmp_path_factory.mktemp("log") / "toys"}


def times(own, words):
    """The moments at which a toy of that environment did something: "flaky begins", "flaky ends"."""
    return [float(moment) for moment in re.findall(f"^{words} (.*)", own["TOY_LOG"].read_text(), re.M)]


HOPELESS = "hopeless,value,type,key"


@pytest.fixture(scope="module")
def bad_run(prefect, postgres, toys, tmp_path_factory):
    """A run in which a model heals, five fail and one is worse than yesterday's, whose songs were quieter."""
    folder, own = tmp_path_factory.mktemp("models"), toys(f"flaky,steady,swinging,hungry,{HOPELESS}")
    quiet = models.describe(db.demo_songs(600).assign(loudness=lambda songs: songs.loudness - 9))
    about = {"run": "2026-01-01T00:00:00+00:00", "table": "bad", "settings": {}, "rows": 600, "seconds": 1.0,
             "data": quiet, "command": "", "value": 0.9}
    for name in *models.MODELS, "swinging":
        models.publish(name, {"toy": name}, {"figure": 0.9}, about, folder)
        models.append_history(folder, [about | {"model": name, "status": "trained"}])
    with a_discord() as discord:
        own |= {"DATABASE_URL": a_table(postgres, "bad"), "DISCORD_WEBHOOK_URL": discord.url}
        line = f"--only flaky --only steady,swinging --only hungry,{HOPELESS} --table-name bad --models-dir {folder}"
        run = Run(line, **own)
        yield SimpleNamespace(run=run, own=own, models=folder, got=discord.got)


@pytest.fixture(scope="module")
def bad(bad_run):
    bad_run.text = bad_run.run.end(
        1, "2 of 8 models trained; held back: swinging; failed: hopeless, value, type, key, hungry")
    return bad_run


def test_what_can_heal_is_tried_again_after_2_4_and_8_seconds(bad):
    begins, ends = times(bad.own, "flaky begins"), times(bad.own, "flaky ends")
    pauses = [begin - end for begin, end in zip(begins[1:], ends)]
    assert [int(pause).bit_length() for pause in pauses] == [2, 3, 4], f"from 2 to 4, to 8, to 16 s: {pauses}"
    said = re.findall("flaky: the fan fell off .*; retrying (.*)", bad.text)
    assert said == ["in 2 s (1 of 3)", "in 4 s (2 of 3)", "in 8 s (3 of 3)"]


def test_what_the_same_input_brings_back_is_not_tried_again(bad):
    assert len(times(bad.own, f"(?:{HOPELESS.replace(',', '|')}) begins")) == 4
    for said in ("hopeless: no song is long enough; not tried again: the same input would bring the same",
                 "hopeless failed: no song is long enough", "value failed: ValueError: no"):
        assert said in bad.text


def test_models_train_side_by_side_on_one_read_and_what_lacked_memory_once_more_alone(bad):
    (flaky, *_), (steady,), (end,), (_, alone) = (times(bad.own, words) for words in (
        "flaky begins", "steady begins", "steady ends", "hungry begins"))
    assert flaky < end and steady < flaky + 2 and alone >= max(times(bad.own, "(?:flaky|steady) ends"))
    assert bad.text.count("600 songs read from bad") == 1


def test_a_bad_night_is_yellow_and_partial(bad):
    (embed, body), run = bad.got[0], last_run("bad")
    assert embed["color"] == YELLOW and "2 of 8 models trained" in embed["title"] and b'filename="report.png"' in body
    assert re.search("mean loudness is[^$]*--failed", embed["description"]) and b"no song is long enough" in body
    assert (run["state"]["type"], run["state"]["name"]) == ("COMPLETED", "Partial")
    tasks = tasks_of(run)
    assert tasks["flaky"]["run_count"] == 4 and tasks["key"]["state_type"] == "FAILED" and logged(tasks["key"], "KeyError: 'no'")


def test_no_secret_is_written(bad):
    for pattern, status in ("the fan fell off", 0), ("|".join(SECRETS), 1):  # 1: grep has found none
        assert subprocess.run(["grep", "-raqE", pattern, bad.models, os.environ["PREFECT_HOME"]]).returncode == status
    assert not any(secret.encode() in bad.got[0][1] for secret in SECRETS)


def test_the_printed_commands_finish_the_job(bad):
    bad.got.clear()
    text = pasted(bad.text, "--failed", " --no-notify", **bad.own | {"HEALED": "hungry"}).end(
        1, "1 of 6 models trained; held back: swinging; failed: hopeless, value, type, key")
    assert bad.got == [] and "--failed" not in text, "what is left would fail again"
    pasted(text, "--only swinging --force", **bad.own).end(0, "1 of 1 models trained")
    assert models.load_model("swinging", bad.models)["metrics"]["figure"] == 0.5


# ---------------------------------------------------------------------------------------------------------------------
# Usage, exit statuses, --check
# ---------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("line, sentence", [
    ("--only jazz", "there is no model 'jazz'; the models are genre, clusters, energy, popularity, similar"),
    ("--truncate", "--truncate must be accompanied by --csv-path"),
    ("--demo --csv-path x.csv", "--demo makes its own songs; leave out --csv-path"),
    ("--demo 0", "--demo needs at least 1 song; it is 0"),
    ("--n-clusters 1", "--n-clusters must be 2 or more; it is 1"),
    ("--failed --only genre", "--failed chooses the models itself; leave out --only"),
    ("--cron '0 3 * * *'", "--cron must be accompanied by --serve"),
    ("--serve --failed", "--serve trains what each run is asked for; leave out --failed"),
    ("--serve", "--serve needs a Prefect server; start one: prefect server start"),
    ("--dask tcp://127.0.0.1:8786", "--dask needs "),
    ("--check --csv-path /nowhere.csv", "--csv-path /nowhere.csv: No such file or directory; give a CSV file"),
])
def test_wrong_usage_is_said(line, sentence, tmp_path):
    Run(line, PREFECT_API_URL="", PREFECT_HOME=tmp_path, DATABASE_URL="postgresql://localhost:1/music").end(2, sentence)


def test_help_and_readme_name_the_same_options():
    options = set(re.findall("--[a-z][a-z-]+", Run("--help").end())) - {"--help"}
    assert options == set(re.findall("^[|] `(--[a-z][a-z-]+)", (ROOT / "README.md").read_text(), re.M))


def test_check_looks_at_everything_and_changes_nothing(prefect, table, tmp_path, discord):
    execute(table, "UPDATE spotify_songs SET popularity = NULL WHERE track_id IN (SELECT track_id FROM spotify_songs LIMIT 60); "
                   "ALTER TABLE spotify_songs DROP COLUMN year")
    Run(f"--check --models-dir {tmp_path}/models").end(
        0, "database ok PostgreSQL", "table ok spotify_songs has 600 rows", "genres ok 20 genres of 5 songs or more",
        "columns ok all required columns; not there, and not needed: year", "nulls warning popularity 10.0%", "space ok",
        f"models directory ok {tmp_path}/models is writable; it will be made", "Discord ok the Discord webhook answers",
        f"Prefect ok {prefect} answers")
    db.demo_songs(30).to_csv(tmp_path / "new.csv")
    Run(f"--check --table-name another --csv-path {tmp_path}/new.csv").end(0, "new.csv may be loaded into another (0 rows)")
    assert discord.got == [None, None] and len(list(tmp_path.iterdir())) == 1


def test_check_names_each_problem_with_its_fix(tmp_path):
    (tmp_path / "file").touch()
    Run(f"--check --models-dir {tmp_path}/file/x", DATABASE_URL="postgresql://me:s3cr%3Aet%2F%40@localhost:1/music",
        PREFECT_API_URL="http://127.0.0.1:9/api", DISCORD_WEBHOOK_URL=DEAD).end(
        2, "database problem PostgreSQL at localhost:1/music", "Discord problem no connection",
        f"directory problem cannot write to {tmp_path}/file; choose another: --models-dir DIR",
        "Prefect problem http://127.0.0.1:9/api does not answer as a Prefect API")


def test_check_does_not_wait_for_what_never_answers(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        at, begun = f"127.0.0.1:{deaf.getsockname()[1]}", time.monotonic()
        Run(f"--check --models-dir {tmp_path}", DATABASE_URL=f"postgresql://me:s3cr%3Aet%2F%40@{at}/music",
            PREFECT_API_URL=f"http://{at}/api", DISCORD_WEBHOOK_URL=DEAD.replace("127.0.0.1:9", at)).end(
            2, "database problem no answer within 4 s", "Discord problem no answer", "Prefect problem no answer")
    assert time.monotonic() - begun < 6


HEAVY = re.compile(r"\| +(prefect|pandas|sklearn|scipy|matplotlib)\b")


def test_check_imports_nothing_heavy_and_makes_no_database(tmp_path):
    text = Run(f"-X importtime {copied(tmp_path)} --check", "-B", PREFECT_API_URL="").end(2, "there is no embedded database yet")
    assert not HEAVY.search(text) and len(list(tmp_path.iterdir())) == 5


def test_a_second_run_goes_away_at_once(tmp_path):
    said = f"another run is training into {tmp_path} (process {os.getpid()} since "
    with models.one_run_at_a_time(tmp_path):
        assert not HEAVY.search(Run(f"-X importtime {TRAIN} --models-dir {tmp_path}", "-B").end(75, said))
        Run(f"rollback energy --models-dir {tmp_path}", MODELS).end(75, said)


def test_wrong_input_is_red_and_no_command_would_help(table, tmp_path, discord):
    elsewhere = Run("--models-dir /dev/null/x", DISCORD_WEBHOOK_URL=DEAD)
    text = Run(f"--table-name nothing --models-dir {tmp_path}").end(2, 'The table "nothing" does not exist')
    embed, body = discord.got[0]
    assert embed["color"] == RED and b"--failed" not in body and "--failed" not in text and "retrying" not in text
    assert models.owed(tmp_path) == list(models.MODELS)
    elsewhere.end(2, "cannot write to the models directory /dev/null/x")


# ---------------------------------------------------------------------------------------------------------------------
# From Python, night after night
# ---------------------------------------------------------------------------------------------------------------------

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
    ours, temporary = sum(len(files) for _, _, files in os.walk(folder)) // 10, len(os.listdir(tempfile.gettempdir()))
    print("LEFT", [memory, len(os.listdir("/proc/self/fd")), threading.active_count(), temporary, ours])
print("TASKS", [(task.name, task.retries, task.retry_delay_seconds)
                for name, task in vars(train).items() if name.startswith("train_") and name.endswith("_model_task")])
"""


@pytest.mark.parametrize("nights", [2, pytest.param(30, marks=slow)])
def test_night_after_night_from_python_lets_nothing_grow(table, tmp_path, nights):
    """Memory in blocks of 16 MB, open files, threads, temporary files, our files by tens."""
    names = "genre", "clustering", "energy_regression", "popularity_regression", "similar_songs"
    text = Run(f"{shlex.quote(NIGHTS.format(root=str(ROOT)))} {tmp_path}/models {nights}", "-c", TMPDIR=tmp_path).end(
        0, f"TASKS {[(f'train_{name}_model_task', 3, [2, 4, 8]) for name in names]}")
    early, *_, late = [json.loads(line) for line in re.findall("LEFT (.*)", text)][nights // 3:]
    assert all(after <= before + 2 for before, after in zip(early, late)), (early, late)


# ---------------------------------------------------------------------------------------------------------------------
# Signals, kills, crashes
# ---------------------------------------------------------------------------------------------------------------------

def stop(run, folder, discord, number=signal.SIGTERM, child=False):
    """Send the signal: within ten seconds the run has ended, told it, freed the lock and left nothing running."""
    pid, told = run.process.pid, f"stopped by {'Ctrl-C' if number == signal.SIGINT else 'SIGTERM'}"
    discord.got.clear()
    os.kill(int(Path(f"/proc/{pid}/task/{pid}/children").read_text()) if child else pid, number)
    run.end(128 + number, told, seconds=10)
    assert [told in json.dumps(embed) for embed, _ in discord.got] == [True]
    with models.one_run_at_a_time(folder):
        return told


@pytest.mark.parametrize("child", [False, pytest.param(True, marks=slow)])
def test_a_signal_amid_a_fit(table, toys, tmp_path, discord, child):
    """To the process that watches, or to the one that trains."""
    run = Run(f"--models-dir {tmp_path} --only clusters,endless", **toys("endless")).at("clusters: done")
    told = stop(run, tmp_path, discord, child=child)
    assert last_run()["state"]["type"] == "CRASHED" and told in last_run()["state"]["message"]
    assert models.owed(tmp_path) == ["genre", "energy", "popularity", "similar"]


def test_a_signal_before_the_flow_and_while_the_database_is_waited_for(prefect, tmp_path, discord, monkeypatch):
    monkeypatch.setenv("DATABASE_URL", "postgresql://localhost:1/music")
    run = Run(f"--models-dir {tmp_path}")
    assert wait_until(lambda: models.read_history(tmp_path))
    stop(run, tmp_path, discord)
    stop(Run(f"--models-dir {tmp_path}").at("retrying in 30 s (1 of 2)"), tmp_path, discord)
    assert models.owed(tmp_path) == list(models.MODELS)


@slow
def test_a_signal_at_any_moment(prefect, table, tmp_path, discord):
    for number, seconds, phase in ((signal.SIGTERM, 0.8, ""), (signal.SIGINT, 2.5, ""), (signal.SIGTERM, 0, "songs read"),
                                   (signal.SIGINT, 0, "similar: done")):
        run = Run(f"--models-dir {tmp_path}", PREFECT_API_URL=prefect if phase else "").at(phase)  # "": a server of its own
        time.sleep(seconds)
        stop(run, tmp_path, discord, number)
    with psycopg2.connect(table) as connection, connection.cursor() as cursor:
        cursor.execute("LOCK TABLE spotify_songs IN ACCESS EXCLUSIVE MODE")
        run = Run(f"--models-dir {tmp_path}")
        assert wait_until(lambda: execute(table, "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock'"), 60)
        stop(run, tmp_path, discord)
    Run(f"--failed --models-dir {tmp_path}").end(0, "models trained")


@pytest.fixture
def memory_group(monkeypatch):
    """A memory cgroup of 300 MB, of either version, for processes that enter it through the file that GROUP names."""
    top = next(path for path in (Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")) if path.exists())
    group = top / f"runs-{os.getpid()}"
    group.mkdir()
    (group / ("memory.limit_in_bytes" if top.name == "memory" else "memory.max")).write_text(str(300 << 20))
    monkeypatch.setenv("GROUP", str(group / "cgroup.procs"))
    yield
    group.rmdir()


@pytest.mark.parametrize("names, status, said", [
    ("fragile", 0, "2 of 2 models trained"),
    pytest.param("deadly,crash", 1, "ended by SIGSEGV", marks=slow), pytest.param("greedy", 1, "ended by SIGKILL", marks=slow)])
def test_a_run_that_is_ended_amid_a_fit_is_started_again(request, table, toys, tmp_path, discord, names, status, said):
    names == "greedy" and request.getfixturevalue("memory_group")
    Run(f"--only steady,{names} --models-dir {tmp_path}", **toys(f"steady,{names}")).end(
        status, said, "the run was ended by SIG", "one model at a time")
    embed, body = discord.got[0]
    assert embed["color"] == YELLOW and "the run was ended by SIGKILL" in embed["description"] and said.encode() in body
    ended = {line["model"]: line["status"] for line in models.read_history(tmp_path)}
    assert ended == {"steady": "trained"} | dict.fromkeys(names.split(","), "failed" if status else "trained")


def whole(folder):
    """{name: run} of the models there; load_model compares each with its metrics' SHA-256."""
    return {name: models.load_model(name, folder)["run"] for name in models.MODELS if (folder / f"{name}.joblib").exists()}


@slow
def test_kill_9_at_six_moments_loses_nothing(tmp_path):
    program, folder = copied(tmp_path), tmp_path / "demo" / "models"
    own = {"PREFECT_API_URL": "", "PREFECT_HOME": tmp_path}
    Run("--demo 600", program, **own).end(0, "5 of 5 models trained")
    old = whole(folder)
    for phase in "", "embedded PostgreSQL", "songs read", "genre: evaluating", "similar: done", "energy: fitting":
        run = Run("--demo 600", program, **own).at(phase)
        time.sleep(0.2)
        run.process.kill()
        run.end(-signal.SIGKILL)
        new, last = whole(folder), models.read_history(folder)[-1]["run"]
        assert [name for name in models.MODELS if new[name] not in (old[name], last)] == []
        assert models.owed(folder) == [name for name in new if new[name] != last]
        old = new
    Run("--demo 600 --failed", program, **own).end(0, "models trained")
    assert models.owed(folder) == [] and [path.name for path in folder.rglob(".*")] == [".lock"]


# ---------------------------------------------------------------------------------------------------------------------
# The disk is full, the database goes away, several runs at once
# ---------------------------------------------------------------------------------------------------------------------

@pytest.fixture
def small_disk(tmp_path):
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", tmp_path], check=True)
    yield tmp_path
    subprocess.run(["umount", "-l", tmp_path], check=True)


@slow
def test_a_full_disk_costs_nothing_and_is_said(table, small_disk, discord):
    folder, filler = small_disk / "models", small_disk / "filler"
    Run(f"--only clusters,energy --models-dir {folder}").end()
    for free, only, status, said, trained in (  # KiB: for nothing; for a small model; for that, but no picture
            (0, "clusters,energy", 3, "0 of 2 models trained", []), (400, "clusters,energy", 1, "failed: energy", ["clusters"]),
            (100, "clusters", 0, "warning: the picture could not be made", ["clusters"])):
        old, room = whole(folder), shutil.disk_usage(small_disk).free
        with open(filler, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, room - free * 1024)
        Run(f"--only {only} --models-dir {folder}").end(status, said, f"there is no space left for {folder}")
        assert [name for name, run in whole(folder).items() if run != old[name]] == trained
        assert b"there is no space left" in discord.got[-1][1]
        filler.unlink()
    Run(f"--failed --models-dir {folder}").end(0, "models trained")


@slow
def test_the_database_is_stopped_amid_the_read_and_comes_back(prefect, tmp_path):
    folder = pg_folder()
    url = db.start_server(folder, "songs")
    db.load_demo(800, url, "spotify_songs")
    execute(url, "CREATE VIEW slow_songs AS SELECT * FROM spotify_songs WHERE pg_sleep(0.005) IS NOT NULL")
    run = Run(f"--only clusters --table-name slow_songs --models-dir {tmp_path}", DATABASE_URL=url, DATABASE_RETRY_SECONDS=4)
    assert wait_until(lambda: execute(url, "SELECT 1 FROM pg_stat_activity WHERE query LIKE 'COPY%'"), 60), run.text
    os.kill(int(next(folder.rglob("postmaster.pid")).read_text().split()[0]), signal.SIGQUIT)
    run.at("retrying in 4 s (1 of 2)")
    db.start_server(folder, "songs")
    run.end(0, "1 of 1 models trained")


@slow
def test_no_connection_slot_is_free(table, tmp_path):
    execute(table, "CREATE ROLE guest LOGIN CONNECTION LIMIT 1; GRANT SELECT ON spotify_songs TO guest")
    guest = table.replace("postgres:", "guest:")
    with contextlib.closing(psycopg2.connect(guest)):
        run = Run(f"--only clusters --models-dir {tmp_path}", DATABASE_URL=guest, DATABASE_RETRY_SECONDS=2).at("(1 of 2)")
    run.end(0, "connection slots are taken: raise max_connections or close idle ones")


@slow
def test_of_ten_runs_into_three_folders_three_train(table, tmp_path):
    """And each starts Prefect where it never ran."""
    own = {"PREFECT_API_URL": "", "PREFECT_HOME": tmp_path / "prefect"}
    runs = [Run(f"--only clusters --models-dir {tmp_path}/{i % 3}", **own) for i in range(10)]
    assert sorted(run.process.wait(200) for run in runs) == [0] * 3 + [75] * 7


# ---------------------------------------------------------------------------------------------------------------------
# Beyond one machine: a Prefect server on its usual port, its scheduler, a work pool, a Dask cluster
# ---------------------------------------------------------------------------------------------------------------------

@slow
def test_a_prefect_server_on_its_usual_port_is_found(table, tmp_path):
    if answers("http://127.0.0.1:4200/api/health"):
        pytest.skip("somebody's Prefect server has that port")
    with prefect_server(tmp_path / "prefect", 4200):
        Run(f"--only clusters --models-dir {tmp_path}", PREFECT_API_URL=None, PREFECT_HOME=tmp_path).end()
        assert last_run()["state"]["name"] == "Completed"


def deployed(line, state):
    """Start a run of a deployment, as people do, and wait for that state."""
    run = {"id": re.search(r"UUID: (\S+)", Run(f"prefect deployment run ml-training-pipeline/{line}", "-m").end())[1]}
    return wait_until(lambda: kept("flow_runs", run)[0]["state"]["name"] == state, 120)


@slow
def test_serve_runs_what_it_is_asked_for_and_loses_no_run_when_it_is_stopped(table, toys, tmp_path):
    own = toys("endless")
    Run("--serve", PREFECT_API_URL="http://127.0.0.1:9/api").end(2, "http://127.0.0.1:9/api does not answer as a Prefect API")
    Run("--serve --cron '0 3 * *'").end(2, "--cron '0 3 * *' is no cron expression; write five fields")
    serving = Run(f"--serve --cron '0 3 * * *' --only clusters --models-dir {tmp_path}", **own).at("serving ml-training-pipeline")
    deployment, = kept("deployments")
    assert [row["schedule"]["cron"] for row in deployment["schedules"]] == ["0 3 * * *"] and not deployment["paused"]
    assert deployment["parameter_openapi_schema"]["properties"]["n_clusters"]["minimum"] == 2
    assert deployed("ml-training-pipeline --param n_clusters=3", "Completed"), serving.text
    assert len(models.read_report("clusters", tmp_path)["metrics"]["sizes"]) == 3
    assert deployed("""ml-training-pipeline --param 'only=["endless"]'""", "Running") and wait_until(own["TOY_LOG"].exists, 60)
    serving.process.terminate()
    serving.end(143, seconds=10)
    assert last_run()["state"]["name"] == "Cancelled" and kept("deployments")[0]["paused"], "nothing piles up meanwhile"


@slow
def test_a_work_pool_runs_the_flow_elsewhere(table, tmp_path):
    Run("prefect work-pool create songs --type process", "-m").end()
    Run("prefect --no-prompt deploy train.py:ml_training_pipeline -n nightly -p songs "
        f"--param models_dir={tmp_path}", "-m", ROOT).end()
    worker = Run("prefect worker start --pool songs", "-m")
    assert deployed("""nightly --param 'only=["clusters", "similar"]'""", "Completed"), worker.text
    assert models.load_model("similar", tmp_path)["rows"] == 600
    worker.process.kill()


@slow
def test_dask_survives_a_worker_that_is_killed_amid_a_fit(table, tmp_path):
    from distributed import Client
    db.load_demo(5_000, table, "spotify_songs")
    own, address = {"PREFECT_API_URL": "", "PREFECT_HOME": tmp_path}, f"tcp://127.0.0.1:{free_port()}"
    line = f"--models-dir {tmp_path} --dask {address}"
    Run(line).end(3, f"no Dask cluster with a worker answers at {address}")
    cluster = [Run(f"distributed.cli.dask_{words} {address} --no-dashboard", "-m", **own).at("tcp://")
               for words in ("scheduler --host", "worker --nthreads 1", "worker --nthreads 1")]
    with Client(address, set_as_default=False) as client:
        run, fits = Run(line), lambda: [worker for worker, keys in client.processing().items() if "train" in str(keys)]
        assert wait_until(fits, 120), run.text
        time.sleep(1)
        os.kill(client.run(os.getpid)[fits()[0]], signal.SIGKILL)
        run.end(0, "5 of 5 models trained")
    assert not (tmp_path / "prefect.db").exists(), "no Prefect servers on the workers"
    for part in cluster:
        os.killpg(part.process.pid, signal.SIGKILL)


# ---- the pictures of the README ------------------------------------------------------------------------------------
PAGE = """<!doctype html><meta charset="utf-8"><style>
body {{ margin: 0; padding: 20px; width: 660px; background: #313338; color: #dbdee1; font: 17px sans-serif; line-height: 1.35 }}
b {{ color: white }} img {{ width: 100%; border-radius: 4px; margin-top: 14px }} code {{ background: #1e1f22; padding: 2px 4px }}
.embed {{ background: #2b2d31; border-left: 5px solid #{color:06x}; border-radius: 4px; padding: 12px 18px; margin-top: 8px }}
.fields {{ display: grid; grid-template-columns: 1fr 1fr 1fr; gap: 8px; margin-top: 10px }} .inlineFalse {{ grid-column: span 3 }}
small {{ display: block; margin-top: 10px; color: #b5bac1 }}</style>
<b>song models</b> <small style="display: inline">APP</small><div class="embed"><b>{title}</b><br>{description}
<div class="fields">{rows}</div><img src="data:image/png;base64,{picture}">
<small>{footer[text]} • {timestamp:.16}</small></div>"""


def shown(text):
    """Discord's markdown as HTML."""
    text = re.sub(r"\\([^\w\s])|\u200b", r"\1", re.sub("`(.+?)`", r"<code>\1</code>", text))
    return text.replace("\n", "<br>")


@pytest.mark.pictures
def test_the_pictures_of_the_readme(prefect, table, discord, tmp_path):
    """Three good nights on demo songs; on the fourth somebody has set popularity to 5."""
    from PIL import Image
    program, picture = copied(tmp_path), tmp_path / "models" / "report.png"
    db.load_demo(5000, table, "spotify_songs")
    for _ in range(3):
        Run("", program).end()
    shutil.copy(picture, ROOT / "docs")
    execute(table, "UPDATE spotify_songs SET popularity = 5")
    Run("", program).end(1)
    embed, _ = discord.got[3]
    rows = "".join("<div class=inline{inline}><b>{name}</b><br>{value}</div>".format(**field) for field in embed["fields"])
    embed |= {"title": shown(embed["title"]), "description": shown(embed["description"]), "rows": shown(rows)}
    page = PAGE.format(**embed, picture=base64.b64encode(picture.read_bytes()).decode())
    (tmp_path / "page.html").write_text(page)
    for address, name, size in ((f"file://{tmp_path}/page.html", "discord.png", "740,1160"),
                                (f"{prefect[:-4]}/runs/flow-run/{last_run()['id']}", "ui.png", "1300,1180")):
        path = ROOT / "docs" / name
        subprocess.run(["chromium", "--headless", "--no-sandbox", "--hide-scrollbars", f"--window-size={size}",
                        "--virtual-time-budget=40000", f"--screenshot={path}", address], check=True, timeout=120)
        Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)
