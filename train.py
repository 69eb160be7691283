"""Train the five song models from a PostgreSQL table, every night, unattended.

    python train.py                                   # train all five from DATABASE_URL
    python train.py --only similar                    # one model; repeat or comma-separate for more
    python train.py --csv-path songs.csv --table-name spotify_songs --truncate --n-clusters 2
    python train.py --demo 50000                      # made-up songs, embedded database, no set-up at all
    python train.py --check                           # look at everything, train nothing
    python train.py --failed                          # only the models that the last run still owes
    python train.py --serve --cron "0 3 * * *"        # a Prefect deployment (needs a Prefect server)
    python -m train                                   # the same as python train.py

From Python, as the Prefect flow it is:

    from train import ml_training_pipeline
    result = ml_training_pipeline(table_name="spotify_songs", only=["genre"])

The file reads from top to bottom: settings, what happens before the heavy imports, the retry rules, the tasks, the
flow, the command line.
"""
import argparse
import asyncio
import atexit
import ctypes
import errno
import hashlib
import importlib.util
import logging
import math
import os
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from datetime import datetime, timezone
from functools import partial, wraps
from pathlib import Path
from typing import Annotated

import db
import models
import notify
from db import DatabaseUnavailable, DataError
from models import Locked, one_run_at_a_time

NAME = "ml-training-pipeline"
ROOT = Path(__file__).resolve().parent
DEMO_DIR = ROOT / "demo" / "models"

# What can heal is tried again: a training after 2, 4 and 8 s, the database twice after 30 s.
TRAINING_RETRIES, TRAINING_DELAYS, JITTER = 3, [2, 4, 8], 0.5
DATABASE_RETRIES = 2
DATABASE_DELAY = float(os.environ.get("DATABASE_RETRY_SECONDS", 30))

SERVER_START_SECONDS = 120  # a first start makes Prefect's database, which takes 15 s and more on a small machine
SERVER_END_SECONDS = 2      # for Prefect's server to write its last lines; one that is still starting takes no notice
LAST_WORDS_SECONDS = 8      # from a signal to the end of the process, whatever is still computing
STOPPED_POST_SECONDS = 5    # of them for Discord
DASK_SECONDS = 30           # for a Dask cluster to answer and to have a worker
CHECK_SECONDS = 4           # for all that --check looks at, side by side
SPACE_NEEDED = 100 << 20    # bytes free for a night: five models, their versions and a picture
# Bytes of memory a song takes, measured (README): while it is read, and on top of that while a model is fitted.
SONG_BYTES = 450
FIT_BYTES = {"genre": 850, "clusters": 350, "energy": 600, "popularity": 1000, "similar": 350}
START_BYTES = 1200 << 20    # address space (ulimit -v), before a song is read
FIT_BASE = 100 << 20        # what a fit takes besides; without 33 MB for a buffer of its own OpenBLAS waits for ever

# Exit statuses.
TRAINED, PARTIAL, WRONG_INPUT, NOTHING_TRAINED, LOCKED, TERMINATED, INTERRUPTED = 0, 1, 2, 3, 75, 143, 130

# Prefect as a nightly job needs it: patient, silent towards third parties, our loggers in its task logs; OpenMP as
# neighbours need it. Only defaults: what stands in the environment wins.
OUR_LOGGERS = ("train", "models", "db", "notify")
for setting, value in {
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": str(SERVER_START_SECONDS),
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "OMP_WAIT_POLICY": "passive",  # OpenMP's threads spin while they wait, off the cores that another run computes on
    "PREFECT_LOGGING_EXTRA_LOGGERS": ",".join(OUR_LOGGERS),
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
    "PREFECT_LOGGING_FORMATTERS_STANDARD_DATEFMT": "%Y-%m-%d %H:%M:%S",
}.items():
    os.environ.setdefault(setting, value)

log = logging.getLogger("train")


# ---------------------------------------------------------------------------------------------------------------------
# What a run says about itself: one description for the terminal, the picture, Discord, Prefect and the exit status
# ---------------------------------------------------------------------------------------------------------------------

class Stopped(SystemExit):
    """SIGTERM or Ctrl-C."""

    def __str__(self):
        return f"the run was stopped by {'Ctrl-C' if self.code == INTERRUPTED else 'SIGTERM'}"


class PipelineFailed(Exception):
    """Nothing could be trained. `result` is the description of the run."""

    def __init__(self, result: dict):
        super().__init__(result["message"])
        self.result = result


def attempt(step, *arguments):
    """Run a step whose failure must not stop the next one; return (what it returned, None) or (None, the error)."""
    try:
        return step(*arguments), None
    except Exception as error:
        if not isinstance(error, EXPECTED):
            log.error("%s failed", getattr(step, "__name__", "step"), exc_info=error)
        return None, error


class OutOfMemory(DataError):
    """The songs do not fit in the memory that is left."""


# Their text says it all.
EXPECTED = (DataError, DatabaseUnavailable, models.ModelError, Locked, PipelineFailed, Stopped, OSError, MemoryError)


def secure_logs() -> None:
    """Let our log lines through, and no secret in them."""
    for name in OUR_LOGGERS:
        logging.getLogger(name).setLevel(logging.INFO)
    for name in (*OUR_LOGGERS, "prefect.flow_runs", "prefect.task_runs"):
        logging.getLogger(name).addFilter(plain_and_without_secrets)
    for handler in logging.getLogger().handlers:
        if hasattr(handler, "console"):
            handler.addFilter(not_only_for_prefect)


def not_only_for_prefect(record: logging.LogRecord) -> bool:
    """A logging filter of the terminal: what a task's page in Prefect's UI shows is said there once, in other words."""
    return not getattr(record, "for_prefect", False)


def plain_and_without_secrets(record: logging.LogRecord) -> bool:
    """A logging filter: errors whose text says all there is to say lose their traceback, everything loses secrets."""
    if record.name == "prefect.task_runs" and "will start" in record.msg:
        retrying(record, *record.args)
    elif record.name.startswith("prefect.") and "Finished in state" in record.msg:
        return False
    elif record.name == "prefect.task_runs" and "Retries are exhausted" in record.msg:  # the run says it to the terminal
        record.msg, record.args, record.for_prefect = "%s", (explain(record.exc_info[1]),), True
    record.msg, record.args = db.redact(record.getMessage()), ()
    if record.exc_info and isinstance(record.exc_info[1], EXPECTED):
        record.exc_info = None
    elif record.exc_info:
        record.exc_text = db.redact(logging.Formatter().formatException(record.exc_info))
    return True


def retrying(record: logging.LogRecord, _, error, retry: int, retries: int, delay: str) -> None:
    """Turn Prefect's line about a retry into one that people read, and that the live lines know."""
    task_name = getattr(record, "task_run_name", "task").removeprefix("train-")
    seconds = f"{float(delay.split()[0]):.0f}" if delay[:1].isdigit() else "0"
    record.levelno, record.levelname, record.args = logging.WARNING, "WARNING", ()
    record.msg = f"{task_name}: {explain(error)}; retrying in {seconds} s ({retry} of {retries})"
    record.model, record.phase = task_name, "retrying"


def explain(error: BaseException) -> str:
    """Return an error as a sentence without secrets."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"there is no space left for {error.filename or 'a file'}; make room on that disk and run it again"
    error = out_of_memory() if isinstance(error, MemoryError) else error
    return db.redact(str(error) if isinstance(error, EXPECTED) else f"{type(error).__name__}: {error}")


def blank_result(table_name: str, demo, folder: Path) -> dict:
    return {"status": "failed", "message": "", "error": None, "started_at": datetime.now(timezone.utc).isoformat(),
            "clock": time.monotonic(), "untold": True, "seconds": 0.0, "read_seconds": None, "peak_mb": None,
            "host": socket.gethostname(),
            "table": table_name, "rows": None, "models_dir": str(folder), "demo": demo is not None, "warnings": [],
            "csv": None, "asked": [], "models": {}, "finish_command": None}


def entry(report: dict, folder: str) -> dict:
    """Return the result's entry of a model from its metrics file."""
    return {key: report[key] for key in ("status", "error", "metrics", "plot", "previous", "bytes", "rows", "seconds")} | {
        "path": str(Path(folder) / f"{report['model']}.joblib") if report["status"] == "trained" else None}


def failed_entry(error: BaseException) -> dict:
    return {"status": "failed", "error": explain(error), "metrics": {}, "plot": {}, "previous": None, "bytes": None,
            "rows": None, "seconds": None, "path": None}


def write_history(result: dict, names: list[str], status: str) -> None:
    """Append a line per model to the history: at the start, so that a killed run is known to owe them, and at the end."""
    lines = []
    for name in names:
        model = result["models"].get(name, {})
        metric, value = next(iter(model.get("metrics", {}).items()), (None, None))
        lines.append({"run": result["started_at"], "model": name, "status": status, "metric": metric, "value": value,
                      "seconds": model.get("seconds"), "rows": result["rows"], "read_seconds": result["read_seconds"],
                      "run_seconds": round(time.monotonic() - result["clock"], 2), "peak_mb": peak_mb(),
                      "error": model.get("error")})
    models.append_history(result["models_dir"], lines)


def memory_left(root: str = "/") -> float:
    """Return the bytes this process may still take: of its own limit, its cgroup's (a container's) and the machine's."""
    left, root = [math.inf], Path(root)
    with suppress(OSError, KeyError):  # not on Linux
        kilobytes = lambda name: dict(re.findall(r"(\w+):\s+(\d+) kB", (root / "proc" / name).read_text()))
        machine, limit = kilobytes("meminfo"), resource.getrlimit(resource.RLIMIT_AS)[0]
        left.append((int(machine["MemAvailable"]) + int(machine["SwapFree"])) << 10)
        if limit != resource.RLIM_INFINITY:
            left.append(limit - (int(kilobytes("self/status")["VmSize"]) << 10))
        for kinds, path in re.findall(r"^\d+:(memory|):/(.*)", (root / "proc/self/cgroup").read_text(), re.M):
            names = "memory.max", "memory.current", "file"
            if kinds:  # the first version of cgroups
                names = "memory.limit_in_bytes", "memory.usage_in_bytes", "cache"
            top = root / "sys/fs/cgroup" / kinds
            for folder in {top, top / path, *(top / parent for parent in Path(path).parents)}:
                with suppress(OSError, ValueError):  # no such group here, or "max": no limit
                    most, used = (int((folder / name).read_text()) for name in names[:2])
                    cached = re.search(rf"(?m)^{names[2]} (\d+)", (folder / "memory.stat").read_text())
                    left.append(most - used + int(cached[1]))
    return min(left)


def out_of_memory(rows: int | None = None) -> OutOfMemory:
    left = memory_left()
    size = f" ({notify.size(max(left, 0)) or 'nothing'})" if left < math.inf else ""
    return OutOfMemory(f"{'the' if rows is None else f'{rows:,}'} songs do not fit in the memory that is left{size}; "
                       "raise the limit (ulimit -v, the container's), train fewer models at a time (--only), "
                       "or name a view with a sample of them as --table-name")


def enough_memory(rows: int, each: int, fits: int = 1) -> bool:
    """Return whether there is room for so many songs of `each` bytes, and for what every fit takes besides."""
    return rows * each + fits * FIT_BASE <= memory_left()


def peak_mb() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // (1024 if sys.platform == "linux" else 1024 ** 2)


def conclude(result: dict, error: BaseException | None, enable_notifications: bool) -> None:
    """Decide what the run was, then tell everybody, once. Whatever fails here is a warning and breaks nothing."""
    if not result.pop("untold", False):
        return
    statuses = [model["status"] for model in result["models"].values()]
    if error:
        result["error"] = explain(error)
    if not statuses or statuses.count("failed") == len(statuses):
        result["status"], result["exit_status"] = "failed", WRONG_INPUT if isinstance(error, DataError) else NOTHING_TRAINED
    elif error or statuses.count("trained") < len(statuses):
        result["status"], result["exit_status"] = "partial", PARTIAL
    else:
        result |= {"status": "completed", "exit_status": TRAINED, "finish_command": None}
    result |= {"message": message(result), "seconds": time.monotonic() - result["clock"], "peak_mb": peak_mb()}
    stopped, picture = isinstance(error, Stopped), Path(result["models_dir"]) / "report.png"
    log.log(logging.INFO if result["status"] == "completed" else logging.ERROR, "%s", result["message"],
            extra={"for_prefect": bool(BEGUN) and not stopped})
    if result["models"] and not stopped:
        history = models.read_history(result["models_dir"])
        draw = partial(models.naming(picture)(notify.draw_report), result, history, picture)
        for what, step in (("the picture", draw), ("Prefect's artifacts", partial(write_artifacts, result))):
            _, trouble = attempt(step)
            if trouble:
                result["warnings"].append(f"{what} could not be made: {explain(trouble)}")
    if enable_notifications and notify.webhook_url():
        shown = picture if result["models"] and not stopped and picture.exists() else None
        notify.post_discord(result, notify.webhook_url(), shown, **{"seconds": STOPPED_POST_SECONDS} if stopped else {})


def message(result: dict) -> str:
    """Return one sentence for the whole run."""
    by_status = {status: [name for name, model in result["models"].items() if model["status"] == status]
                 for status in ("trained", "held_back", "failed")}
    if not result["models"]:
        return f"Nothing was trained: {result['error']}"
    parts = [f"{len(by_status['trained'])} of {len(result['asked'])} models trained"]
    parts += [f"{status.replace('_', ' ')}: {', '.join(by_status[status])}"
              for status in ("held_back", "failed") if by_status[status]]
    return "; ".join(parts + [result["error"]] * bool(result["error"]))


def finish_command(*, csv_path, table_name, truncate_table, n_clusters, only, enable_notifications, models_dir, demo,
                   force, dask) -> str:
    """Return the command that trains what this run will not have trained: --failed, and the flow's other parameters."""
    words = ["python", "train.py", "--failed"]
    words += ["--table-name", table_name] * (table_name != "spotify_songs")
    words += ["--n-clusters", str(n_clusters)] * (n_clusters != 2) + ["--demo", str(demo)] * (demo is not None)
    words += ["--models-dir", str(models_dir)] * bool(models_dir) + ["--dask", dask] * bool(dask)
    words += ["--csv-path", csv_path] * bool(csv_path) + ["--truncate"] * truncate_table
    words += ["--force"] * force + ["--no-notify"] * (not enable_notifications)
    return shlex.join(words)


# ---------------------------------------------------------------------------------------------------------------------
# Before the heavy imports: the options, the lock, Prefect's server
# ---------------------------------------------------------------------------------------------------------------------

def parse_options(arguments=None) -> argparse.Namespace:
    """Read the command line. A wrong option prints the usage and exits with 2."""
    usage, _, rest = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(prog="train.py", description=usage, epilog=rest.partition("From Python")[0],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv-path", metavar="FILE", help="load this CSV (.csv, .csv.gz or http(s) URL) into the table first")
    parser.add_argument("--table-name", default="spotify_songs", metavar="TABLE",
                        help="table or view of songs, TABLE or SCHEMA.TABLE (default: %(default)s)")
    parser.add_argument("--truncate", action="store_true", help="empty the table before loading the CSV")
    parser.add_argument("--n-clusters", type=int, default=2, metavar="N", help="number of clusters (default: %(default)s)")
    parser.add_argument("--only", action="append", metavar="MODEL",
                        help=f"train only these; repeat or comma-separate: {', '.join(models.MODELS)}")
    parser.add_argument("--failed", action="store_true",
                        help="train only the models whose last run failed, was held back or was killed")
    parser.add_argument("--force", action="store_true", help="publish a model even if it is worse than the current one")
    parser.add_argument("--demo", nargs="?", type=int, const=10_000, metavar="N",
                        help="train on N made-up songs in the embedded database (default: 10000)")
    parser.add_argument("--check", action="store_true", help="look at everything a run needs, train nothing and change nothing")
    parser.add_argument("--no-notify", action="store_true", help="do not post to Discord")
    parser.add_argument("--models-dir", metavar="DIR",
                        help="where the models go (default: models, or demo/models with --demo, beside train.py)")
    parser.add_argument("--dask", metavar="ADDRESS", help="train on the Dask cluster of that scheduler, tcp://HOST:8786")
    parser.add_argument("--serve", action="store_true",
                        help="be a Prefect deployment until stopped; the other options are what its runs do by default")
    parser.add_argument("--cron", metavar="CRON", help='with --serve: when to run, in UTC, such as "0 3 * * *"')
    options = parser.parse_args(arguments)
    if options.truncate and not options.csv_path:
        parser.error("--truncate must be accompanied by --csv-path")
    if options.demo is not None and options.csv_path:
        parser.error("--demo makes its own songs; leave out --csv-path")
    if options.demo is not None and options.demo < 1:
        parser.error(f"--demo needs at least 1 song; it is {options.demo}")
    if options.n_clusters < 2:
        parser.error(f"--n-clusters must be 2 or more; it is {options.n_clusters}")
    if options.failed and options.only:
        parser.error("--failed chooses the models itself; leave out --only")
    if options.cron is not None and not options.serve:
        parser.error("--cron must be accompanied by --serve")
    if options.serve and options.failed:
        parser.error("--serve trains what each run is asked for; leave out --failed")
    if options.serve and not options.check and not prefect_is_configured():
        parser.error("--serve needs a Prefect server; start one: prefect server start; "
                     "then: export PREFECT_API_URL=http://127.0.0.1:4200/api")
    try:
        options.only = chosen(options.only)
        check_dask(options.dask)
    except DataError as error:
        parser.error(str(error))
    return options


def flow_parameters(options: argparse.Namespace) -> dict:
    """Return the options as parameters of the flow."""
    return {"csv_path": options.csv_path, "table_name": options.table_name, "truncate_table": options.truncate,
            "n_clusters": options.n_clusters, "only": options.only, "enable_notifications": not options.no_notify,
            "models_dir": options.models_dir, "demo": options.demo, "force": options.force, "dask": options.dask}


def chosen(only) -> list[str]:
    """Return the models asked for, in their usual order; `only` is None for all, a name, or names with or without commas."""
    names = [only] if isinstance(only, str) else only or list(models.MODELS)
    names = [part.strip() for name in names for part in name.split(",") if part.strip()]
    for name in names:
        if name not in models.MODELS:
            raise DataError(f"there is no model {name!r}; the models are {', '.join(models.MODELS)}")
    return [name for name in models.MODELS if name in names]


def check_dask(address) -> None:
    if address and not importlib.util.find_spec("prefect_dask"):
        raise DataError("--dask needs prefect-dask; install it: pip install -c constraints.txt prefect-dask")
    if address and not prefect_is_configured():
        raise DataError("--dask needs a Prefect server that the cluster's workers reach as well; start one: "
                        "prefect server start --host 0.0.0.0; then: export PREFECT_API_URL=http://HOST:4200/api")


def models_folder(models_dir=None, demo=None) -> Path:
    return Path(models_dir or (models.MODELS_DIR if demo is None else DEMO_DIR)).resolve()


HELD = ExitStack()  # the lock of a run from the command line
EXIT = {"status": 1}  # what it ends with; 1 is Python's own for an error nobody caught
BEGUN = {}          # its result, what went wrong already and whether to notify: whoever ends it before the flow begins says so


def prefect_files() -> str:
    """Return what stands in the files where Prefect's settings may be."""
    home = Path(os.environ.get("PREFECT_HOME", Path.home() / ".prefect"))
    files = (home / "profiles.toml", Path("prefect.toml"), Path("pyproject.toml"), Path(".env"))
    return "\n".join(file.read_text(errors="replace") for file in files if file.is_file())


def prefect_is_configured() -> bool:
    """Return whether Prefect has a server or Cloud of its own to talk to: then it is left alone."""
    return bool(os.environ.get("PREFECT_API_URL") or os.environ.get("PREFECT_PROFILE") or re.search(
        r'(?im)api_url|^\s*\[.*prefect.*api|^\s*\[api\]|^\s*active\s*=\s*"(?!ephemeral)', prefect_files()))


def start_prefect_server():
    """Start Prefect's own server on a free port, to boot while this process imports; point PREFECT_API_URL to it.

    Prefect would start one by itself, but only when the flow is called, and would import the server's code a second
    time into this process. It must be stopped by an atexit handler that is registered before prefect is imported:
    after it, Prefect's log worker waits for a server that is gone.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port), "--no-services", "--no-ui"],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True, preexec_fn=_die_with_parent)  # Ctrl-C reaches the run alone, which still needs its server
    atexit.register(end_prefect_server, server)
    os.environ["PREFECT_API_URL"] = f"http://127.0.0.1:{port}/api"
    # It lives as long as the run and has no UI: "Beginning flow run" and "View at" help nobody.
    os.environ.setdefault("PREFECT_LOGGING_LOGGERS_PREFECT_FLOW_RUNS_LEVEL", "ERROR")
    return server


def _die_with_parent():
    """Ask Linux to end this child when its parent dies, however it dies; elsewhere atexit must do."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1 is PR_SET_PDEATHSIG; a server that is still starting ignores SIGTERM


def end_prefect_server(server) -> None:
    server.terminate()
    try:
        server.wait(SERVER_END_SECONDS)
    except subprocess.TimeoutExpired:
        server.kill()


def wait_for_prefect(server):
    """Return a context in which Prefect's API answers: ours, or where that did not start, Prefect's temporary server."""
    deadline = time.monotonic() + SERVER_START_SECONDS
    while server.poll() is None and time.monotonic() < deadline:
        try:
            urllib.request.urlopen(os.environ["PREFECT_API_URL"] + "/health", timeout=5).close()
            return nullcontext()
        except OSError:
            time.sleep(0.05)
    server.terminate()
    del os.environ["PREFECT_API_URL"]
    log.warning("Prefect's server did not start in time; leaving it to Prefect's own temporary server")
    return temporary_settings(restore_defaults={PREFECT_API_URL})


def leave() -> None:
    """The last thing this process does, registered first: what Python does after it, for Prefect's threads, takes 2 s."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(EXIT["status"])


def on_signal(number, _):
    EXIT["status"] = 128 + number
    raise Stopped(128 + number)


@contextmanager
def stop_is_told():
    """Tell everybody of a stop outside the flow: once unwound, as a handler amid an import waits for that import's locks."""
    try:
        yield
    except Stopped as stop:
        if BEGUN:
            conclude(BEGUN["result"], stop, BEGUN["notify"])
        raise


def end_soon(status: int, seconds: float = LAST_WORDS_SECONDS) -> None:
    """End this process within seconds, whatever is still computing: a fit in a thread cannot be interrupted."""
    watchdog = threading.Timer(seconds, os._exit, [status])
    watchdog.daemon = True
    watchdog.start()


def watch_for_signals() -> None:
    """Handle SIGTERM and Ctrl-C, also where the main thread is deep in C code, waiting for a lock on a table, say.

    A handler in Python has to wait until that returns; the byte in the pipe is there at once.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)

    def last_words():
        while (number := os.read(read, 1)[0]) not in (signal.SIGTERM, signal.SIGINT):
            pass
        end_soon(128 + number)
        time.sleep(LAST_WORDS_SECONDS - STOPPED_POST_SECONDS)
        conclude(BEGUN["result"], Stopped(128 + number), BEGUN["notify"]) if BEGUN else None
    threading.Thread(target=last_words, daemon=True, name="last words").start()


def begin(result: dict, failed: bool, lock: ExitStack) -> None:
    """Take the lock, clean up after a killed run, find out what `--failed` means, write down what is about to be trained."""
    lock.enter_context(one_run_at_a_time(Path(result["models_dir"])))
    models.recover(result["models_dir"])
    if failed:
        result["asked"] = models.owed(result["models_dir"])
    write_history(result, result["asked"], "started")


def before_the_imports(options: argparse.Namespace):
    """Begin the run and start Prefect's server; return it, or None where Prefect has its own."""
    atexit.register(leave)
    if 0 <= resource.getrlimit(resource.RLIMIT_AS)[0] < START_BYTES:
        print(f"ulimit -v allows this process less than the {notify.size(START_BYTES)} that it needs "
              "before it reads a song; raise it", file=sys.stderr)
        EXIT["status"] = WRONG_INPUT
        sys.exit(WRONG_INPUT)
    secure_logs()
    watch_for_signals()
    result = blank_result(options.table_name, options.demo, models_folder(options.models_dir, options.demo))
    result |= {"asked": options.only, "finish_command": finish_command(**flow_parameters(options))}
    _, error = attempt(begin, result, options.failed, HELD)
    if isinstance(error, Locked):
        print(error, file=sys.stderr)
        EXIT["status"] = LOCKED
        sys.exit(LOCKED)
    if not result["asked"]:
        print(f"nothing to do: the last run of every model in {result['models_dir']} trained it")
        EXIT["status"] = TRAINED
        sys.exit(TRAINED)
    BEGUN.update(result=result, error=error, notify=not options.no_notify)
    return None if prefect_is_configured() else start_prefect_server()


# ---------------------------------------------------------------------------------------------------------------------
# --check: a line per thing that a run needs: (what, ok or warning or problem, a sentence with the fix)
# ---------------------------------------------------------------------------------------------------------------------

def check(options: argparse.Namespace) -> int:
    """Look at everything at once, change nothing; print the lines; return the exit status."""
    secure_logs()
    looks = {"database": check_songs, "models directory": check_folder, "Discord": check_discord, "Prefect": check_prefect}
    answers = {}
    threads = [threading.Thread(daemon=True, target=lambda what=what, look=look: answers.update({what: attempt(look, options)}))
               for what, look in looks.items()]
    for thread in threads:
        thread.start()
    deadline, lines = time.monotonic() + CHECK_SECONDS, []
    for what, thread in zip(looks, threads):
        thread.join(max(0, deadline - time.monotonic()))
        late = TimeoutError(f"no answer within {CHECK_SECONDS} s; is it busy or out of reach?")
        found, error = answers.get(what, (None, late))
        lines += [(what, "problem", explain(error))] if error else found
    for what, state, sentence in lines:
        print(f"{what:18}{state:9}{notify.plain(sentence, 1000)}")
    return WRONG_INPUT if any(state == "problem" for _, state, _ in lines) else TRAINED


def check_songs(options):
    if options.demo is not None:
        return [("database", "ok", "made-up songs need no table")]
    if options.csv_path and not re.match("https?://", options.csv_path):
        try:
            open(options.csv_path, "rb").close()
        except OSError as error:
            raise DataError(f"--csv-path {options.csv_path}: {error.strerror}; give a CSV file") from None
    embedded = db.ROOT / ".postgres"
    if db.setting("DATABASE_URL"):
        url = db.database_url()
    elif (embedded / "data" / "PG_VERSION").exists():
        url = db.start_server(embedded, "postgres").replace("/postgres?", "/music?")
    elif options.csv_path:
        return [("database", "ok", f"DATABASE_URL is not set: an embedded PostgreSQL will be made in {embedded}")]
    else:
        raise DataError("DATABASE_URL is not set and there is no embedded database yet; "
                        "try: python train.py --csv-path songs.csv")
    try:
        found = db.check_table(url, options.table_name, for_csv=bool(options.csv_path))
    except DataError as error:
        if not db.setting("DATABASE_URL") and 'database "music" does not exist' in str(error):  # only a demo has run here
            raise DataError("there are no songs in the embedded database yet; "
                            "try: python train.py --csv-path songs.csv") from None
        raise
    lines = [("database", "ok", f"PostgreSQL {found['server']} at {found['host']}, database {found['database']}")]
    if options.csv_path:
        return lines + [("table", "ok", f"{options.csv_path} may be loaded into {options.table_name} ({found['rows']:,} rows)")]
    genres, nulls = db.profile_table(url, options.table_name)
    without = [name for name in db.OPTIONAL if name not in nulls]
    holes = {name: share for name, share in nulls.items() if share > (0 if name in db.REQUIRED else 0.5)}
    few = found["rows"] < models.MIN_SONGS
    roomy = enough_memory(found["rows"], SONG_BYTES + max(FIT_BYTES.values()))
    return lines + [
        ("table", "problem" if few else "ok",
         f"{options.table_name} has {found['rows']:,} rows" + f"; {models.MIN_SONGS} are needed" * few),
        ("columns", "ok", "all required columns" +
         (f"; not there, and not needed: {', '.join(without)}" if without else " and all optional ones")),
        ("genres", "ok" if genres >= 2 else "warning",
         f"{genres} genres of {models.MIN_GENRE_SONGS} songs or more" + "; the genre model needs 2" * (genres < 2)),
        ("nulls", "warning" if holes else "ok", ", ".join(f"{name} {share:.1%}" for name, share in holes.items()) +
         ": songs without a required value are left out, optional ones are treated as missing" if holes else "none that matter"),
        ("memory", "ok" if roomy else "problem", "enough for these songs" if roomy else str(out_of_memory(found["rows"])))]


def check_folder(options):
    folder = models_folder(options.models_dir, options.demo)
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        raise DataError(f"cannot write to {there}; choose another: --models-dir DIR")
    free = shutil.disk_usage(there).free
    state = "problem" if free < SPACE_NEEDED else "warning" if free < 10 * SPACE_NEEDED else "ok"
    return [("models directory", "ok", f"{folder} is writable" + "; it will be made" * (there != folder)),
            ("space", state, f"{notify.size(free) or '0 B'} free" + f"; make room on the disk of {there}" * (state != "ok"))]


def check_discord(options):
    if options.no_notify:
        return [("Discord", "ok", "--no-notify: nothing is posted")]
    fine, sentence = notify.check_webhook(notify.webhook_url())
    return [("Discord", "ok" if fine else "problem", sentence)]


def check_prefect(options):
    stated = re.search(r'(?im)^\s*(?:prefect_)?api_url\s*=\s*["\']?(https?://[^\s"\']+)', prefect_files())
    url = os.environ.get("PREFECT_API_URL") or (stated[1] if stated else None)
    if not url:
        profile = "a profile of yours (see: prefect config view)"
        return [("Prefect", "ok", profile if prefect_is_configured() else "a temporary server per run")]
    try:
        urllib.request.urlopen(f"{url.rstrip('/')}/health", timeout=CHECK_SECONDS).close()
    except OSError as error:
        if getattr(error, "code", None) not in (401, 403):  # Cloud answers, to those who say who they are
            raise DataError(f"{url} does not answer as a Prefect API ({error}); correct PREFECT_API_URL or start it: "
                            "prefect server start") from error
    return [("Prefect", "ok", f"{url} answers")]


if __name__ == "__main__":
    # First of all: --help and a wrong option answer at once, and the server boots while the imports take their seconds.
    OPTIONS = parse_options()
    if OPTIONS.check:
        sys.exit(check(OPTIONS))
    if OPTIONS.serve:
        atexit.register(leave)
    with stop_is_told():
        SERVER = None if OPTIONS.serve else before_the_imports(OPTIONS)
        for heavy in ("pandas", "sklearn.ensemble", "sklearn.pipeline", "matplotlib.figure",
                      "prefect.artifacts", "prefect.futures", "prefect.task_runners"):
            importlib.import_module(heavy)

from pydantic import Field
import sklearn.ensemble, sklearn.pipeline  # here, by one thread: of five that import it at once, some see half of it
from prefect import flow, runtime, task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.context import get_run_context
from prefect.exceptions import TerminationSignal
from prefect.futures import as_completed
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Completed, Crashed, Failed
from prefect.task_runners import ThreadPoolTaskRunner


# ---------------------------------------------------------------------------------------------------------------------
# The tasks: plain functions, decorated here and nowhere else
# ---------------------------------------------------------------------------------------------------------------------

def can_heal(task, task_run, state) -> bool:
    """Prefect's retry condition: False for what the same input brings back, said in the log."""
    error = state.result(raise_on_failure=False)
    if isinstance(error, OutOfMemory):  # not while the others are still there: train_all tries it alone
        return False
    if isinstance(error, (DataError, ValueError, TypeError, KeyError)):
        log.error("%s", explain(error), extra={"for_prefect": True})
        log.info("%s is not tried again: the same input would bring the same %s", task.name, type(error).__name__)
        return False
    return True


def train_model(name: str, songs, threads: int | None, settings: dict):
    """Train one model with its share of the cores (None: what its process has); return [estimator, metrics, seconds].

    OpenMP's barriers spin: a fit with more threads than free cores is many times slower than one with a single thread.
    """
    from joblib import parallel_config
    from threadpoolctl import threadpool_limits
    if not enough_memory(len(songs), FIT_BYTES.get(name, 0)):
        raise out_of_memory(len(songs))
    start = time.monotonic()
    with threadpool_limits(threads), parallel_config("threading", n_jobs=threads):
        estimator, metrics = models.MODELS[name](songs, **settings)
    return [estimator, metrics, time.monotonic() - start]


def without_secrets(step):
    """Return the step with errors whose text holds no secret: Prefect writes it into states and events, not only logs.

    A MemoryError leaves without its traceback, which would keep the arrays of the failed fit alive.
    """
    @wraps(step)
    def safe(*arguments, **settings):
        try:
            return step(*arguments, **settings)
        except MemoryError:
            rows = next((len(each) for each in arguments if hasattr(each, "columns")), None)
        except Exception as error:
            error.args = tuple(db.redact(part) if isinstance(part, str) else part for part in error.args)
            raise
        raise out_of_memory(rows)
    return safe


# NO_CACHE: Prefect's default would pickle and hash every song for every task.
from_database = dict(retries=DATABASE_RETRIES, retry_delay_seconds=DATABASE_DELAY, retry_condition_fn=can_heal,
                     cache_policy=NO_CACHE)
check_database = task(without_secrets(db.check_table), name="check-database", task_run_name="check-database", **from_database)
load_csv = task(without_secrets(db.load_csv), name="load-csv", task_run_name="load-csv", **from_database)
load_demo = task(without_secrets(db.load_demo), name="load-demo", task_run_name="load-demo", **from_database)
load_songs = task(without_secrets(db.load_songs), name="load-songs", task_run_name="load-songs", **from_database)
train_tasks = {
    name: task(without_secrets(train_model), name=f"train-{name}", task_run_name=f"train-{name}", retries=TRAINING_RETRIES,
               retry_delay_seconds=TRAINING_DELAYS, retry_jitter_factor=JITTER, retry_condition_fn=can_heal,
               cache_policy=NO_CACHE, persist_result=False)
    for name in models.MODELS}


# ---------------------------------------------------------------------------------------------------------------------
# The flow
# ---------------------------------------------------------------------------------------------------------------------

def run_name() -> str:
    parameters = runtime.flow_run.parameters
    return f"{datetime.now():%Y-%m-%d %H:%M} {parameters['table_name'] if parameters['demo'] is None else 'demo songs'}"


@flow(name=NAME, flow_run_name=run_name, task_runner=ThreadPoolTaskRunner(max_workers=len(models.MODELS)))
def ml_training_pipeline(csv_path: str | None = None, table_name: str = "spotify_songs", truncate_table: bool = False,
                         n_clusters: Annotated[int, Field(ge=2)] = 2, only: list[str] | str | None = None,
                         enable_notifications: bool = True, models_dir: str | None = None, demo: int | None = None,
                         force: bool = False, dask: str | None = None) -> dict:
    """Train the models `only` names (all five by default) on the songs of a table; return what happened.

    Args:
        csv_path: a CSV to load into the table first: a path or an http(s) URL; .csv.gz works.
        table_name: table or view of songs, TABLE or SCHEMA.TABLE.
        truncate_table: empty the table before the CSV is loaded.
        n_clusters: number of clusters, 2 or more.
        only: names of models: genre, clusters, energy, popularity, similar; all by default.
        enable_notifications: post to Discord if DISCORD_WEBHOOK_URL is set.
        models_dir: where the models go; models/ beside train.py by default.
        demo: train on so many made-up songs in the embedded database instead.
        force: publish a model even if it is worse than the current one.
        dask: train on the Dask cluster whose scheduler is at this address, such as tcp://host:8786.

    Returns {"status": "completed" or "partial", "models": {name: {"status", "metrics", "path", "seconds", ...}}, ...}.
    A model that fails does not raise: its entry has status "failed" and an error. Raises PipelineFailed when nothing
    could be trained, Locked when another run holds the models directory.
    """
    given = dict(locals())
    secure_logs()
    result = BEGUN.get("result") or blank_result(table_name, demo, models_folder(models_dir, demo))
    with ExitStack() as lock:
        try:
            _, error = attempt(train_into, result, lock, given)
        except (Stopped, TerminationSignal) as stop:  # in a flow it is Prefect that catches SIGTERM
            status = getattr(stop, "code", TERMINATED)
            end_soon(status)
            conclude(result, Stopped(status), enable_notifications)
            if BEGUN:  # whoever started this process for a deployment tells Prefect itself
                attempt(mark_crashed, result["message"])
            end_soon(status, SERVER_END_SECONDS)
            raise
        if isinstance(error, Locked):
            raise error
        conclude(result, error, enable_notifications)
    if result["status"] == "failed":
        return Failed(message=result["message"], data=PipelineFailed(result))
    return Completed(name="Partial" if result["status"] == "partial" else None, message=result["message"], data=result)


def mark_crashed(message: str) -> None:
    """Tell Prefect that the run is over: it would notice when the fits end, which this process does not wait for."""
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(runtime.flow_run.id, Crashed(message=message), force=True)


def train_into(result: dict, lock: ExitStack, given: dict) -> None:
    """Everything from the lock (which the command line has taken) to the last model published, noted in the result.

    `given` are the parameters of the flow.
    """
    if BEGUN:
        if BEGUN["error"]:
            raise BEGUN["error"]
    else:
        result["asked"] = chosen(given["only"])
        check_dask(given["dask"])
        result["finish_command"] = finish_command(**given)
        begin(result, False, lock)
    songs = get_songs(result, given["csv_path"], given["table_name"], given["truncate_table"], given["demo"])
    result["finish_command"] = finish_command(**given | {"csv_path": None, "truncate_table": False})
    train_all(result, songs, {"clusters": {"n_clusters": given["n_clusters"]}}, given["force"], given["dask"])


def get_songs(result: dict, csv_path, table_name: str, truncate_table: bool, demo):
    """Check the database, load the CSV if there is one, read the songs: once, for all models."""
    url = db.database_url(demo=demo is not None)
    if demo is not None:
        rows = load_demo(demo, url, table_name)["loaded"]
    elif csv_path:
        check_database(url, table_name, for_csv=True)
        with notify.load_progress() as progress:
            result["csv"] = load_csv(csv_path, url, table_name, truncate=truncate_table, progress=progress,
                                     rejected_path=Path(result["models_dir"]) / "rejected_rows.csv")
        rows = result["csv"]["loaded"]
    else:
        rows = check_database(url, table_name)["rows"]
    if not enough_memory(rows, SONG_BYTES):
        raise out_of_memory(rows)
    start = time.monotonic()
    songs = load_songs(url, table_name)
    result |= {"rows": len(songs), "read_seconds": time.monotonic() - start}
    log.info("%s songs read from %s in %.1f s", f"{len(songs):,}", table_name, result["read_seconds"])
    return songs


@contextmanager
def cluster(address: str, songs, copies: int):
    """Give (a task runner on the Dask cluster at the address, a future of the songs, which are sent there once)."""
    from distributed.diagnostics.plugin import SchedulerUploadFile, UploadFile
    from prefect_dask import DaskTaskRunner
    with DaskTaskRunner(address=address) as runner:
        try:
            runner.client.wait_for_workers(1, DASK_SECONDS)
        except ValueError as error:
            raise DataError(f"--dask {address} is not an address ({error}); write tcp://HOST:8786") from None
        except OSError as error:
            raise ConnectionError(f"no Dask cluster with a worker answers at {address} ({error}); "
                                  f"start one: dask scheduler; dask worker {address}") from None
        for path in (db.__file__, models.__file__, notify.__file__, __file__):
            for plugin in (SchedulerUploadFile(path), UploadFile(path)):
                # Once per version of a file: one that is loaded anew amid another run spoils that run's estimators.
                plugin.idempotent = True
                runner.client.register_plugin(plugin, f"{plugin.filename} {hashlib.sha256(plugin.data).hexdigest()}")
        # A call, not scattered data: where the worker that holds the songs dies, Dask makes the call again.
        sent = runner.client.submit(lambda: songs, pure=False)
        runner.client.replicate(sent, copies)  # Dask gives a task only to workers that have its data
        yield runner, sent


def train_all(result: dict, songs, settings: dict, force: bool, dask: str | None) -> None:
    """Train the models asked for side by side, publish each as soon as it is ready, note what became of it."""
    from threadpoolctl import threadpool_limits
    asked, data = result["asked"], models.describe(songs)
    for moved in models.drift_since(data, result["table"], result["models_dir"]):
        log.warning("the songs are not those of the last training: %s", moved)
        result["warnings"].append(moved)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    together = bool(dask) or len(asked) == 1 or enough_memory(
        len(songs), sum(FIT_BYTES.get(name, 0) for name in asked), len(asked))
    threads = None if dask else max(1, cores // len(asked))
    log.info("training %s %s%s", ", ".join(asked), "" if together else "one after another, as memory is short, ",
             f"on the Dask cluster at {dask}" if dask else f"with {threads} thread{'s' * (threads > 1)} each")
    where = cluster(dask, songs, len(asked)) if dask else nullcontext((get_run_context().task_runner, songs))
    # Around all: BLAS has one limit for the whole process, and the first model to end would lift it for the others.
    with where as (runner, sent), notify.live_status(asked), threadpool_limits(threads):
        def submit(name):
            return runner.submit(train_tasks[name], {"name": name, "songs": sent, "threads": threads,
                                                     "settings": settings.get(name, {})})

        def finish(name, future) -> bool:
            """Publish the model; return whether it is to be tried again, alone."""
            error = publish(result, name, future, songs, data, settings, force)
            if dask:
                future.wrapped_future.release()  # else Dask trains finished models again where their worker dies later
            return isinstance(error, OutOfMemory) and len(asked) > 1
        futures = {submit(name): name for name in asked * together}
        starved = [futures[future] for future in as_completed(list(futures)) if finish(futures[future], future)]
        for name in starved if together else asked:
            finish(name, submit(name))


def publish(result: dict, name: str, future, songs, data: dict, settings: dict, force: bool) -> Exception | None:
    """Publish a model that is ready, or note why there is none: in the result, the history and the log.

    Returns the error, if there was one.
    """
    trained, error = attempt(future.result)
    if not error:
        estimator, metrics, seconds = trained
        trained.clear()  # Prefect keeps the result of a task to the end of the flow; a model is large
        report = {"model": name, "run": result["started_at"], "table": result["table"], "seconds": seconds,
                  "settings": settings.get(name, {}), "data": data, "data_fingerprint": data["fingerprint"], "rows": len(songs)}
        report, error = attempt(models.publish, name, estimator, metrics, report, result["models_dir"], force)
    model = failed_entry(error) if error else entry(report, result["models_dir"])
    done = result["models"] | {name: model}
    result["models"] = {other: done[other] for other in result["asked"] if other in done}
    attempt(write_history, result, [name], model["status"])
    good, (metric, change) = model["status"] == "trained", notify.metric_and_change(model)
    log.log(logging.INFO if good else logging.WARNING, "%s: %s", name, model["error"] or f"done, {metric} ({change})",
            extra={"model": name, "phase": "done" if good else model["status"]})
    return error


def write_artifacts(result: dict) -> None:
    """Put the metrics where Prefect's UI shows them: a table for the run, a page per model whose versions accumulate."""
    rows, history = [], models.read_history(result["models_dir"])
    for name, model in result["models"].items():
        rows.append(notify.table_row(name, model))
        figures = [(key, notify.number(value)) for key, value in model["metrics"].items()
                   if isinstance(value, (int, float))]
        runs = [(line["run"][:16].replace("T", " "), notify.escape(notify.reason(line)) or line["status"].replace("_", " "),
                 "" if line["value"] is None else notify.number(line["value"]))
                for line in history[::-1] if line["model"] == name and line["status"] != "started"][:notify.RUNS_SHOWN]
        tables = [["|".join(cells) for cells in (heading, ["---"] * len(heading), *lines)]
                  for heading, lines in ((("metric", "value"), figures), (("last runs (UTC)", "status", "metric"), runs)) if lines]
        said = notify.reason(model) or "{status}, {metric} ({change})".format(**rows[-1])
        create_markdown_artifact("\n\n".join("\n".join(lines) for lines in tables), key=f"model-{name}",
                                 description=f"{name} {said}")
    create_table_artifact(rows, key="metrics", description=result["message"])


# ---------------------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------------------

def main(options: argparse.Namespace, server) -> int:
    """Run the flow once; print what happened; return the exit status."""
    with wait_for_prefect(server) if server else nullcontext():
        parameters = flow_parameters(options) | {"only": BEGUN["result"]["asked"]}
        _, error = attempt(partial(ml_training_pipeline, **parameters))
    result = BEGUN["result"]
    conclude(result, error, BEGUN["notify"])  # where Prefect failed before the flow could say anything
    notify.print_summary(result)
    return result["exit_status"]


async def serve(options: argparse.Namespace) -> None:
    """Be the deployment until a signal comes: Prefect starts a process for each run, and ends it when this one ends."""
    from prefect.runner import Runner
    from prefect.schedules import Cron
    check_prefect(options)
    try:
        schedules = [] if options.cron is None else [Cron(options.cron)]
    except ValueError:
        raise DataError(f'--cron {options.cron!r} is no cron expression; write five fields: "0 3 * * *"') from None
    # limit: a run that is due while another trains waits for it instead of finding the models directory locked.
    runner, loop = Runner(name=NAME, limit=1), asyncio.get_running_loop()
    # The flow by import, not that of __main__: a run's process is told its name instead of being sent its functions.
    await runner.aadd_flow(importlib.import_module("train").ml_training_pipeline, name=NAME,
                           parameters=flow_parameters(options), schedules=schedules)

    def stop(number, _):
        EXIT["status"] = 128 + number
        loop.call_soon_threadsafe(loop.create_task, runner.astop())
    runner.handle_sigterm = stop  # flow.serve's own does not await this, and so waits for the run to end
    signal.signal(signal.SIGINT, stop)
    print(f"serving {NAME}/{NAME}; start a run with: prefect deployment run {NAME}/{NAME}", flush=True)
    await runner.start()


if __name__ == "__main__":
    if OPTIONS.serve:
        _, error = attempt(asyncio.run, serve(OPTIONS))
        if isinstance(error, DataError):
            print(f"train.py: error: {error}", file=sys.stderr)
            EXIT["status"] = WRONG_INPUT
        sys.exit(EXIT["status"])
    with stop_is_told():
        EXIT["status"] = main(OPTIONS, SERVER)
    sys.exit(EXIT["status"])
