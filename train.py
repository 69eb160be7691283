"""Train the five song models from a PostgreSQL table, every night, unattended.

    python train.py                                   # train all five from DATABASE_URL
    python train.py --only similar                    # one model; repeat or comma-separate for more
    python train.py --csv-path songs.csv --table-name spotify_songs --truncate --n-clusters 2
    python train.py --demo 50000                      # made-up songs, embedded database, no set-up
    python train.py --check                           # look at everything, train nothing
    python train.py --failed                          # only the models that the last run owes
    python train.py --serve --cron "0 3 * * *"        # a Prefect deployment (needs a server)
    from train import ml_training_pipeline            # in Python: a Prefect flow like any other

This file alone knows Prefect. First the flow, then its steps, its tasks, how a run begins and ends,
which Prefect it uses, and the command line. Whatever is heavy happens in forks of another process,
the fork server of models.py: this one holds the flow, waits, and tells people.
"""

import argparse
import asyncio
import atexit
import fcntl
import gc
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
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import IO, Annotated, Any, NoReturn

# Prefect as a nightly job needs it. Only defaults: the environment wins.
for name, value in {
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

from annotated_types import Ge

import db
import models
import notify
from db import DataError
from models import Killed, Locked, NotPublished
from notify import (
    INTERRUPTED,
    LOCKED,
    NOTHING_TRAINED,
    PARTIAL,
    TERMINATED,
    TRAINED,
    WRONG_INPUT,
    Run,
    Stopped,
)

try:
    from prefect import Flow, runtime, task
    from prefect.artifacts import create_markdown_artifact, create_table_artifact
    from prefect.cache_policies import NO_CACHE
    from prefect.client.orchestration import get_client
    from prefect.context import FlowRunContext
    from prefect.events.worker import EventsWorker
    from prefect.exceptions import TerminationSignal
    from prefect.futures import PrefectFuture, as_completed
    from prefect.logging.handlers import APILogHandler
    from prefect.settings import get_current_settings, temporary_settings
    from prefect.states import Completed, Crashed, Failed, State
except Exception as error:  # it cannot read its settings, or is not installed whole
    if __name__ == "__main__":
        notify.tell_without_prefect(error, sys.argv[1:])
    raise

NAME = "ml-training-pipeline"
START_SECONDS = 100  # Prefect's server: a first start makes its database, 15 s on a small machine
DRAIN_SECONDS = 5  # for what Prefect has still to send to it at the end of a run
SERVER_STARTS = 5  # how often Prefect's temporary server is started in a run, should it be killed
STOP_SECONDS = 1.5  # from a stop to the end of the process, whatever still waits in it
STOPS = {signal.SIGTERM, signal.SIGINT}
DASK_SECONDS = 30  # for a Dask cluster to answer and to have a worker
CHECK_SECONDS = 4  # for all that --check looks at, side by side
MEMORY_SECONDS = 1  # between two looks at the memory of a run: each costs 3 ms a process

log = logging.getLogger("train")

# The run of the command line. Where the flow is called otherwise, it begins one of its own.
RUN: Run | None = None


# ---- The flow ------------------------------------------------------------------------------------


class Pipeline(Flow):
    """A Prefect flow that looks for its server in one way, whoever calls it."""

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        with prefect_api():
            return super().__call__(*arguments, **keywords)


def run_name() -> str:
    """Return the name of a flow run: its time and table."""
    parameters = runtime.flow_run.parameters
    songs = parameters["table_name"] if parameters["demo"] is None else "demo songs"
    return f"{datetime.now():%Y-%m-%d %H:%M} {songs}"


@partial(Pipeline, name=NAME, flow_run_name=run_name)
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
    """Train the models `only` names (all by default) on the songs of a table.

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
    run = new_run(parameters)
    with begun(run):
        return carry_out(run)


class PipelineFailed(db.Expected):
    """Nothing could be trained. `result` has the fields of the run."""

    def __init__(self, run: Run) -> None:
        super().__init__(run.message)
        self.result = asdict(run)


def carry_out(run: Run) -> Any:
    """Train, tell everybody, and return the Prefect state that the run ends in.

    Here, and nowhere else, a run is stopped: `python train.py` holds signals until the `try`, and
    from its end on.
    """
    held = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
        _, error = notify.attempt(train_and_publish, run)
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
    except TerminationSignal:  # Prefect's word for SIGTERM
        stop(run, Stopped(TERMINATED))
        raise
    except KeyboardInterrupt:
        stop(run, Stopped(INTERRUPTED))
        raise
    notify.decide(run, error)
    _, trouble = notify.attempt(write_artifacts, run)
    if trouble:
        run.warnings.append(f"Prefect has no metrics of this run: {notify.explain(trouble)}")
    tell(run)
    if run.status == "failed":
        return Failed(message=run.message, data=PipelineFailed(run))
    name = "Partial" if run.status == "partial" else None
    return Completed(name=name, message=run.message, data=asdict(run))


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
            predicting = database_task("predict_task", "predict")
            run.predicted = predicting(models.predict_table, url, run.table, into, run.models_dir)


def read_songs(run: Run) -> str:
    """Load the CSV or the demo songs, if asked for; read the table; return the database's URL."""
    given = run.parameters
    url = db.database_url(demo=given["demo"] is not None)
    if given["demo"]:
        database_task("load_demo_task", "load demo songs")(
            db.load_demo, given["demo"], url, run.table
        )
    elif given["csv_path"]:
        rejected = str(Path(run.models_dir, "rejected_rows.csv"))
        run.csv = database_task("load_csv_task", "load CSV")(
            db.load_csv, given["csv_path"], url, run.table, given["truncate_table"], rejected
        )
        run.warnings += run.csv["warnings"]
    start = time.monotonic()
    songs = database_task("load_songs_task", "load songs")(
        models.read_songs, url, run.table, run.models_dir
    )
    run.rows = songs["rows"]
    run.read_seconds = time.monotonic() - start
    log.info("%s songs read from %s in %.1f s", f"{run.rows:,}", run.table, run.read_seconds)
    run.warnings += songs["warnings"]
    return url


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
    given = None if elsewhere else url
    arguments = (name, given, about, run.models_dir, run.parameters["force"])
    return runner.submit(training_task(name), {"step": models.train, "arguments": arguments})


def note(run: Run, name: str, report: dict | None, error: Any) -> None:
    """Write down what became of a model: in the run, the history and the log."""
    outcome = notify.outcome_of(report, run.models_dir) if report else notify.failed(error)
    done = run.models | {name: outcome}
    run.models = {other: done[other] for other in run.asked if other in done}
    write_history(run, [name], outcome)
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
    write_history(run, [name], notify.failed(error))
    sentence = "%s: %s; it is trained again, alone, when the others are done"
    log.warning(sentence, name, reason, extra={"model": name, "phase": "retrying"})


def write_artifacts(run: Run) -> None:
    """Put the metrics where Prefect's UI shows them: a table of the run, a page for each model."""
    history = models.read_history(run.models_dir)
    for name, outcome in run.models.items():
        page = notify.model_page(name, run, history)
        description = notify.in_short(name, outcome)
        create_markdown_artifact(page, key=f"model-{name}", description=description)
    rows = [notify.table_row(name, outcome) for name, outcome in run.models.items()]
    create_table_artifact(rows, key="metrics", description=run.message)


# ---- The tasks: plain functions, decorated here and nowhere else ---------------------------------


def take(step: Callable, *arguments: Any) -> Any:
    """Have the fork server take a step; what it logs is logged here, in the task's thread."""
    return models.take(step, *arguments)


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


# NO_CACHE: Prefect's default would hash what every task is given.
every: Any = {"cache_policy": NO_CACHE, "persist_result": False}
training: Any = {
    "retries": 3,
    "retry_delay_seconds": [2, 4, 8],
    "retry_jitter_factor": 0.5,  # a pause is up to so much longer, or shorter by less
    "retry_condition_fn": training_can_heal,
    **every,
}
TASK_NAMES = {
    "clusters": "train_clustering_model_task",
    "energy": "train_energy_regression_model_task",
    "popularity": "train_popularity_regression_model_task",
    "similar": "train_similar_songs_model_task",
}


def training_task(model: str) -> Any:
    """Return the task that trains a model; its runs are named after the model."""
    name = TASK_NAMES.get(model, f"train_{model}_model_task")
    return task(name=name, task_run_name=model, **training)(take)


def database_task(name: str, run_name: str) -> Any:
    """Return a task that is tried three times, with DATABASE_RETRY_SECONDS between."""
    return task(
        name=name,
        task_run_name=run_name,
        retries=2,
        retry_delay_seconds=[pause()] * 2,
        retry_condition_fn=can_heal,
        **every,
    )(take)


def pause() -> float:
    """Return DATABASE_RETRY_SECONDS, 30 by default. Raises DataError where it is no number."""
    text = db.setting("DATABASE_RETRY_SECONDS") or "30"
    if not re.fullmatch(r"\d+\.?\d*", text):
        raise DataError(
            f"DATABASE_RETRY_SECONDS is {text!r}; write a number of seconds, such as 30"
        )
    return float(text)


def task_runner(run: Run) -> Any:
    """Give, as a context, what runs the trainings: the flow's threads, or a Dask cluster."""
    if run.parameters["dask"]:
        return cluster(run.parameters["dask"])
    context: Any = FlowRunContext.get()
    return nullcontext(context.task_runner)


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


# ---- How a run begins ----------------------------------------------------------------------------


def new_run(parameters: dict) -> Run:
    """Return the run that the flow's parameters ask for."""
    demand_dask(parameters["dask"])
    folder = models.folder_for(parameters["models_dir"], parameters["demo"])
    return Run(
        parameters=parameters,
        asked=models.chosen(parameters["only"]),
        models_dir=str(folder),
        command=notify.command_of(parameters, str(folder)),
    )


@contextmanager
def begun(run: Run, failed: bool = False) -> Iterator[None]:
    """Have a run begun while the block runs: it holds the models directory and has a fork server.

    With `failed` it is asked for what the last run owes, which may be nothing. Raises Locked, or
    DataError where the directory cannot be written to.
    """
    with models.one_run_at_a_time(Path(run.models_dir)) as lock:
        models.clean_up(run.models_dir)
        if failed:
            run.asked = models.owed(run.models_dir)
        if not run.asked:
            yield
            return
        write_history(run, run.asked, notify.Outcome("started"))
        run.begun = True
        if run.parameters["enable_notifications"]:
            beat = threading.Thread(target=notify.heartbeat, args=["start"], daemon=True)
            beat.start()  # nobody waits for it
        with models.fork_server(lock), watched_memory(run):
            yield


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


def write_history(run: Run, names: list[str], outcome: notify.Outcome) -> None:
    """Append a line per model: at the start, so that a killed run owes them, and at the end."""
    lines = [notify.history_line(run, name, outcome) for name in names]
    models.append_history(run.models_dir, lines)


# ---- How a run ends ------------------------------------------------------------------------------


def tell(run: Run) -> None:
    """Draw the picture, write run.json, send the heartbeat, post to Discord.

    What fails is a warning, but for run.json: then the last run's would pass for this one's.
    """
    stopped = run.exit_status in notify.STOPPED_BY
    picture: Path | None = None
    if run.models and not stopped:
        picture = Path(run.models_dir, "report.png")
        _, trouble = notify.attempt(models.take, models.draw, run, picture)
        if trouble:
            picture = None
            run.warnings.append(f"the picture could not be made: {notify.explain(trouble)}")
    _, trouble = notify.attempt(notify.write_run, run)
    if trouble:
        run.warnings.append(f"run.json could not be written: {notify.explain(trouble)}")
        if run.exit_status == TRAINED:
            run.exit_status = PARTIAL
            run.status = "partial"
    if not run.parameters["enable_notifications"]:
        return
    notify.heartbeat("" if run.exit_status == TRAINED else "fail")
    url = db.setting("DISCORD_WEBHOOK_URL")
    if url:
        seconds = notify.STOPPED_SECONDS if stopped else notify.POST_SECONDS
        notify.post_discord(run, url, picture, seconds)


def stop(run: Run, why: Stopped) -> None:
    """End the steps, which nothing can interrupt, tell everybody, and end the process soon.

    Prefect waits for every task, also for one that sleeps before its next try.
    """
    if RUN:
        for number in STOPS:
            signal.signal(number, signal.SIG_IGN)  # the first one counts
    models.end_steps()
    notify.decide(run, why)
    tell(run)
    if RUN:
        notify.print_summary(run)
    if RUN or why.code == TERMINATED:
        timer = threading.Timer(STOP_SECONDS, os._exit, [why.code])
        timer.daemon = True
        timer.start()
    if RUN:
        notify.attempt(tell_prefect, why)


def tell_prefect(why: Stopped) -> None:
    """Set the flow run's state, which Prefect would do when its tasks have ended."""
    with get_client(sync_client=True) as client:
        state: State = Crashed(message=str(why))
        client.set_flow_run_state(runtime.flow_run.id, state, force=True)


# ---- Which Prefect -------------------------------------------------------------------------------


@contextmanager
def prefect_api() -> Iterator[None]:
    """Have Prefect use the API that find_prefect finds while the block runs, or one of our own."""
    with ExitStack() as stack:
        settings: dict[str, Any] = {"api.url": find_prefect()}
        if not settings["api.url"] and not FlowRunContext.get():
            settings["api.url"] = stack.enter_context(temporary_server())
            # It needs no heartbeat to know of a crash, and Prefect waits up to a second for the
            # thread that sends it.
            settings["flows.heartbeat_frequency"] = None
        stack.enter_context(temporary_settings(settings))
        yield


def find_prefect() -> str | None:
    """Return the address of the Prefect API to use, None where there is none.

    It is that of the environment, of .env or of Prefect's own settings, or of a server on its usual
    port of this machine. Loopback is never asked for through a proxy.
    """
    for name in ("no_proxy", "NO_PROXY"):
        others = os.environ.get(name, "")
        if LOOPBACK not in others:
            os.environ[name] = f"{others},{LOOPBACK}"
    settings = get_current_settings()
    configured = db.setting("PREFECT_API_URL") or settings.api.url
    usual = f"http://127.0.0.1:{settings.server.api.port}/api"
    if configured or not answers(usual):
        return configured
    return usual


LOOPBACK = "127.0.0.1,localhost"


def answers(api: str) -> bool:
    """Return whether that is a Prefect API, if only to those who say who they are."""
    try:
        url = f"{api.rstrip('/')}/health"
        with urllib.request.urlopen(url, timeout=CHECK_SECONDS) as reply:
            return reply.read(5) == b"true"
    except urllib.error.HTTPError as error:
        return error.code in (401, 403)
    except (OSError, ValueError, http.client.HTTPException):
        return False


class NoPrefect(db.Expected):
    """Prefect's temporary server did not start; the text has its last words and the fix."""


@contextmanager
def temporary_server() -> Iterator[str]:
    """Have a Prefect server on a free port while the block runs; give the address of its API.

    Prefect would start one by itself, slower, and not end it where the run is killed. Where it is
    killed it is started again, with the same database: the flow goes on. Raises NoPrefect.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    address = f"http://127.0.0.1:{port}/api"
    # It lives as long as the run and has no UI: "Beginning flow run" and "View at" help nobody.
    logging.getLogger("prefect.flow_runs").setLevel(logging.CRITICAL)
    ended = threading.Event()
    with tempfile.TemporaryFile() as output:
        servers = [start_server(port, output)]

        def watch() -> None:
            while len(servers) < SERVER_STARTS:
                servers[-1].wait()
                if ended.is_set():
                    return
                log.warning("Prefect's temporary server was killed; it was started again")
                if RUN:
                    RUN.warnings.append(
                        "Prefect's temporary server was killed; it was started again"
                    )
                servers.append(start_server(port, output))

        try:
            wait_for_server(servers[0], address, output)
            threading.Thread(target=watch, daemon=True).start()
            yield address
        finally:
            # What Prefect has still to send is sent now: at exit it would try for a minute.
            APILogHandler().flush()
            EventsWorker.drain_all(DRAIN_SECONDS)
            ended.set()
            servers[-1].kill()


def start_server(port: str, output: IO[bytes]) -> subprocess.Popen:
    words = [sys.executable, __file__, "prefect-server", port, str(os.getpid())]
    with models.signals_held():
        return subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,  # Ctrl-C is for whoever started it
        )


def wait_for_server(server: subprocess.Popen, address: str, output: IO[bytes]) -> None:
    """Return when the server answers. Raises NoPrefect where it has ended, Stopped on a signal."""
    deadline = time.monotonic() + START_SECONDS
    while not answers(address):
        held = signal.sigpending() & STOPS
        if held:
            raise Stopped(128 + min(held))
        if server.poll() is not None:
            output.seek(0)
            raise NoPrefect(why_it_ended(output.read().decode("utf-8", "replace")))
        if time.monotonic() > deadline:
            raise NoPrefect(f"Prefect's temporary server did not answer within {START_SECONDS} s")
        time.sleep(0.05)


def why_it_ended(said: str) -> str:
    """Return a sentence with the fix for what Prefect's server said at its end."""
    errors = re.findall(r"^[\w.]+(?:Error|Exception)\b.*", said, re.M) or [said[-300:]]
    fix = "start one of your own (prefect server start) and see what it says"
    for pattern, advice in SERVER_ADVICE.items():
        if re.search(pattern, said, re.I):
            fix = advice.format(home=get_current_settings().home)
    return f"Prefect's temporary server did not start: {errors[-1].strip()}; {fix}"


SERVER_ADVICE = {
    "unable to open|permission denied|read-?only|not a directory|no such file": (
        "{home} cannot be written to; make it writable for this user or set PREFECT_HOME"
    ),
    "is not a database|malformed": "its database is damaged; move it away: {home}/prefect.db",
    "is full|no space|file too large|disk I/O": "make room on the disk of {home}",
}


def be_prefect_server(port: str, parent: str) -> NoReturn:
    """Be Prefect's server on that port until the process that started this one ends."""
    models.die_with(int(parent))
    gc.set_threshold(100_000)  # new objects: of Prefect's start a sixth is the garbage collector's
    home = get_current_settings().home
    if not (home / "prefect.db").exists():
        # It makes a database, and two that do so at once spoil it for each other: one goes first.
        home.mkdir(parents=True, exist_ok=True)
        first = open(home / "first-start.lock", "w")  # noqa: SIM115 (held until it is made)
        fcntl.flock(first, fcntl.LOCK_EX)
        threading.Timer(20, first.close).start()
    sys.argv = f"prefect server start --host 127.0.0.1 --port {port} --no-services --no-ui".split()
    runpy.run_module("prefect", run_name="__main__", alter_sys=True)
    sys.exit()


# ---- The command line: the options ---------------------------------------------------------------


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
        help="train only models that failed, were held back or were killed, or have no file",
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
        options.only = models.chosen(options.only)
        demand_dask(options.dask)
    except DataError as error:
        parser.error(str(error))
    return options


def demand_options_that_agree(options: argparse.Namespace) -> None:
    """Raise DataError where options, or a variable, make no sense together."""
    if options.truncate_table and not options.csv_path:
        raise DataError("--truncate must be accompanied by --csv-path")
    if options.demo and options.csv_path:
        raise DataError("--demo makes its own songs; leave out --csv-path")
    if options.demo is not None and options.demo < 1:
        raise DataError(f"--demo needs at least 1 song; it is {options.demo}")
    if options.n_clusters < 2:
        raise DataError(f"--n-clusters must be 2 or more; it is {options.n_clusters}")
    if options.failed and options.only:
        raise DataError("--failed chooses the models itself; leave out --only")
    if options.cron and not options.serve:
        raise DataError("--cron must be accompanied by --serve")
    if options.serve and options.failed:
        raise DataError("--serve trains what each run is asked for; leave out --failed")
    memory, _ = resource.getrlimit(resource.RLIMIT_AS)
    if 0 <= memory < 2 << 30:
        raise DataError("a run needs 2 GB; raise the limit (ulimit -v)")
    pause()


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


# ---- --check -------------------------------------------------------------------------------------


def check(options: argparse.Namespace) -> NoReturn:
    """Look at everything at once, change nothing; print a line each; exit with 0, or 2.

    A line: what, ok or warning or problem, a sentence with the fix.
    """
    notify.quiet_logs()
    folder = models.folder_for(options.models_dir, options.demo)
    looks: dict[str, Callable[[], list]] = {
        "CSV": lambda: db.check_csv(options.csv_path),
        "database": lambda: db.check(options.csv_path, options.table_name, options.demo),
        "models directory": lambda: models.check_folder(folder),
        "Discord": lambda: notify.check_discord(options.enable_notifications),
        "heartbeat": lambda: notify.check_heartbeat(options.enable_notifications),
        "Prefect": check_prefect,
    }
    pool = ThreadPoolExecutor()
    asked = {what: pool.submit(notify.attempt, look) for what, look in looks.items()}
    wait(asked.values(), CHECK_SECONDS)
    lines: list = []
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
    """Return the line of --check on Prefect.

    Raises DataError where its API does not answer, or a temporary server would have no place.
    """
    address = find_prefect()
    said = f"{address} answers"
    if not address:
        home = get_current_settings().home
        models.check_folder(home, f"there is no place for {home}: set PREFECT_HOME to another")
        said = f"a temporary server per run, its database in {home}"
    elif not answers(address):
        raise DataError(
            f"{address} does not answer as a Prefect API; correct PREFECT_API_URL or start it: "
            "prefect server start"
        )
    return [("Prefect", "ok", said)]


# ---- --serve -------------------------------------------------------------------------------------


def serve(options: argparse.Namespace) -> NoReturn:
    """Be the deployment until a signal comes.

    Prefect starts a process for each run, and ends it when this one ends.
    """
    with temporary_settings({"api.url": find_prefect()}):
        status, error = notify.attempt(asyncio.run, serve_until_stopped(options))
    if error:
        print(f"train.py: error: {notify.explain(error)}", file=sys.stderr, flush=True)
        status = WRONG_INPUT
    os._exit(status)  # what Python does after it, for Prefect's threads, takes 2 s


async def serve_until_stopped(options: argparse.Namespace) -> int:
    """Serve; return the exit status that goes with the signal that came."""
    from prefect.runner import Runner
    from prefect.schedules import Cron

    if not get_current_settings().api.url:
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


# ---- main ----------------------------------------------------------------------------------------


def main() -> NoReturn:
    """Do what the command line asks for; exit with its status."""
    notify.never_break_off()
    if sys.argv[1:2] == ["prefect-server"]:
        be_prefect_server(*sys.argv[2:])
    options = parse_options()
    if options.check:
        check(options)
    if options.serve:
        serve(options)
    run = new_run(flow_parameters(options))
    atexit.register(leave, run)  # before the flow: what Prefect registers then goes first
    hold_signals()
    notify.quiet_logs()
    try:
        _, error = notify.attempt(be_run, run, options.failed)
    except (KeyboardInterrupt, TerminationSignal):
        sys.exit()  # the flow has told everybody
    if run.exit_status is None:  # it could not begin, or Prefect failed before the flow
        notify.decide(run, error)
        tell(run)
    if run.message:
        notify.print_summary(run)
    sys.exit()


def be_run(run: Run, failed: bool) -> None:
    """Begin the run of the command line, and call the flow, which carries it out."""
    global RUN
    try:
        with begun(run, failed):
            if not run.asked:
                print(f"nothing to do: the last run of every model in {run.models_dir} trained it")
                run.exit_status = TRAINED
                return
            print(f"starting {', '.join(run.asked)}; models go to {run.models_dir}", flush=True)
            RUN = run
            ml_training_pipeline(**run.parameters)
    except Locked as error:
        print(error, file=sys.stderr)
        run.exit_status = LOCKED


def hold_signals() -> None:
    """Have SIGTERM and Ctrl-C wait until the flow can tell people: see carry_out.

    A mask is of one thread and of those it starts, so this comes before the first other one.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which nohup and `&` take away
    # Prefect replaces this one, and sends itself a second SIGTERM once it has put it back.
    signal.signal(signal.SIGTERM, lambda *_: None)


def leave(run: Run) -> NoReturn:
    """Exit at once, whatever thread still waits: 0 only where the run says that it has trained."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(NOTHING_TRAINED if run.exit_status is None else run.exit_status)


if __name__ == "__main__":
    # What is sent to a Dask worker must name the module: of __main__ it could load nothing.
    import train

    train.main()
