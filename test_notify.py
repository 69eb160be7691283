"""Tests of notify.py: a real HTTP server in Discord's place, real pictures, a real terminal."""
import contextlib
import http.server
import io
import json
import logging
import os
import pty
import random
import re
import struct
import sys
import threading
import time
import warnings
from email.parser import BytesParser
from pathlib import Path

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
            time.sleep(3)
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


# ---- results of runs -----------------------------------------------------------------------------------------------
PARAMETERS = {"csv_path": None, "table_name": "spotify_songs", "truncate_table": False, "n_clusters": 2, "only": None,
              "enable_notifications": True, "models_dir": None, "demo": None, "force": False, "dask": None}
HELD = "accuracy fell from 0.709 to 0.112, more than 5 %; the old model stays (train again with --force to publish it)"


def a_model(plot, previous=None, metrics=None, **changes):
    return {"status": "trained", "error": None, "metrics": metrics, "plot": plot, "previous": previous, "bytes": 9_876,
            "rows": 89_740, "seconds": 3.2, "path": "/srv/models/x.joblib", "heals": False, "guessing": False} | changes


def a_genre(names=114, **changes):
    genres = names if isinstance(names, list) else [f"genre-{i}" for i in range(names)]
    confusions = [[genres[i % len(genres)], genres[i * 7 % len(genres)], 60 - i, 0.4 - i / 100] for i in range(25)]
    matrix = {"labels": genres, "rows": [[0.8 if row == column else 0.02 for column in genres] for row in genres]}
    plot = {"confusions": confusions, "matrix": matrix if len(genres) <= 12 else None, "by_genre": []}
    metrics = {"accuracy": 0.7134, "accuracy_new_artists": 0.2421, "top3_accuracy": 0.861}
    return a_model(plot, 0.709, **{"metrics": metrics} | changes)


def some_clusters(count=2, **changes):
    points = [[random.gauss(3 * (i % 3), 1), random.gauss(i, 1), i] for i in range(count) for _ in range(2000 // count)]
    plot = {"points": points, "labels": ["loud, electronic", "quiet, acoustic"] * 6, "sizes": [100 * (i + 1) for i in range(count)]}
    return a_model(plot | {"labels": plot["labels"][:count]}, None, {"silhouette": 0.2311}, **changes)


def a_regression(top, **changes):
    density = [[int(900 / (1 + abs(row - column)) ** 2 - 8) * (row > 3) for column in range(40)] for row in range(40)]
    metrics = {"r2": 0.8842, "r2_new_artists": 0.8748, "mae": 0.0631, "baseline_mae": 0.2088}
    return a_model({"edges": [0, top, 40], "density": [[max(0, n) for n in row] for row in density]}, 0.8851, metrics, **changes)


def a_similar(**changes):
    plot = {"same_genre_at": [0.61 - 0.035 * i for i in range(10)], "by_chance": 0.0089}
    return a_model(plot, 0.412, {"same_genre_at_10": 0.4123, "same_genre_by_chance": 0.0089}, **{"bytes": 31_234_567} | changes)


def failed(why="genre needs at least 2 genres with 5 songs each; the table has 1"):
    return notify.failed_entry(OSError(why))


def a_run(models=(), error=None, **changes):
    """The result of a good night, or of another with `models` replaced, added or left out (None) and other changes."""
    night = {"genre": a_genre(), "clusters": some_clusters(), "energy": a_regression(1), "popularity": a_regression(100),
             "similar": a_similar()}
    models = {name: model for name, model in (night | dict(models)).items() if model}
    result = notify.new_result(PARAMETERS, models or night, "/srv/models") | {
        "models": models, "rows": 89_740, "read_seconds": 1.1, "host": "musicbox"} | changes
    notify.decide(result, error)
    return result | {"seconds": 41.2, "started_at": "2026-11-23T03:00:00+00:00"} | changes


def a_history(runs=30):
    return [{"run": f"2026-{10 + day // 31:02}-{day % 31 + 1:02}T03:00:00+00:00", "model": model, "error": None,
             "status": "failed" if day % 9 == at else "trained", "value": None if day % 9 == at else 0.5 + at / 10 + day % 5 / 50}
            for day in range(23, 23 + runs) for at, model in enumerate(NONE)]


NONE = dict.fromkeys(("genre", "clusters", "energy", "popularity", "similar"))


# ---- what the run was ----------------------------------------------------------------------------------------------
STOPPED = notify.Stopped(notify.TERMINATED)


@pytest.mark.parametrize("models, error, status, code, says, finish", [
    ({}, None, "completed", 0, "5 of 5 models trained", False),
    ({"genre": failed()}, None, "partial", 1, "4 of 5 models trained; failed: genre", True),
    ({"genre": notify.failed_entry(db.DataError("x"))}, None, "partial", 1, "failed: genre", False),
    ({"genre": a_genre(status="held_back", error=HELD)}, None, "partial", 1, "held back: genre", False),
    (dict.fromkeys(NONE, failed()), None, "failed", 3, "0 of 5 models trained; failed: genre, clusters", True),
    (NONE, db.DataError("no column genre"), "failed", 2, "Nothing was trained: no column genre", False),
    (NONE, db.DatabaseUnavailable("it is gone"), "failed", 3, "Nothing was trained: it is gone", True),
    (NONE, RuntimeError("odd"), "failed", 3, "Nothing was trained: RuntimeError: odd", True),
    (NONE, MemoryError(), "failed", 3, "not enough memory; raise", True),
    (NONE, STOPPED, "failed", 143, "Nothing was trained: the run was stopped by SIGTERM", True),
    ({"genre": failed()}, notify.Stopped(130), "partial", 130, "4 of 5 models trained; failed: genre; the run was stopped by Ctrl-C", True)])
def test_what_a_run_was(models, error, status, code, says, finish):
    result = json.loads(json.dumps(a_run(models, error)))
    assert (result["status"], result["exit_status"], bool(result["finish_command"])) == (status, code, finish)
    assert says in result["message"] and result["peak_mb"] > 20
    notify.decide(result, OSError("later"))
    assert result["message"] == a_run(models, error)["message"]


def test_commands_do_what_they_say_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = PARAMETERS | {"csv_path": "my songs.csv", "truncate_table": True, "models_dir": "m", "n_clusters": 3, "table_name": "s.t"}
    result = notify.new_result(given, ["genre"], "m")
    words = "train.py", "--table-name", "s.t", "--n-clusters", 3, "--models-dir", tmp_path / "m"
    assert result["command"] == db.command(*words)
    notify.decide(result | {"csv": {}}, STOPPED)
    notify.decide(result, STOPPED)
    assert result["finish_command"] == db.command(*words, "--failed", "--csv-path", tmp_path / "my songs.csv", "--truncate")
    result |= {"csv": {"read": 1}, "exit_status": None}
    notify.decide(result, STOPPED)
    assert result["finish_command"] == db.command(*words, "--failed")


def test_logs_hold_no_secrets_and_no_needless_traceback(monkeypatch):
    monkeypatch.setenv("DATABASE_URL", "postgresql://me:hunter22xyz@db/music")
    logger, out = logging.getLogger("prefect.task_runs"), io.StringIO()
    notify.quiet_logs()
    monkeypatch.setattr(logger, "handlers", [handler := logging.StreamHandler(out)])
    for error in (OSError("hunter22xyz is gone"), RuntimeError("hunter22xyz is odd")):
        _, caught = notify.attempt(lambda: [][error])
        logger.error("%s went wrong: %s", "hunter22xyz", error, exc_info=error)
    handler.flush()
    assert isinstance(caught, TypeError) and "hunter22xyz" not in out.getvalue()
    assert "*** is odd" in out.getvalue() and out.getvalue().count("RuntimeError") == 1 and "OSError" not in out.getvalue()


# ---- Discord -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("route, told, posts, logged", [
    ("ok", True, 1, ""), ("ok-200", True, 1, ""), ("gone", False, 1, "make a new one"), ("wrong", False, 1, "token is wrong"),
    ("limited-once", True, 2, "next try in 0.3 s"), ("limited-html", True, 2, "next try in 1.0 s"),
    ("limited", False, 6, "too many messages"), ("limited-long", False, 1, "too many messages"),
    ("broken-twice", True, 3, "answered 500"), ("broken", False, 3, "answered 500: oops"),
    ("dropped-once", True, 2, "answered nothing"), ("dropped", False, 3, "no connection"),
    ("moved", False, 1, "answered 302"), ("refused", False, 1, "answered 400"), ("slow", False, 1, "no answer")])
def test_discord_replies(discord, caplog, route, told, posts, logged):
    caplog.set_level("DEBUG")
    begun = time.monotonic()
    assert notify.post_discord(a_run(), discord(route), seconds=1 if route == "slow" else 20) is told
    assert (len(discord.got), time.monotonic() - begun < 4) == (posts, True)
    assert logged in caplog.text and TOKEN not in caplog.text


@pytest.mark.parametrize("url", ["discord.com/api/" + TOKEN, "ftp://discord.com/" + TOKEN, "https://", "http://[::1/" + TOKEN,
                                 "http://host:port/" + TOKEN, "https://discord.com/api/webhooks/1/ " + TOKEN, "https://é.com/" + TOKEN])
def test_a_webhook_that_is_none(url, caplog, monkeypatch):
    caplog.set_level("DEBUG")
    monkeypatch.setenv("DISCORD_WEBHOOK_URL", url)
    assert notify.post_discord(a_run(), url) is False and notify.check_discord(True)[0][1] == "problem"
    assert "Copy Webhook URL" in caplog.text and TOKEN not in caplog.text


def test_discord_is_told_with_the_picture(discord, tmp_path, caplog, monkeypatch):
    result = a_run(models_dir=str(tmp_path))
    for route in ("ok", "no-pictures"):
        monkeypatch.setenv("DISCORD_WEBHOOK_URL", discord(route))
        notify.tell(result, a_history())
    picture = {"files[0]": ("report.png", (tmp_path / "report.png").read_bytes())}
    assert [files for _, files in discord.got] == [picture, picture, {}] and "refused the picture (413)" in caplog.text
    (tmp_path / "report.png").unlink()
    notify.tell(a_run({"genre": None}, STOPPED, models_dir=str(tmp_path)), [])       # no time for one
    notify.tell(a_run(NONE, OSError("gone"), models_dir=str(tmp_path)), [])          # nothing to draw
    notify.tell(a_run(models_dir=str(tmp_path), notify=False), [])                   # --no-notify
    notify.tell(broken := a_run(models_dir=str(tmp_path / "absent")), [])
    assert [files for _, files in discord.got[3:]] == [{}] * 3 and "the picture could not be made" in broken["warnings"][0]
    assert notify.post_discord({"status": "no such status"}, discord()) is False and "was not told: KeyError" in caplog.text


def test_check_of_the_webhook(discord, monkeypatch):
    for url, state, says in (discord(), "ok", "answers"), (discord("gone"), "problem", "make a new one"), ("", "ok", "not set"):
        monkeypatch.setenv("DISCORD_WEBHOOK_URL", url)
        (what, found, sentence), = notify.check_discord(True)
        assert (what, found) == ("Discord", state) and says in sentence and TOKEN not in sentence
    assert notify.check_discord(False) == [("Discord", "ok", "--no-notify: nothing is posted")]


EVIL = "🎸*_`|~[x](http://e.example) <@1> @everyone \\ \x00\u202e\n# " * 300


@pytest.mark.parametrize("result, colour, title, says", [
    (a_run(), 0x2ECC71, "✅ 5 of 5 models trained", ["accuracy 0.713 (+0.004)\\n3.2 s", "89,740 songs of spotify"]),
    (a_run({"genre": failed()}), 0xF1C40F, "⚠️ 4 of 5", ["--failed`", "failed: genre needs at least 2 genres"]),
    (a_run({"genre": a_genre(status="held_back", error=HELD)}), 0xF1C40F, "⚠️ 4 of 5", ["held back: accuracy fell from 0.709"]),
    (a_run(warnings=["half the songs are gone"]), 0xF1C40F, "⚠️ 5 of 5", ["warning: half the songs"]),
    (a_run(deaths=["it was ended by SIGKILL"], warnings=["x"]), 0xF1C40F, "⚠️ 5 of 5", ["ended by SIGKILL\\nwarning: x"]),
    (a_run(NONE, STOPPED), 0xE74C3C, "❌ Nothing was trained: the run was stopped by SIGTERM", ["--failed`"]),
    (a_run(dict.fromkeys(NONE, failed())), 0xE74C3C, "❌ 0 of 5", ["❌ similar"]),
    (a_run({"genre": failed(""), "clusters": a_genre(metrics={}, seconds=None)}), 0xF1C40F, "⚠️ 4 of 5", ["no reason"]),
    (a_run({"genre": failed(EVIL), EVIL[:500]: failed("\\" * 3000)} | {f"model {i}": failed(EVIL) for i in range(30)},
           message=EVIL, error=EVIL, warnings=[EVIL] * 5, host="@everyone", table=EVIL, finish_command="`@everyone`"),
     0xF1C40F, "⚠️ 🎸\\*", ["…"])])
def test_message(result, colour, title, says):
    payload = notify.discord_payload(result)
    embed, text = payload["embeds"][0], json.dumps(payload, ensure_ascii=False)
    assert objections(payload) == [] and embed["color"] == colour and embed["title"].startswith(title)
    assert [words for words in [*says, "musicbox" if "@" not in text else "…"] if words not in text] == []
    assert not any(bad in text for bad in ("@everyone", "\\u0000", "\u202e")) and "http://" not in json.dumps(embed["fields"])
    text.encode("utf-8")


def test_no_secret_leaves(monkeypatch):
    monkeypatch.setenv("DATABASE_URL", "postgresql://me:hunter22xyz@db/music")
    why = f"connection to postgresql://me:hunter22xyz@db/music failed; https://discord.com/api/webhooks/1/{TOKEN}"
    result, out = a_run({"genre": failed(why)}, error=why, warnings=[why], message=why, finish_command=why), io.StringIO()
    notify.print_summary(result, out)
    for text in (json.dumps(notify.discord_payload(result)), out.getvalue(), drawn(notify.report_figure(result, []))):
        assert "hunter22xyz" not in text and TOKEN not in text and "failed" in text


# ---- the picture ---------------------------------------------------------------------------------------------------
LONG = ["A genre with a very long name indeed, as they come", "$m_i^2$ _under_ $x", "東京 Jポップ", "rock 🎸🤘", "русский", "\x00\ud800"]


def drawn(figure):
    return " ".join(text.get_text().replace("\n", " ") for text in figure.findobj(lambda artist: hasattr(artist, "get_text")))


@pytest.mark.parametrize("result, history, says", [
    (a_run(), a_history(), ["genre: accuracy 0.713 (+0.004)", "last 30 runs", "by chance 0.9%", "5 of 5 models trained"]),
    (a_run(NONE | {"similar": a_similar()}), [], ["first run", "1 of 1 models trained"]),
    (a_run({"genre": failed(), "energy": a_regression(1, status="held_back", error=HELD)}, warnings=["half the songs are gone"],
           deaths=["it was ended by SIGKILL"]), a_history(1),
     ["genre: failed", "at least 2 genres", "energy: held back at R² 0.884", "accuracy fell from 0.709", "by SIGKILL (and 1 more)"]),
    (a_run({"genre": a_genre(2), "clusters": some_clusters(5), "energy": None}), a_history(3), ["genre-1", "80%", "last 3 runs"]),
    (a_run({"genre": a_genre(LONG), "clusters": some_clusters(12), "more": a_similar()}), a_history(), ["$m_i^2$", "русский"]),
    (a_run({"genre": a_genre(LONG * 3), "clusters": some_clusters(1)}, host="ホスト$"), [], ["русский →", "…"]),
    (a_run(dict.fromkeys(NONE, failed("it broke"))), [], ["genre: failed", "it broke"]),
    (a_run(NONE, OSError("the database is gone")), a_history(), ["Nothing was trained: the database is gone", "last 30 runs"])])
def test_picture_of_every_kind_of_run(result, history, says, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        notify.draw_report(result, history, tmp_path / "report.png")
        figure = notify.report_figure(result, history)
    data = (tmp_path / "report.png").read_bytes()
    width, height = struct.unpack(">II", data[16:24])
    assert data.startswith(b"\x89PNG") and width == 1600 and 700 <= height <= 1500 and len(data) < 500_000
    assert [words for words in says if words not in drawn(figure)] == [] and len(list(tmp_path.iterdir())) == 1
    assert len([axes for axes in figure.axes if axes.get_label() != "<colorbar>"]) == len(result["models"]) + 1


def test_picture_keeps_the_old_one_when_it_fails(tmp_path):
    (tmp_path / "report.png").write_bytes(b"old")
    assert isinstance(notify.attempt(notify.draw_report, a_run(status="none such"), [], tmp_path / "report.png")[1], KeyError)
    assert (tmp_path / "report.png").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


# ---- the terminal --------------------------------------------------------------------------------------------------
def on_terminal(work, columns=80):
    """What `work(file)` writes to a pseudo-terminal, without escape codes."""
    master, slave = pty.openpty()
    written = []

    def drain():
        with contextlib.suppress(OSError):
            while data := os.read(master, 65536):
                written.append(data)
    reader = threading.Thread(target=drain, daemon=True)
    reader.start()
    with open(slave, "w", encoding="utf-8") as file, pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", str(columns))
        patch.setenv("TERM", "xterm-256color")
        work(file)
    reader.join(5)
    os.close(master)
    text = b"".join(written).decode()
    assert "\x1b[" in text
    return re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", text)


def test_summary_piped_is_plain(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    csv = {"read": 9, "loaded": 6, "repeated": 1, "rejected": {"no title": 2}}
    notify.print_summary(a_run({"genre": failed("[bold]no\x1b[31m")}, warnings=["drift"], csv=csv), file)
    file.seek(0)
    text = file.read()
    assert "\x1b" not in text and "failed: [bold]no [31m" in text and "warning: drift" in text and "R\\xb2 0.884" in text
    assert re.search(r"clusters +trained +silhouette 0.231 +first +3.2 s +9.9 kB", text)
    assert "9 rows read, 6 songs loaded, 1 repeated, 2 rejected (no title: 2)" in text
    assert re.search(r"\nto finish the job: \S+ \S+train.py --failed\n$", text)
    notify.print_summary(a_run(NONE, OSError("the database is gone")), out := io.StringIO())
    assert out.getvalue().startswith("Nothing was trained: the database is gone\n")


@pytest.mark.parametrize("columns", [80, 200])
def test_summary_on_a_terminal(columns):
    text = on_terminal(lambda file: notify.print_summary(a_run({"genre": failed("x" * 300)}), file), columns)
    table = text.split("4 of 5")[0]
    assert max(map(len, table.splitlines())) <= columns and "31.2 MB" in table and "same genre 0.412" in table


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


def test_live_lines_and_load_progress(caplog):
    logger = logging.getLogger("models")
    notify.quiet_logs()

    def work(file):
        with logging_to(file), notify.live_status(["genre", "similar"]):
            logger.info("genre: fitting 9 songs", extra={"model": "genre", "phase": "fitting"})
            logger.error("something else")
            logger.warning("similar: no disk; retrying in 2 s", extra={"model": "similar", "phase": "retrying"})
            time.sleep(0.6)
        with logging_to(file), notify.load_progress() as progress:
            progress(500, 1000)
            time.sleep(0.3)
    text = on_terminal(work)
    assert "fitting 9 songs" in text and "waiting" in text and text.count("something else") == 1 and "50 % of 1.0 kB" in text
    assert text.count("similar: no disk; retrying in 2 s") == 1 and "↻ similar" in text and "genre: fitting" not in text
    work(out := io.StringIO())
    with notify.load_progress() as progress:
        for done in range(0, 1001, 10):
            progress(done, 1000)
        progress(5, None)
    assert "genre: fitting 9 songs" in out.getvalue()
    assert [line for line in caplog.messages if "%" in line][-4:] == [f"loading the CSV: {q} % of 1.0 kB" for q in (25, 50, 75, 100)]
