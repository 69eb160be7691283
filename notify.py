"""What people are told about a run: the terminal (live lines, one table), report.png and one Discord message.

All of it is made from the result of a run, one dict that is JSON from end to end, so that terminal, picture, message
and exit status never disagree. Nothing here may cost a trained model.
"""
import contextlib
import errno
import functools
import io
import json
import logging
import math
import os
import re
import resource
import shlex
import socket
import sys
import textwrap
import threading
import time
import unicodedata
import urllib.error
import urllib.request
import uuid
from datetime import datetime, timezone
from pathlib import Path

from db import DataError, Expected, command, redact, setting

# Exit statuses.
TRAINED, PARTIAL, WRONG_INPUT, NOTHING_TRAINED, LOCKED, TERMINATED, INTERRUPTED = 0, 1, 2, 3, 75, 143, 130

LOGGERS = "train", "models", "db", "notify"
log = logging.getLogger("notify")

# Metrics as people say them, in the order of a panel's second line; what is not here goes by its own name, and only
# where it is the primary metric.
METRICS = {"accuracy_new_artists": "new artists", "r2_new_artists": "new artists", "top3_accuracy": "top 3",
           "mae": "typical error", "baseline_mae": "guessing", "baseline_accuracy": "guessing",
           "same_genre_by_chance": "by chance", "same_artist_at_10": "same artist", "r2": "R²",
           "same_genre_at_10": "same genre"}

# Of each status: its word, sign, colour (legible on black and on white, also to colour-blind eyes), colour on Discord.
GOOD, MIXED, BAD = ("✅", "#00795A", 0x2ECC71), ("⚠️", "#A86400", 0xF1C40F), ("❌", "#C42B00", 0xE74C3C)
STATUS = {"completed": ("completed", *GOOD), "trained": ("trained", *GOOD), "partial": ("partial", *MIXED),
          "held_back": ("held back", *MIXED), "failed": ("failed", *BAD)}

PLAIN_WIDTH = 160          # columns of a table where there is no terminal to ask
LOG_EVERY = 0.25           # share of a CSV between two log lines where there is no terminal

# The picture. Okabe-Ito colours and cividis are told apart by colour-blind eyes; markers differ as well.
INCHES, ROW_INCHES, HEADER_INCHES = 16, 4.3, 1.4  # at 100 dots per inch
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#999999")
MARKERS = "os^Dvp*X"
INK, GREY = "#222222", "#707070"
RUNS_SHOWN, CONFUSIONS_SHOWN, CLUSTERS_NAMED = 30, 9, 8
FONTS = ("DejaVu Sans", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "Hiragino Sans", "Microsoft YaHei",
         "Noto Sans Devanagari", "Noto Sans Thai", "Arial Unicode MS")  # those installed
READING = re.compile("(?:HANGUL SYLLABLE|(?:HIRAGANA|KATAKANA) LETTER(?: SMALL)?) ([A-Z]+)$")  # in Unicode's names

# Discord. Its limits count UTF-16 code units; breaking one is a 400 and loses the message.
TITLE, DESCRIPTION, FIELDS, VALUE, FOOTER, EMBEDS = 256, 4096, 25, 1024, 256, 6000
USER_AGENT = "ml-training-pipeline (https://discord.com/developers/docs/resources/webhook, 1.0)"  # urllib's: 403
TIMEOUT = 10               # seconds for one request
POST_SECONDS = 30          # for a whole message, waits and retries included
STOPPED_SECONDS = 5        # the same after a stop: whoever stopped the run waits
CHECK_SECONDS = 4
RETRY_DELAYS = (1, 2)      # seconds before the retries after a 5xx or a broken connection
RATE_LIMITED = 5           # how often a 429 is waited out
NO_CONNECTION, NO_ANSWER = 0, 1  # stand where an HTTP status would
COPY_IT = 'copy it from Discord (channel settings, Integrations, Webhooks, "Copy Webhook URL") into DISCORD_WEBHOOK_URL'

# ---------------------------------------------------------------------------------------------------- words

UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]+")


def plain(text, limit=10_000):
    """One line that can be shown anywhere: no secret, no control or direction character, `limit` characters at most."""
    text = " ".join(UNPRINTABLE.sub(" ", redact(str(text))).split())
    return text if len(text) <= limit else text[:limit - 1] + "…"


def number(value):
    """A metric as people read it: three digits that matter, thousands separated."""
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        return "not known"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}" if abs(value) < 1000 else f"{value:,.0f}"


def duration(seconds):
    """41.2 -> "41.2 s", 754 -> "12 min 34 s", 4000 -> "1 h 6 min"; "" for none."""
    if not seconds or seconds < 60:
        return f"{seconds:.1f} s" if seconds else ""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def size(count):
    """Bytes as "3.1 MB"; "" for none."""
    power = min(3, int(math.log(count, 1000))) if count else 0
    return f"{count / 1000 ** power:.{1 if power else 0}f} {('B', 'kB', 'MB', 'GB')[power]}" if count else ""


def metric_and_change(model):
    """("accuracy 0.713", "+0.004") of one model of the result; "first" when nothing came before, "" when it failed."""
    if not model.get("metrics"):
        return "", ""
    name, value = next(iter(model["metrics"].items()))
    previous = model.get("previous")
    change = "first" if previous is None else "" if value is None else f"{value - previous:+.3f}"
    return f"{METRICS.get(name, plain(name))} {number(value)}", change


def reason(model):
    """"failed: ..." or "held back: ..."; "" where nothing went wrong."""
    word, error = STATUS[model["status"]][0], plain(model.get("error") or "")
    return error and f"{word}: {error.removeprefix(f'{word}: ')}"


def table_row(name, model):
    """A model as a row of a table: {"model", "status", "metric", "change", "time", "size"}, all text."""
    metric, change = metric_and_change(model)
    return {"model": plain(name, 20), "status": STATUS[model["status"]][0], "metric": metric, "change": change,
            "time": duration(model.get("seconds")), "size": size(model.get("bytes"))}


def facts(result):
    """["89,740 songs of spotify_songs", "41.2 s in all", ...]: what there is to say besides the models."""
    songs = f"{result['rows']:,} {'made-up ' * bool(result['demo'])}songs of" if result["rows"] else "table"
    said = {"table": lambda table: f"{songs} {plain(table, 80)}", "read_seconds": lambda s: f"{duration(s)} to read",
            "seconds": lambda s: f"{duration(s)} in all", "peak_mb": lambda mb: f"peak memory {mb:,.0f} MB",
            "host": lambda host: f"on {plain(host, 80)}"}
    return [say(result[key]) for key, say in said.items() if result[key]]


def warnings(result):
    """The most important first: that the run was ended and started again, then what the models' data say."""
    return result["deaths"] + result["warnings"]


def notes(result):
    """What there is to say below the models: the error if the message has it not, warnings, the CSV's rows."""
    error, csv = plain(result["error"] or ""), result["csv"]
    said = [error] * (error not in plain(result["message"])) + [f"warning: {plain(w)}" for w in warnings(result)]
    if csv:
        reasons = "; ".join(f"{plain(reason, 80)}: {count:,}" for reason, count in csv["rejected"].items())
        said.append(f"CSV: {csv['read']:,} rows read, {csv['loaded']:,} songs loaded, {csv['repeated']:,} repeated, "
                    f"{sum(csv['rejected'].values()):,} rejected" + f" ({reasons})" * bool(reasons))
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
        return redact(f"there is no space left for {error.filename or 'a file'}; make room on that disk and run it again")
    if isinstance(error, MemoryError):
        return ("there is not enough memory; raise the limit (ulimit -v, the container's), train fewer models at a time "
                "(--only), or name a view with a sample of the songs as --table-name")
    return redact(str(error) if isinstance(error, SAY_IT_ALL) else f"{type(error).__name__}: {error}")


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
    for name in (*LOGGERS, *logging.root.manager.loggerDict):
        if name in LOGGERS:
            logging.getLogger(name).setLevel(logging.INFO)
        if name in LOGGERS or name.startswith("prefect"):
            logging.getLogger(name).addFilter(_without_secrets)


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
    options = {"table_name": "spotify_songs", "n_clusters": 2, "demo": None, "dask": None, "predict_into": None}
    for name, default in options.items():
        value = parameters.get(name, default)
        words += [f"--{name.replace('_', '-')}", value] * (value != default)
    words += ["--models-dir", folder] * bool(parameters["models_dir"]) + ["--force"] * parameters["force"]
    words += ["--no-notify"] * (not parameters["enable_notifications"])
    return {"status": "failed", "exit_status": None, "message": "", "error": None,
            "started_at": datetime.now(timezone.utc).isoformat(), "clock": time.monotonic(), "seconds": 0.0,
            "read_seconds": None, "peak_mb": None, "host": socket.gethostname(), "table": parameters["table_name"],
            "rows": None, "models_dir": str(folder), "demo": parameters["demo"], "warnings": [], "csv": None,
            "asked": list(asked), "models": {}, "command": command("train.py", *words), "finish_command": None,
            "notify": parameters["enable_notifications"], "parameters": parameters, "flow_run_id": None,
            "training": None, "deaths": []}


def entry(report, folder):
    """What the result says of a model that has a metrics file."""
    keys = "status", "error", "metrics", "plot", "previous", "bytes", "rows", "seconds"
    path = Path(folder) / f"{report['model']}.joblib"
    return {key: report[key] for key in keys} | {
        "path": str(path) if report["status"] == "trained" else None, "heals": False}


def failed_entry(error):
    """What the result says of a model that there is none of."""
    return {"status": "failed", "error": explain(error), "metrics": {}, "plot": {}, "previous": None, "bytes": None,
            "rows": None, "seconds": None, "path": None, "heals": _heals(error)}


def _heals(error):
    """Whether trying again may help: the same input brings these back."""
    return not isinstance(error, (ValueError, TypeError, KeyError))


def peak_mb(so_far=0):
    """The largest memory of this process and of those it waited for, in MB."""
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return max(so_far or 0, peak // (1024 if sys.platform == "linux" else 1024 ** 2))


def decide(result, error=None):
    """What the run was: status, exit status, message, and the command that finishes it where one can help."""
    if result["exit_status"] is not None:
        return
    asked, models = result["asked"], result["models"]
    named = {status: [name for name in asked if name in models and models[name]["status"] == status]
             for status in ("trained", "held_back", "failed")}
    if error:
        result["error"] = explain(error)
    if not models or len(named["failed"]) == len(models):
        result |= {"status": "failed", "exit_status": WRONG_INPUT if isinstance(error, DataError) else NOTHING_TRAINED}
    elif error or len(named["trained"]) < len(asked):
        result |= {"status": "partial", "exit_status": PARTIAL}
    else:
        result |= {"status": "completed", "exit_status": TRAINED}
    if isinstance(error, Stopped):
        result["exit_status"] = error.code
    said = [f"{status.replace('_', ' ')}: {', '.join(named[status])}" for status in ("held_back", "failed") if named[status]]
    said = [f"{len(named['trained'])} of {len(asked)} models trained", *said, *[result["error"]] * bool(error)]
    result["message"] = "; ".join(said) if models else f"Nothing was trained: {result['error'] or 'no reason was given'}"
    if (not error or _heals(error)) and any(name not in models or models[name]["heals"] for name in asked):
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
    stopped, picture = result["exit_status"] in (TERMINATED, INTERRUPTED), Path(result["models_dir"]) / "report.png"
    trouble = stopped or not result["models"]
    if not trouble:
        _, trouble = attempt(draw_report, result, history, picture)
        if trouble:
            result["warnings"].append(f"the picture could not be made: {explain(trouble)}")
    if result["notify"] and webhook_url():
        seconds = STOPPED_SECONDS if stopped else POST_SECONDS
        post_discord(result, webhook_url(), None if trouble else picture, seconds)


# ------------------------------------------------------------------------------------------------- terminal

def print_summary(result, file=None):
    """Print the table of a run and what there is to say below it."""
    models = result["models"]
    colours, rows = {name: STATUS[model["status"]][2] for name, model in models.items()}, []
    for name, model in models.items():
        _, status, *others = table_row(name, model).values()
        rows.append([(name, "bold"), (status, colours[name]), *others])
    lines = [(result["message"], f"bold {STATUS[result['status']][2]}")]
    lines += [(f"{name} {reason(model)}", colours[name]) for name, model in models.items() if model.get("error")]
    lines += [(note, MIXED[1] if note.startswith("warning") else "") for note in notes(result)]
    lines += [", ".join(facts(result))] * bool(facts(result))
    lines += [f"models in {result['models_dir']}"] if any(model.get("path") for model in models.values()) else []
    if result["finish_command"]:
        lines.append((f"to finish the job: {result['finish_command']}", "bold"))
    print_table(("model", "status", "metric", "change>", "time>", "size>"), rows, below=lines, file=file)


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
    tty, encoding = file.isatty(), getattr(file, "encoding", None) or "utf-8"
    lines = tty and "utf" in encoding.lower()
    out = Console(file=io.StringIO(), width=Console(file=file).width if tty else PLAIN_WIDTH, force_terminal=tty,
                  markup=False, emoji=False, highlight=False)
    table = Table(box=box.SIMPLE_HEAD if lines else None, pad_edge=False, padding=(0, 1 if lines else 2, 0, 0))
    for column in columns:
        table.add_column(column.rstrip(">"), justify="right" if column.endswith(">") else "left", overflow="fold",
                         no_wrap=column not in ("title", "artist"))
    for row in rows:
        table.add_row(*map(text, row))
    for part in (*map(text, above), *[table] * bool(rows), *map(text, below)):
        out.print(part, soft_wrap=part is not table)
    printed = "\n".join(line.rstrip() for line in out.file.getvalue().splitlines())
    file.write(printed.encode(encoding, "backslashreplace").decode(encoding) + "\n")
    file.flush()


def _log_handler():
    """The handler whose rich console writes the log to a terminal, as Prefect's does: what is live goes below it."""
    consoles = [handler for handler in logging.getLogger().handlers if hasattr(handler, "console")]
    return next((handler for handler in consoles if handler.console.file.isatty()
                 and not handler.console.is_dumb_terminal and "utf" in handler.console.encoding), None)


@contextlib.contextmanager
def live_status(models):
    """A line per model below the log on a terminal while the block runs; nothing elsewhere. Fed by log records."""
    handler = _log_handler()
    if not handler:
        yield
        return
    from rich.live import Live
    status = LiveStatus(models)
    handler.addFilter(status)
    try:
        with Live(status, console=handler.console, transient=True):
            yield
    finally:
        handler.removeFilter(status)


class LiveStatus(logging.Filter):
    """Takes records logged with extra={"model": "genre", "phase": "fitting"} and shows the last one of each model.

    The line has the message without its "genre: ". Up to level INFO such a record goes no further; a warning (a retry
    and its reason) is in the log as well.
    """
    SIGNS = {"waiting": ("·", ""), "done": ("✓", GOOD[1]), "held_back": ("!", MIXED[1]), "failed": ("✗", BAD[1]),
             "retrying": ("↻", MIXED[1])}

    def __init__(self, models):
        super().__init__()
        self.begun, self.lines = time.monotonic(), {name: ("waiting", "waiting", None) for name in models}

    def filter(self, record):
        name, phase = getattr(record, "model", None), getattr(record, "phase", "")
        if name in self.lines:
            ended = time.monotonic() if phase in ("done", "failed", "held_back") else None
            self.lines[name] = phase, plain(record.getMessage()).removeprefix(f"{name}: "), ended
        return record.levelno >= logging.WARNING or name not in self.lines

    def __rich__(self):
        from rich.text import Text
        lines, width = [], max(map(len, self.lines))
        for name, (phase, text, ended) in self.lines.items():
            sign, style = self.SIGNS.get(phase, ("▶", PALETTE[0]))
            clock = f" {name:<{width}}{(ended or time.monotonic()) - self.begun:4.0f} s  "
            lines.append(Text.assemble((sign, style), clock, (text, style)))
        return Text("\n", no_wrap=True, overflow="ellipsis").join(lines)


@contextlib.contextmanager
def load_progress():
    """Gives progress(done_bytes, total_bytes): a bar below the log on a terminal, a log line per quarter elsewhere."""
    handler = _log_handler()
    if not handler:
        logged = [0]

        def progress(done, total):
            if total and done / total >= logged[0] + LOG_EVERY:
                logged[0] = done / total // LOG_EVERY * LOG_EVERY
                log.info("loading the CSV: %.0f %% of %s", 100 * logged[0], size(total))
        yield progress
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.theme import Theme
    columns = TextColumn("loading the CSV"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with handler.console.use_theme(Theme()), Progress(*columns, console=handler.console, transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total or None)


# -------------------------------------------------------------------------------------------------- picture

def draw_report(result, history, path):
    """Write the picture of a run, a PNG 1600 pixels wide, to `path`; the old one stays until the new is whole.

    `history`: the lines of history.jsonl as dicts, oldest first. Raises OSError when `path` cannot be written.
    """
    import matplotlib
    import numpy
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image
    families, _ = _fonts()
    temporary = Path(path).with_name(f".{Path(path).name}.tmp")
    with matplotlib.rc_context({"font.family": families, "text.parse_math": False, "text.color": INK}):
        canvas = FigureCanvasAgg(report_figure(result, history))
        canvas.draw()
    image = Image.fromarray(numpy.asarray(canvas.buffer_rgba())).convert("RGB")
    image = image.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)  # a third of the size
    try:
        image.save(temporary, format="PNG", optimize=True)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def report_figure(result, history):
    """The matplotlib Figure behind draw_report: a headline, a panel per model of this run, the metric history."""
    from matplotlib.figure import Figure  # without pyplot: no global state, so any thread may draw
    models, warned = result["models"], warnings(result)
    columns = 3 if len(models) > 3 else 2
    rows = len(models) // columns + 1
    height = HEADER_INCHES + ROW_INCHES * rows + 1.5 * (rows == 1)
    figure = Figure(figsize=(INCHES, height), facecolor="white")
    grid = figure.add_gridspec(rows, columns, left=0.068, right=0.92, bottom=0.6 / height, hspace=0.5,
                               top=1 - (HEADER_INCHES + 0.75) / height, wspace=0.28 if columns == 3 else 0.2)
    for place, (name, model) in enumerate(models.items()):
        _draw_model(figure.add_subplot(grid[place // columns, place % columns]), name, model)
    _draw_history(figure.add_subplot(grid[-1, len(models) % columns:]), result, history)
    when = f"{datetime.fromisoformat(result['started_at']).astimezone(timezone.utc):%Y-%m-%d %H:%M} UTC"
    more = f" (and {len(warned) - 1} more)" if len(warned) > 1 else ""
    write = functools.partial(_write, figure, 0.015)
    write(1 - 0.62 / height, result["message"], 80, size=25, weight="bold", color=STATUS[result["status"]][2])
    write(1 - 0.95 / height, " · ".join([when, *facts(result)]), 145, size=14)
    if warned:
        write(1 - 1.25 / height, f"warning: {plain(warned[0], 110)}{more}", 150, size=13.5, color=MIXED[1])
    return figure


@functools.cache
def _fonts():
    """(the families of FONTS that are installed, the code points they can draw)."""
    from matplotlib import font_manager
    manager = font_manager.fontManager
    for path in set(font_manager.findSystemFonts()) - {font.fname for font in manager.ttflist}:
        with contextlib.suppress(Exception):  # installed since matplotlib made its list; some it cannot read
            manager.addfont(path)
    there = {font.name for font in manager.ttflist if os.path.exists(font.fname)}
    families = [name for name in FONTS if name in there]
    faces = [font_manager.get_font(manager.findfont(family)) for family in families]
    return families, set().union(*(face.get_charmap() for face in faces))


def _drawable(text, width=1000, tail=0):
    """`text` in `width` columns, cut before its last `tail` characters, of characters that some font has.

    Of the others, kana and Hangul are spelt in Latin letters and the rest becomes "…": no empty boxes, no warnings.
    """
    from rich.cells import cell_len
    _, known = _fonts()
    text = unicodedata.normalize("NFC", plain(text))
    for c in {c for c in text if ord(c) not in known}:
        read = READING.match(unicodedata.name(c, ""))
        gone = unicodedata.category(c) in ("Cf", "Mn")  # joiners and marks upon a letter
        text = text.replace(c, "" if gone else read[1].lower() if read else "…")
    text = re.sub("…+", "…", text)
    head, end = text[:len(text) - tail], text[len(text) - tail:]
    if cell_len(text) <= width:
        return text
    while cell_len(head + end) >= width:
        head = head[:-1]
    return f"{head.rstrip()}…{end.lstrip()}"


def _labels(names, width):
    """{name: it in `width` columns}, cut at the end, or before it where names begin alike."""
    cut = {name: _drawable(name, width) for name in names}
    return {name: short if list(cut.values()).count(short) == 1 else _drawable(name, width, width // 3)
            for name, short in cut.items()}


def _write(place, x, y, text, width=1000, lines=1, **style):
    """Text at x, y (shares of the axes unless `transform` says otherwise), wrapped to `lines` lines of `width`."""
    wrapped = textwrap.wrap(_drawable(text), width, max_lines=lines, placeholder=" …")
    style = {"va": "bottom"} | ({"transform": place.transAxes} if hasattr(place, "transAxes") else {}) | style
    return place.text(x, y, "\n".join(wrapped), **style)


def _say(axes, text, color=GREY):
    """A panel that has words instead of a drawing."""
    axes.set_axis_off()
    _write(axes, 0, 0.98, text, 40, 10, size=14, va="top", color=color)


def _draw_model(axes, name, model):
    """One panel: a headline with metric and change, a line of further figures, the drawing."""
    (metric, change), status, metrics = metric_and_change(model), model["status"], model["metrics"]
    words, color = metric + f" ({change})" * bool(change), INK
    if status != "trained":
        words, color = STATUS[status][0] + f" at {metric}" * bool(metric), STATUS[status][2]
    _write(axes, 0, 1.12, f"{plain(name, 20)}: {words}", 60, size=15, weight="bold", color=color)
    if status == "failed":
        return _say(axes, model["error"] or "no reason was given", color)
    detail = ", ".join(f"{METRICS[key]} {number(metrics[key])}" for key in METRICS if key in list(metrics)[1:])
    _write(axes, 0, 1.015, reason(model) or detail, 62, 2, size=10.5, color=GREY, linespacing=1)
    draw = {"matrix": _draw_matrix, "confusions": _draw_confusions, "points": _draw_clusters,
            "density": _draw_density, "same_genre_at": _draw_similar}
    for key, function in draw.items():
        if model["plot"].get(key):
            return function(axes, model["plot"])
    _say(axes, "nothing to draw")


def _draw_matrix(axes, plot):
    """Few genres: the confusion matrix, shares of the actual genre."""
    rows, names = plot["matrix"]["rows"], plot["matrix"]["labels"]
    few, points = len(rows) < 4, 15 if len(rows) < 6 else 10 if len(rows) < 9 else 8
    labels = list(map(_labels(names, 9).get, names))
    axes.imshow(rows, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    for y, row in enumerate(rows):
        for x, share in enumerate(row):
            axes.text(x, y, f"{share:.0%}" if len(rows) < 6 else f"{100 * share:.0f}", ha="center", va="center",
                      color="white" if share < 0.55 else "black", size=points)
    axes.set_xticks(range(len(rows)), labels, **{} if few else dict(rotation=30, ha="right", rotation_mode="anchor"))
    axes.set_yticks(range(len(rows)), labels)
    _finish(axes, "predicted", "actual", 11 if few else 8.5)


def _draw_confusions(axes, plot):
    """Many genres: which are most often taken for which, as bars with their names on them."""
    shown = plot["confusions"][:CONFUSIONS_SHOWN]
    shares, labels = [share for *_, share in shown], _labels([name for row in shown for name in row[:2]], 14)
    axes.barh(range(len(shown)), shares, color="#A9CCE3", height=0.82)
    style = {"transform": axes.get_yaxis_transform(), "va": "center", "size": 11}
    for row, (actual, predicted, count, share) in enumerate(shown):
        _write(axes, 0.012, row, f"{labels[actual]} → {labels[predicted]}", **style)
        _write(axes, 0.99, row, f"{share:.0%} ({count:,})", ha="right", color=GREY, **style)
    axes.set(xlim=(0, max(0.01, *shares, 0) * 1.35), ylim=(CONFUSIONS_SHOWN - 0.5, -0.5), yticks=[], xticks=[])
    axes.spines[:].set_visible(False)
    _finish(axes, "actual → predicted, share of the actual (songs)", "")


def _draw_clusters(axes, plot):
    """The songs on their first two principal components, coloured and numbered by cluster, as in predictions."""
    sizes, halo = plot["sizes"], {"fc": "white", "alpha": 0.85, "ec": "none", "boxstyle": "circle,pad=0.2"}
    named = min(len(sizes), CLUSTERS_NAMED)
    columns = 1 if named <= 4 else 2
    for i, label in enumerate(plot["labels"]):
        x, y = ([point[axis] for point in plot["points"] if point[2] == i] for axis in (0, 1))
        name = f"{_drawable(f'{i} {label}', 42 // columns)} {sizes[i] / max(1, sum(sizes)):.0%}"
        axes.scatter(x, y, s=9, alpha=0.6, linewidths=0, color=PALETTE[i % len(PALETTE)],
                     marker=MARKERS[i % len(MARKERS)], label=name if i < named else None)
        if x:
            axes.text(sorted(x)[len(x) // 2], sorted(y)[len(y) // 2], i, ha="center", va="center", size=14,
                      weight="bold", bbox=halo)
    low, high = axes.get_ylim()
    axes.set(xticks=[], yticks=[], ylim=(low - (high - low) * 0.1 * math.ceil(named / columns), high))
    _finish(axes, "first principal component", "second")
    axes.legend(loc="lower left", ncols=columns, frameon=False, borderaxespad=0.1, markerscale=2.5, handletextpad=0.1,
                columnspacing=0.4, handlelength=1.2, fontsize=9.5 if columns == 2 else 11)


def _draw_density(axes, plot):
    """Predicted against actual: how many songs, on a logarithmic colour scale; the dashed line is a right guess."""
    from matplotlib.colors import LogNorm
    low, high, _ = plot["edges"]
    counts = [[count or math.nan for count in row] for row in plot["density"]]
    most = max(2, *(max(row) for row in plot["density"]))
    image = axes.imshow(counts, origin="lower", extent=(low, high) * 2, cmap="cividis", aspect="auto",
                        norm=LogNorm(1, most))
    axes.plot([low, high], [low, high], color=PALETTE[3], linestyle="--", linewidth=2)
    bar = axes.figure.colorbar(image, ax=axes, pad=0.02, aspect=30, format="{x:,.0f}")
    bar.set_ticks(sorted({1, round(math.sqrt(most)), most}), minor=False)
    bar.minorticks_off()
    bar.ax.get_yticklabels()[-1].set_va("top")
    bar.set_label("songs", color=GREY, size=11)
    bar.outline.set_visible(False)
    _finish(axes, "predicted", "actual")


def _draw_similar(axes, plot):
    """How many of the neighbours at each rank share the song's genre, against chance."""
    shares, chance = [share for share in plot["same_genre_at"] if share is not None], plot["by_chance"]
    axes.plot(range(1, len(shares) + 1), shares, color=PALETTE[0], marker="o", linewidth=2.5, markersize=8)
    axes.axhline(chance, color=PALETTE[3], linestyle="--", linewidth=2)
    axes.text(len(shares), chance, f"by chance {chance:.1%}", ha="right", va="bottom", size=13, color=PALETTE[3])
    axes.set(ylim=(0, min(1.05, max(chance, *shares, 0) * 1.25 + 0.01)), xticks=range(1, len(shares) + 1))
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    _finish(axes, "rank of the neighbour", "of the song's own genre", grid=True)


def _finish(axes, x, y, size=11, grid=False):
    axes.set_xlabel(x, color=GREY, size=12)
    axes.set_ylabel(y, color=GREY, size=12)
    axes.tick_params(labelsize=size, colors=INK)
    if grid:
        axes.grid(axis="y", color="#DDDDDD")
        axes.spines[["top", "right"]].set_visible(False)


def _draw_history(axes, result, history):
    """The primary metric of every model over the last runs; a line breaks where a run failed or was held back."""
    points = {(row["run"], row["model"]): (row["status"], row.get("value")) for row in history}
    for name, model in result["models"].items():
        points[result["started_at"], name] = (model["status"], next(iter(model["metrics"].values()), None))
    runs = sorted({run for run, _ in points})[-RUNS_SHOWN:]
    names, label_at = list(dict.fromkeys(name for _, name in points)), {}
    for i, name in enumerate(names):
        style = {"color": PALETTE[i % len(PALETTE)], "marker": MARKERS[i % len(MARKERS)], "clip_on": False}
        mine = [(at, *points[run, name]) for at, run in enumerate(runs) if (run, name) in points]
        good = [value if status == "trained" and value is not None else math.nan for _, status, value in mine]
        known = [value for value in good if value == value]
        if not known:
            continue
        axes.plot([at for at, *_ in mine], good, linewidth=2, markersize=6, **style)
        before, label_at[name] = known[0], known[-1]
        for (at, *_), value in zip(mine, good):
            before = value if value == value else before  # a cross stands at the height of the last good value
            if value != value:
                axes.plot(at, before, **style | {"marker": "x"}, markersize=10, markeredgewidth=2.5)
    _write(axes, 0, 1.12, f"last {len(runs)} runs" if len(runs) > 1 else "first run", size=15, weight="bold")
    if not label_at:
        return _say(axes, "no run has trained a model yet")
    if any(status != "trained" for (run, _), (status, _) in points.items() if run in runs):
        _write(axes, 1, 1.02, "× failed or held back", size=10.5, color=GREY, ha="right")
    (low, high), at = axes.get_ylim(), -math.inf
    for name in sorted(label_at, key=label_at.get):
        at = max(label_at[name], at + (high - low) / 12)  # moved up where it would lie on the one below
        _write(axes, 1.01, at, plain(name, 14), transform=axes.get_yaxis_transform(), va="center", size=13,
               weight="bold", color=PALETTE[names.index(name) % len(PALETTE)])
    ticks = sorted({round(k * (len(runs) - 1) / 4) for k in range(5)})
    part = slice(5, 10) if runs[0][:10] != runs[-1][:10] else slice(11, 16)  # the day, or the time of the day
    axes.set_xticks(ticks, [runs[at][part] for at in ticks])
    axes.set_xlim(-0.5, max(len(runs) - 0.5, 0.5))
    _finish(axes, "", "", grid=True)


# -------------------------------------------------------------------------------------------------- Discord

def webhook_url():
    """DISCORD_WEBHOOK_URL from the environment, else from .env; None when unset or empty: nothing is posted then."""
    return setting("DISCORD_WEBHOOK_URL").strip() or None


def units(text):
    """How long Discord finds `text`."""
    return len(text.encode("utf-16-le")) // 2


def fit(text, limit):
    """`text` cut to `limit` UTF-16 code units, with an ellipsis, never within a character or an escape."""
    if units(text) <= limit:
        return text
    cut = text.encode("utf-16-le")[:2 * max(0, limit - 1)].decode("utf-16-le", "ignore")
    return cut.rstrip("\\") + "…" if limit > 0 else ""


def escape(text):
    """`text` as Discord shows it literally: no markdown, no mention, no link."""
    text = re.sub(r"([\\*_~`|\[\]<])", r"\\\1", plain(text)).replace("@", "@\u200b").replace("://", ":\u200b//")
    return re.sub(r"^([#>+-]|\d+(?=\.))", "\u200b\\1", text)


def discord_payload(result):
    """The JSON of the message: one embed, green, yellow or red, a field per model, within all limits of Discord."""
    models, status = result["models"], result["status"]
    status = "partial" if status == "completed" and warnings(result) else status
    title = fit(f"{STATUS[status][1]} {escape(result['message'])}", TITLE)
    footer = fit(", ".join(facts(result)).replace("@", "@\u200b"), FOOTER)
    room = min(VALUE, (EMBEDS - 2 * TITLE - FOOTER) // min(FIELDS, len(models) or 1) - 80)  # the description needs some
    fields = [{"name": fit(f"{STATUS[model['status']][1]} {escape(name)}", 64), "value": fit(_field(model), room),
               "inline": model["status"] == "trained"} for name, model in list(models.items())[:FIELDS]]
    lines = [escape(note) for note in notes(result)]
    if result["finish_command"]:
        command = plain(result["finish_command"]).replace("`", "'").replace("@", "@\u200b")
        lines.append(f"to finish the job: `{command}`")
    used = units(title + footer) + sum(units(field["name"] + field["value"]) for field in fields)
    embed = {"title": title, "color": STATUS[status][3], "fields": fields, "footer": {"text": footer},
             "description": fit("\n".join(lines), min(DESCRIPTION, EMBEDS - used)), "timestamp": result["started_at"]}
    return {"embeds": [embed], "allowed_mentions": {"parse": []}}


def _field(model):
    """Metric, change and seconds of a model, or what went wrong; never empty, which Discord refuses."""
    metric, change = metric_and_change(model)
    said = escape(metric) + f" ({change})" * bool(change), escape(reason(model)), duration(model.get("seconds"))
    return "\n".join(filter(None, said)) or "no reason was given"


def post_discord(result, url, picture=None, seconds=POST_SECONDS):
    """Post one message about the run, with `picture` (path of a PNG) if given; True when Discord took it.

    Never raises and never takes longer than `seconds`, whatever the network does: a message must not cost a model.
    """
    trouble = _malformed(url) or _within(
        seconds, lambda: _post(result, url, picture, time.monotonic() + seconds), f"no answer within {seconds:.0f} s")
    if trouble:
        log.warning("Discord was not told: %s", _scrub(trouble, url))
    return not trouble


def check_webhook(url):
    """(fine, sentence) after a GET of the webhook, which posts nothing."""
    if not url:
        return True, "DISCORD_WEBHOOK_URL is not set: nothing is posted"
    if _malformed(url):
        return False, _malformed(url)
    status, body, _ = _within(CHECK_SECONDS, lambda: _request(url, None, {}, CHECK_SECONDS), (NO_ANSWER, "", None))
    return (True, "the Discord webhook answers") if status == 200 else (False, _scrub(_reason(status, body), url))


def check_discord(enabled):
    """The lines of --check: (what, "ok" or "problem", sentence)."""
    fine, sentence = check_webhook(webhook_url()) if enabled else (True, "--no-notify: nothing is posted")
    return [("Discord", "ok" if fine else "problem", sentence)]


def _within(seconds, function, otherwise):
    """What `function` returns, or `otherwise` when it takes longer: looking up a name knows no timeout of its own."""
    answer = []
    thread = threading.Thread(target=lambda: answer.append(function()), daemon=True, name="discord")
    thread.start()
    thread.join(seconds)
    return answer[0] if answer else otherwise


def _malformed(url):
    """Why `url` cannot be a webhook, else None; the url may hold the secret and is not quoted."""
    if not re.fullmatch(r"https?://([\w.-]+|\[[\da-f:]+\])(:\d+)?/[!-~]+", url, re.ASCII):
        return f"DISCORD_WEBHOOK_URL is not a web address (https://discord.com/api/webhooks/...): {COPY_IT}"


def _scrub(text, url):
    """`text` without the webhook's secret, wherever it stands."""
    text = plain(text, 600)
    for secret in [url, *(part for part in re.split(r"[/?&=]", url)[3:] if len(part) > 8 and part != "webhooks")]:
        text = text.replace(secret, "***")
    return text


def _post(result, url, picture, deadline):
    """None when Discord took the message, else why not, whatever it was."""
    image = None
    try:
        image = Path(picture).read_bytes() if picture else None
    except OSError as error:
        log.warning("the Discord message goes without the picture: %s", plain(error))
    try:
        payload = discord_payload(result)
        status, body = _send(url, *_encode(payload, image), deadline)
        if image and status in (400, 413):
            log.warning("Discord refused the picture (%d), trying without: %s", status, _scrub(body, url))
            status, body = _send(url, *_encode(payload, None), deadline)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None if 200 <= status < 300 else _reason(status, body)


def _encode(payload, image):
    """(body, headers): JSON alone, or multipart with the picture, to which the embed refers."""
    if not image:
        return json.dumps(payload).encode(), {"Content-Type": "application/json"}
    embeds = [payload["embeds"][0] | {"image": {"url": "attachment://report.png"}}]
    boundary, part = uuid.uuid4().hex, "Content-Disposition: form-data; name="
    text = (f'--{boundary}\r\n{part}"payload_json"\r\nContent-Type: application/json\r\n\r\n'
            f'{json.dumps(payload | {"embeds": embeds})}\r\n'
            f'--{boundary}\r\n{part}"files[0]"; filename="report.png"\r\nContent-Type: image/png\r\n\r\n')
    return (text.encode() + image + f"\r\n--{boundary}--\r\n".encode(),
            {"Content-Type": f"multipart/form-data; boundary={boundary}"})


def _send(url, data, headers, deadline):
    """(status, body) of a POST, after obeying 429 and retrying what may heal as long as `deadline` allows."""
    failures = limited = 0
    while True:
        remaining = deadline - time.monotonic()
        status, body, wait = _request(url, data, headers, max(0.1, min(TIMEOUT, remaining)))
        if status == 429 and limited < RATE_LIMITED:
            limited += 1
        elif (status == NO_CONNECTION or status >= 500) and failures < len(RETRY_DELAYS):
            failures, wait = failures + 1, RETRY_DELAYS[failures]
        else:
            return status, body
        if time.monotonic() + wait >= deadline:
            return status, body
        log.info("Discord: %s; next try in %.1f s", _scrub(_reason(status, body), url), wait)
        time.sleep(wait)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_):
        """None: urllib would turn the POST into a GET, lose the message and call it a success."""


def _request(url, data, headers, timeout):
    """(status, first 2,000 characters of the body, seconds to wait if limited); no exception for what networks do."""
    request = urllib.request.Request(url, data, {"User-Agent": USER_AGENT} | headers)
    try:
        try:
            reply = urllib.request.build_opener(_NoRedirect).open(request, timeout=timeout)
        except urllib.error.HTTPError as error:
            reply = error
        with reply:
            body = reply.read(2000).decode("utf-8", "replace")
    except TimeoutError:  # after sending: the message may have arrived, so it is not sent twice
        return NO_ANSWER, f"no answer within {timeout:.0f} s", None
    except OSError as error:
        return NO_CONNECTION, str(getattr(error, "reason", error)), None
    found = (re.search(r'"retry_after":\s*(\d+\.?\d*)', body)
             or re.match(r"(\d+\.?\d*)$", reply.headers.get("Retry-After") or ""))
    return reply.status, body, max(0.2, float(found[1])) if found else 1.0


def _reason(status, body):
    """The sentence for a reply that is not a success."""
    known = {NO_CONNECTION: "no connection", NO_ANSWER: "no answer in time",
             401: f"the webhook's token is wrong; {COPY_IT}",
             404: f"the webhook is gone (404); make a new one and {COPY_IT}", 429: "too many messages (429)"}
    return known.get(status, f"the server answered {status}") + (f": {body}" if body and status != 404 else "")
