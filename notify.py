"""What people are told about a run: terminal, picture, one Discord message, a heartbeat.

A `Run` is all there is to tell. Terminal (live lines, then one table), report.png, Discord's
message and run.json are made from it alone, so that they never disagree. Nothing here may cost a
trained model: what cannot be told is a warning.
"""

import argparse
import contextlib
import errno
import http.client
import json
import logging
import math
import os
import re
import shlex
import signal
import socket
import sys
import textwrap
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, NoReturn
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from db import DataError, Expected, command, redact, setting, write_atomically, write_json

if TYPE_CHECKING:  # for annotations only: both are slow to import
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

log = logging.getLogger("notify")

# Exit statuses
TRAINED = 0
PARTIAL = 1
WRONG_INPUT = 2
NOTHING_TRAINED = 3
LOCKED = 75
INTERRUPTED = 128 + signal.SIGINT
TERMINATED = 128 + signal.SIGTERM

# ---- A run: all there is to tell -----------------------------------------------------------------


@dataclass
class Outcome:
    """What became of one model of a run."""

    status: str  # "trained", "held_back" or "failed"; in the history "started" as well
    error: str | None = None  # why it was held back or failed
    metrics: dict = field(default_factory=dict)  # as in its metrics file, the primary metric first
    plot: dict = field(default_factory=dict)  # what its panel of the picture is drawn from
    previous: float | None = None  # the primary metric of the model that was current before
    bytes: int | None = None  # size of the model's file
    rows: int | None = None  # songs that it was trained on
    seconds: float | None = None  # that the training took
    guessing: bool | None = None  # it is no better than its baseline
    path: str | None = None  # the model's file, where it was published
    heals: bool = False  # may trying again help?

    @property
    def word(self) -> str:
        """The status as people say it."""
        return self.status.replace("_", " ")


@dataclass
class Run:
    """All there is to tell about a run. `asdict(run)` is JSON from end to end."""

    parameters: dict  # the flow's
    asked: list[str]  # names of the models that were asked for, in their usual order
    models_dir: str
    command: str  # the command line that does the same
    # ISO 8601, UTC
    started_at: str = field(default_factory=lambda: datetime.now(UTC).isoformat())
    host: str = field(default_factory=socket.gethostname)
    models: dict[str, Outcome] = field(default_factory=dict)  # those that are done, in that order
    warnings: list[str] = field(default_factory=list)
    crashes: list[str] = field(default_factory=list)  # killed steps, and what was done about them
    csv: dict | None = None  # what load_csv returned
    predicted: dict | None = None  # what predict_table returned
    rows: int | None = None  # songs that were read
    read_seconds: float | None = None  # that reading them took
    seconds: float = 0.0  # that the run took
    peak_mb: float | None = None  # the largest memory of a process of it
    status: str = "failed"  # "completed", "partial" or "failed"
    message: str = ""  # the run in a sentence
    error: str | None = None  # what ended it
    exit_status: int | None = None  # None until it is decided
    begun: bool = False  # the history knows what was asked for
    finish_command: str | None = None  # trains what this run has not, where a command can

    @property
    def table(self) -> str:
        """The table or view of songs; made-up ones have a table of their own."""
        name = self.parameters["table_name"]
        return name if self.parameters["demo"] is None else f"demo_{name}"


def outcome_of(report: dict, folder: str) -> Outcome:
    """Return what became of a model, from its `report`: what stands in its metrics file.

    `folder`: the models directory.
    """
    known = {name: report[name] for name in Outcome.__annotations__ if name in report}
    outcome = Outcome(**known)
    if outcome.status == "trained":
        outcome.path = f"{folder}/{report['model']}.joblib"
    return outcome


def failed(error: BaseException) -> Outcome:
    """Return what became of a model that there is none of."""
    return Outcome("failed", error=explain(error), heals=heals(error))


def decide(run: Run, error: BaseException | None = None) -> None:
    """Decide what the run was: status, exit status, message, and the command that finishes it.

    `error`: what ended it early, if anything did.
    """
    if error:
        run.error = explain(error)
    trained = with_status(run, "trained")
    if not trained:
        run.status = "failed"
        run.exit_status = WRONG_INPUT if isinstance(error, DataError) else NOTHING_TRAINED
    elif error or trained != run.asked:
        run.status = "partial"
        run.exit_status = PARTIAL
    else:
        run.status = "completed"
        run.exit_status = TRAINED
    if isinstance(error, Stopped):
        run.exit_status = error.code
    run.message = message_of(run)
    owed = [name for name in run.asked if name not in run.models or run.models[name].heals]
    if run.begun and owed and heals(error):
        run.finish_command = finish_command(run)
    run.seconds = seconds_since_start(run)


def write_run(run: Run) -> None:
    """Write metrics/run.json, the run as it stands. Raises OSError."""
    write_json(Path(run.models_dir, "metrics", "run.json"), asdict(run))


def tell_without_prefect(error: Exception, arguments: list[str]) -> NoReturn:
    """Tell everybody that no run can begin where Prefect cannot be imported; exit with 3.

    `arguments` are those of train.py. Who only looks (--check, --help) is told alone: exit 2.
    """
    from models import folder_for  # which imports this module

    url, cause = attempt(setting, "DISCORD_WEBHOOK_URL")  # Prefect reads .env too
    if not cause:
        cause = Expected(
            f"Prefect cannot be imported ({type(error).__name__}: {error}); correct the variable "
            "PREFECT_... or the file it names, or install again: pip install -r requirements.txt"
        )
    parser = argparse.ArgumentParser("train.py", usage=argparse.SUPPRESS, add_help=False)
    if {"--check", "--help", "-h", "--serve"} & {*arguments}:
        parser.error(explain(cause))
    parser.add_argument("--table-name", default="spotify_songs")
    parser.add_argument("--demo", nargs="?", type=int, const=10_000)
    parser.add_argument("--no-notify", dest="enable_notifications", action="store_false")
    parser.add_argument("--models-dir")
    options, _ = parser.parse_known_args(arguments)
    run = Run(
        parameters=vars(options),
        asked=[],
        models_dir=str(folder_for(options.models_dir, options.demo)),
        command=command("train.py", *arguments),
    )
    decide(run, cause)
    attempt(write_run, run)
    if options.enable_notifications:
        attempt(heartbeat, "fail")
        if url:
            post_discord(run, url)
    print_summary(run)
    sys.exit(run.exit_status)


def with_status(run: Run, status: str) -> list[str]:
    """Return the names of the models with that status, in their usual order."""
    return [name for name, outcome in run.models.items() if outcome.status == status]


def message_of(run: Run) -> str:
    """Return the run in a sentence."""
    if not run.models:
        return f"Nothing was trained: {run.error or 'no reason was given'}"
    said = [f"{len(with_status(run, 'trained'))} of {len(run.asked)} models trained"]
    for status in ("held_back", "failed"):
        names = with_status(run, status)
        if names:
            said.append(f"{run.models[names[0]].word}: {', '.join(names)}")
    if run.error:
        said.append(run.error)
    return "; ".join(said)


def command_of(parameters: dict, models_dir: str) -> str:
    """Return the command line of a run but for the models it trains and the CSV.

    `parameters` are the flow's, `models_dir` the full path.
    """
    words: list[Any] = []
    defaults = {"table_name": "spotify_songs", "n_clusters": 2}
    for name in ("table_name", "n_clusters", "demo", "dask", "predict_into"):
        value = parameters[name]
        if value != defaults.get(name):
            words += [f"--{name.replace('_', '-')}", value]
    if parameters["models_dir"]:
        words += ["--models-dir", models_dir]
    if parameters["force"]:
        words.append("--force")
    if not parameters["enable_notifications"]:
        words.append("--no-notify")
    return command("train.py", *words)


def finish_command(run: Run) -> str:
    """Return the command that trains what this run has not, also where the CSV is not loaded."""
    arguments = ["--failed"]
    csv_path = run.parameters["csv_path"]
    if csv_path and not run.csv:
        if not re.match("https?://", csv_path):
            csv_path = str(Path(csv_path).resolve())
        arguments += ["--csv-path", csv_path]
        if run.parameters["truncate_table"]:
            arguments.append("--truncate")
    return f"{run.command} {shlex.join(arguments)}"


def seconds_since_start(run: Run) -> float:
    return (datetime.now(UTC) - datetime.fromisoformat(run.started_at)).total_seconds()


def history_line(run: Run, name: str, outcome: Outcome) -> dict:
    """Return the line of history.jsonl on a model of a run; of one that begins, "started"."""
    metric, value = next(iter(outcome.metrics.items()), (None, None))
    return {
        "run": run.started_at,
        "model": name,
        "table": run.table,
        "status": outcome.status,
        "metric": metric,
        "value": value,
        "seconds": outcome.seconds,
        "rows": run.rows,
        "read_seconds": run.read_seconds,
        "run_seconds": round(seconds_since_start(run), 2),
        "peak_mb": run.peak_mb and round(run.peak_mb),
        "error": outcome.error,
    }


def history_of(run: Run, history: list[dict]) -> list[dict]:
    """Return the lines of the history that are about the run's table."""
    return [line for line in history if line.get("table", run.table) == run.table]


# ---- Words ---------------------------------------------------------------------------------------


class Look(NamedTuple):
    """How a status looks."""

    sign: str
    colour: str  # legible on black and on white, also to colour-blind eyes
    discord_colour: int


GOOD = Look("✅", "#00795A", 0x2ECC71)
WARNING = Look("⚠️", "#A86400", 0xF1C40F)
BAD = Look("❌", "#C42B00", 0xE74C3C)
# Of a run or a model
LOOKS = {
    "completed": GOOD,
    "trained": GOOD,
    "partial": WARNING,
    "held_back": WARNING,
    "failed": BAD,
}

# Metrics as people say them, in the order in which they are told; what is not here is told only
# where it is the primary metric.
METRICS = {
    "accuracy_new_artists": "new artists",
    "r2_new_artists": "new artists",
    "top3_accuracy": "top 3",
    "mae": "typical error",
    "baseline_mae": "guessing",
    "baseline_accuracy": "guessing",
    "same_genre_by_chance": "by chance",
    "same_artist_at_10": "same artist",
    "r2": "R²",
    "same_genre_at_10": "same genre",
}
# Columns as people say them; others go by their own names.
COLUMNS = {"artist_name": "artist", "album_name": "album", "track_name": "title"}
LEANS_ON = 3  # columns named
LEAST_FALL = 0.005  # of the primary metric: less is "0.00"
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]+")


def plain(text: object, limit: int = 10_000) -> str:
    """Return `text` as one line that can be shown anywhere.

    It holds no secret, no control or direction character, and `limit` characters at most.
    """
    line = " ".join(UNPRINTABLE.sub(" ", redact(str(text))).split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def number(value: float | None) -> str:
    """Return a number as people read it: 0.826, 14.4, 2011.3, 228,912."""
    if value is None or not math.isfinite(value):
        return "not known"
    if abs(value) >= 10_000:
        return f"{value:,.0f}"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def duration(seconds: float | None) -> str:
    """Return seconds as "41.2 s", "12 min 34 s", "7.1 h" or "3 days"; "" for none."""
    if not seconds:
        return ""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    if minutes < 48 * 60:
        return f"{minutes / 60:.1f} h"
    return f"{minutes // (24 * 60)} days"


def size(count: int | None) -> str:
    """Return bytes as "3.1 MB"; "" for none."""
    from rich.filesize import decimal

    return decimal(count) if count else ""


def metric_and_change(outcome: Outcome) -> tuple[str, str]:
    """Return a model's primary metric and its change, such as ("accuracy 0.713", "+0.004").

    The change is "first" where nothing came before, "was 0.709" where the metric is not known now;
    both are "" where there are no metrics.
    """
    if not outcome.metrics:
        return "", ""
    value = next(iter(outcome.metrics.values()))
    before = outcome.previous
    change = "first"
    if before is not None:
        change = f"was {number(before)}" if value is None else f"{value - before:+.3f}"
    return figures(outcome.metrics)[0], change


def figures(metrics: dict) -> list[str]:
    """Return the metrics that are known as people say them, the primary one first: "R² 0.826"."""
    primary = next(iter(metrics))
    # The primary metric keeps the first place, also where METRICS has its words.
    words = {primary: plain(primary).replace("_", " "), **METRICS}
    return [
        f"{said} {number(metrics[key])}"
        for key, said in words.items()
        if key == primary or metrics.get(key) is not None
    ]


def leans_on(metrics: dict) -> str:
    """Return "leans on artist 0.31, album 0.12, year 0.05"; "" where that is not known.

    The figures: how much the primary metric falls when that column is shuffled.
    """
    falls = [
        f"{plain(column, 20).removesuffix('_ms').replace('_', ' ')} {fall:.2f}"
        for column, fall in metrics.get("leans_on", {}).items()
        if fall >= LEAST_FALL
    ]
    return f"leans on {', '.join(falls[:LEANS_ON])}" if falls else ""


def reason(outcome: Outcome) -> str:
    """Return "failed: …", "held back: …" or "no better than guessing"; "" for a good model."""
    if outcome.status == "trained":
        return "no better than guessing" if outcome.guessing else ""
    error = plain(outcome.error or "no reason was given")
    return f"{outcome.word}: {error.removeprefix(f'{outcome.word}: ')}"


def said_of(outcome: Outcome) -> str:
    """Return what became of a model: "accuracy 0.713 (+0.004)" if it was trained, the reason."""
    if outcome.status != "trained":
        return reason(outcome)
    metric, change = metric_and_change(outcome)
    said = f"{metric} ({change})"
    return f"{said}, {reason(outcome)}" if outcome.guessing else said


def in_short(name: str, outcome: Outcome) -> str:
    """Return what became of the model of that name, in a line for the log."""
    done = "done, " if outcome.status == "trained" else ""
    return f"{name}: {done}{said_of(outcome)}"


def table_row(name: str, outcome: Outcome) -> dict[str, str]:
    """Return a model as a row of a table; the columns are its keys."""
    metric, change = metric_and_change(outcome)
    return {
        "model": name,
        "status": outcome.word,
        "metric": metric,
        "change": change,
        "time": duration(outcome.seconds),
        "size": size(outcome.bytes),
    }


def facts(run: Run) -> list[str]:
    """Return what there is to say besides the models: songs, times, memory, machine."""
    table = plain(run.table, 130)
    said = [f"table {table}"]
    if run.rows:
        said = [f"{run.rows:,} {'made-up songs' if run.parameters['demo'] else 'songs'} of {table}"]
    if run.read_seconds:
        said.append(f"{duration(run.read_seconds)} to read")
    said.append(f"{duration(run.seconds)} in all")
    if run.peak_mb:
        said.append(f"peak memory {run.peak_mb:,.0f} MB")
    said.append(f"on {plain(run.host, 80)}")
    return said


def warnings_of(run: Run) -> list[str]:
    """Return the warnings, the most important first: what was killed, then what the data say."""
    return run.crashes + run.warnings


def notes(run: Run) -> list[str]:
    """Return what there is to say below the models: warnings, the CSV's rows, the predictions."""
    said = [f"warning: {plain(warning)}" for warning in warnings_of(run)]
    if run.csv:
        said.append(_rows_of_csv(run.csv))
    if run.predicted:
        said.append(in_words(run.predicted))
    return said


def what_next(run: Run) -> list[str]:
    """Return commands that use the models: after a demo, and where there were none before."""
    compared = any(outcome.previous is not None for outcome in run.models.values())
    if compared and not run.parameters["demo"]:
        return []
    uses = [["show"]]
    if "similar" in with_status(run, "trained"):
        uses.append(["similar", run.models["similar"].plot["example"]])
    return [command("models.py", *words, "--models-dir", run.models_dir) for words in uses]


def in_words(predicted: dict) -> str:
    """Return what predicting did, a dict(rows, into, seconds), in words."""
    said = f"predictions of {predicted['rows']:,} songs are in {predicted['into']}"
    return f"{said}, {duration(predicted['seconds'])}"


def _rows_of_csv(csv: dict) -> str:
    rejected = csv["rejected"]
    said = f"CSV: {csv['read']:,} rows read, {csv['loaded']:,} songs loaded"
    said += f", {csv['repeated']:,} repeated"
    if csv.get("different"):  # and may be other songs
        said += f" ({csv['different']:,} with different values)"
    said += f", {sum(rejected.values()):,} rejected"
    if rejected:
        reasons = [f"{plain(reason, 80)}: {count:,}" for reason, count in rejected.items()]
        said += f" ({'; '.join(reasons)})"
    return said


def model_page(name: str, run: Run, history: list[dict]) -> str:
    """Return Markdown about a model: its figures, and its last runs on this table, latest first."""
    outcome = run.models[name]
    lines = []
    if outcome.metrics:
        lines = [*figures(outcome.metrics), leans_on(outcome.metrics)]
    lines = [f"{escape(line)}  " for line in lines]  # two blanks end a line
    lines += ["", "|last runs (UTC)|status|metric|", "|---|---|---|"]
    runs = [
        line
        for line in history_of(run, history)
        if line["model"] == name and line["status"] != "started"
    ]
    for line in reversed(runs[-RUNS_SHOWN:]):
        status = escape(line.get("error") or line["status"])
        lines.append(f"|{line['run'][:16]}|{status}|{number(line.get('value'))}|")
    return "\n".join(lines)


# ---- Errors and the log --------------------------------------------------------------------------

LOGGERS = ("train", "models", "db", "notify")
# The exit statuses of a run that was stopped: 128 and the signal's number.
STOPPED_BY = {TERMINATED: "SIGTERM", INTERRUPTED: "Ctrl-C"}
SAY_IT_ALL = (Expected, OSError, MemoryError)  # errors of which nobody needs a traceback
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Stopped(Expected):
    """The run was ended by SIGTERM or Ctrl-C. `code`: the exit status, a key of STOPPED_BY."""

    def __init__(self, code: int):
        super().__init__(f"the run was stopped by {STOPPED_BY[code]}")
        self.code = code


def explain(error: BaseException) -> str:
    """Return an error as a sentence without secrets."""
    said = f"{type(error).__name__}: {error}"
    if isinstance(error, SAY_IT_ALL):
        said = str(error)
    if isinstance(error, MemoryError):
        said = (
            "there is not enough memory; raise the limit (ulimit -v, the container's), train "
            "fewer models at a time (--only), or name a view with a sample of the songs as "
            "--table-name"
        )
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        said = (
            f"there is no space left for {error.filename or 'a file'}; "
            "make room on that disk and run it again"
        )
    return redact(said)


def heals(error: BaseException | None) -> bool:
    """Return True unless the same input would fail in the same way; without an error, too."""
    return not isinstance(error, (ValueError, TypeError, KeyError))


def attempt(step: Callable, *arguments: Any) -> tuple[Any, Exception | None]:
    """Run a step whose failure must not stop the next one.

    Return (what it returned, None) or (None, the error). An error that nobody expects is logged
    with its traceback.
    """
    try:
        return step(*arguments), None
    except Exception as error:
        if not isinstance(error, SAY_IT_ALL):
            log.error("%s failed", getattr(step, "__name__", "a step"), exc_info=error)
        return None, error


def quiet_logs(keep_shares: bool = False) -> None:
    """Let our log lines through, and no secret in any line of ours or of Prefect's.

    Records that carry a share of what is done move the bars of `live_status`; those of level DEBUG
    go no further. With `keep_shares` all go on: for a process that sends what it logs to the one
    with the terminal.
    """
    for logger in map(logging.getLogger, LOGGERS):
        logger.setLevel(logging.DEBUG)
        if not keep_shares:
            logger.addFilter(_moves_bar_or_goes_on)
    for name in [*logging.root.manager.loggerDict, "prefect.flow_runs", "prefect.task_runs"]:
        if name.startswith((*LOGGERS, "prefect")):
            logging.getLogger(name).addFilter(_without_secrets)
    # Prefect's: at the end it counts what is still to be sent.
    logging.getLogger("EventsWorker").setLevel(logging.ERROR)


def _without_secrets(record: logging.LogRecord) -> bool:
    """A logging filter: take secrets out of a record, and the traceback where the text is enough.

    A record that comes from another process has its traceback as text only.
    """
    record.msg = redact(record.getMessage())
    record.args = ()
    if record.exc_info and not isinstance(record.exc_info[1], SAY_IT_ALL):
        record.exc_text = logging.Formatter().formatException(record.exc_info)
    record.exc_info = None
    if record.exc_text:
        record.exc_text = redact(record.exc_text)
    return True


def _moves_bar_or_goes_on(record: logging.LogRecord) -> bool:
    """A logging filter: a record below INFO moves a bar, if there is one, and goes no further."""
    if record.levelno >= logging.INFO:
        return True
    for handler in logging.root.handlers:
        handler.filter(record)  # the terminal's has that of live_status
    return False


# ---- Terminal ------------------------------------------------------------------------------------


def never_break_off() -> None:
    """Let stdout and stderr be closed, on a full disk, or a pipe that nobody reads any more.

    Whoever writes to them goes on: rich, for one, ends a thread that meets a broken pipe.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed: what is opened next would get its number
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    sys.stdout = _Forgiving(sys.stdout)
    sys.stderr = _Forgiving(sys.stderr)
    for name in ["", *logging.root.manager.loggerDict]:
        for handler in logging.getLogger(name).handlers:
            if hasattr(handler, "console"):  # Prefect's, which has the old one
                handler.console.file = sys.stderr


class _Forgiving:
    """A stream of text as it is, but for errors of writing, which are passed over."""

    def __init__(self, stream: IO[str] | None) -> None:
        self.stream = stream or open(os.devnull, "w")  # noqa: SIM115 (held until this process ends)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self.stream.flush()


PLAIN_WIDTH = 160  # columns of a table where there is no terminal to ask
BAR_WIDTH = 16
NAME_WIDTH = 12
# Signs of the live lines, by phase; what has none here is at work.
SIGNS = {
    "done": f"[{GOOD.colour}]✓[/]",
    "failed": f"[{BAD.colour}]✗[/]",
    "held_back": f"[{WARNING.colour}]![/]",
    "retrying": f"[{WARNING.colour}]↻[/]",
}
ENDED = ("done", "failed", "held_back")

Cell = Any  # text, a number, or (text, rich style)


def print_summary(run: Run) -> None:
    """Print the table of a run and what there is to say below it."""
    rows = []
    lines: list[Cell] = [(run.message, f"bold {LOOKS[run.status].colour}")]
    for name, outcome in run.models.items():
        model, status, *others = table_row(name, outcome).values()
        colour = LOOKS[outcome.status].colour
        rows.append([(model, "bold"), (status, colour), *others])
        if reason(outcome):
            lines.append(
                (f"{name} {reason(outcome)}", WARNING.colour if outcome.guessing else colour)
            )
    for note in notes(run):
        lines.append((note, WARNING.colour if note.startswith("warning") else ""))
    lines.append(", ".join(facts(run)))
    if with_status(run, "trained"):
        lines.append(f"models in {run.models_dir}")
        lines += [f"to go on: {line}" for line in what_next(run)]
    if run.finish_command:
        lines.append((f"to finish the job: {run.finish_command}", "bold"))
    print_table(("model", "status", "metric", "change>", "time>", "size>"), rows)
    print_lines(lines)


def print_lines(lines: Iterable[Cell]) -> None:
    """Print lines as `print_table` prints cells."""
    console = _console()
    for line in lines:
        console.print(_styled(line), soft_wrap=True)


def print_table(columns: Iterable[str], rows: Iterable[Iterable[Cell]]) -> None:
    """Print a table: in colour on a terminal, plain text anywhere else; nothing without rows.

    `columns`: the headings, with a ">" at the end of those whose cells stand on the right; titles,
    artists and tables may be folded. Cells are text, numbers or (text, rich style).
    """
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(
            column.rstrip(">"),
            justify="right" if column.endswith(">") else "left",
            overflow="fold",
            no_wrap=column not in ("title", "artist", "table"),
        )
    for row in rows:
        table.add_row(*map(_styled, row))
    if table.rows:
        _console().print(table)


def _console() -> Any:
    """Return rich's console on stdout."""
    from rich.console import Console

    on_terminal = sys.stdout.isatty()
    if hasattr(sys.stdout, "reconfigure"):  # where a terminal or a log knows only ASCII
        sys.stdout.reconfigure(errors="backslashreplace")
    return Console(width=None if on_terminal else PLAIN_WIDTH, force_terminal=on_terminal)


def _styled(cell: Cell) -> Any:
    """Return a cell or line as rich's Text."""
    from rich.text import Text

    text, style = cell if isinstance(cell, tuple) else (cell, "")
    return Text(plain(text), style)


@contextlib.contextmanager
def live_status(models: Iterable[str]) -> Iterator[None]:
    """Show a line per model below the log on a terminal while the block runs; nothing elsewhere.

    A line shows the last record logged with extra={"model": "genre", "phase": "fitting"}, without
    its "genre: ", and a bar where the record carries "share", 0 to 1, of what is done. A model that
    is not among `models` ("CSV", "predict") gets a line with its first record. Up to level INFO
    such records go no further; a warning (a retry and its reason) is in the log as well.
    """
    handler = _log_handler()
    if not handler:
        yield
        return
    progress = _live_lines(handler.console)
    lines = {}
    for model in models:
        lines[model] = progress.add_task(f"· {model:{NAME_WIDTH}}waiting", bar="")
    show = partial(_show, progress, lines)
    handler.addFilter(show)
    try:
        with progress:
            yield
    finally:
        handler.removeFilter(show)


def _live_lines(console: Any) -> Any:
    """Return what shows lines on a rich console: a clock, what is said, a bar if there is one."""
    from rich.progress import Progress, TextColumn, TimeElapsedColumn
    from rich.table import Column

    # A line that is too long would narrow all columns alike, clock and percent as well.
    room = max(20, console.width - len("0:00:00   100%") - BAR_WIDTH)
    return Progress(
        TimeElapsedColumn(),
        TextColumn("{task.description}", table_column=Column(no_wrap=True, max_width=room)),
        TextColumn("{task.fields[bar]}"),
        console=console,
        transient=True,
    )


def _show(progress: Any, lines: dict[str, Any], record: logging.LogRecord) -> bool:
    """A logging filter: show what is about a model; return whether the log gets it as well.

    `lines`: the lines of `progress` by model.
    """
    from rich.markup import escape

    about = vars(record)
    model = about.get("model")
    is_warning = record.levelno >= logging.WARNING
    if model is None:
        return True
    if model not in lines:
        if is_warning:
            return True
        lines[model] = progress.add_task("", bar="")
    bar = ""
    share = about.get("share")
    if share is not None:
        done = "━" * round(BAR_WIDTH * share)
        bar = f"{done:{BAR_WIDTH}} {share:4.0%}"
    phase = about["phase"]
    said = plain(record.getMessage()).removeprefix(f"{model}: ")
    text = f"{SIGNS.get(phase, '▶')} {escape(model):{NAME_WIDTH}}{escape(said)}"
    progress.update(lines[model], description=text, bar=bar)
    if phase in ENDED:
        progress.stop_task(lines[model])
    return is_warning


def _log_handler() -> Any:
    """Return the handler whose rich console writes the log to a terminal, as Prefect's does.

    What is live goes below its lines. None where there is no terminal, or a poor one.
    """
    for handler in logging.root.handlers:
        console = getattr(handler, "console", None)
        if console and console.file.isatty() and not console.is_dumb_terminal:
            return handler if "utf" in console.encoding else None
    return None


# ---- Picture -------------------------------------------------------------------------------------

INCHES = 16  # the width, at 100 dots per inch
ROW_INCHES = 4.2
PANELS_ABREAST = 3
HEADER_INCHES = 1.5
# Okabe-Ito colours and cividis are told apart by colour-blind eyes; markers differ as well.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#999999")
MARKERS = "os^Dvp*X"
HEADLINE_PAD = 50  # points between a panel's headline and its frame, for three lines of details
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "text.parse_math": False,
    "axes.titlelocation": "left",
    "axes.titlepad": HEADLINE_PAD,
    "axes.titleweight": "bold",
    "axes.titlesize": 15,
    "font.size": 11,
    "legend.columnspacing": 1,
    "legend.frameon": False,
}
LEGEND_BELOW: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (-0.03, -0.06)}
RUNS_SHOWN = 30
CONFUSIONS_SHOWN = 9
ENOUGH_SONGS = 20  # of a genre: with fewer, a share moves by 5 % with every song
CLUSTERS_NAMED = 8


def draw_report(run: Run, history: list[dict], path: Path) -> "Figure":
    """Write the picture of a run, a PNG 1600 pixels wide; the old one stays until it is whole.

    `history`: the lines of history.jsonl as dicts, oldest first. Raises OSError when `path` cannot
    be written.
    """
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure = report_figure(run, history)
        write_atomically(path, partial(figure.savefig, format="png"))
    return figure


def report_figure(run: Run, history: list[dict]) -> "Figure":
    """Return the figure behind draw_report: a headline, a panel per model, the history."""
    from matplotlib.figure import Figure  # without pyplot: no global state, so any thread may draw
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    panels = len(run.models) + 1
    rows = math.ceil(panels / PANELS_ABREAST)
    height = HEADER_INCHES + ROW_INCHES * rows
    below_header = (0.01, 0.01, 0.98, 1 - HEADER_INCHES / height)
    layout = ConstrainedLayoutEngine(rect=below_header, wspace=0.06)
    figure = Figure(figsize=(INCHES, height), layout=layout)
    panel = partial(figure.add_subplot, rows, PANELS_ABREAST)
    for at, (name, outcome) in enumerate(run.models.items(), 1):
        _draw_model(panel(at), name, outcome)
    _draw_history(panel((panels, rows * PANELS_ABREAST)), history_of(run, history))
    _write_headline(figure, run)
    return figure


def _write_headline(figure: "Figure", run: Run) -> None:
    """Write what the run was, when, on what, and the warnings there is room for."""
    about = " · ".join([f"{run.started_at[:16].replace('T', ' ')} UTC", *facts(run)])
    written = [
        (0.62, _cut(run.message, 95), 25, LOOKS[run.status].colour),
        (0.95, _drawable(about), 14 * min(1, 135 / len(about)), "black"),  # a table's name is long
    ]
    warnings = "; ".join(warnings_of(run))
    if warnings:
        written.append((1.25, _cut(f"warning: {warnings}", 135), 14, WARNING.colour))
    for inches, text, size, colour in written:
        figure.text(0.015, 1 - inches / figure.get_figheight(), text, size=size, color=colour)


def _draw_model(axes: "Axes", name: str, outcome: Outcome) -> None:
    """Draw one panel: a headline with metric and change, a few lines of details, the drawing."""
    draw = next((draw for key, draw in DRAWINGS.items() if outcome.plot.get(key)), None)
    if outcome.status == "trained":
        metric, change = metric_and_change(outcome)
        headline = f"{metric} ({change})"
        headline_colour = "black"
        colour = WARNING.colour if outcome.guessing else "#707070"
    else:
        headline = outcome.word
        headline_colour = LOOKS[outcome.status].colour
        colour = headline_colour
    axes.set_title(_drawable(f"{name}: {headline}", 60), color=headline_colour)
    details = reason(outcome) or ", ".join(figures(outcome.metrics)[1:])
    size, width, lines = (10, 62, 2) if draw else (14, 44, 12)
    axes.annotate(
        f"{_cut(details, width, lines)}\n{_cut(leans_on(outcome.metrics), width)}".strip(),
        xy=(0, 1),
        xycoords="axes fraction",
        xytext=(0, HEADLINE_PAD - 6),
        textcoords="offset points",
        va="top",
        size=size,
        color=colour,
        in_layout=False,
    )
    if draw:
        draw(axes, outcome.plot)
    else:
        axes.set_axis_off()


def _draw_confusions(axes: "Axes", plot: dict) -> None:
    """Draw which genres are most often taken for which, as bars with their names on them.

    Those with the largest shares, of genres with enough songs where there are any.
    """
    enough = [pair for pair in plot["confusions"] if round(pair[2] / pair[3]) >= ENOUGH_SONGS]
    by_share = sorted(enough or plot["confusions"], key=lambda pair: pair[3], reverse=True)
    for at, (actual, predicted, count, share) in enumerate(by_share[:CONFUSIONS_SHOWN]):
        axes.barh(at, share, color="#A9CCE3")
        said = f"{plain(actual, 14)} → {plain(predicted, 14)}: {share:.0%} ({count:,})"
        axes.text(0.01, at, _drawable(said), va="center", transform=axes.get_yaxis_transform())
    axes.set(yticks=[], xticks=[], xlabel="actual → predicted: share of the actual (songs)")
    axes.invert_yaxis()
    axes.set_frame_on(False)


def _draw_clusters(axes: "Axes", plot: dict) -> None:
    """Draw the songs on their first two principal components, coloured by cluster."""
    for cluster, (label, songs) in enumerate(zip(plot["labels"], plot["sizes"])):
        look = cluster % len(PALETTE)
        points = [point for point in plot["points"] if point[2] == cluster]
        name = f"{_drawable(f'{cluster} {label}', 20)} {songs / sum(plot['sizes']):.0%}"
        axes.scatter(
            [x for x, *_ in points],
            [y for _, y, _ in points],
            s=9,
            alpha=0.6,
            linewidths=0,
            color=PALETTE[look],
            marker=MARKERS[look],
            label=name if cluster < CLUSTERS_NAMED else None,
        )
    axes.set(xticks=[], yticks=[], xlabel="first principal component", ylabel="second")
    axes.legend(ncols=2, markerscale=2.5, **LEGEND_BELOW)


def _draw_density(axes: "Axes", plot: dict) -> None:
    """Draw predicted against actual values: how many songs, on a logarithmic colour scale.

    The dashed line is a right guess.
    """
    low, high, _ = plot["edges"]
    most = max(2, *map(max, plot["density"]))
    axes.imshow(
        plot["density"],
        origin="lower",
        extent=(low, high, low, high),
        cmap="cividis",
        aspect="auto",
        norm="log",
        vmin=1,
        vmax=most,
    )
    axes.plot([low, high], [low, high], color=PALETTE[3], linestyle="--")
    axes.set(xlabel=f"predicted (yellow: {most:,} songs)", ylabel="actual")


def _draw_similar(axes: "Axes", plot: dict) -> None:
    """Draw how many of the neighbours at each rank share the song's genre, against chance."""
    shares = plot["same_genre_at"]
    chance = plot["by_chance"]
    ranks = range(1, len(shares) + 1)
    axes.plot(ranks, shares, color=PALETTE[0], marker="o", markersize=8)
    axes.axhline(chance, color=PALETTE[3], linestyle="--")
    axes.set(
        ylim=(0, 1.05),
        xticks=ranks,
        ylabel="of the song's own genre",
        xlabel=f"rank of the neighbour (dashed: by chance {chance:.1%})",
    )
    axes.yaxis.set_major_formatter("{x:.0%}")


# What is drawn of a model, by the key of its `plot`.
DRAWINGS = {
    "confusions": _draw_confusions,
    "points": _draw_clusters,
    "density": _draw_density,
    "same_genre_at": _draw_similar,
}


def _draw_history(axes: "Axes", history: list[dict]) -> None:
    """Draw the primary metric of every model over the last runs; its place gives its colour.

    A line breaks where a run failed or was held back: a cross stands at the value that was held
    back, or else at the last good one. Where lines lie on each other the later ones are narrower,
    so that all are seen.
    """
    from pandas import DataFrame, to_numeric

    from models import MODELS  # which imports this module

    table = DataFrame(history, columns=["run", "model", "status", "value"])
    table = table.drop_duplicates(["run", "model"], keep="last")
    runs = sorted(set(table["run"]))[-RUNS_SHOWN:]
    for at, (name, colour, marker) in enumerate(zip(MODELS, PALETTE, MARKERS)):
        lines = table.query("model == @name and run in @runs")
        if lines.empty:
            continue
        places = lines["run"].map(runs.index)
        trained = lines["status"] == "trained"
        found = to_numeric(lines["value"], errors="coerce")
        values = found.where(trained)
        crosses = found.fillna(values.ffill()).mask(trained)
        axes.plot(
            places,
            values,
            color=colour,
            linewidth=4.8 - 0.55 * at,
            marker=marker,
            markersize=9.5 - 0.8 * at,
            label=name,
        )
        # Above the lines
        axes.plot(places, crosses, "x", color=colour, ms=10, mew=2.5, zorder=3)
    shown = f"last {len(runs)} runs" if len(runs) > 1 else "first run"
    axes.set_title(f"{shown} (× failed or held back)")
    if runs:
        axes.legend(ncols=3, **LEGEND_BELOW)
        ticks = range(0, len(runs), len(runs) // 4 + 1)
        axes.set_xticks(ticks, [runs[tick][5:16].replace("T", " ") for tick in ticks])


def _drawable(text: object, limit: int = 1000) -> str:
    """Return `text` with "…" for what matplotlib's own font cannot draw: no boxes, no warnings."""
    from matplotlib import font_manager

    known = font_manager.get_font(font_manager.findfont("DejaVu Sans")).get_charmap()
    drawn = "".join(letter if ord(letter) in known else "…" for letter in plain(text, limit))
    return re.sub("…+", "…", drawn)


def _cut(text: str, width: int, lines: int = 1) -> str:
    """Return text in so many lines of that width, without the clauses for which there is no room.

    A command is a clause: whole or not there.
    """
    text = _drawable(text)
    wrap = partial(textwrap.wrap, width=width, break_on_hyphens=False)
    while len(wrap(text)) > lines and "; " in text:
        text = f"{text.rpartition('; ')[0]} …"
    return "\n".join(wrap(text, max_lines=lines, placeholder=" …"))


# ---- Discord -------------------------------------------------------------------------------------

# Breaking one of these limits is a 400 and loses the message; what is below shares the embed's.
FIELDS = 25
VALUE = 1024
EMBED = 6000
TITLE = 256
DESCRIPTION = 2000
FOOTER = 256
NAME = 64
MENTION = "@\u200b"  # an @ that calls nobody
TIMEOUT = 10  # seconds for one request
POST_SECONDS = 30  # for a whole message, waits and retries included
STOPPED_SECONDS = 5  # the same after a stop: whoever stopped the run waits
CHECK_SECONDS = 4
RETRY_DELAYS = (1, 2)  # seconds before the retries after a 5xx or a broken connection
RATE_LIMITED = 5  # how often a 429 is waited out
COPY_WEBHOOK = (
    'copy it from Discord (channel settings, Integrations, Webhooks, "Copy Webhook URL") '
    "into DISCORD_WEBHOOK_URL"
)
NO_WEBHOOK = (
    "DISCORD_WEBHOOK_URL is not a web address (https://discord.com/api/webhooks/...): "
    f"{COPY_WEBHOOK}"
)
DISCORD_SAYS = {
    401: f"the webhook's token is wrong; {COPY_WEBHOOK}",
    404: f"the webhook is gone (404); make a new one and {COPY_WEBHOOK}",
    429: "too many messages (429)",
}


def post_discord(
    run: Run, url: str, picture: Path | None = None, seconds: float = POST_SECONDS
) -> bool:
    """Post one message about the run, with the picture (a PNG) if given.

    Return True when Discord took it. Never raises and never takes longer than `seconds`, whatever
    the network does: a message must not cost a model.
    """
    deadline = time.monotonic() + seconds
    return _in_time(seconds, "Discord was not told", _post, url, run, picture, deadline)


def check_discord(enabled: bool) -> list[tuple[str, str, str]]:
    """Return the line of --check after a GET of the webhook, which posts nothing.

    A line is (what, "ok", sentence). Raises Expected where something is wrong.
    """
    url = setting("DISCORD_WEBHOOK_URL")
    said = "the Discord webhook answers"
    if not enabled:
        said = "--no-notify: nothing is posted"
    elif not url:
        said = "DISCORD_WEBHOOK_URL is not set: nothing is posted"
    else:
        _demand_address(url, NO_WEBHOOK)
        _succeed(_request(url, CHECK_SECONDS), DISCORD_SAYS)
    return [("Discord", "ok", said)]


def discord_payload(run: Run) -> dict:
    """Return the JSON of the message: one embed, a field per model, within Discord's limits."""
    status = run.status
    if status == "completed" and warnings_of(run):
        status = "partial"
    lines = [escape(note) for note in notes(run)]
    if run.finish_command:
        finish = plain(run.finish_command).replace("`", "'")
        lines.append(f"to finish the job: `{finish}`")
    models = list(run.models.items())[:FIELDS]
    share = (EMBED - TITLE - FOOTER - DESCRIPTION) // max(1, len(models))
    room = min(VALUE, share - NAME)
    fields = [
        {
            "name": fit(f"{LOOKS[outcome.status].sign} {escape(name)}", NAME),
            "value": fit(f"{escape(said_of(outcome))}\n{duration(outcome.seconds)}".strip(), room),
            "inline": outcome.status == "trained",
        }
        for name, outcome in models
    ]
    embed = {
        "title": fit(f"{LOOKS[status].sign} {escape(run.message)}", TITLE),
        "color": LOOKS[status].discord_colour,
        "description": fit("\n".join(lines), DESCRIPTION),
        "timestamp": run.started_at,
        "fields": fields,
        "footer": {"text": fit(", ".join(facts(run)), FOOTER)},
    }
    return {"embeds": [embed], "allowed_mentions": {"parse": []}}


def fit(text: str, limit: int) -> str:
    """Return `text` without mentions, cut to `limit` UTF-16 code units, as Discord counts.

    It is never cut within a character or an escape.
    """
    text = text.replace("@", MENTION)
    units = text.encode("utf-16-le")
    if len(units) <= 2 * limit:
        return text
    return units[: 2 * limit - 2].decode("utf-16-le", "ignore").rstrip("\\") + "…"


def escape(text: object) -> str:
    """Return `text` as Discord shows it literally: no markdown, no link."""
    literal = re.sub(r"([\\*_~`|\[\]<])", r"\\\1", plain(text)).replace("://", ":\u200b//")
    return re.sub(r"^([#>+-]|\d+(?=\.))", "\u200b\\1", literal)


def _post(url: str, run: Run, picture: Path | None, deadline: float) -> None:
    """Send the message, without the picture where Discord does not take it.

    Raises Expected where it takes neither.
    """
    _demand_address(url, NO_WEBHOOK)
    if picture:
        message = _with_picture(url, discord_payload(run), picture.read_bytes())
        reply = _send(message, deadline)
        if reply.status not in (400, 413):
            return _succeed(reply, DISCORD_SAYS)
        log.warning("Discord refused the picture (%d), trying without", reply.status)
    body = json.dumps(discord_payload(run)).encode()
    message = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    _succeed(_send(message, deadline), DISCORD_SAYS)


def _with_picture(url: str, payload: dict, image: bytes) -> urllib.request.Request:
    """Return the request that posts a form with the picture, to which the embed refers."""
    payload["embeds"][0]["image"] = {"url": "attachment://report.png"}
    edge = "a-line-that-stands-in-no-part"
    part = "Content-Disposition: form-data; name="
    head = (
        f'--{edge}\r\n{part}"payload_json"\r\nContent-Type: application/json\r\n\r\n'
        f"{json.dumps(payload)}\r\n"
        f'--{edge}\r\n{part}"files[0]"; filename="report.png"\r\nContent-Type: image/png\r\n\r\n'
    )
    body = head.encode() + image + f"\r\n--{edge}--\r\n".encode()
    kind = f"multipart/form-data; boundary={edge}"
    return urllib.request.Request(url, body, {"Content-Type": kind})


def _send(message: urllib.request.Request, deadline: float) -> "Reply":
    """Return the reply to a message.

    A 429 is obeyed and what may heal is tried again, as long as `deadline` allows.
    """
    delays = list(RETRY_DELAYS)
    limited = 0
    while True:
        reply = _request(message, TIMEOUT)
        if reply.status == TOO_MANY and limited < RATE_LIMITED:
            limited += 1
            wait = reply.wait
        elif reply.status in MAY_HEAL and delays:
            wait = delays.pop(0)
        else:
            return reply
        if time.monotonic() + wait >= deadline:
            return reply
        log.info("Discord answered %s; next try in %.1f s", reply.status or "nothing", wait)
        time.sleep(wait)


# ---- Heartbeat -----------------------------------------------------------------------------------
# A machine that is down at night tells nobody: a service that waits for a sign of life does.

HEARTBEAT_SECONDS = 5  # for a heartbeat, both tries
HEARTBEAT_TRY = 2  # seconds for each
HEARTBEAT_PAUSE = 1
NO_HEARTBEAT = (
    "HEARTBEAT_URL is not a web address (https://hc-ping.com/...): copy the check's ping URL, "
    "or the push monitor's, into HEARTBEAT_URL"
)


def heartbeat(kind: str) -> None:
    """Call HEARTBEAT_URL, if it is set: `kind` is "start", "" (all is well) or "fail".

    Never raises and never takes longer than HEARTBEAT_SECONDS, whatever the network does; what goes
    wrong is a line of the log. May be called in a thread.
    """
    url = setting("HEARTBEAT_URL")
    if url:
        _in_time(HEARTBEAT_SECONDS, "the heartbeat was not sent", _beat, url, kind)


def heartbeat_address(url: str, kind: str) -> str | None:
    """Return the address to call, in the way of the service that `url` belongs to.

    healthchecks.io and its like: URL/start, URL, URL/fail. Cronitor: ?state=run, complete, fail.
    Uptime Kuma's push monitors: ?status=up, down; None for a start, which they would take for a
    good end.
    """
    parts = urlsplit(url)
    if "/api/push/" in parts.path:
        states = UPTIME_KUMA
    elif parts.hostname == "cronitor.link" or "state=" in parts.query:
        states = CRONITOR
    else:
        path = f"{parts.path.rstrip('/')}/{kind}" if kind else parts.path
        return urlunsplit(parts._replace(path=path))
    if kind not in states:
        return None
    query = dict(parse_qsl(f"{parts.query}&{states[kind]}", keep_blank_values=True))
    return urlunsplit(parts._replace(query=urlencode(query)))


# Queries, by the kind of heartbeat
UPTIME_KUMA = {"": "status=up&msg=OK", "fail": "status=down&msg=not every model was trained"}
CRONITOR = {"start": "state=run", "": "state=complete", "fail": "state=fail"}


def check_heartbeat(enabled: bool) -> list[tuple[str, str, str]]:
    """Return the line of --check on HEARTBEAT_URL, which is not called; see check_discord."""
    url = setting("HEARTBEAT_URL")
    said = "HEARTBEAT_URL is set and well formed; only a run calls it"
    if not enabled:
        said = "--no-notify: none is sent"
    elif not url:
        said = "HEARTBEAT_URL is not set: nobody is told when no run begins"
    else:
        _demand_address(url, NO_HEARTBEAT)
    return [("heartbeat", "ok", said)]


def _beat(url: str, kind: str) -> None:
    """Call the address, a second time where that may help; raise Expected where neither does."""
    _demand_address(url, NO_HEARTBEAT)
    address = heartbeat_address(url, kind)
    if not address:
        return
    reply = _request(address, HEARTBEAT_TRY)
    if reply.status in MAY_HEAL | {TIMED_OUT, TOO_MANY}:
        time.sleep(HEARTBEAT_PAUSE)
        reply = _request(address, HEARTBEAT_TRY)
    _succeed(reply, {})


# ---- Requests ------------------------------------------------------------------------------------

ADDRESS = re.compile(r"https?://([\w.-]+|\[[\da-f:]+\])(:\d+)?/[!-~]+", re.ASCII)
# With urllib's own Discord answers 403.
USER_AGENT = "ml-training-pipeline (https://discord.com/developers/docs/resources/webhook, 1.0)"
TOO_MANY = 429
NO_CONNECTION = 0  # these two stand where an HTTP status would
TIMED_OUT = -1
MAY_HEAL = {NO_CONNECTION, *range(500, 600)}  # the same request may succeed a little later


class Reply(NamedTuple):
    """An answer to a request."""

    status: int  # of HTTP, or NO_CONNECTION or TIMED_OUT
    text: str
    wait: float = 0.0  # seconds, where there were too many requests


class _AnyStatus(urllib.request.HTTPErrorProcessor):
    def http_response(self, request: Any, response: Any) -> Any:
        """Return an answer as it is, and follow no redirect.

        urllib would turn a POST into a GET, lose the message, call it a success.
        """
        return response

    https_response = http_response


def _request(request: str | urllib.request.Request, timeout: float) -> Reply:
    """Return the reply to a request; an address alone is one for GET."""
    opener = urllib.request.build_opener(_AnyStatus)
    opener.addheaders = [("User-Agent", USER_AGENT)]
    try:
        with opener.open(request, timeout=timeout) as answer:
            text = answer.read(2000).decode("utf-8", "replace")
    except TimeoutError:
        return Reply(TIMED_OUT, "")
    except (OSError, http.client.HTTPException) as error:
        return Reply(NO_CONNECTION, str(error))
    # Discord says in the body how long to wait, others in a header.
    asked = re.search(r'"retry_after": ?(\d+\.?\d*)', text)
    asked = asked or re.match(r"(\d+\.?\d*)$", answer.headers.get("Retry-After", ""))
    return Reply(answer.status, text, float(asked[1]) if asked else 1.0)


def _succeed(reply: Reply, sentences: dict[int, str]) -> None:
    """Raise Expected, with the sentence for its status, where a reply is not a success."""
    if 200 <= reply.status < 300:
        return
    known = {TIMED_OUT: "no answer in time", NO_CONNECTION: "no connection"} | sentences
    said = known.get(reply.status, f"the server answered {reply.status}")
    if reply.text:
        said += f": {reply.text}"
    raise Expected(said)


def _demand_address(url: str, sentence: str) -> None:
    """Raise Expected, with that sentence, where a URL is none."""
    if not ADDRESS.fullmatch(url):
        raise Expected(sentence)


def _in_time(seconds: float, failure: str, step: Callable, *arguments: Any) -> bool:
    """Take a step; return whether it succeeded. If not, that failure and why are logged.

    The step is given up after `seconds`: looking up a name knows no timeout of its own.
    """
    # What became of the step, at last
    ended: list[Exception | None] = [TimeoutError(f"no answer within {seconds:.0f} s")]

    def take_step() -> None:
        ended.append(attempt(step, *arguments)[1])

    thread = threading.Thread(target=take_step, daemon=True)
    try:
        thread.start()
        thread.join(seconds)
    except RuntimeError:  # no more threads can be started
        take_step()
    error = ended[-1]
    if error:
        log.warning("%s: %s", failure, plain(explain(error), 600))
    return error is None
