"""Train the five song models from a PostgreSQL table, every night, unattended.

    python train.py                                   # train all five from DATABASE_URL
    python train.py --only similar                    # one model; repeat or comma-separate for more
    python train.py --csv-path songs.csv --table-name spotify_songs --truncate --n-clusters 2
    python train.py --demo 50000                      # made-up songs, embedded database, no set-up
    python train.py --check                           # look at everything, train nothing
    python train.py --failed                          # only the models that the last run owes
    python train.py --serve --cron "0 3 * * *"        # a Prefect deployment (needs a server)
    from train import ml_training_pipeline            # in Python: a Prefect flow like any other

This file alone knows Prefect. It reads as a night goes: the options; how a run begins and how it
ends; the tasks; the flow and its steps. Whatever is heavy happens in forks of another process, the
fork server of models.py: this one holds the flow, waits, and tells people.
"""

import argparse
import asyncio
import atexit
import fcntl
import http.client
import importlib.util
import logging
import os
import re
import resource
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, NoReturn

# Prefect as a nightly job needs it. Only defaults: the environment wins.
for name, value in {
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "PREFECT_LOGGING_EXTRA_LOGGERS": "train,models,db,notify",
    "PREFECT_LOGGING_LOGGERS_PREFECT_TASK_RUNS_LEVEL": "CRITICAL",
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
    "PREFECT_LOGGING_FORMATTERS_STANDARD_DATEFMT": "%Y-%m-%d %H:%M:%S",
    # A model has one thread: OpenMP's threads wait for each other at every step, so two were four
    # to thirteen times slower than one on small tables, and beside other work.
    "OMP_NUM_THREADS": "1",
}.items():
    os.environ.setdefault(name, value)

import db

if api := db.setting("PREFECT_API_URL"):  # from .env too, which Prefect reads in the current folder
    os.environ["PREFECT_API_URL"] = api

from annotated_types import Ge

import models
import notify
from db import DataError
from models import Killed, Locked, NotPublished
from notify import INTERRUPTED, LOCKED, TERMINATED, TRAINED, WRONG_INPUT, Run, Stopped

NAME = "ml-training-pipeline"
LOCAL_PREFECT = "http://127.0.0.1:4200/api"  # where `prefect server start` listens
START_SECONDS = 120  # Prefect's server: a first start makes its database, 15 s on a small machine
SERVER_STARTS = 5  # how often Prefect's temporary server is started in a run, should it be killed
STOP_SECONDS = 1.5  # from a stop to the end of the process, whatever still waits in it
DASK_SECONDS = 30  # for a Dask cluster to answer and to have a worker
CHECK_SECONDS = 4  # for all that --check looks at, side by side
MEMORY_SECONDS = 0.5  # between two looks at the memory of a run
JITTER = 0.5  # a retry's pause is up to so much longer, or shorter by less: runs come apart

log = logging.getLogger("train")


# ---- The options ---------------------------------------------------------------------------------


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line. A wrong option prints the usage and exits with 2."""
    parser = argparse.ArgumentParser(
        prog="train.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--csv-path",
        metavar="FILE",
        help="load this CSV (.csv, .csv.gz or http(s) URL) into the table first",
    )
    add(
        "--table-name",
        default="spotify_songs",
        metavar="TABLE",
        help="table or view of songs, TABLE or SCHEMA.TABLE (default: %(default)s)",
    )
    add(
        "--truncate",
        dest="truncate_table",
        action="store_true",
        help="empty the table before loading the CSV",
    )
    add(
        "--n-clusters",
        type=int,
        default=2,
        metavar="N",
        help="number of clusters (default: %(default)s)",
    )
    add(
        "--only",
        action="append",
        metavar="MODEL",
        help=f"train only these; repeat or comma-separate: {', '.join(models.MODELS)}",
    )
    add(
        "--failed",
        action="store_true",
        help="train only the models whose last run failed, was held back or was killed",
    )
    add(
        "--force",
        action="store_true",
        help="publish a model even if it is worse than the current one",
    )
    add(
        "--demo",
        nargs="?",
        type=int,
        const=10_000,
        metavar="N",
        help="train on N made-up songs in the embedded database (default: 10000)",
    )
    add(
        "--check",
        action="store_true",
        help="look at everything a run needs, train nothing and change nothing",
    )
    add(
        "--no-notify",
        dest="enable_notifications",
        action="store_false",
        help="do not post to Discord, send no heartbeat",
    )
    add(
        "--models-dir",
        metavar="DIR",
        help="where the models go (default: models, or demo/models with --demo, beside train.py)",
    )
    add(
        "--predict-into",
        metavar="TABLE",
        help="then put every song's predictions and neighbours into this table",
    )
    add(
        "--dask",
        metavar="ADDRESS",
        help="train on the Dask cluster of that scheduler, tcp://HOST:8786",
    )
    add(
        "--serve",
        action="store_true",
        help="be a Prefect deployment until stopped; the other options are what its runs do",
    )
    add("--cron", help='with --serve: when to run, in UTC, such as "0 3 * * *"')
    options = parser.parse_args(arguments)
    try:
        demand_options_that_agree(options)
        options.only = chosen(options.only)
        demand_dask(options.dask)
    except DataError as error:
        parser.error(str(error))
    return options


def demand_options_that_agree(options: argparse.Namespace) -> None:
    """Raise DataError where options, or a variable, make no sense together."""
    memory, _ = resource.getrlimit(resource.RLIMIT_AS)
    for wrong, sentence in (
        (
            options.truncate_table and not options.csv_path,
            "--truncate must be accompanied by --csv-path",
        ),
        (options.demo and options.csv_path, "--demo makes its own songs; leave out --csv-path"),
        (
            options.demo is not None and options.demo < 1,
            f"--demo needs at least 1 song; it is {options.demo}",
        ),
        (options.n_clusters < 2, f"--n-clusters must be 2 or more; it is {options.n_clusters}"),
        (
            options.failed and options.only,
            "--failed chooses the models itself; leave out --only",
        ),
        (options.cron and not options.serve, "--cron must be accompanied by --serve"),
        (
            not re.fullmatch(r"\d+\.?\d*", PAUSE),
            f"DATABASE_RETRY_SECONDS is {PAUSE!r}; write a number of seconds, such as 30",
        ),
        (
            options.serve and options.failed,
            "--serve trains what each run is asked for; leave out --failed",
        ),
        (0 <= memory < 2 << 30, "a run needs 2 GB; raise the limit (ulimit -v)"),
    ):
        if wrong:
            raise DataError(sentence)


PAUSE = db.setting("DATABASE_RETRY_SECONDS") or "30"  # before the database is tried again


def chosen(only: list[str] | str | None) -> list[str]:
    """Return the models asked for, in their usual order.

    `only` is None for all, a name, or names with or without commas. Raises DataError for another.
    """
    text = ",".join(only) if isinstance(only, list) else only
    names = [name.strip() for name in (text or ",".join(models.MODELS)).split(",")]
    for name in filter(None, names):
        if name not in models.MODELS:
            raise DataError(
                f"there is no model {name!r}; the models are {', '.join(models.MODELS)}"
            )
    return [name for name in models.MODELS if name in names]


def demand_dask(address: str | None) -> None:
    """Raise DataError where --dask is asked for and what it needs is not there."""
    if not address:
        return
    if not importlib.util.find_spec("prefect_dask"):
        raise DataError(
            "--dask needs prefect-dask; install it: pip install -c constraints.txt prefect-dask"
        )
    if not find_prefect():
        raise DataError(
            "--dask needs a Prefect server that the cluster's workers reach as well; start one: "
            "prefect server start --host 0.0.0.0; then: export PREFECT_API_URL=http://HOST:4200/api"
        )


def flow_parameters(options: argparse.Namespace) -> dict:
    """Return the options that are parameters of the flow."""
    others = ("failed", "check", "serve", "cron")
    return {name: value for name, value in vars(options).items() if name not in others}


# ---- How a run begins ----------------------------------------------------------------------------


@contextmanager
def a_run(parameters: dict, failed: bool = False) -> Iterator[Run]:
    """Give a run that is about to begin: it holds the models directory and has a fork server.

    With `failed` it is asked for what the last run owes, which may be nothing. Raises Locked, or
    DataError where the directory cannot be written to.
    """
    run = new_run(parameters)
    with models.one_run_at_a_time(Path(run.models_dir)) as lock:
        models.clean_up(run.models_dir)
        if failed:
            run.asked = models.owed(run.models_dir)
        if not run.asked:
            yield run
            return
        write_history(run, run.asked, "started")
        if run.enable_notifications:
            beat = threading.Thread(target=notify.heartbeat, args=["start"], daemon=True)
            beat.start()  # nobody waits for it
        with models.fork_server(lock), watched_memory(run):
            yield run


def new_run(parameters: dict) -> Run:
    """Return the run that the flow's parameters ask for."""
    demand_dask(parameters["dask"])
    folder = models_folder(parameters["models_dir"], parameters["demo"])
    return Run(
        parameters=parameters,
        asked=chosen(parameters["only"]),
        models_dir=str(folder),
        command=command_of(parameters, folder),
        started_at=datetime.now(UTC).isoformat(),
        host=socket.gethostname(),
    )


def models_folder(models_dir: str | None, demo: int | None) -> Path:
    """Return where the models go."""
    default = models.MODELS_DIR if demo is None else db.ROOT / "demo" / "models"
    return Path(models_dir or default).resolve()


def command_of(parameters: dict, folder: Path) -> str:
    """Return the command line that does the same, but for the models it trains and the CSV."""
    words: list[Any] = []
    defaults = {"table_name": "spotify_songs", "n_clusters": 2}
    for name in ("table_name", "n_clusters", "demo", "dask", "predict_into"):
        value = parameters[name]
        if value != defaults.get(name):
            words += [f"--{name.replace('_', '-')}", value]
    if parameters["models_dir"]:
        words += ["--models-dir", folder]
    if parameters["force"]:
        words.append("--force")
    if not parameters["enable_notifications"]:
        words.append("--no-notify")
    return db.command("train.py", *words)


@contextmanager
def watched_memory(run: Run) -> Iterator[None]:
    """Note the largest sum of what the processes of a run hold at once, while the block runs."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(MEMORY_SECONDS):
            run.peak_mb = max(run.peak_mb or 0, models.memory_mb())

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        ended.set()


# ---- How a run ends ------------------------------------------------------------------------------


def conclude(run: Run, error: BaseException | None, *steps: Callable[[Run], None]) -> None:
    """Decide what the run was, take the steps, tell everybody: once. What fails is a warning."""
    if run.exit_status is not None:
        return
    notify.decide(run, error)
    for step in steps:
        _, trouble = notify.attempt(step, run)
        if trouble:
            run.warnings.append(f"{step.__name__} failed: {notify.explain(trouble)}")
    tell(run, stopped=isinstance(error, Stopped))
    notify.attempt(models.write_json, Path(run.models_dir, "metrics", "run.json"), asdict(run))


def tell(run: Run, stopped: bool) -> None:
    """Draw the picture, post to Discord, send the heartbeat."""
    picture: Path | None = None
    if run.models and not stopped:
        picture = Path(run.models_dir, "report.png")
        _, trouble = notify.attempt(models.take, "draw", run, picture)
        if trouble:
            picture = None
            run.warnings.append(f"the picture could not be made: {notify.explain(trouble)}")
    if not run.enable_notifications:
        return
    notify.heartbeat("" if run.exit_status == TRAINED else "fail")
    url = db.setting("DISCORD_WEBHOOK_URL")
    if url:
        seconds = notify.STOPPED_SECONDS if stopped else notify.POST_SECONDS
        notify.post_discord(run, url, picture, seconds)


def write_history(run: Run, names: list[str], status: str, error: str | None = None) -> None:
    """Append a line per model to the history.

    One at the start, so that a run that is killed is known to owe them, and one at the end.
    """
    lines = [notify.history_line(run, name, status, error) for name in names]
    models.append_history(run.models_dir, lines)


# ---- Which Prefect -------------------------------------------------------------------------------


def find_prefect() -> str:
    """Return the address of the Prefect API to use; "" where there is none.

    It is that of the environment or .env, of Prefect's own files, or of a server on this machine.
    """
    url = os.environ.get("PREFECT_API_URL") or configured_prefect()
    if not url and answers(LOCAL_PREFECT):
        url = LOCAL_PREFECT
    os.environ["PREFECT_API_URL"] = url
    return url


def configured_prefect() -> str:
    """Return the API that Prefect's own files name, in their order; "" where none does."""
    profiles = read_toml(prefect_home() / "profiles.toml")
    active = os.environ.get("PREFECT_PROFILE") or profiles.get("active", "")
    for settings in (
        read_toml(Path("prefect.toml")),
        read_toml(Path("pyproject.toml")).get("tool", {}).get("prefect", {}),
    ):
        if url := settings.get("api", {}).get("url"):
            return url
    return profiles.get("profiles", {}).get(active, {}).get("PREFECT_API_URL", "")


def prefect_home() -> Path:
    return Path(os.environ.get("PREFECT_HOME") or "~/.prefect").expanduser()


def read_toml(path: Path) -> dict:
    try:
        return tomllib.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def answers(api: str) -> bool:
    """Return whether that is a Prefect API, if only to those who say who they are."""
    try:
        url = f"{api.rstrip('/')}/health"
        with urllib.request.urlopen(url, timeout=CHECK_SECONDS + 1) as reply:
            return reply.read(5) == b"true"
    except urllib.error.HTTPError as error:
        return error.code in (401, 403)
    except (OSError, ValueError, http.client.HTTPException):
        return False


@contextmanager
def prefect_server(run: Run) -> Iterator[None]:
    """Have a temporary Prefect server on a free port while the block runs; PREFECT_API_URL is it.

    Prefect would start one by itself, but only when the flow is called, and not end it where the
    run is killed. Where it is killed it is started again, with the same database: the flow goes on.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    os.environ["PREFECT_API_URL"] = f"http://127.0.0.1:{port}/api"
    # It lives as long as the run and has no UI: "Beginning flow run" and "View at" help nobody.
    os.environ.setdefault("PREFECT_LOGGING_LOGGERS_PREFECT_FLOW_RUNS_LEVEL", "CRITICAL")
    servers = [start_prefect_server(port)]
    ended = threading.Event()

    def watch() -> None:
        while len(servers) < SERVER_STARTS:
            servers[-1].wait()
            if ended.is_set():
                return
            run.warnings.append("Prefect's temporary server was killed; it was started again")
            log.warning(run.warnings[-1])
            servers.append(start_prefect_server(port))

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        servers[-1].kill()


def start_prefect_server(port: str) -> subprocess.Popen:
    words = [sys.executable, __file__, "prefect-server", port, str(os.getpid())]
    with models.signals_held():
        return subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for whoever started it
        )


def be_prefect_server(port: str, parent: str) -> NoReturn:
    """Be Prefect's server on that port until the process that started this one ends."""
    models.die_with(int(parent))
    if not (prefect_home() / "prefect.db").exists():
        # It makes a database, and two that do so at once spoil it for each other: one goes first.
        prefect_home().mkdir(parents=True, exist_ok=True)
        first = open(prefect_home() / "first-start.lock", "w")  # noqa: SIM115 (held until it is made)
        fcntl.flock(first, fcntl.LOCK_EX)
        threading.Timer(20, first.close).start()
    words = ["server", "start", "--host", "127.0.0.1", "--port", port, "--no-services", "--no-ui"]
    sys.argv = ["prefect", *words]
    runpy.run_module("prefect", run_name="__main__", alter_sys=True)
    sys.exit()


# ---- --check: nothing of it needs Prefect --------------------------------------------------------


def check(options: argparse.Namespace) -> NoReturn:
    """Look at everything at once, change nothing; print a line each; exit with 0, or 2.

    A line: what, ok or warning or problem, a sentence with the fix.
    """
    notify.quiet_logs()
    folder = models_folder(options.models_dir, options.demo)
    looks: dict[str, Callable[[], list]] = {
        "database": lambda: db.check(options.csv_path, options.table_name, options.demo),
        "models directory": lambda: models.check_folder(folder),
        "Discord": lambda: notify.check_discord(options.enable_notifications),
        "heartbeat": lambda: notify.check_heartbeat(options.enable_notifications),
        "Prefect": check_prefect,
    }
    pool = ThreadPoolExecutor()
    asked = {what: pool.submit(notify.attempt, look) for what, look in looks.items()}
    wait(asked.values(), CHECK_SECONDS)
    lines: list[tuple[str, str, str]] = []
    for what, future in asked.items():
        if not future.done():
            sentence = f"no answer within {CHECK_SECONDS} s; is it busy or out of reach?"
            lines.append((what, "problem", sentence))
            continue
        found, error = future.result()
        lines += [(what, "problem", notify.explain(error))] if error else found
    for what, state, sentence in lines:
        print(f"{what:18}{state:9}{notify.plain(sentence, 1000)}")
    sys.stdout.flush()
    problems = any(state == "problem" for _, state, _ in lines)
    os._exit(WRONG_INPUT if problems else TRAINED)  # whoever has not answered is not waited for


def check_prefect() -> list[tuple[str, str, str]]:
    """Return the line of --check on Prefect. Raises DataError where its API does not answer."""
    address = find_prefect()
    if not address:
        return [("Prefect", "ok", "a temporary server per run")]
    if not answers(address):
        raise DataError(
            f"{address} does not answer as a Prefect API; correct PREFECT_API_URL or start it: "
            "prefect server start"
        )
    return [("Prefect", "ok", f"{address} answers")]


# ---- python train.py: what need not wait for Prefect, whose import takes seconds -----------------

# The run of the command line. Where the flow is called otherwise it makes its own.
RUN: Run | None = None
NIGHT = ExitStack()  # what ends with it: lock, fork server, Prefect's server


def begin(options: argparse.Namespace) -> Run:
    """Begin the run of the command line, or exit where it cannot or need not."""
    notify.quiet_logs()
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    try:
        run = NIGHT.enter_context(a_run(flow_parameters(options), options.failed))
    except Locked as error:
        print(error, file=sys.stderr)
        sys.exit(LOCKED)
    except (DataError, OSError) as error:
        run = new_run(flow_parameters(options))
        log_without_prefect()
        conclude(run, error)
        notify.print_summary(run)
        sys.exit(run.exit_status)
    if not run.asked:
        print(f"nothing to do: the last run of every model in {run.models_dir} trained it")
        sys.exit(TRAINED)
    print(f"starting {', '.join(run.asked)}; models go to {run.models_dir}", flush=True)
    atexit.register(leave, run)  # before Prefect is imported: what it registers goes first
    return run


STOPPING = threading.Event()  # by a signal that came before the flow


def stop(number: int, _: Any) -> None:
    """Conclude the run on SIGTERM or Ctrl-C where the flow does not do so itself; exit.

    In a thread, while whatever the signal came into goes on: amid an import nothing else can be
    imported, and an exception may not come out as what it was.
    """
    ignore_signals()
    if RUN is None:
        sys.exit(128 + number)
    STOPPING.set()
    threading.Thread(target=stop_and_leave, args=[RUN, Stopped(128 + number)]).start()


def stop_and_leave(run: Run, why: Stopped) -> NoReturn:
    log_without_prefect()
    stop_run(run, why)
    leave(run)


def ignore_signals() -> None:
    """Let the first signal count."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def log_without_prefect() -> None:
    """Log as Prefect would, where it has not been imported and set up."""
    logging.basicConfig(
        format="%(asctime)s.%(msecs)03d | %(levelname)-7s | %(message)s",
        datefmt="%Y-%m-%d %H:%M:%S",
    )


def stop_run(run: Run, why: Stopped) -> None:
    """End the steps, which nothing can interrupt, and conclude."""
    models.end_steps()
    conclude(run, why)


LEAVING = threading.RLock()
SAID: list[Run] = []  # whose summary is printed


def leave(run: Run) -> NoReturn:
    """Print what the run was, end all that it started, and exit, whatever thread still waits."""
    with LEAVING:  # once, even if a signal or the timer of a stop comes amid it
        if run not in SAID:
            SAID.append(run)
            notify.print_summary(run)
        NIGHT.close()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(run.exit_status or TRAINED)


IS_COMMAND = __name__ == "__main__"
if IS_COMMAND:
    if sys.argv[1:2] == ["prefect-server"]:
        be_prefect_server(*sys.argv[2:])
    # What is sent to a Dask worker names this module, and __main__ is another one there.
    sys.modules["train"] = sys.modules[__name__]
    __name__ = "train"
    OPTIONS = parse_options()
    if OPTIONS.check:
        check(OPTIONS)
    if not OPTIONS.serve:
        RUN = begin(OPTIONS)
        OWN_SERVER = not find_prefect()
        if OWN_SERVER:
            NIGHT.enter_context(prefect_server(RUN))

from prefect import flow, runtime, task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext
from prefect.exceptions import TerminationSignal
from prefect.futures import PrefectFuture, as_completed
from prefect.settings import temporary_settings
from prefect.states import Completed, Crashed, Failed, State

# ---- The tasks: plain functions, decorated here and nowhere else ---------------------------------


def can_heal(task: Any, task_run: Any, state: State) -> bool:
    """Return whether to try a failed task again (Prefect's retry condition); if so, log it.

    Not what the same input brings back, nor what lacked memory. An error that ends the run is told
    at its end.
    """
    error = state.result(raise_on_failure=False)
    if isinstance(error, MemoryError) or not notify.heals(error):
        return False
    log.warning(
        "%s: %s; retrying in %s%g s (%d of %d)",
        task.task_run_name,
        notify.explain(error),
        "about " if task.retry_jitter_factor else "",
        task.retry_delay_seconds[task_run.run_count - 1],
        task_run.run_count,
        task.retries,
        extra={"model": task.task_run_name, "phase": "retrying"},
    )
    return True


NEEDS_ROOM = (Killed, MemoryError)  # not tried again beside other fits: alone, when they are done


def training_can_heal(task: Any, task_run: Any, state: State) -> bool:
    """Return the same of a training: not what is trained again alone, nor what is trained."""
    error = state.result(raise_on_failure=False)
    if isinstance(error, (*NEEDS_ROOM, NotPublished)):
        return False
    if not notify.heals(error):
        sentence = "%s: %s; not tried again: the same input would bring the same"
        log.error(sentence, task.task_run_name, notify.explain(error))
        return False
    return can_heal(task, task_run, state)


def load_csv(csv_path: str, url: str, table: str, truncate: bool, rejected_path: str) -> dict:
    return models.take("load_csv", csv_path, url, table, truncate, rejected_path)


def load_demo(count: int, url: str, table: str) -> dict:
    return models.take("load_demo", count, url, table)


def load_songs(url: str, table: str, models_dir: str) -> dict:
    return models.take("read_songs", url, table, models_dir)


def train_model(name: str, url: str | None, about: dict, models_dir: str, force: bool) -> dict:
    return models.take("train", name, url, about, models_dir, force)


def write_predictions(url: str, table: str, into: str, models_dir: str) -> int:
    return models.take("predict_table", url, table, into, models_dir)


# NO_CACHE: Prefect's default would hash what every task is given.
every: Any = {"cache_policy": NO_CACHE, "persist_result": False}
database: Any = {
    "retries": 2,
    "retry_delay_seconds": [float(PAUSE)] * 2 if re.fullmatch(r"\d+\.?\d*", PAUSE) else 30,
    "retry_condition_fn": can_heal,
    **every,
}
training: Any = {
    "retries": 3,
    "retry_delay_seconds": [2, 4, 8],
    "retry_jitter_factor": JITTER,
    "retry_condition_fn": training_can_heal,
    **every,
}
load_csv_task = task(name="load_csv_task", task_run_name="load CSV", **database)(load_csv)
load_demo_task = task(name="load_demo_task", task_run_name="load demo songs", **database)(load_demo)
load_songs_task = task(name="load_songs_task", task_run_name="load songs", **database)(load_songs)
predict_task = task(name="predict_task", task_run_name="predict", **database)(write_predictions)


def training_task(model: str, name: str) -> Any:
    """Return the task that trains a model; its runs are named after the model."""
    return task(name=name, task_run_name=model, **training)(train_model)


train_genre_model_task = training_task("genre", "train_genre_model_task")
train_clustering_model_task = training_task("clusters", "train_clustering_model_task")
train_energy_regression_model_task = training_task("energy", "train_energy_regression_model_task")
train_popularity_regression_model_task = training_task(
    "popularity", "train_popularity_regression_model_task"
)
train_similar_songs_model_task = training_task("similar", "train_similar_songs_model_task")

TASKS = {
    "genre": train_genre_model_task,
    "clusters": train_clustering_model_task,
    "energy": train_energy_regression_model_task,
    "popularity": train_popularity_regression_model_task,
    "similar": train_similar_songs_model_task,
}


# ---- The flow ------------------------------------------------------------------------------------


def run_name() -> str:
    """Return the name of a flow run: its time and table."""
    parameters = runtime.flow_run.parameters
    songs = parameters["table_name"] if parameters["demo"] is None else "demo songs"
    return f"{datetime.now():%Y-%m-%d %H:%M} {songs}"


@flow(name=NAME, flow_run_name=run_name)
def ml_training_pipeline(
    csv_path: str | None = None,
    table_name: str = "spotify_songs",
    truncate_table: bool = False,
    n_clusters: Annotated[int, Ge(2)] = 2,
    only: list[str] | str | None = None,
    enable_notifications: bool = True,
    models_dir: str | None = None,
    demo: int | None = None,
    force: bool = False,
    dask: str | None = None,
    predict_into: str | None = None,
) -> dict:
    """Train the models `only` names (all five by default) on the songs of a table.

    Args:
        csv_path: a CSV to load into the table first: a path or an http(s) URL; .csv.gz works.
        table_name: table or view of songs, TABLE or SCHEMA.TABLE.
        truncate_table: empty the table before the CSV is loaded.
        n_clusters: number of clusters, 2 or more.
        only: names of models: genre, clusters, energy, popularity, similar; all by default.
        enable_notifications: post to Discord and send a heartbeat, where their URLs are set.
        models_dir: where the models go; models/ beside train.py by default.
        demo: train on so many made-up songs in the embedded database instead.
        force: publish a model even if it is worse than the current one.
        dask: train on the Dask cluster whose scheduler is at this address: tcp://host:8786.
        predict_into: after the training, put predictions and neighbours of all songs there.

    Return what happened, the fields of notify.Run: {"status": "completed" or "partial", "models":
    {name: {"status", "metrics", "path", "seconds", ...}}, ...}. A model that fails does not raise:
    its entry has status "failed" and an error. Raises PipelineFailed when nothing could be trained,
    Locked when another run holds the models directory.
    """
    parameters = dict(locals())
    if RUN:
        return carry_out(RUN)
    notify.quiet_logs()
    with a_run(parameters) as run:
        return carry_out(run)


class PipelineFailed(db.Expected):
    """Nothing could be trained. `result` has the fields of the run."""

    def __init__(self, run: Run) -> None:
        super().__init__(run.message)
        self.result = asdict(run)


def carry_out(run: Run) -> Any:
    """Train, conclude, and return the Prefect state that the run ends in."""
    try:
        if STOPPING.is_set():
            raise TerminationSignal(signal.SIGTERM)
        _, error = notify.attempt(train_and_publish, run)
    except TerminationSignal:  # Prefect's word for SIGTERM
        stop_flow(run, Stopped(TERMINATED))
        raise
    except KeyboardInterrupt:
        stop_flow(run, Stopped(INTERRUPTED))
        raise
    conclude(run, error, write_artifacts)
    if run.status == "failed":
        return Failed(message=run.message, data=PipelineFailed(run))
    name = "Partial" if run.status == "partial" else None
    return Completed(name=name, message=run.message, data=asdict(run))


def stop_flow(run: Run, why: Stopped) -> None:
    """Conclude a run that is stopped amid the flow; see that the process ends soon.

    Prefect waits for every task, also for one that sleeps before its next try.
    """
    if RUN:
        ignore_signals()
    stop_run(run, why)
    if RUN:
        notify.attempt(tell_prefect, why)
        timer = threading.Timer(STOP_SECONDS, leave, [RUN])
    elif why.code == TERMINATED:
        timer = threading.Timer(STOP_SECONDS, os._exit, [why.code])
    else:
        return
    timer.daemon = True
    timer.start()


def tell_prefect(why: Stopped) -> None:
    """Set the flow run's state, which Prefect would do when its tasks have ended."""
    with get_client(sync_client=True) as client:
        state: State = Crashed(message=str(why))
        client.set_flow_run_state(runtime.flow_run.id, state, force=True)


def write_artifacts(run: Run) -> None:
    """Put the metrics where Prefect's UI shows them: a table of the run, a page for each model."""
    history = models.read_history(run.models_dir)
    for name, outcome in run.models.items():
        page = notify.model_page(name, outcome, history)
        description = notify.in_short(name, outcome)
        create_markdown_artifact(page, key=f"model-{name}", description=description)
    rows = [notify.table_row(name, outcome) for name, outcome in run.models.items()]
    create_table_artifact(rows, key="metrics", description=run.message)


# ---- The steps of the flow -----------------------------------------------------------------------


def train_and_publish(run: Run) -> None:
    """Read the songs, train the models side by side, predict if asked to; note what became of it.

    What was killed, or did not get enough memory beside the others, is trained once more, alone.
    """
    with notify.live_status(run.asked):
        url = read_songs(run)
        log.info("training %s", ", ".join(run.asked))
        with task_runner(run) as runner:
            train_all(run, runner, url)
        into = run.parameters["predict_into"]
        if into:
            predict_task(url, run.table, into, run.models_dir)


def train_all(run: Run, runner: Any, url: str) -> None:
    """Have the models trained by the task runner; note each as soon as it is ready."""
    futures = {submit(runner, run, name, url): name for name in run.asked}
    again = []
    for future in as_completed(list(futures)):
        name = futures[future]
        report, error = notify.attempt(future.result)
        if isinstance(error, NEEDS_ROOM):
            note_crash(run, name, error)
            again.append(name)
        else:
            note(run, name, report, error)
        forget(future)
    for name in again:
        report, error = notify.attempt(submit(runner, run, name, url).result)
        note(run, name, report, error)
    note_lost_workers(run, runner, futures)


def read_songs(run: Run) -> str:
    """Load the CSV or the demo songs, if asked for; read the table; return the database's URL."""
    given = run.parameters
    url = db.database_url(demo=run.demo is not None)
    if run.demo:
        load_demo_task(run.demo, url, run.table)
    elif given["csv_path"]:
        rejected = str(Path(run.models_dir, "rejected_rows.csv"))
        run.csv = load_csv_task(
            given["csv_path"], url, run.table, given["truncate_table"], rejected
        )
        run.warnings += run.csv.get("warnings", [])
    start = time.monotonic()
    songs = load_songs_task(url, run.table, run.models_dir)
    run.rows = songs["rows"]
    run.read_seconds = time.monotonic() - start
    log.info("%s songs read from %s in %.1f s", f"{run.rows:,}", run.table, run.read_seconds)
    run.warnings += songs["warnings"]
    return url


def submit(runner: Any, run: Run, name: str, url: str) -> PrefectFuture:
    """Have a model trained."""
    settings = {"n_clusters": run.parameters["n_clusters"]} if name == "clusters" else {}
    about = {
        "run": run.started_at,
        "table": run.table,
        "command": run.command,
        "settings": settings,
    }
    # A worker on another machine has a DATABASE_URL of its own: the password stays here.
    elsewhere = run.parameters["dask"] and url == db.setting("DATABASE_URL")
    parameters = {
        "name": name,
        "url": None if elsewhere else url,
        "about": about,
        "models_dir": run.models_dir,
        "force": run.parameters["force"],
    }
    train_task = TASKS.get(name) or training_task(name, f"train_{name}_model_task")
    return runner.submit(train_task, parameters)


def note(run: Run, name: str, report: dict | None, error: Any) -> None:
    """Write down what became of a model: in the run, the history and the log."""
    outcome = notify.outcome_of(report, run.models_dir) if report else notify.failed(error)
    done = run.models | {name: outcome}
    run.models = {other: done[other] for other in run.asked if other in done}
    notify.attempt(write_history, run, [name], outcome.status)
    good = outcome.status == "trained"
    log.log(
        logging.INFO if good else logging.WARNING,
        "%s",
        notify.in_short(name, outcome),
        extra={"model": name, "phase": "done" if good else outcome.status},
    )


def note_crash(run: Run, name: str, error: Exception) -> None:
    """Write down that a training needs to be alone: in the run, the history and the log."""
    reason = notify.explain(error)
    run.crashes.append(f"{name}: {reason}; it was trained again, alone")
    notify.attempt(write_history, run, [name], "failed", reason)
    sentence = "%s: %s; it is trained again, alone, when the others are done"
    log.warning(sentence, name, reason, extra={"model": name, "phase": "retrying"})


def task_runner(run: Run) -> Any:
    """Give, as a context, what runs the trainings: the flow's threads, or a Dask cluster."""
    if run.parameters["dask"]:
        return cluster(run.parameters["dask"])
    context = FlowRunContext.get()
    return nullcontext(context.task_runner if context else None)


# ---- Dask, only with --dask ----------------------------------------------------------------------


@contextmanager
def cluster(address: str) -> Iterator[Any]:
    """Give a task runner on the Dask cluster at the address."""
    from prefect_dask import DaskTaskRunner

    with DaskTaskRunner(address=address) as runner:
        try:
            runner.client.wait_for_workers(1, DASK_SECONDS)
        except ValueError as error:
            raise DataError(
                f"--dask {address} is not an address ({error}); write tcp://HOST:8786"
            ) from None
        except OSError as error:
            raise ConnectionError(
                f"no Dask cluster with a worker answers at {address} ({error}); start one: "
                f"dask scheduler; dask worker {address}"
            ) from None
        yield runner


def forget(future: Any) -> None:
    """Let Dask forget a training that is done: else it trains again where its worker dies later."""
    if hasattr(future.wrapped_future, "release"):
        future.wrapped_future.release()


def note_lost_workers(run: Run, runner: Any, futures: dict[Any, str]) -> None:
    """Write down which trainings lost their Dask worker: Dask has begun them again by itself."""
    if not run.parameters["dask"]:
        return
    for _, event in runner.client.get_events("all"):
        for future, name in futures.items():
            if future.wrapped_future.key in event.get("processing-tasks", ()):
                run.crashes.append(
                    f"{name}: its Dask worker {event['worker']} was lost; it was trained again"
                )


# ---- python train.py, the rest of it -------------------------------------------------------------


def main(run: Run) -> NoReturn:
    """Run the flow for the command line; exit with the run's status."""
    deadline = time.monotonic() + START_SECONDS
    while OWN_SERVER and time.monotonic() < deadline and not answers(os.environ["PREFECT_API_URL"]):
        time.sleep(0.05)
    # Our own server needs no heartbeat to know of a crash, and Prefect waits up to a second for
    # the thread that sends it.
    own = {"flows.heartbeat_frequency": None} if OWN_SERVER else None
    if not STOPPING.is_set():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # the flow knows KeyboardInterrupt
    try:
        with temporary_settings(own):
            _, error = notify.attempt(lambda: ml_training_pipeline(**run.parameters))
        conclude(run, error)  # where Prefect failed before the flow could say anything
    except (KeyboardInterrupt, TerminationSignal):
        stop_and_leave(run, Stopped(INTERRUPTED))  # if the flow has not concluded it
    sys.exit(run.exit_status)


# ---- --serve -------------------------------------------------------------------------------------


def serve(options: argparse.Namespace) -> NoReturn:
    """Be the deployment until a signal comes.

    Prefect starts a process for each run, and ends it when this one ends.
    """
    status, error = notify.attempt(lambda: asyncio.run(serve_until_stopped(options)))
    if error:
        print(f"train.py: error: {notify.explain(error)}", file=sys.stderr, flush=True)
        status = WRONG_INPUT
    os._exit(status)  # what Python does after it, for Prefect's threads, takes 2 s


async def serve_until_stopped(options: argparse.Namespace) -> int:
    """Serve; return the exit status that goes with the signal that came."""
    from prefect.runner import Runner
    from prefect.schedules import Cron

    if not find_prefect():
        raise DataError("--serve needs a Prefect server; start one: prefect server start")
    check_prefect()
    try:
        schedules = [Cron(options.cron)] if options.cron else []
    except ValueError:
        raise DataError(
            f'--cron {options.cron!r} is no cron expression; write five fields: "0 3 * * *"'
        ) from None
    # limit: a run that is due while another trains waits for it instead of finding it locked.
    runner = Runner(name=NAME, limit=1)
    loop = asyncio.get_running_loop()
    stopped_by: list[int] = []
    await runner.aadd_flow(
        ml_training_pipeline,
        name=NAME,
        parameters=flow_parameters(options),
        schedules=schedules,
    )

    def end_serving(number: int, _: Any) -> None:
        stopped_by.append(number)
        loop.call_soon_threadsafe(loop.create_task, runner.astop())

    # flow.serve's own does not await this, and so waits for the run to end.
    setattr(runner, "handle_sigterm", end_serving)  # noqa: B010 (a method, to mypy)
    signal.signal(signal.SIGINT, end_serving)
    print(
        f"serving {NAME}/{NAME}; start a run with: prefect deployment run {NAME}/{NAME}", flush=True
    )
    await runner.start()
    return 128 + stopped_by[0] if stopped_by else 1


if IS_COMMAND:
    if OPTIONS.serve:
        serve(OPTIONS)
    elif RUN:
        main(RUN)
