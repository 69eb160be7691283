"""Tests of notify.py: a real HTTP server in Discord's place, real pictures, a real terminal."""
import contextlib
import http.server
import io
import json
import logging
import os
import pty
import re
import struct
import threading
import time
import warnings
from email.parser import BytesParser

import pytest
from prefect.logging.handlers import PrefectConsoleHandler

import db
import notify

# ---- shared --------------------------------------------------------------------------------------------------------
TOKEN = "aVerySecretToken_0123456789-abcdefghij"
LIMITED = 429, '{"retry_after": 0.3}'
# What the server answers on a route, in turn; the last answer is given again and again. None: the line goes dead.
REPLIES = {"ok-200": [(200, "{}")], "gone": [(404, '{"message": "Unknown Webhook", "code": 10015}')], "wrong": [(401, "")],
           "limited-once": [LIMITED, (204, "")], "limited": [LIMITED], "limited-html": [(429, "<html>"), (204, "")],
           "limited-long": [(429, '{"retry_after": 3600}')], "broken-twice": [(500, "oops")] * 2 + [(204, "")],
           "broken": [(500, "oops")], "dropped-once": [None, (204, "")], "dropped": [None], "moved": [(302, "")],
           "refused": [(400, f'{{"echo": "{TOKEN}"}}')]}


def objections(payload):
    """What Discord would refuse in a message, as sentences. It counts UTF-16 code units."""
    def units(text):
        return len(text.encode("utf-16-le")) // 2
    embed, = payload["embeds"]
    fields = embed["fields"]
    texts = [(embed["title"], 256), (embed["description"], 4096), (embed["footer"]["text"], 2048)]
    texts += [(field[key], limit) for field in fields for key, limit in (("name", 256), ("value", 1024))]
    found = [f"{units(text)} > {limit}" for text, limit in texts if units(text) > limit]
    found += ["empty field"] * any(not field[key].strip() for field in fields for key in ("name", "value"))
    found += ["too many fields"] * (len(fields) > 25) + ["more than 6000"] * (sum(units(text) for text, _ in texts) > 6000)
    return found + ["mentions allowed"] * (payload["allowed_mentions"] != {"parse": []})


class Discord(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def answer(self, status, body):
        self.send_response(status)
        for header in {"Content-Length": len(body), "Location": "/api/webhooks/ok/x", "Retry-After": 1}.items():
            self.send_header(*map(str, header))
        self.end_headers()
        self.wfile.write(body.encode())

    def do_GET(self):
        self.answer(200 if "/ok/" in self.path else 404, json.dumps({"name": "songs", "token": TOKEN}))

    def do_POST(self):
        data, files = self.rfile.read(int(self.headers["Content-Length"])), {}
        if self.headers.get_content_type() != "application/json":
            message = BytesParser().parsebytes(b"Content-Type: " + self.headers["Content-Type"].encode() + b"\r\n\r\n" + data)
            parts = {part.get_param("name", header="Content-Disposition"): part for part in message.get_payload()}
            data = parts.pop("payload_json").get_payload(decode=True)
            files = {name: (part.get_filename(), part.get_payload(decode=True)) for name, part in parts.items()}
        payload, route = json.loads(data), self.path.split("/")[3]
        self.server.got.append((payload, files))
        if route == "slow":
            time.sleep(2)
        if route == "endless":
            self.send_response(200)
            self.end_headers()
            while not time.sleep(0.1):
                self.wfile.write(b" ")
        if "python" in self.headers["User-Agent"].lower():
            return self.answer(403, "error code: 1010")
        images = [embed["image"]["url"] for embed in payload["embeds"] if "image" in embed]
        if objections(payload) or images != [f"attachment://{name}" for name, _ in files.values()]:
            return self.answer(400, json.dumps(objections(payload) or ["attachment"]))
        if route == "no-pictures" and files:
            return self.answer(413, "Request entity too large")
        replies = REPLIES.get(route, [(204, "")])
        reply = replies[min(len(self.server.got), len(replies)) - 1]
        self.answer(*reply) if reply else self.connection.close()


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


def on_terminal(work):
    """What `work(file)` writes to a pseudo-terminal of 80 columns, without its escape codes."""
    master, slave = pty.openpty()
    written = []

    def drain():
        with contextlib.suppress(OSError):
            while data := os.read(master, 65536):
                written.append(data)
    reader = threading.Thread(target=drain, daemon=True)
    reader.start()
    with open(slave, "w", encoding="utf-8") as file, pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "80")
        patch.setenv("TERM", "xterm-256color")
        work(file)
    reader.join(5)
    os.close(master)
    return re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", b"".join(written).decode())


# ---- results of runs -----------------------------------------------------------------------------------------------
PARAMETERS = {"csv_path": None, "table_name": "spotify_songs", "truncate_table": False, "n_clusters": 2, "only": None,
              "enable_notifications": True, "models_dir": None, "demo": None, "force": False, "dask": None}
NONE = dict.fromkeys(("genre", "clusters", "energy", "popularity", "similar"))
NAMES = ["A genre with a very long name indeed", "$\\m_i^2$ _x_", "東京 Jポップ", "rock 🎸", "русский", "\x00\ud800"]


def a_model(plot, metrics, **changes):
    return {"status": "trained", "error": None, "metrics": metrics, "plot": plot, "previous": 0.709, "bytes": 31_234_567,
            "rows": 9, "seconds": 3.2, "path": "/srv/x.joblib", "heals": False, "guessing": None} | changes


def a_genre(names, **changes):
    matrix = {"labels": names, "rows": [[0.8 if row == column else 0.04 for column in names] for row in names]}
    plot = {"confusions": [[name, names[-1], 60, 0.4] for name in names], "matrix": matrix if len(names) < 13 else None}
    return a_model(plot, {"accuracy": 0.7134, "top3_accuracy": 0.861}, **changes)


def some_clusters(count, **changes):
    plot = {"points": [[i % 3, i * 7 % 5, i] for i in range(count)], "labels": ["loud, live"] * count, "sizes": [9] * count}
    return a_model(plot, {"silhouette": 0.2311}, **{"previous": None} | changes)


def a_regression(top=1, **changes):
    density = [[row * column for column in range(40)] for row in range(40)]
    return a_model({"edges": [0, top, 40], "density": density}, {"r2": 0.8842, "baseline_mae": 0.2088}, **changes)


def failed(why="too few songs"):
    return notify.failed_entry(OSError(why))


def a_run(models=(), error=None, **changes):
    """The result of a good night, or of another with `models` replaced, added or left out (None) and other changes."""
    similar = a_model({"same_genre_at": [0.6, 0.5, None], "by_chance": 0.009}, {"same_genre_at_10": 0.41, "some_new_one": 1})
    every = {"genre": a_genre(["rock", "pop"] * 7), "clusters": some_clusters(2), "energy": a_regression(),
             "popularity": a_regression(100), "similar": similar} | dict(models)
    models = {name: model for name, model in every.items() if model}
    result = notify.new_result(PARAMETERS, models or NONE, "/srv/models") | {"models": models, "rows": 89_740} | changes
    notify.decide(result, error)
    return result | {"host": "musicbox"} | changes


def a_history(days):
    return [{"run": f"2026-11-{day + 1:02}T03:00:00+00:00", "model": model, "status": "failed" if day % 9 == at else "trained",
             "value": None if day % 9 == at else day % 5} for day in range(days) for at, model in enumerate(NONE)]


# ---- what the run was ----------------------------------------------------------------------------------------------
STOPPED, HELD = notify.Stopped(notify.TERMINATED), {"status": "held_back", "error": "held back: it fell; --only genre --force"}


@pytest.mark.parametrize("models, error, status, code, says, finish", [
    ({}, None, "completed", 0, "5 of 5 models trained", False),
    ({"genre": failed()}, None, "partial", 1, "4 of 5 models trained; failed: genre", True),
    ({"genre": notify.failed_entry(db.DataError("x"))}, None, "partial", 1, "4 of 5 models trained; failed: genre", False),
    ({"genre": a_genre([""], **HELD)}, None, "partial", 1, "4 of 5 models trained; held back: genre", False),
    (NONE | {"genre": failed()}, None, "failed", 3, "0 of 1 models trained; failed: genre", True),
    (NONE, db.DataError("no column"), "failed", 2, "Nothing was trained: no column", False),
    (NONE, db.DatabaseUnavailable("it is gone"), "failed", 3, "Nothing was trained: it is gone", True),
    (NONE, RuntimeError("odd"), "failed", 3, "Nothing was trained: RuntimeError: odd", True),
    (NONE, STOPPED, "failed", 143, "Nothing was trained: the run was stopped by SIGTERM", True),
    ({}, notify.Stopped(130), "partial", 130, "5 of 5 models trained; the run was stopped by Ctrl-C", False)])
def test_what_a_run_was(models, error, status, code, says, finish):
    result = json.loads(json.dumps(a_run(models, error)))
    notify.decide(result, OSError("later"))
    assert (result["status"], result["exit_status"], result["message"]) == (status, code, says)
    assert bool(result["finish_command"]) == finish and result["peak_mb"] > 20


def test_commands_do_what_they_say_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = PARAMETERS | {"csv_path": "my songs.csv", "truncate_table": True, "models_dir": "m", "demo": 9, "table_name": "s.t"}
    words = "train.py", "--table-name", "s.t", "--demo", 9, "--models-dir", tmp_path / "m"
    for csv, more in (None, ("--csv-path", tmp_path / "my songs.csv", "--truncate")), ({"read": 1}, ()):
        result = notify.new_result(given, ["genre"], "m") | {"csv": csv}
        notify.decide(result, STOPPED)
        assert (result["command"], result["finish_command"]) == (db.command(*words), db.command(*words, "--failed", *more))


def test_logs_hold_no_secrets_and_no_needless_traceback(monkeypatch):
    monkeypatch.setenv("DATABASE_URL", "postgresql://me:hunter22xyz@db/music")
    logger, out = logging.getLogger("prefect.task_runs"), io.StringIO()
    notify.quiet_logs()
    monkeypatch.setattr(logger, "handlers", [logging.StreamHandler(out)])
    for error in (OSError("hunter22xyz is gone"), RuntimeError("hunter22xyz is odd")):
        logger.error("%s went wrong: %s", "hunter22xyz", error, exc_info=error)
    said = out.getvalue()
    assert "hunter22xyz" not in said and "RuntimeError: *** is odd" in said and "OSError" not in said


# ---- Discord -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("route, told, posts, logged", [
    ("ok", True, 1, ""), ("ok-200", True, 1, ""), ("gone", False, 1, "make a new one"), ("wrong", False, 1, "token is wrong"),
    ("limited-once", True, 2, "next try in 0.3 s"), ("limited-html", True, 2, "next try in 1.0 s"),
    ("limited", False, 6, "too many messages"), ("limited-long", False, 1, "too many messages"),
    ("broken-twice", True, 3, "answered 500"), ("broken", False, 3, "answered 500: oops"),
    ("dropped-once", True, 2, "answered nothing"), ("dropped", False, 3, "no connection"), ("moved", False, 1, "answered 302"),
    ("refused", False, 1, "answered 400"), ("slow", False, 1, "no answer"), ("endless", False, 1, "no answer within 2 s"),
    (" ", False, 0, "Copy Webhook URL")])
def test_discord_replies(discord, caplog, monkeypatch, route, told, posts, logged):
    caplog.set_level("DEBUG")
    monkeypatch.setattr(notify, "TIMEOUT", 0.5)
    begun = time.monotonic()
    assert notify.post_discord(a_run(), discord(route), seconds=2 if route == "endless" else 20) is told
    assert (len(discord.got), time.monotonic() - begun < 4) == (posts, True)
    assert logged in caplog.text and TOKEN not in caplog.text


def test_discord_is_told_with_the_picture(discord, tmp_path, caplog, monkeypatch):
    good, stopped = (a_run(error=error, models_dir=str(tmp_path)) for error in (None, STOPPED))
    for route, result in (("ok", good), ("no-pictures", good), ("ok", stopped), ("ok", good | {"notify": False})):
        monkeypatch.setenv("DISCORD_WEBHOOK_URL", discord(route))
        notify.tell(result, [])
    picture = {"files[0]": ("report.png", (tmp_path / "report.png").read_bytes())}
    assert [files for _, files in discord.got] == [picture, picture, {}, {}] and len(list(tmp_path.iterdir())) == 1
    notify.tell(broken := a_run(models_dir=str(tmp_path / "absent")), [])
    assert discord.got[-1][1] == {} and "the picture could not be made" in broken["warnings"][0]
    assert notify.post_discord({}, discord()) is False and "was not told: KeyError" in caplog.text


def test_check_of_the_webhook(discord, monkeypatch):
    for url, state, says in (discord(), "ok", "answers"), (discord("gone"), "problem", "make a new one"), ("", "ok", "not set"):
        monkeypatch.setenv("DISCORD_WEBHOOK_URL", url)
        (_, found, sentence), = notify.check_discord(True)
        assert found == state and says in sentence and TOKEN not in sentence
    assert notify.check_discord(False) == [("Discord", "ok", "--no-notify: nothing is posted")]


EVIL = "🎸*_`|~[x](http://e.example) <@1> @everyone \\ \x00\u202e\n# postgresql://me:hunter22xyz@db/music " + TOKEN + " "


def test_no_limit_is_broken_and_no_secret_leaves(monkeypatch):
    monkeypatch.setenv("DATABASE_URL", "postgresql://me:hunter22xyz@db/music")
    monkeypatch.setenv("DISCORD_WEBHOOK_URL", "https://discord.com/api/webhooks/1/" + TOKEN)
    much = dict.fromkeys(("message", "error", "host", "table", "finish_command"), EVIL * 99) | {"warnings": [EVIL * 99] * 5}
    payload, summary, picture = seen(a_run({str(i) + EVIL: failed(EVIL * 99) for i in range(7)}, **much))
    assert objections(payload) == [] and "http://" not in json.dumps(payload["embeds"][0]["fields"])
    for text in (json.dumps(payload, ensure_ascii=False), summary, picture):
        assert not any(bad in text for bad in ("hunter22xyz", TOKEN, "\x00", "\\u0000", "\u202e")) and "…" in picture
    assert "@everyone" not in json.dumps(payload)


# ---- what people see -----------------------------------------------------------------------------------------------
def seen(result, history=()):
    """(the message, the summary, the words of the picture)."""
    out, figure = io.StringIO(), notify.report_figure(result, history)
    notify.print_summary(result, out)
    assert len(figure.axes) == len(result["models"]) + 1
    texts = figure.findobj(lambda artist: hasattr(artist, "get_text"))
    return notify.discord_payload(result), out.getvalue(), " ".join(text.get_text().replace("\n", " ") for text in texts)


@pytest.mark.parametrize("result, history, colour, says, draws", [
    (a_run(), a_history(30), 0x2ECC71, ["5 of 5 models trained", "accuracy 0.713", "+0.004", "89,740 songs of", "musicbox"],
     ["genre: accuracy", "rock → pop: 40% (60)", "last 30 runs", "by chance 0.9%"]),
    (a_run({"genre": failed(), "clusters": None, "energy": a_regression(**HELD), "popularity": a_regression(guessing=True)}),
     a_history(1), 0xF1C40F, ["2 of 4", "too few songs", "held back: it fell", "no better than guessing"],
     ["genre: failed", "energy: held back at R² 0.884", "first run"]),
    (a_run({"genre": a_genre(["rock", "pop"]), "clusters": some_clusters(5)}, warnings=["x"], deaths=["ended by SIGKILL"]),
     a_history(3), 0xF1C40F, ["5 of 5", "warning: ended by SIGKILL"], ["80%", "last 3", "SIGKILL (and 1 more)"]),
    (a_run({"genre": a_genre(NAMES), "clusters": some_clusters(12), "more": a_regression()}), [], 0x2ECC71, [],
     ["_i^2$", "русский"]),
    (a_run({"genre": a_genre(NAMES * 3), "similar": None}, host="ホスト$"), [], 0x2ECC71, [], ["русский →", "…"]),
    (a_run(NONE | {"similar": a_model({}, {"some_new_one": 1.0})}), [], 0x2ECC71, ["some new one 1.000"], ["nothing to draw"]),
    (a_run(NONE, STOPPED), [], 0xE74C3C, ["Nothing was trained: the run was stopped by SIGTERM"], [])])
def test_of_every_kind_of_run(result, history, colour, says, draws, tmp_path):
    payload, summary, picture = seen(result, history)
    message, embed = json.dumps(payload, ensure_ascii=False), payload["embeds"][0]
    assert objections(payload) == [] and embed["color"] == colour and result["message"] in embed["title"]
    assert [(word, text) for word in says for text in (message, summary, picture) if word not in text] == []
    assert [word for word in draws if word not in picture] == []
    command = str(result["finish_command"])
    assert (f"`{command}`" in message) == summary.endswith(f"\nto finish the job: {command}\n") == bool(result["finish_command"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        notify.draw_report(result, history, tmp_path / "report.png")
    data = (tmp_path / "report.png").read_bytes()
    width, height = struct.unpack(">II", data[16:24])
    assert data.startswith(b"\x89PNG") and width == 1600 and 700 <= height <= 1500 and len(data) < 500_000


# ---- the terminal --------------------------------------------------------------------------------------------------
def test_summary(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    csv = {"read": 9, "loaded": 6, "repeated": 1, "rejected": {"no title": 2}}
    result, file = a_run({"genre": failed("[bold]no\x1b[31m")}, csv=csv), io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    notify.print_summary(result, file)
    file.seek(0)
    text = file.read()
    assert "\x1b" not in text and "genre failed: [bold]no [31m" in text and "R\\xb2 0.884" in text
    assert "9 rows read, 6 songs loaded, 1 repeated, 2 rejected (no title: 2)" in text
    assert re.search(r"clusters +trained +silhouette 0.231 +first +3.2 s +31.2 MB", text)
    table = on_terminal(lambda file: notify.print_summary(result, file)).split("4 of 5")[0]
    assert max(map(len, table.splitlines())) <= 80 and re.search(r"same genre 0.410 +-0.299 +3.2 s", table)


def test_live_lines_and_load_progress():
    def work(file):
        root, logger = logging.getLogger(), logging.getLogger("models")
        before, root.handlers = root.handlers, [PrefectConsoleHandler(stream=file)]
        notify.quiet_logs()
        with notify.live_status(["genre", "similar"]), notify.load_progress() as progress:
            logger.info("genre: fitting 9 songs", extra={"model": "genre", "phase": "fitting"})
            logger.warning("similar: no disk; retrying in 2 s", extra={"model": "similar", "phase": "retrying"})
            time.sleep(0.6)
            for done in range(0, 1001, 10):
                progress(done, 1000)
        root.handlers = before
    text = on_terminal(work)
    assert "▶ genre       fitting 9 songs" in text and "↻ similar     no disk" in text and "genre: fitting" not in text
    assert text.count("similar: no disk; retrying in 2 s") == 1
    work(out := io.StringIO())
    assert "genre: fitting 9 songs" in out.getvalue()
    assert re.findall(r"loading the CSV: (.*) of 1.0 kB", out.getvalue()) == ["25 %", "50 %", "75 %", "100 %"]
