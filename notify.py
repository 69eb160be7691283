"""What people are told about a run: the terminal (live lines, one table), report.png and one Discord message.

All of it is made from the result of a run, one dict that is JSON from end to end, so that terminal, picture, message
and exit status never disagree. Nothing here may cost a trained model.
"""

import contextlib
import errno
import http.client
import json
import logging
import math
import re
import resource
import shlex
import socket
import sys
import textwrap
import threading
import time
import urllib.error
import urllib.request
import uuid
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from db import DataError, Expected, command, redact, setting, write_atomically

# Exit statuses.
TRAINED, PARTIAL, WRONG_INPUT, NOTHING_TRAINED, LOCKED, TERMINATED, INTERRUPTED = (
    0,
    1,
    2,
    3,
    75,
    143,
    130,
)

LOGGERS = "train", "models", "db", "notify"
log = logging.getLogger("notify")

# Metrics as people say them, in the order of a panel's second line; what is not here goes by its own name, and only
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

# Of each status: its word, sign, colour (legible on black and on white, also to colour-blind eyes), colour on Discord.
GOOD, MIXED, BAD = (
    ("✅", "#00795A", 0x2ECC71),
    ("⚠️", "#A86400", 0xF1C40F),
    ("❌", "#C42B00", 0xE74C3C),
)
STATUS = {
    "completed": ("completed", *GOOD),
    "trained": ("trained", *GOOD),
    "partial": ("partial", *MIXED),
    "held_back": ("held back", *MIXED),
    "failed": ("failed", *BAD),
}

# Signs of the live lines; what has none is at work.
SIGNS = {
    "done": f"[{GOOD[1]}]✓[/]",
    "failed": f"[{BAD[1]}]✗[/]",
    "held_back": f"[{MIXED[1]}]![/]",
    "retrying": f"[{MIXED[1]}]↻[/]",
}

PLAIN_WIDTH = 160  # columns of a table where there is no terminal to ask

# The picture. Okabe-Ito colours and cividis are told apart by colour-blind eyes; markers differ as well.
INCHES, ROW_INCHES, HEADER_INCHES = 16, 4.2, 1.5  # at 100 dots per inch
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#999999")
MARKERS = "os^Dvp*X"
INK, GREY = "#222222", "#707070"
STYLE = {
    "font.family": "DejaVu Sans",
    "text.parse_math": False,
    "text.color": INK,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlesize": 15,
    "axes.titlepad": 30,
    "axes.labelcolor": GREY,
    "axes.labelsize": 12,
    "legend.frameon": False,
    "legend.fontsize": 11,
}
BELOW = {
    "loc": "upper left",
    "bbox_to_anchor": (-0.03, -0.06),
    "columnspacing": 1,
    "handletextpad": 0.3,
}  # a legend
RUNS_SHOWN, CONFUSIONS_SHOWN, CLUSTERS_NAMED = 30, 9, 8

# Discord. Breaking a limit (fields, a field's value, an embed) is a 400 and loses the message; the others share the embed.
FIELDS, VALUE, EMBEDS = 25, 1024, 6000
TITLE, DESCRIPTION, FOOTER, NAME = 256, 2000, 256, 64
MENTION = "@\u200b"  # an @ that calls nobody
USER_AGENT = "ml-training-pipeline (https://discord.com/developers/docs/resources/webhook, 1.0)"  # urllib's: 403
TIMEOUT = 10  # seconds for one request
POST_SECONDS = 30  # for a whole message, waits and retries included
STOPPED_SECONDS = 5  # the same after a stop: whoever stopped the run waits
CHECK_SECONDS = 4
RETRY_DELAYS = (1, 2)  # seconds before the retries after a 5xx or a broken connection
RATE_LIMITED = 5  # how often a 429 is waited out
NO_CONNECTION = 0  # stands where an HTTP status would
COPY_IT = 'copy it from Discord (channel settings, Integrations, Webhooks, "Copy Webhook URL") into DISCORD_WEBHOOK_URL'

# ---- A run: all there is to tell -----------------------------------------------------------------


@dataclass
class Outcome:
    """What became of one model of a run."""

    status: str  # "trained", "held_back" or "failed"
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


@dataclass
class Run:
    """All there is to tell about a run. `asdict(run)` is JSON from end to end."""

    parameters: dict  # the flow's
    asked: list[str]  # names of the models that were asked for, in their usual order
    models_dir: str
    command: str  # the command line that does the same
    started_at: str  # ISO 8601, UTC
    host: str
    models: dict[str, Outcome] = field(default_factory=dict)  # of those that are done
    warnings: list[str] = field(default_factory=list)
    crashes: list[str] = field(default_factory=list)  # killed steps, and what was done about them
    csv: dict | None = None  # what load_csv returned
    rows: int | None = None  # songs that were read
    read_seconds: float | None = None  # that reading them took
    seconds: float = 0.0  # that the run took
    peak_mb: float | None = None  # the largest memory of a process of it
    status: str = "failed"  # "completed", "partial" or "failed"
    message: str = ""  # the run in a sentence
    error: str | None = None  # what ended it
    exit_status: int | None = None  # None until the run is concluded
    finish_command: str | None = None  # trains what this run has not, where a command can

    @property
    def table(self) -> str:
        return self.parameters["table_name"]

    @property
    def demo(self) -> int | None:
        """The number of made-up songs; None where they are real."""
        return self.parameters["demo"]

    @property
    def enable_notifications(self) -> bool:
        return self.parameters["enable_notifications"]


def outcome_of(report: dict, folder: str | Path) -> Outcome:
    """Return what became of a model, from its `report`: what stands in its metrics file.

    `folder`: the models directory.
    """
    path = None
    if report["status"] == "trained":
        path = str(Path(folder) / f"{report['model']}.joblib")
    return Outcome(
        status=report["status"],
        error=report.get("error"),
        metrics=report["metrics"],
        plot=report.get("plot") or {},
        previous=report.get("previous"),
        bytes=report.get("bytes"),
        rows=report.get("rows"),
        seconds=report.get("seconds"),
        guessing=report.get("guessing"),
        path=path,
    )


def failed(error: BaseException) -> Outcome:
    """Return what became of a model that there is none of."""
    return Outcome("failed", error=explain(error), heals=heals(error))


# ---------------------------------------------------------------------------------------------------- words

UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]+")


def plain(text, limit=10_000):
    """One line that can be shown anywhere: no secret, no control or direction character, `limit` characters at most."""
    text = " ".join(UNPRINTABLE.sub(" ", redact(str(text))).split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def number(value):
    """A metric as people read it: three digits that matter, thousands separated."""
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        return "not known"
    return (
        f"{value:,}"
        if isinstance(value, int)
        else f"{value:.3f}"
        if abs(value) < 10
        else f"{value:,.1f}"
    )


def duration(seconds):
    """41.2 -> "41.2 s", 754 -> "12 min 34 s"; "" for none."""
    if not seconds or seconds < 60:
        return f"{seconds:.1f} s" if seconds else ""
    return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"


def size(count):
    """Bytes as "3.1 MB"; "" for none."""
    power = min(3, int(math.log(count, 1000))) if count else 0
    return (
        f"{count / 1000**power:.{1 if power else 0}f} {('B', 'kB', 'MB', 'GB')[power]}"
        if count
        else ""
    )


def metric_and_change(model):
    """("accuracy 0.713", "+0.004") of one model of the result; "first" when nothing came before, "" when it failed."""
    if not model.get("metrics"):
        return "", ""
    name, value = next(iter(model["metrics"].items()))
    previous = model.get("previous")
    change = "first" if None in (previous, value) else f"{value - previous:+.3f}"
    return f"{METRICS.get(name, plain(name).replace('_', ' '))} {number(value)}", change


def reason(model):
    """ "failed: ...", "held back: ..." or "no better than guessing"; "" where there is nothing to say."""
    if model["status"] == "trained":
        return "no better than guessing" * bool(model.get("guessing"))
    word, error = STATUS[model["status"]][0], plain(model["error"] or "no reason was given")
    return f"{word}: {error.removeprefix(f'{word}: ')}"


def outcome(model):
    """What became of a model: "accuracy 0.713 (+0.004)", where it was trained, and the reason."""
    metric, change = metric_and_change(model)
    return ", ".join(
        filter(None, [f"{metric} ({change})" * (model["status"] == "trained"), reason(model)])
    )


def in_short(name, model):
    return f"{name}: {'done, ' * (model['status'] == 'trained')}{outcome(model)}"


def table_row(name, model):
    """A model as a row of a table: {"model", "status", "metric", "change", "time", "size"}, all text."""
    metric, change = metric_and_change(model)
    return {
        "model": plain(name, 20),
        "status": STATUS[model["status"]][0],
        "metric": metric,
        "change": change,
        "time": duration(model["seconds"]),
        "size": size(model["bytes"]),
    }


def facts(result):
    """["89,740 songs of spotify_songs", "41.2 s in all", ...]: what there is to say besides the models."""
    songs = (
        f"{result['rows']:,} {'made-up ' * bool(result['demo'])}songs of"
        if result["rows"]
        else "table"
    )
    said = {
        "table": f"{songs} {plain(result['table'], 80)}",
        "read_seconds": f"{duration(result['read_seconds'])} to read",
        "seconds": f"{duration(result['seconds'])} in all",
        "peak_mb": f"peak memory {result['peak_mb'] or 0:,.0f} MB",
        "host": f"on {plain(result['host'], 80)}",
    }
    return [words for key, words in said.items() if result[key]]


def warnings(result):
    """The most important first: that the run was ended and started again, then what the models' data say."""
    return result["deaths"] + result["warnings"]


def notes(result):
    """What there is to say below the models: the error if the message has it not, warnings, the CSV's rows."""
    error, csv = plain(result["error"] or ""), result["csv"]
    said = [error] * (error not in plain(result["message"])) + [
        f"warning: {plain(w)}" for w in warnings(result)
    ]
    if csv:
        reasons = "; ".join(
            f"{plain(reason, 80)}: {count:,}" for reason, count in csv["rejected"].items()
        )
        said.append(
            f"CSV: {csv['read']:,} rows read, {csv['loaded']:,} songs loaded, {csv['repeated']:,} repeated, "
            f"{sum(csv['rejected'].values()):,} rejected" + f" ({reasons})" * bool(reasons)
        )
    return said


# ------------------------------------------------------------------------------------------------------ errors


class Stopped(Expected):
    """The run was ended by SIGTERM or Ctrl-C. `code`: the exit status, TERMINATED or INTERRUPTED."""

    def __init__(self, code):
        super().__init__(code)
        self.code = code

    def __str__(self):
        return f"the run was stopped by {'Ctrl-C' if self.code == INTERRUPTED else 'SIGTERM'}"


SAY_IT_ALL = Expected, OSError, MemoryError  # errors of which nobody needs a traceback


def explain(error):
    """An error as a sentence without secrets."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return redact(
            f"there is no space left for {error.filename or 'a file'}; make room on that disk and run it again"
        )
    if isinstance(error, MemoryError):
        return (
            "there is not enough memory; raise the limit (ulimit -v, the container's), train fewer models at a time "
            "(--only), or name a view with a sample of the songs as --table-name"
        )
    return redact(
        str(error) if isinstance(error, SAY_IT_ALL) else f"{type(error).__name__}: {error}"
    )


def attempt(step, *arguments):
    """Run a step whose failure must not stop the next one; return (what it returned, None) or (None, the error)."""
    try:
        return step(*arguments), None
    except Exception as error:
        if not isinstance(error, SAY_IT_ALL):
            log.error("%s failed", getattr(step, "__name__", "a step"), exc_info=error)
        return None, error


def quiet_logs():
    """Let our log lines through, and no secret in any line of ours or of Prefect's."""
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.INFO)
    for name in [*logging.root.manager.loggerDict, "prefect.flow_runs", "prefect.task_runs"]:
        if name.startswith((*LOGGERS, "prefect")):
            logging.getLogger(name).addFilter(_without_secrets)
    logging.getLogger("EventsWorker").setLevel(
        logging.ERROR
    )  # Prefect's: at the end it counts what is still to be sent


def _without_secrets(record):
    """A logging filter: errors whose text says all there is to say lose their traceback, everything loses secrets."""
    record.msg, record.args = redact(record.getMessage()), ()
    if record.exc_info and isinstance(record.exc_info[1], SAY_IT_ALL):
        record.exc_info = None
    elif record.exc_info:
        record.exc_text = redact(logging.Formatter().formatException(record.exc_info))
    return True


# ---------------------------------------------------------------------------------------------- result of a run


def new_result(parameters, asked, folder):
    """The result of a run that is about to begin. `parameters`: the flow's; `asked`: names of models; `folder`: theirs."""
    words, folder = [], Path(folder).resolve()
    options = {
        "table_name": "spotify_songs",
        "n_clusters": 2,
        "demo": None,
        "dask": None,
        "predict_into": None,
    }
    for name, default in options.items():
        value = parameters.get(name, default)
        words += [f"--{name.replace('_', '-')}", value] * (value != default)
    words += ["--models-dir", folder] * bool(parameters["models_dir"]) + ["--force"] * parameters[
        "force"
    ]
    words += ["--no-notify"] * (not parameters["enable_notifications"])
    unknown = dict.fromkeys(
        (
            "exit_status",
            "error",
            "read_seconds",
            "peak_mb",
            "rows",
            "csv",
            "finish_command",
            "flow_run_id",
            "training",
        )
    )
    return unknown | {
        "status": "failed",
        "message": "",
        "started_at": datetime.now(UTC).isoformat(),
        "clock": time.monotonic(),
        "seconds": 0.0,
        "host": socket.gethostname(),
        "warnings": [],
        "table": parameters["table_name"],
        "models_dir": str(folder),
        "demo": parameters["demo"],
        "asked": list(asked),
        "models": {},
        "command": command("train.py", *words),
        "deaths": [],
        "notify": parameters["enable_notifications"],
        "parameters": parameters,
    }


ENTRY = "status", "error", "metrics", "plot", "previous", "bytes", "rows", "seconds", "guessing"


def entry(report, folder):
    """What the result says of a model that has a metrics file."""
    path = (
        str(Path(folder) / f"{report['model']}.joblib") if report["status"] == "trained" else None
    )
    return {key: report.get(key) for key in ENTRY} | {"path": path, "heals": False}


def failed_entry(error):
    """What the result says of a model that there is none of."""
    return dict.fromkeys(ENTRY) | {
        "status": "failed",
        "error": explain(error),
        "metrics": {},
        "plot": {},
        "path": None,
        "heals": heals(error),
    }


def heals(error):
    """Whether trying again may help: the same input brings these back."""
    return not isinstance(error, (ValueError, TypeError, KeyError))


def peak_mb(so_far=0):
    """The largest memory of this process and of those it waited for, in MB."""
    peak = max(
        resource.getrusage(who).ru_maxrss
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return max(so_far or 0, peak // (1024 if sys.platform == "linux" else 1024**2))


def history_line(result, name, status):
    """The line of history.jsonl on a model of a run."""
    model = result["models"].get(name) or dict.fromkeys(ENTRY)
    metric, value = next(iter((model["metrics"] or {}).items()), (None, None))
    return {
        "run": result["started_at"],
        "model": name,
        "status": status,
        "metric": metric,
        "value": value,
        "seconds": model["seconds"],
        "rows": result["rows"],
        "read_seconds": result["read_seconds"],
        "run_seconds": round(time.monotonic() - result["clock"], 2),
        "peak_mb": peak_mb(),
        "error": model["error"],
    }


def model_page(name, model, history):
    """Markdown about a model: its figures, and its last runs, the latest first."""
    lines = ["|metric|value|", "|---|---|"]
    lines += [
        f"|{key}|{number(value)}|"
        for key, value in model["metrics"].items()
        if not isinstance(value, (list, dict))
    ]
    lines += ["", "|last runs (UTC)|status|metric|", "|---|---|---|"]
    lines += [
        f"|{line['run'][:16]}|{escape(line.get('error') or line['status'])}|{number(line.get('value'))}|"
        for line in history[::-1]
        if line["model"] == name and line["status"] != "started"
    ][:RUNS_SHOWN]
    return "\n".join(lines)


def decide(result, error=None):
    """What the run was: status, exit status, message, and the command that finishes it where one can help."""
    if result["exit_status"] is not None:
        return
    asked, models = result["asked"], result["models"]
    trained, held_back, failed = (
        [name for name in asked if name in models and models[name]["status"] == status]
        for status in ("trained", "held_back", "failed")
    )
    if error:
        result["error"] = explain(error)
    if len(failed) == len(models):
        status, code = "failed", WRONG_INPUT if isinstance(error, DataError) else NOTHING_TRAINED
    elif error or len(trained) < len(asked):
        status, code = "partial", PARTIAL
    else:
        status, code = "completed", TRAINED
    result |= {"status": status, "exit_status": error.code if isinstance(error, Stopped) else code}
    said = [f"{len(trained)} of {len(asked)} models trained"] + [
        "held back: " + ", ".join(held_back)
    ] * bool(held_back)
    said += ["failed: " + ", ".join(failed)] * bool(failed) + [result["error"]] * bool(
        result["error"]
    )
    result["message"] = (
        "; ".join(said)
        if models
        else f"Nothing was trained: {result['error'] or 'no reason was given'}"
    )
    if (not error or heals(error)) and any(
        name not in models or models[name]["heals"] for name in asked
    ):
        result["finish_command"] = _finish_command(result)
    result |= {"seconds": time.monotonic() - result["clock"], "peak_mb": peak_mb(result["peak_mb"])}


def _finish_command(result):
    """The command that trains what this run has not trained, also where it has not loaded its CSV."""
    words, parameters = ["--failed"], result["parameters"]
    if not result["csv"] and (csv := parameters["csv_path"]):
        words += ["--csv-path", csv if re.match("https?://", csv) else str(Path(csv).resolve())]
        words += ["--truncate"] * parameters["truncate_table"]
    return f"{result['command']} {shlex.join(words)}"


def tell(result, history):
    """Draw the picture and post to Discord; what fails is a warning. `history`: the lines of history.jsonl as dicts."""
    stopped, picture = (
        result["exit_status"] in (TERMINATED, INTERRUPTED),
        Path(result["models_dir"]) / "report.png",
    )
    trouble = stopped or not result["models"]
    if not trouble:
        _, trouble = attempt(draw_report, result, history, picture)
        if trouble:
            result["warnings"].append(f"the picture could not be made: {explain(trouble)}")
    if result["notify"] and (url := setting("DISCORD_WEBHOOK_URL")):
        post_discord(
            result, url, None if trouble else picture, STOPPED_SECONDS if stopped else POST_SECONDS
        )


# ------------------------------------------------------------------------------------------------- terminal


def print_summary(result, file=None):
    """Print the table of a run and what there is to say below it."""
    rows, lines = [], [(result["message"], f"bold {STATUS[result['status']][2]}")]
    for name, model in result["models"].items():
        model_name, status, *others = table_row(name, model).values()
        colour = STATUS[model["status"]][2]
        rows.append([(model_name, "bold"), (status, colour), *others])
        if reason(model):
            lines.append((f"{name} {reason(model)}", MIXED[1] if status == "trained" else colour))
    lines += [(note, MIXED[1] if note.startswith("warning") else "") for note in notes(result)]
    lines.append(", ".join(facts(result)))
    if any(model["path"] for model in result["models"].values()):
        lines.append(f"models in {result['models_dir']}")
    if result["finish_command"]:
        lines.append((f"to finish the job: {result['finish_command']}", "bold"))
    print_table(
        ("model", "status", "metric", "change>", "time>", "size>"), rows, below=lines, file=file
    )


def print_table(columns, rows, above=(), below=(), file=None):
    """Print lines, a table, lines: in colour on a terminal, plain text without escape codes anywhere else.

    `columns`: the headings, with a ">" at the end of those whose cells stand on the right; titles and artists may be
    folded. Cells and lines are text or (text, rich style).
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    def text(said):
        said, style = said if isinstance(said, tuple) else (said, "")
        return Text(plain(said), style)

    file = file or sys.stdout
    tty = file.isatty()
    if hasattr(file, "reconfigure"):
        file.reconfigure(errors="backslashreplace")  # where a terminal or a log knows only ASCII
    out = Console(file=file, width=None if tty else PLAIN_WIDTH, force_terminal=tty)
    table = Table(box=box.SIMPLE_HEAD if tty else None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(
            column.rstrip(">"),
            justify="right" if column.endswith(">") else "left",
            overflow="fold",
            no_wrap=column not in ("title", "artist"),
        )
    for row in rows:
        table.add_row(*map(text, row))
    for part in (*map(text, above), *[table] * bool(rows), *map(text, below)):
        out.print(part, soft_wrap=part is not table)


def _log_handler():
    """The handler whose rich console writes the log to a terminal, as Prefect's does: what is live goes below it."""
    for handler in logging.getLogger().handlers:
        console = getattr(handler, "console", None)
        if (
            console
            and console.file.isatty()
            and not console.is_dumb_terminal
            and "utf" in console.encoding
        ):
            return handler


@contextlib.contextmanager
def live_status(models):
    """A line per model below the log on a terminal while the block runs; nothing elsewhere.

    It shows the last record logged with extra={"model": "genre", "phase": "fitting"}, without its "genre: ". Up to
    level INFO such a record goes no further; a warning (a retry and its reason) is in the log as well.
    """
    handler = _log_handler()
    if not handler:
        yield
        return
    from rich.markup import escape
    from rich.progress import Progress, TextColumn, TimeElapsedColumn
    from rich.theme import Theme

    columns = TimeElapsedColumn(), TextColumn("{task.description}")
    with (
        handler.console.use_theme(Theme()),
        Progress(*columns, console=handler.console, transient=True) as progress,
    ):
        lines = {name: progress.add_task(f"· {name:12}waiting") for name in models}

        def show(record):
            name, phase = getattr(record, "model", None), getattr(record, "phase", "")
            if name in lines:
                said = escape(plain(record.getMessage()).removeprefix(f"{name}: "))
                progress.update(lines[name], description=f"{SIGNS.get(phase, '▶')} {name:12}{said}")
                if phase in ("done", "failed", "held_back"):
                    progress.stop_task(lines[name])
            return record.levelno >= logging.WARNING or name not in lines

        handler.addFilter(show)
        try:
            yield
        finally:
            handler.removeFilter(show)


# -------------------------------------------------------------------------------------------------- picture


def draw_report(result, history, path):
    """Write the picture of a run, a PNG 1600 pixels wide, to `path`; the old one stays until the new is whole.

    `history`: the lines of history.jsonl as dicts, oldest first. Raises OSError when `path` cannot be written.
    """
    import matplotlib

    with matplotlib.rc_context(STYLE):
        write_atomically(path, partial(report_figure(result, history).savefig, format="png"))


def report_figure(result, history):
    """The matplotlib Figure behind draw_report: a headline, a panel per model of this run, the metric history."""
    from matplotlib.figure import Figure  # without pyplot: no global state, so any thread may draw

    models, warned = result["models"], warnings(result)
    columns = 3 if len(models) > 3 else 2
    cells = [*models, *["history"] * (columns - len(models) % columns)]
    height = max(7.2, HEADER_INCHES + ROW_INCHES * len(cells) // columns)
    figure = Figure(figsize=(INCHES, height), layout="constrained")
    figure.get_layout_engine().set(rect=(0.01, 0.01, 0.98, 1 - HEADER_INCHES / height), wspace=0.06)
    panels = figure.subplot_mosaic(
        [cells[at : at + columns] for at in range(0, len(cells), columns)]
    )
    for name, model in models.items():
        _draw_model(panels[name], name, model)
    _draw_history(panels["history"], history)
    when = f"{datetime.fromisoformat(result['started_at']).astimezone(UTC):%Y-%m-%d %H:%M} UTC"
    more = f" (and {len(warned) - 1} more)" if len(warned) > 1 else ""
    lines = [
        (0.62, result["message"], 95, 25, STATUS[result["status"]][2]),
        (0.95, " · ".join([when, *facts(result)]), 145, 14, INK),
    ]
    lines += [
        (1.25, f"warning: {plain(warning, 130)}{more}", 160, 13.5, MIXED[1])
        for warning in warned[:1]
    ]
    for inches, text, width, size, color in lines:
        _write(figure, 0.015, 1 - inches / height, text, width, size=size, color=color)
    return figure


def _drawable(text, limit=1000):
    """`text` with "…" for what matplotlib's own font cannot draw: no empty boxes, no warnings."""
    from matplotlib import font_manager

    known = font_manager.get_font(font_manager.findfont("DejaVu Sans")).get_charmap()
    return re.sub("…+", "…", "".join(c if ord(c) in known else "…" for c in plain(text, limit)))


def _write(place, x, y, text, width, lines=1, **style):
    """Text at x, y, wrapped to `lines` lines of `width`."""
    wrapped = textwrap.wrap(_drawable(text), width, max_lines=lines, placeholder=" …")
    return place.text(x, y, "\n".join(wrapped), in_layout=False, **style)


def _draw_model(axes, name, model):
    """One panel: a headline with metric and change, a line of further figures, the drawing."""
    (metric, change), metrics = metric_and_change(model), model["metrics"]
    words, _, color, _ = STATUS[model["status"]]
    if words == "trained":
        words, color = f"{metric} ({change})", INK
    elif metric:
        words += f" at {metric}"
    axes.set_title(_drawable(f"{plain(name, 20)}: {words}"), color=color)
    detail = ", ".join(
        f"{METRICS[key]} {number(metrics[key])}" for key in METRICS if key in list(metrics)[1:]
    )
    for key, draw in {
        "confusions": _draw_confusions,
        "points": _draw_clusters,
        "density": _draw_density,
        "same_genre_at": _draw_similar,
    }.items():
        if model["plot"].get(key):
            _write(
                axes,
                0,
                1.015,
                reason(model) or detail,
                62,
                2,
                size=10,
                color=MIXED[1] if reason(model) else GREY,
                transform=axes.transAxes,
            )
            return draw(axes, model["plot"])
    axes.set_axis_off()
    _write(
        axes, 0, 0.98, model["error"] or "nothing to draw", 40, 10, size=14, va="top", color=color
    )


def _draw_confusions(axes, plot):
    """Which genres are most often taken for which, as bars with their names on them."""
    shown = plot["confusions"][:CONFUSIONS_SHOWN]
    axes.barh(range(len(shown)), [share for *_, share in shown], color="#A9CCE3")
    for at, (actual, predicted, count, share) in enumerate(shown):
        said = f"{plain(actual, 14)} → {plain(predicted, 14)}: {share:.0%} ({count:,})"
        _write(axes, 0.01, at, said, 50, size=11, va="center", transform=axes.get_yaxis_transform())
    axes.set(yticks=[], xticks=[], xlabel="actual → predicted: share of the actual (songs)")
    axes.invert_yaxis()
    axes.set_frame_on(False)


def _draw_clusters(axes, plot):
    """The songs on their first two principal components, coloured by cluster."""
    for i, (label, size) in enumerate(zip(plot["labels"], plot["sizes"])):
        x, y = ([point[axis] for point in plot["points"] if point[2] == i] for axis in (0, 1))
        name = f"{_drawable(f'{i} {label}', 20)} {size / sum(plot['sizes']):.0%}"
        axes.scatter(
            x,
            y,
            s=9,
            alpha=0.6,
            linewidths=0,
            color=PALETTE[i % len(PALETTE)],
            marker=MARKERS[i % len(MARKERS)],
            label=name if i < CLUSTERS_NAMED else None,
        )
    axes.set(xticks=[], yticks=[], xlabel="first principal component", ylabel="second")
    axes.legend(ncols=2, markerscale=2.5, **BELOW)


def _draw_density(axes, plot):
    """Predicted against actual: how many songs, on a logarithmic colour scale; the dashed line is a right guess."""
    from matplotlib.colors import LogNorm

    low, high, _ = plot["edges"]
    most = max(2, *map(max, plot["density"]))
    axes.imshow(
        plot["density"],
        origin="lower",
        extent=(low, high) * 2,
        cmap="cividis",
        aspect="auto",
        norm=LogNorm(1, most),
    )
    axes.plot([low, high], [low, high], color=PALETTE[3], linestyle="--")
    axes.set(xlabel=f"predicted (yellow: {most:,} songs)", ylabel="actual")


def _draw_similar(axes, plot):
    """How many of the neighbours at each rank share the song's genre, against chance."""
    shares, chance = plot["same_genre_at"], plot["by_chance"]
    ranks = range(1, len(shares) + 1)
    axes.plot(ranks, shares, color=PALETTE[0], marker="o", markersize=8)
    axes.axhline(chance, color=PALETTE[3], linestyle="--")
    axes.set(
        ylim=(0, None),
        xticks=ranks,
        ylabel="of the song's own genre",
        xlabel=f"rank of the neighbour (dashed: by chance {chance:.1%})",
    )
    axes.yaxis.set_major_formatter("{x:.0%}")


def _draw_history(axes, history):
    """The primary metric of every model over the last runs; a line breaks where a run failed or was held back."""
    import pandas

    points = {
        (line["run"], line["model"]): line.get("value") if line["status"] == "trained" else None
        for line in history
    }
    runs = sorted({run for run, _ in points})[-RUNS_SHOWN:]
    for name, color, marker in zip(dict.fromkeys(name for _, name in points), PALETTE, MARKERS):
        values = pandas.Series(
            {at: points[run, name] for at, run in enumerate(runs) if (run, name) in points},
            dtype=float,
        )
        axes.plot(values, color=color, marker=marker, label=_drawable(name, 14))
        lost = values.ffill().bfill()[
            values.isna()
        ]  # a cross stands at the height of the last good value
        axes.plot(lost, "x", color=color, markersize=10, markeredgewidth=2.5)
    axes.set_title(
        (f"last {len(runs)} runs" if len(runs) > 1 else "first run") + " (× failed or held back)"
    )
    if runs:
        axes.legend(ncols=3, **BELOW)
        ticks = range(0, len(runs), len(runs) // 4 + 1)
        axes.set_xticks(ticks, [runs[at][5:16].replace("T", " ") for at in ticks])


# -------------------------------------------------------------------------------------------------- Discord


def fit(text, limit):
    """`text` cut to `limit` UTF-16 code units, as Discord counts, never within a character or an escape."""
    cut = text.encode("utf-16-le")
    if len(cut) <= 2 * limit:
        return text
    return cut[: 2 * limit - 2].decode("utf-16-le", "ignore").rstrip("\\") + "…"


def escape(text):
    """`text` as Discord shows it literally: no markdown, no mention, no link."""
    text = (
        re.sub(r"([\\*_~`|\[\]<])", r"\\\1", plain(text))
        .replace("@", MENTION)
        .replace("://", ":\u200b//")
    )
    return re.sub(r"^([#>+-]|\d+(?=\.))", "\u200b\\1", text)


def discord_payload(result):
    """The JSON of the message: one embed, green, yellow or red, a field per model, within all limits of Discord."""
    models, status = list(result["models"].items())[:FIELDS], result["status"]
    status = "partial" if status == "completed" and warnings(result) else status
    lines = [escape(note) for note in notes(result)]
    if result["finish_command"]:
        command = plain(result["finish_command"]).replace("`", "'").replace("@", MENTION)
        lines.append(f"to finish the job: `{command}`")
    room = min(VALUE, (EMBEDS - TITLE - FOOTER - DESCRIPTION) // max(1, len(models)) - NAME)
    fields = [
        {
            "name": fit(f"{STATUS[model['status']][1]} {escape(name)}", NAME),
            "value": fit(f"{escape(outcome(model))}\n{duration(model['seconds'])}", room),
            "inline": model["status"] == "trained",
        }
        for name, model in models
    ]
    embed = {
        "title": fit(f"{STATUS[status][1]} {escape(result['message'])}", TITLE),
        "color": STATUS[status][3],
        "description": fit("\n".join(lines), DESCRIPTION),
        "timestamp": result["started_at"],
        "fields": fields,
        "footer": {"text": fit(", ".join(facts(result)).replace("@", MENTION), FOOTER)},
    }
    return {"embeds": [embed], "allowed_mentions": {"parse": []}}


def post_discord(result, url, picture=None, seconds=POST_SECONDS):
    """Post one message about the run, with `picture` (path of a PNG) if given; True when Discord took it.

    Never raises and never takes longer than `seconds`, whatever the network does: a message must not cost a model.
    """
    trouble = _trouble(url, seconds, _post, result, picture, time.monotonic() + seconds)
    if trouble:
        log.warning("Discord was not told: %s", trouble)
    return not trouble


def check_discord(enabled):
    """The lines of --check after a GET of the webhook, which posts nothing: (what, "ok" or "problem", sentence)."""
    url = setting("DISCORD_WEBHOOK_URL")
    if not enabled or not url:
        return [
            (
                "Discord",
                "ok",
                f"{'DISCORD_WEBHOOK_URL is not set' if enabled else '--no-notify'}: nothing is posted",
            )
        ]
    trouble = _trouble(url, CHECK_SECONDS, lambda url: _succeed(*_request(url, CHECK_SECONDS)))
    return [("Discord", "problem" if trouble else "ok", trouble or "the Discord webhook answers")]


def _trouble(url, seconds, step, *arguments):
    """Why a step with the webhook failed, without its secret; None where it did not.

    It is given up after `seconds`: looking up a name knows no timeout of its own.
    """
    errors = [TimeoutError(f"no answer within {seconds:.0f} s")]
    thread = threading.Thread(
        target=lambda: errors.append(attempt(step, url, *arguments)[1]), daemon=True
    )
    thread.start()
    thread.join(seconds)
    return errors[-1] and re.sub(
        "|".join(re.findall(r"[\w-]{12,}", url)) or "$^", "***", plain(explain(errors[-1]), 600)
    )


def _post(url, result, picture, deadline):
    """Send the message, without the picture where Discord does not take it; raise Expected if it takes neither."""
    payload = discord_payload(result)
    if picture:
        status, body = _send(url, deadline, *_with_picture(payload, Path(picture).read_bytes()))
        if status not in (400, 413):
            return _succeed(status, body)
        log.warning("Discord refused the picture (%d), trying without", status)
    _succeed(*_send(url, deadline, json.dumps(payload).encode(), "application/json"))


def _with_picture(payload, image):
    """(body, content type) of a form with the picture, to which the embed refers."""
    told = json.dumps(
        payload | {"embeds": [payload["embeds"][0] | {"image": {"url": "attachment://report.png"}}]}
    )
    edge, part = uuid.uuid4().hex, "Content-Disposition: form-data; name="
    text = (
        f'--{edge}\r\n{part}"payload_json"\r\nContent-Type: application/json\r\n\r\n{told}\r\n'
        f'--{edge}\r\n{part}"files[0]"; filename="report.png"\r\nContent-Type: image/png\r\n\r\n'
    )
    return (
        text.encode() + image + f"\r\n--{edge}--\r\n".encode(),
        f"multipart/form-data; boundary={edge}",
    )


def _send(url, deadline, body, kind):
    """(status, reply) of a POST, after obeying 429 and retrying what may heal as long as `deadline` allows."""
    failures = limited = 0
    while True:
        status, reply, wait = _request(
            url, max(0.1, min(TIMEOUT, deadline - time.monotonic())), body, kind
        )
        if status == 429 and limited < RATE_LIMITED:
            limited += 1
        elif (status == NO_CONNECTION or status >= 500) and failures < len(RETRY_DELAYS):
            failures, wait = failures + 1, RETRY_DELAYS[failures]
        else:
            return status, reply
        if time.monotonic() + wait >= deadline:
            return status, reply
        log.info("Discord answered %s; next try in %.1f s", status or "nothing", wait)
        time.sleep(wait)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_):
        """None: urllib would turn the POST into a GET, lose the message and call it a success."""


def _request(url, timeout, body=None, kind="text/plain"):
    """(status, reply, seconds to wait if limited) of a POST of the body, or of a GET."""
    if not re.fullmatch(r"https?://([\w.-]+|\[[\da-f:]+\])(:\d+)?/[!-~]+", url, re.ASCII):
        raise Expected(
            f"DISCORD_WEBHOOK_URL is not a web address (https://discord.com/api/webhooks/...): {COPY_IT}"
        )
    request = urllib.request.Request(url, body, {"User-Agent": USER_AGENT, "Content-Type": kind})
    try:
        try:
            reply = urllib.request.build_opener(_NoRedirect).open(request, timeout=timeout)
        except urllib.error.HTTPError as error:
            reply = error
        text = reply.read(2000).decode("utf-8", "replace")
    except TimeoutError:  # the message may have arrived, so it is not sent twice
        raise Expected("no answer in time") from None
    except (OSError, http.client.HTTPException) as error:
        return NO_CONNECTION, str(error), 0
    wait = re.search(r'"retry_after": ?(\d+\.?\d*)|$', text)[1] or reply.headers.get(
        "Retry-After", ""
    )
    return reply.status, text, float(wait) if re.fullmatch(r"[\d.]+", wait) else 1.0


def _succeed(status, body, _=None):
    """Raise Expected, with the sentence for it, where a reply is not a success."""
    known = {
        NO_CONNECTION: "no connection",
        401: f"the webhook's token is wrong; {COPY_IT}",
        404: f"the webhook is gone (404); make a new one and {COPY_IT}",
        429: "too many messages (429)",
    }
    if not 200 <= status < 300:
        raise Expected(
            known.get(status, f"the server answered {status}")
            + f": {body}" * bool(body and status != 404)
        )
