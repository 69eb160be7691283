"""Train the five song models from a PostgreSQL table, every night, unattended.

python train.py                                   # train all five from DATABASE_URL
python train.py --only similar                    # one model; repeat or comma-separate for more
python train.py --csv-path songs.csv --table-name spotify_songs --truncate --n-clusters 2
python train.py --demo 50000                      # made-up songs, embedded database, no set-up at all
python train.py --check                           # look at everything, train nothing
python train.py --failed                          # only the models that the last run still owes
python train.py --serve --cron "0 3 * * *"        # a Prefect deployment (needs a Prefect server)
from train import ml_training_pipeline            # in Python: a Prefect flow like any other
"""

import argparse
import asyncio
import hashlib
import http.client
import importlib.util
import json
import logging
import os
import re
import resource
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import wraps
from pathlib import Path
from typing import Annotated

# Prefect as a nightly job needs it. A model has one thread: OpenMP's threads wait for each other at every step, so two
# were four to thirteen times slower than one on small tables, and beside other work. Only defaults: the environment wins.
for name, value in {
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "PREFECT_LOGGING_EXTRA_LOGGERS": "train,models,db,notify",
    "PREFECT_LOGGING_LOGGERS_PREFECT_TASK_RUNS_LEVEL": "CRITICAL",
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
    "PREFECT_LOGGING_FORMATTERS_STANDARD_DATEFMT": "%Y-%m-%d %H:%M:%S",
    "OMP_NUM_THREADS": "1",
}.items():
    os.environ.setdefault(name, value)

import db

if api := db.setting(
    "PREFECT_API_URL"
):  # also from .env, which Prefect reads in the current folder only
    os.environ["PREFECT_API_URL"] = api

import models
import notify
from db import DataError
from models import Locked
from notify import Outcome

if (
    __name__ == "__main__"
):  # the process that watches: it starts at once and is never deep in a library, so no Prefect
    NO_CACHE, task, flow = (
        None,
        lambda function, **_: function,
        lambda **_: lambda function: function,
    )
else:
    from prefect import flow, runtime, task
    from prefect.artifacts import create_markdown_artifact, create_table_artifact
    from prefect.cache_policies import NO_CACHE
    from prefect.context import get_run_context
    from prefect.exceptions import TerminationSignal
    from prefect.futures import as_completed
    from prefect.settings import temporary_settings
    from prefect.states import Completed, Failed
from annotated_types import Ge

NAME = "ml-training-pipeline"
# Exit statuses.
TRAINED = 0
PARTIAL = 1
WRONG_INPUT = 2
NOTHING_TRAINED = 3
LOCKED = 75
TERMINATED = 143
INTERRUPTED = 130

LOCAL_PREFECT = "http://127.0.0.1:4200/api"  # where `prefect server start` listens
START_SECONDS = (
    120  # Prefect's server: a first start makes its database, 15 s and more on a small machine
)
STOP_SECONDS = 3  # from SIGTERM to SIGKILL: a fit in C code cannot be interrupted
DASK_SECONDS = 30  # for a Dask cluster to answer and to have a worker
CHECK_SECONDS = 4  # for all that --check looks at, side by side

log = logging.getLogger("train")


# ---- The tasks: plain functions, decorated here and nowhere else ------------------------------------------------------


def can_heal(task, task_run, state) -> bool:
    """Prefect's retry condition: False for what the same input brings back, and for want of memory; said in the log."""
    error, name = state.result(raise_on_failure=False), task.task_run_name
    if isinstance(error, MemoryError):  # not while the others hold theirs: it is tried again alone
        return False
    if not notify.heals(error):
        log.error(
            "%s: %s; not tried again: the same input would bring the same",
            name,
            notify.explain(error),
        )
        return False
    log.warning(
        "%s: %s; retrying in %g s (%d of %d)",
        name,
        notify.explain(error),
        task.retry_delay_seconds[task_run.run_count - 1],
        task_run.run_count,
        task.retries,
        extra={"model": name, "phase": "retrying"},
    )
    return True


def safely(step):
    """Return the step as [what it returns, seconds], with errors that hold no secret: Prefect writes them into states."""

    @wraps(step)
    def safe(*arguments, **settings):
        start = time.monotonic()
        try:
            return [step(*arguments, **settings), time.monotonic() - start]
        except MemoryError:
            pass  # its traceback would keep the arrays of the failed fit alive
        except Exception as error:
            error.args = tuple(
                db.redact(part) if isinstance(part, str) else part for part in error.args
            )
            raise
        raise MemoryError

    return safe


# NO_CACHE: Prefect's default would pickle and hash every song for every task.
every = {"retry_condition_fn": can_heal, "cache_policy": NO_CACHE, "persist_result": False}
PAUSE = db.setting("DATABASE_RETRY_SECONDS") or "30"
database = {"retries": 2, "retry_delay_seconds": lambda retries: [float(PAUSE)] * retries, **every}
training = {"retries": 3, "retry_delay_seconds": [2, 4, 8], **every}
load_csv_task = task(
    safely(db.load_csv), name="load_csv_task", task_run_name="load CSV", **database
)
load_demo_task = task(
    safely(db.load_demo), name="load_demo_task", task_run_name="load demo songs", **database
)
load_songs_task = task(
    safely(db.load_songs), name="load_songs_task", task_run_name="load songs", **database
)
predict_task = task(
    safely(models.predict_table), name="predict_task", task_run_name="predict", **database
)


TASKS = {}


def training_task(model: str, name: str):
    TASKS[model] = task(safely(models.MODELS[model]), name=name, task_run_name=model, **training)
    return TASKS[model]


train_genre_model_task = training_task("genre", "train_genre_model_task")
train_clustering_model_task = training_task("clusters", "train_clustering_model_task")
train_energy_regression_model_task = training_task("energy", "train_energy_regression_model_task")
train_popularity_regression_model_task = training_task(
    "popularity", "train_popularity_regression_model_task"
)
train_similar_songs_model_task = training_task("similar", "train_similar_songs_model_task")


# ---- The flow ---------------------------------------------------------------------------------------------------------


def run_name() -> str:
    parameters = runtime.flow_run.parameters
    return f"{datetime.now():%Y-%m-%d %H:%M} {parameters['table_name'] if parameters['demo'] is None else 'demo songs'}"


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
        predict_into: after the training, put every song's predictions and neighbours into this table.

    Returns {"status": "completed" or "partial", "models": {name: {"status", "metrics", "path", "seconds", ...}}, ...}.
    A model that fails does not raise: its entry has status "failed" and an error. Raises PipelineFailed when nothing
    could be trained, Locked when another run holds the models directory.
    """
    with the_run(dict(locals())) as result:
        tell_watcher(result, flow_run_id=str(runtime.flow_run.id))
        try:
            _, error = notify.attempt(train_and_publish, result)
        except (
            TerminationSignal
        ):  # Prefect's word for SIGTERM; it waits for the fits, which nothing can interrupt
            if not WATCHED:
                conclude(result, notify.Stopped(TERMINATED))
            threading.Timer(STOP_SECONDS, os._exit, [TERMINATED]).start()
            raise
        conclude(result, error, write_artifacts)
    if result.status == "failed":
        return Failed(message=result.message, data=PipelineFailed(asdict(result)))
    return Completed(
        name="Partial" if result.status == "partial" else None,
        message=result.message,
        data=asdict(result),
    )


# ---- The steps of the flow --------------------------------------------------------------------------------------------

WATCHED = {}  # where a process watches over this one: the result that both know, and the pipe that takes news of it there


class RunEnded(db.Expected):
    """A signal that nobody sent has ended the process that trains: the kernel's where memory is short, a library's crash."""


class PipelineFailed(db.Expected):
    """Nothing could be trained. `result` is the description of the run."""

    def __init__(self, result: dict):
        super().__init__(result["message"])
        self.result = result


@contextmanager
def the_run(parameters: dict):
    """Give the result to be filled in: that of the process that watches, which holds the lock, or a new one."""
    notify.quiet_logs()
    if WATCHED:
        yield WATCHED["result"]
        return
    result = new_result(parameters)
    with models.one_run_at_a_time(Path(result.models_dir)):
        begin(result)
        yield result


def new_result(parameters: dict) -> notify.Run:
    check_dask(parameters["dask"])
    folder = models_folder(parameters["models_dir"], parameters["demo"])
    return new_run(parameters, chosen(parameters["only"]), folder)


def begin(result: notify.Run, failed: bool = False) -> None:
    """Clean up after a killed run, find out what `--failed` means, write down what is about to be trained."""
    models.clean_up(result.models_dir)
    if failed:
        result.asked = models.owed(result.models_dir)
    write_history(result, result.asked, "started")


def get_songs(result: notify.Run):
    """Check the database, load the CSV if there is one, read the songs: once, for all models."""
    given, table = result.parameters, result.table
    url = db.database_url(demo=given["demo"])
    if given["demo"]:
        load_demo_task(given["demo"], url, table)
    elif given["csv_path"] and not result.csv:
        loaded, _ = load_csv_task(
            given["csv_path"],
            url,
            table,
            given["truncate_table"],
            Path(result.models_dir) / "rejected_rows.csv",
        )
        tell_watcher(result, csv=loaded)
    songs, seconds = load_songs_task(url, table)
    tell_watcher(result, rows=len(songs), read_seconds=seconds)
    log.info("%s songs read from %s in %.1f s", f"{len(songs):,}", table, seconds)
    return songs


def train_and_publish(result: notify.Run) -> None:
    """Read the songs, train the models side by side, publish each as soon as it is ready, note what became of it.

    One after another where the run was ended once; and what did not get enough memory beside the others, again alone.
    """
    songs, dask, owed = get_songs(result), result.parameters["dask"], owed_models(result)
    data = models.describe(songs)
    for moved in models.drift_since(data, result.table, result.models_dir):
        log.warning("the songs are not those of the last training: %s", moved)
        result.warnings.append(moved)
    alone = bool(result.crashes)
    log.info("training %s%s", ", ".join(owed), " one after another" * alone)
    if WATCHED:
        with suppress(
            OSError
        ):  # Linux: where memory is short, the kernel shall end this process and no database
            Path("/proc/self/oom_score_adj").write_text("500")
    runner = (
        cluster(dask, songs, len(owed))
        if dask
        else nullcontext((get_run_context().task_runner, songs))
    )
    with runner as (runner, sent), notify.live_status(owed):

        def submit(name):
            train_task = TASKS.get(name) or training_task(name, f"train_{name}_model_task")
            return runner.submit(train_task, {"songs": sent, **settings(result, name)})

        if not alone:
            futures = {submit(name): name for name in owed}
            owed = [
                futures[future]
                for future in as_completed(list(futures))
                if isinstance(publish(result, futures[future], future, data), MemoryError)
            ]
        for name in owed:
            tell_watcher(result, training=name)
            publish(result, name, submit(name), data)
        tell_watcher(result, training=None)
    if into := result.parameters["predict_into"]:
        predict_task(db.database_url(demo=result.demo), result.table, into, result.models_dir)


def settings(result: notify.Run, name: str) -> dict:
    return {"n_clusters": result.parameters["n_clusters"]} if name == "clusters" else {}


def publish(result: notify.Run, name: str, future, data: dict) -> Exception | None:
    """Publish a model that is ready, or note why there is none; return the error, if there was one."""
    trained, error = notify.attempt(future.result)
    if not error:
        (estimator, metrics), seconds = trained
        trained.clear()  # Prefect keeps the result of a task to the end of the flow; a model is large
        about = {
            "run": result.started_at,
            "table": result.table,
            "command": result.command,
            "seconds": seconds,
            "settings": settings(result, name),
            "data": data,
            "rows": data["rows"],
        }
        folder = result.models_dir
        report, error = notify.attempt(
            models.publish, name, estimator, metrics, about, folder, result.parameters["force"]
        )
    if result.parameters["dask"]:
        future.wrapped_future.release()  # else Dask trains finished models again where their worker dies later
    note(result, name, notify.failed(error) if error else notify.outcome_of(report, folder))
    return error


def note(result: notify.Run, name: str, model: Outcome) -> None:
    """Write down what became of a model: in the result, the history and the log."""
    done = result.models | {name: model}
    result.models = {other: done[other] for other in result.asked if other in done}
    notify.attempt(write_history, result, [name], model.status)
    tell_watcher(result)
    good = model.status == "trained"
    log.log(
        logging.INFO if good else logging.WARNING,
        "%s",
        notify.in_short(name, model),
        extra={"model": name, "phase": "done" if good else model.status},
    )


def write_history(result: notify.Run, names: list[str], status: str) -> None:
    """Append a line per model to the history: at the start, so that a killed run is known to owe them, and at the end."""
    models.append_history(result.models_dir, [history_line(result, name, status) for name in names])


def owed_models(result: notify.Run) -> list[str]:
    return [name for name in result.asked if name not in result.models]


def conclude(result: notify.Run, error: BaseException | None, *steps) -> None:
    """Decide what the run was, take the steps, tell everybody: once. What fails in a step is a warning, no more."""
    if result.exit_status is None:
        decide(result, error)
        for step in steps:
            _, trouble = notify.attempt(step, result)
            result.warnings += [f"{step.__name__} failed: {notify.explain(trouble)}"] * bool(
                trouble
            )
        notify.tell(result, models.read_history(result.models_dir))
        notify.attempt(
            models.write_json, Path(result.models_dir) / "metrics" / "run.json", asdict(result)
        )
        tell_watcher(result)


def write_artifacts(result: notify.Run) -> None:
    """Put the metrics where Prefect's UI shows them: a table for the run, a page per model whose versions accumulate."""
    for name, model in result.models.items():
        page = notify.model_page(name, model, models.read_history(result.models_dir))
        create_markdown_artifact(
            page, key=f"model-{name}", description=notify.in_short(name, model)
        )
    rows = [notify.table_row(name, model) for name, model in result.models.items()]
    create_table_artifact(rows, key="metrics", description=result.message)


# ---- The end of a run ----------------------------------------------------------------------------


@dataclass
class Run(notify.Run):
    """A run as the process that watches knows it."""

    flow_run_id: str | None = None
    training: str | None = None  # the model that is being trained alone


def run_from(content: dict) -> Run:
    """Return the run that `asdict` made this of."""
    models_done = {name: Outcome(**outcome) for name, outcome in content["models"].items()}
    return Run(**content | {"models": models_done})


def new_run(parameters: dict, asked: list[str], folder: Path) -> Run:
    """Return a run that is about to begin.

    `parameters`: the flow's; `asked`: names of models; `folder`: the models directory.
    """
    return Run(
        parameters=parameters,
        asked=list(asked),
        models_dir=str(folder.resolve()),
        command=db.command("train.py", *command_line(parameters, folder)),
        started_at=datetime.now(UTC).isoformat(),
        host=socket.gethostname(),
    )


def command_line(parameters: dict, folder: Path) -> list:
    """Return the arguments of train.py that do the same, without the CSV and the models."""
    defaults = {
        "table_name": "spotify_songs",
        "n_clusters": 2,
        "demo": None,
        "dask": None,
        "predict_into": None,
    }
    arguments: list = []
    for name, default in defaults.items():
        value = parameters.get(name, default)
        if value != default:
            arguments += [f"--{name.replace('_', '-')}", value]
    if parameters["models_dir"]:
        arguments += ["--models-dir", folder.resolve()]
    if parameters["force"]:
        arguments.append("--force")
    if not parameters["enable_notifications"]:
        arguments.append("--no-notify")
    return arguments


def decide(run: notify.Run, error: BaseException | None = None) -> None:
    """Decide what the run was: status, exit status, message, and the command that finishes it.

    `error`: what ended it early, if anything did. What was decided once stays.
    """
    if run.exit_status is not None:
        return
    if error:
        run.error = notify.explain(error)
    trained = with_status(run, "trained")
    if len(with_status(run, "failed")) == len(run.models):
        run.status = "failed"
        run.exit_status = WRONG_INPUT if isinstance(error, DataError) else NOTHING_TRAINED
    elif error or len(trained) < len(run.asked):
        run.status = "partial"
        run.exit_status = PARTIAL
    else:
        run.status = "completed"
        run.exit_status = TRAINED
    if isinstance(error, notify.Stopped):
        run.exit_status = error.code
    run.message = message_of(run)
    missing = [name for name in run.asked if name not in run.models]
    heals = [name for name, outcome in run.models.items() if outcome.heals]
    if (missing or heals) and (error is None or notify.heals(error)):
        run.finish_command = finish_command(run)
    run.seconds = seconds_since_start(run)
    run.peak_mb = peak_mb(run.peak_mb)


def with_status(run: notify.Run, status: str) -> list[str]:
    """Return the names of the models with that status, in their usual order."""
    return [name for name in run.asked if name in run.models and run.models[name].status == status]


def message_of(run: notify.Run) -> str:
    """Return the run in a sentence."""
    if not run.models:
        return f"Nothing was trained: {run.error or 'no reason was given'}"
    said = [f"{len(with_status(run, 'trained'))} of {len(run.asked)} models trained"]
    for status, word in (("held_back", "held back"), ("failed", "failed")):
        names = with_status(run, status)
        if names:
            said.append(f"{word}: {', '.join(names)}")
    if run.error:
        said.append(run.error)
    return "; ".join(said)


def finish_command(run: notify.Run) -> str:
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


def history_line(run: notify.Run, name: str, status: str) -> dict:
    """Return the line of history.jsonl on a model of a run."""
    outcome = run.models.get(name) or Outcome(status)
    metric, value = next(iter(outcome.metrics.items()), (None, None))
    return {
        "run": run.started_at,
        "model": name,
        "status": status,
        "metric": metric,
        "value": value,
        "seconds": outcome.seconds,
        "rows": run.rows,
        "read_seconds": run.read_seconds,
        "run_seconds": round(seconds_since_start(run), 2),
        "peak_mb": peak_mb(),
        "error": outcome.error,
    }


def seconds_since_start(run: notify.Run) -> float:
    return (datetime.now(UTC) - datetime.fromisoformat(run.started_at)).total_seconds()


def peak_mb(so_far: float | None = None) -> float:
    """Return the largest memory of this process and of those it waited for, in MB."""
    peak = max(
        resource.getrusage(who).ru_maxrss
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    unit = 1024 if sys.platform == "linux" else 1024**2  # macOS counts bytes
    return max(so_far or 0, peak // unit)


@contextmanager
def cluster(address: str, songs, copies: int):
    """Give (a task runner on the Dask cluster at the address, a future of the songs, which are sent there once)."""
    from distributed.diagnostics.plugin import SchedulerUploadFile, UploadFile
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
                f"no Dask cluster with a worker answers at {address} ({error}); "
                f"start one: dask scheduler; dask worker {address}"
            ) from None
        for path in (db.__file__, models.__file__, notify.__file__, __file__):
            for plugin in (SchedulerUploadFile(path), UploadFile(path)):
                # Once per version of a file: one that is loaded anew amid another run spoils that run's estimators.
                plugin.idempotent = True
                runner.client.register_plugin(
                    plugin, f"{plugin.filename} {hashlib.sha256(plugin.data).hexdigest()}"
                )
        # A call, not scattered data: where the worker that holds the songs dies, Dask makes the call again.
        sent = runner.client.submit(lambda: songs, pure=False)
        runner.client.replicate(
            sent, copies
        )  # Dask gives a task only to workers that have its data
        yield runner, sent


# ---- The process that trains, a child of the one that watches ---------------------------------------------------------


def run(pipe: int, own_server: bool) -> None:
    """Run the flow on the result that comes in on standard input; news of it go out through the pipe."""
    WATCHED.update(result=run_from(json.load(sys.stdin)), pipe=pipe)
    _, error = notify.attempt(run_flow, own_server)
    conclude(WATCHED["result"], error)  # where Prefect failed before the flow could say anything


def run_flow(own_server: bool) -> None:
    for heavy in ("pandas", "sklearn.ensemble", "sklearn.pipeline", "matplotlib.figure"):
        importlib.import_module(
            heavy
        )  # while the server boots; and of five threads that import it at once, some see half of it
    deadline = time.monotonic() + START_SECONDS
    while own_server and time.monotonic() < deadline and not answers(os.environ["PREFECT_API_URL"]):
        time.sleep(0.05)
    # Our own server needs no heartbeat to know of a crash, and Prefect waits up to a second for its thread to end.
    with temporary_settings({"flows.heartbeat_frequency": None} if own_server else None):
        ml_training_pipeline(**WATCHED["result"].parameters)


def tell_watcher(result: notify.Run, **news) -> None:
    for key, value in news.items():
        setattr(result, key, value)
    if WATCHED:
        with open(WATCHED["pipe"], "w", closefd=False) as pipe:
            pipe.write(json.dumps(asdict(result)) + "\n")


# ---- The process that watches: lock, Prefect's server, the process that trains, and what to do when that is ended -----

# os._exit: what Python does after our last word, for Prefect's threads, takes a second.
RUN = (
    "import atexit, os; atexit.register(os._exit, 0); import train; train.run({pipe}, {own_server})"
)
# Where Prefect never ran its server makes a database, and two that do so at once spoil it for each other: one goes first.
SERVER = """import fcntl, os, runpy, threading
home = os.path.expanduser(os.environ.get("PREFECT_HOME") or "~/.prefect")
if not os.path.exists(home + "/prefect.db"):
    os.makedirs(home, exist_ok=True)
    first = open(home + "/first-start.lock", "w")
    fcntl.flock(first, fcntl.LOCK_EX)
    threading.Timer(20, first.close).start()
runpy.run_module("prefect", run_name="__main__", alter_sys=True)"""
CRASHED = """from prefect.client.orchestration import get_client; from prefect.states import Crashed
sys.stdin.read()  # the imports take a second or two; meanwhile the run is being ended
with get_client(sync_client=True) as client:
    client.set_flow_run_state(sys.argv[1], Crashed(message=sys.argv[2]), force=True)"""


def main(options: argparse.Namespace) -> int:
    """Train as the options say; return the exit status."""
    logging.basicConfig(
        format="%(asctime)s.%(msecs)03d | %(levelname)-7s | %(message)s",
        datefmt="%Y-%m-%d %H:%M:%S",
    )
    notify.quiet_logs()
    on_signals(stop)
    result = new_result(flow_parameters(options))
    try:
        with models.one_run_at_a_time(Path(result.models_dir)) as lock:
            begin(result, options.failed)
            if not result.asked:
                print(
                    f"nothing to do: the last run of every model in {result.models_dir} trained it"
                )
                return TRAINED
            print(
                f"starting {', '.join(result.asked)}; models go to {result.models_dir}",
                flush=True,
            )
            watch(result, lock)
    except Locked as error:
        print(error, file=sys.stderr)
        return LOCKED
    except (notify.Stopped, DataError, OSError) as error:
        conclude(result, error)
    notify.print_summary(result)
    return result.exit_status


def on_signals(handler) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handler)


def stop(number, _):
    on_signals(signal.SIG_IGN)  # the first one counts
    raise notify.Stopped(128 + number)


def watch(result: notify.Run, lock) -> None:
    """Have the flow run in a process of its own, and again where a signal that nobody sent has ended it."""
    server, process = None if find_prefect() else start_prefect_server(), None
    try:
        while result.exit_status is None:
            process, news = start_run(result, lock, server is not None)
            with news:
                for line in news:
                    if line.endswith("\n"):  # it may be killed amid a word
                        vars(result).update(vars(run_from(json.loads(line))))
            if process.wait() in (-signal.SIGTERM, TERMINATED):
                raise notify.Stopped(TERMINATED)
            if result.exit_status is None:
                carry_on(result, process)
    except notify.Stopped as why:
        end_run(process, result, why)
        raise
    finally:
        end(process)
        end(server)
        sys.stderr.write("\x1b[?25h" * sys.stderr.isatty())  # the cursor, which live lines hide


def start_run(result: notify.Run, lock, own_server: bool):
    """Start the process that trains; return it and the stream of its news, a line of JSON each time the result changes."""
    read, write = os.pipe()
    process = start_python(
        RUN.format(pipe=write, own_server=own_server),
        stdin=subprocess.PIPE,
        pass_fds=(lock.fileno(), write),
    )
    os.close(write)
    with suppress(BrokenPipeError), process.stdin:
        process.stdin.write(json.dumps(asdict(result)).encode())
    return process, open(read)


def carry_on(result: notify.Run, process) -> None:
    """Note that the run was ended, and by which model; conclude where nothing is left that a new one could train."""
    status = process.returncode
    how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
    memory = " (was memory short?)" if status == -signal.SIGKILL else ""
    error, culprit, first = (
        RunEnded(f"the run was ended by {how}{memory}"),
        result.training,
        not result.crashes,
    )
    amid = (
        f" while training {culprit or ', '.join(owed_models(result))}"
        if result.rows
        else " before training"
    )
    end_run(process, result, f"{error}{amid}")
    again = "; it was started again, one model at a time" * first
    result.training = None
    result.crashes.append(f"{error}{amid}{again}")
    if culprit and not first:
        note(result, culprit, notify.failed(error))
    if not owed_models(result) or not (first or culprit):
        conclude(result, error)


def start_python(code: str, *words, **options):
    """Start Python on the code, so that Ctrl-C reaches this process alone, and that it dies with it, however (on Linux)."""
    die_with_parent = f"""sys.platform == 'linux' and ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL
os.getppid() == {os.getpid()} or sys.exit()  # it died before that
"""
    code = f"import ctypes, os, sys; sys.path.insert(0, {str(db.ROOT)!r}); {die_with_parent}{code}"
    options = {"stdin": subprocess.DEVNULL, "start_new_session": True} | options
    return subprocess.Popen([sys.executable, "-c", code, *words], **options)


def end(process) -> None:
    if process:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def end_run(process, result: notify.Run, why) -> None:
    """End the process that trains, and tell Prefect, which cannot know it from a process that is killed."""
    words = [result.flow_run_id, str(why)]
    marker = words[0] and start_python(
        CRASHED, *words, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    end(process)
    with suppress(subprocess.TimeoutExpired):
        marker and marker.communicate(timeout=2 * STOP_SECONDS)


def start_prefect_server():
    """Start Prefect's own server on a free port, to boot while the other process imports; point PREFECT_API_URL to it.

    Prefect would start one by itself, but only when the flow is called, and not end it where the run is killed.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    os.environ["PREFECT_API_URL"] = f"http://127.0.0.1:{port}/api"
    # It lives as long as the run and has no UI: "Beginning flow run" and "View at" help nobody.
    os.environ.setdefault("PREFECT_LOGGING_LOGGERS_PREFECT_FLOW_RUNS_LEVEL", "CRITICAL")
    return start_python(
        SERVER,
        "server",
        "start",
        "--host",
        "127.0.0.1",
        "--port",
        port,
        "--no-services",
        "--no-ui",
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def answers(api: str) -> bool:
    """Return whether that is a Prefect API, if only to those who say who they are."""
    try:
        with urllib.request.urlopen(
            f"{api.rstrip('/')}/health", timeout=CHECK_SECONDS + 1
        ) as reply:
            return reply.read(5) == b"true"
    except urllib.error.HTTPError as error:
        return error.code in (401, 403)
    except (OSError, http.client.HTTPException):
        return False


def find_prefect() -> str:
    """Return the address of the Prefect API to use: by the environment or .env, by Prefect's own files, or on this machine.

    "" where there is none.
    """
    home, url = (
        Path(os.environ.get("PREFECT_HOME", Path.home() / ".prefect")),
        os.environ.get("PREFECT_API_URL"),
    )
    files = home / "profiles.toml", Path("prefect.toml"), Path("pyproject.toml")
    text = "\n".join(file.read_text(errors="replace") for file in files if file.is_file())
    stated = re.search(
        r"""(?imx) api_url\s*=\s*["']?(https?://[^\s"']+) | ^\s*\[.*prefect.*api | ^\s*\[api\]
                                  | ^\s*active\s*=\s*"(?!ephemeral)""",
        text,
    )
    if not url and (stated or os.environ.get("PREFECT_PROFILE")):
        return stated and stated[1] or "a profile of yours (see: prefect config view)"
    os.environ["PREFECT_API_URL"] = url or LOCAL_PREFECT * answers(LOCAL_PREFECT)
    return os.environ["PREFECT_API_URL"]


# ---- The command line -------------------------------------------------------------------------------------------------


def parse_options(arguments=None) -> argparse.Namespace:
    """Read the command line. A wrong option prints the usage and exits with 2."""
    parser = argparse.ArgumentParser(
        prog="train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--csv-path",
        metavar="FILE",
        help="load this CSV (.csv, .csv.gz or http(s) URL) into the table first",
    )
    parser.add_argument(
        "--table-name",
        default="spotify_songs",
        metavar="TABLE",
        help="table or view of songs, TABLE or SCHEMA.TABLE (default: %(default)s)",
    )
    parser.add_argument(
        "--truncate",
        dest="truncate_table",
        action="store_true",
        help="empty the table before loading the CSV",
    )
    parser.add_argument(
        "--n-clusters",
        type=int,
        default=2,
        metavar="N",
        help="number of clusters (default: %(default)s)",
    )
    parser.add_argument(
        "--only",
        action="append",
        metavar="MODEL",
        help=f"train only these; repeat or comma-separate: {', '.join(models.MODELS)}",
    )
    parser.add_argument(
        "--failed",
        action="store_true",
        help="train only the models whose last run failed, was held back or was killed",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="publish a model even if it is worse than the current one",
    )
    parser.add_argument(
        "--demo",
        nargs="?",
        type=int,
        const=10_000,
        metavar="N",
        help="train on N made-up songs in the embedded database (default: 10000)",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="look at everything a run needs, train nothing and change nothing",
    )
    parser.add_argument(
        "--no-notify",
        dest="enable_notifications",
        action="store_false",
        help="do not post to Discord",
    )
    parser.add_argument(
        "--models-dir",
        metavar="DIR",
        help="where the models go (default: models, or demo/models with --demo, beside train.py)",
    )
    parser.add_argument(
        "--predict-into",
        metavar="TABLE",
        help="then put every song's predictions and neighbours into this table",
    )
    parser.add_argument(
        "--dask",
        metavar="ADDRESS",
        help="train on the Dask cluster of that scheduler, tcp://HOST:8786",
    )
    parser.add_argument(
        "--serve",
        action="store_true",
        help="be a Prefect deployment until stopped; the other options are what its runs do by default",
    )
    parser.add_argument("--cron", help='with --serve: when to run, in UTC, such as "0 3 * * *"')
    options = parser.parse_args(arguments)
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
        (options.failed and options.only, "--failed chooses the models itself; leave out --only"),
        (options.cron and not options.serve, "--cron must be accompanied by --serve"),
        (
            not re.fullmatch(r"\d+\.?\d*", PAUSE),
            f"DATABASE_RETRY_SECONDS is {PAUSE!r}; write a number of seconds, such as 30",
        ),
        (
            options.serve and options.failed,
            "--serve trains what each run is asked for; leave out --failed",
        ),
        (
            0 <= resource.getrlimit(resource.RLIMIT_AS)[0] < 2 << 30,
            "a run needs 2 GB; raise the limit (ulimit -v)",
        ),
    ):
        if wrong:
            parser.error(sentence)
    try:
        options.only = chosen(options.only)
        check_dask(options.dask)
    except DataError as error:
        parser.error(str(error))
    return options


def flow_parameters(options: argparse.Namespace) -> dict:
    return {
        name: value
        for name, value in vars(options).items()
        if name not in ("failed", "check", "serve", "cron")
    }


def chosen(only) -> list[str]:
    """Return the models asked for, in their usual order; `only` is None for all, a name, or names with or without commas."""
    text = ",".join(only) if isinstance(only, list) else only
    names = [name.strip() for name in (text or ",".join(models.MODELS)).split(",") if name.strip()]
    for name in names:
        if name not in models.MODELS:
            raise DataError(
                f"there is no model {name!r}; the models are {', '.join(models.MODELS)}"
            )
    return [name for name in models.MODELS if name in names]


def check_dask(address) -> None:
    if address and not importlib.util.find_spec("prefect_dask"):
        raise DataError(
            "--dask needs prefect-dask; install it: pip install -c constraints.txt prefect-dask"
        )
    if address and not find_prefect():
        raise DataError(
            "--dask needs a Prefect server that the cluster's workers reach as well; start one: "
            "prefect server start --host 0.0.0.0; then: export PREFECT_API_URL=http://HOST:4200/api"
        )


def models_folder(models_dir, demo):
    return Path(
        models_dir or (models.MODELS_DIR if demo is None else db.ROOT / "demo" / "models")
    ).resolve()


def check(options: argparse.Namespace) -> None:
    """Look at everything at once, change nothing; print a line each: what, ok or warning or problem, and the fix; exit."""
    notify.quiet_logs()
    looks = {
        "database": lambda: db.check(options.csv_path, options.table_name, options.demo),
        "models directory": lambda: models.check_folder(
            models_folder(options.models_dir, options.demo)
        ),
        "Discord": lambda: notify.check_discord(options.enable_notifications),
        "Prefect": check_prefect,
    }
    pool, lines = ThreadPoolExecutor(), []
    asked = {what: pool.submit(notify.attempt, look) for what, look in looks.items()}
    wait(asked.values(), CHECK_SECONDS)
    late = TimeoutError(f"no answer within {CHECK_SECONDS} s; is it busy or out of reach?")
    for what, future in asked.items():
        found, error = future.result() if future.done() else (None, late)
        lines += [(what, "problem", notify.explain(error))] if error else found
    for what, state, sentence in lines:
        print(f"{what:18}{state:9}{notify.plain(sentence, 1000)}")
    sys.stdout.flush()
    os._exit(
        WRONG_INPUT if any(state == "problem" for _, state, _ in lines) else TRAINED
    )  # whoever is late


def check_prefect() -> list:
    api = find_prefect()
    if not api.startswith("http"):
        return [("Prefect", "ok", api or "a temporary server per run")]
    if not answers(api):
        raise DataError(
            f"{api} does not answer as a Prefect API; correct PREFECT_API_URL or start it: prefect server start"
        )
    return [("Prefect", "ok", f"{api} answers")]


def serve() -> None:
    """Be the deployment until a signal comes: Prefect starts a process for each run, and ends it when this one ends."""
    status, error = notify.attempt(asyncio.run, serve_until_stopped(parse_options()))
    if error:
        print(f"train.py: error: {notify.explain(error)}", file=sys.stderr)
    os._exit(
        WRONG_INPUT if error else status
    )  # what Python does after it, for Prefect's threads, takes 2 s


async def serve_until_stopped(options: argparse.Namespace) -> int:
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
    # limit: a run that is due while another trains waits for it instead of finding the models directory locked.
    runner, loop, stopped_by = Runner(name=NAME, limit=1), asyncio.get_running_loop(), []
    await runner.aadd_flow(
        ml_training_pipeline, name=NAME, parameters=flow_parameters(options), schedules=schedules
    )

    def end_serving(number, _):
        stopped_by.append(number)
        loop.call_soon_threadsafe(loop.create_task, runner.astop())

    runner.handle_sigterm = (
        end_serving  # flow.serve's own does not await this, and so waits for the run to end
    )
    signal.signal(signal.SIGINT, end_serving)
    print(
        f"serving {NAME}/{NAME}; start a run with: prefect deployment run {NAME}/{NAME}", flush=True
    )
    await runner.start()
    return 128 + stopped_by[0] if stopped_by else 1


if __name__ == "__main__":
    OPTIONS = parse_options()
    if OPTIONS.check:
        check(OPTIONS)
    if OPTIONS.serve:  # Prefect watches over its runs itself
        CODE = f"import sys; sys.path.insert(0, {str(db.ROOT)!r}); import train; train.serve()"
        os.execv(sys.executable, [sys.executable, "-c", CODE, *sys.argv[1:]])
    sys.exit(main(OPTIONS))
