"""Tests of the models: figures against independent oracles, publishing, the command line of models.py."""
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # OpenMP's barriers spin: beside other work two threads are slower than one

import numpy as np
import pandas as pd
import pytest
from sklearn import metrics as oracle

import db
import models
from db import DataError

ROOT = Path(__file__).resolve().parent


# ---- shared ----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="session")
def songs():
    return db.demo_songs(3000, genres=6)


@pytest.fixture(scope="session")
def trained(songs):
    """(estimator, metrics) of every model, trained once."""
    return {name: train(songs) for name, train in models.MODELS.items()}


@pytest.fixture(scope="session")
def models_dir(trained, songs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, (estimator, metrics) in trained.items():
        about = {"run": "2026-01-01T00:00:00+00:00", "settings": {}, "rows": len(songs), "seconds": 1.0, "table": "songs",
                 "data": models.describe(songs), "command": f"train.py --models-dir {folder}"}
        models.publish(name, estimator, metrics, about, folder)
    return folder


COMMAND = {}  # environment of every command


def command(*arguments, **environment):
    """Run `python …` beside the modules; return the finished process."""
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, env={**os.environ, **COMMAND, **environment},
                          capture_output=True, text=True, timeout=300)


# ---- models: figures -------------------------------------------------------------------------------------------------
def by_the_rule(songs, split):
    """The documented split, anew: (train, known, new)."""
    def first(values, share, key):
        names = np.array(sorted(set(values), key=lambda name: pd.util.hash_array(np.array([name], object), hash_key=f"{key:16}")[0]))
        return values.isin(names[:int(len(names) * share)])
    new = first(songs.artist_name, 0.10, f"artist{split or ''}")
    rest, recording = songs[~new], (songs.artist_name + "\0" + songs.track_name).str.casefold()
    known = first(rest.track_id, 0.12, f"song{split or ''}")
    train = rest[~known]
    return train, rest[known & ~recording[~new].isin(recording[train.index])], songs[new]


@pytest.mark.parametrize("name, few", [("genre", True), ("energy", True), ("popularity", True), ("energy", False)])
def test_metrics_agree_with_scikit_learn_on_a_split_of_our_own(songs, monkeypatch, name, few):
    copies = songs.head(90).assign(track_id=[f"copy{i}" for i in range(90)], track_name=songs.track_name.str.upper())
    some = pd.concat([songs.head(900), copies], ignore_index=True)
    monkeypatch.setattr(models, "FEW_SONGS", 50_000 if few else 500)  # a large table is judged on one split
    found = {"known": [], "new": []}
    for split in range(3 if few else 1):
        train, known, new = by_the_rule(some, split)
        judged = (models.GenreClassifier() if name == "genre" else models.SongRegressor(name)).fit(train, train[name])
        for part, rows in (("known", known), ("new", new)):
            scores = judged.predict_proba(rows) if name == "genre" else judged.predict(rows)
            naive = train[name].mode()[0] if name == "genre" else train[name].mean()
            found[part].append(pd.DataFrame({"actual": rows[name], "naive": naive, "score": list(scores)}))
    known, new = (pd.concat(found[part]) for part in ("known", "new"))
    if name == "genre":
        labels = np.unique(some.genre.astype(str))
        named = [labels[np.stack(part.score).argmax(axis=1)] for part in (known, new)]
        expected = {"accuracy": oracle.accuracy_score(known.actual, named[0]), "classes": 6,
                    "accuracy_new_artists": oracle.accuracy_score(new.actual, named[1]),
                    "top3_accuracy": oracle.top_k_accuracy_score(known.actual, np.stack(known.score), k=3, labels=labels),
                    "f1_macro": oracle.f1_score(known.actual, named[0], average="macro"),
                    "baseline_accuracy": oracle.accuracy_score(known.actual, known.naive)}
    else:
        expected = {"r2": oracle.r2_score(known.actual, known.score), "r2_new_artists": oracle.r2_score(new.actual, new.score),
                    "mae": oracle.mean_absolute_error(known.actual, known.score),
                    "mae_new_artists": oracle.mean_absolute_error(new.actual, new.score),
                    "rmse": oracle.root_mean_squared_error(known.actual, known.score),
                    "baseline_mae": oracle.mean_absolute_error(known.actual, known.naive)}
    metrics = models.MODELS[name](some)[1]
    assert {key: metrics[key] for key in expected} == pytest.approx(expected) and next(iter(metrics)) == next(iter(expected))


def test_split_is_the_same_when_the_table_grows(songs):
    more = pd.concat([songs, db.demo_songs(300, seed=1, genres=6)], ignore_index=True)
    assert (models.holdout(songs)[2] == models.holdout(more)[2][:len(songs)]).mean() > 0.97


def test_a_rare_genre_that_a_split_holds_out_whole():
    songs = db.demo_songs(200, seed=3, genres=2)
    rare = songs.index[songs.track_id.isin(by_the_rule(songs, 1)[1].track_id)][:5]
    songs.loc[rare, "genre"] = "rare"  # so the first split learns three genres, the second two
    assert 0 < models.train_genre(songs)[1]["accuracy"] <= 1


@pytest.mark.parametrize("name", list(models.MODELS))
def test_training_is_repeatable_needs_no_optional_column_and_gives_plain_json(songs, name):
    few = songs.head(600)
    some = [few, pd.concat([few, few], ignore_index=True), few[list(db.REQUIRED)]]  # repeated track_ids count once
    first, again, bare = (json.loads(json.dumps(models.MODELS[name](rows)[1] | {"query_ms": 0}, allow_nan=False)) for rows in some)
    assert first == again and next(iter(bare.values())) is not None and bare.keys() == first.keys()


@pytest.mark.parametrize("name", ["genre", "energy", "popularity"])
def test_models_find_what_the_demo_songs_hide_without_seeing_it(songs, trained, name):
    estimator, metrics = trained[name]
    if name == "genre":
        assert metrics["accuracy"] > metrics["accuracy_new_artists"] > 1.5 * metrics["baseline_accuracy"]
    else:
        assert metrics["r2"] > 0.4 and metrics["r2"] > metrics["r2_new_artists"] > 0 and metrics["mae"] < metrics["baseline_mae"]
    other = songs.head(200).assign(**{name: songs[name].sample(200, random_state=0).to_numpy()})
    assert (estimator.predict(other) == estimator.predict(songs.head(200))).all()
    unknown = [songs.head(50).assign(artist_name=artist, album_name="Nothing In Particular") for artist in ("Nobody", "Somebody")]
    if name != "genre":  # whose words are of the artist's name too
        assert (estimator.predict(unknown[0]) == estimator.predict(unknown[1])).all()


def test_the_genre_network_gradient_is_that_of_its_loss(songs):
    """Against finite differences of the mean cross-entropy."""
    few, rng = songs.head(40), np.random.default_rng(0)
    genre = models.GenreClassifier().fit(few, few.genre)
    net = genre.network_ = {name: weights.astype(np.float64) for name, weights in genre.network_.items()}
    numbers, texts = (part.astype(np.float64) for part in genre._encode(few))
    y = np.searchsorted(genre.classes_, few.genre)
    def loss():
        hidden = np.maximum(numbers @ net["in"] + net["in0"] + texts @ net["words"], 0)
        return oracle.log_loss(y, models.softmax(hidden @ net["out"] + net["out0"]), labels=range(len(genre.classes_)))
    gradients = genre._gradients(numbers, texts, np.arange(texts.shape[1]), y, np.ones((40, genre.HIDDEN)))
    for name, weights in net.items():
        at, seen = tuple(rng.integers(0, size) for size in weights.shape), []
        for step in (1e-5, -2e-5):
            weights[at] += step
            seen.append(loss())
        assert gradients[name][at] == pytest.approx((seen[0] - seen[1]) / 2e-5, abs=1e-6), name


@pytest.mark.parametrize("name, rows, change, sentence", [
    ("genre", 600, {"genre": "pop"}, "genre needs at least 2 genres with 5 songs each; the table has 1"),
    ("popularity", 600, {"popularity": 50.0}, "popularity is 50 for all 600 songs; there is nothing to learn until the column varies"),
    ("clusters", 600, dict.fromkeys(models.AUDIO, 0.5), "clusters needs at least 2 distinct songs for 2 clusters; the table has 1"),
    ("similar", 600, {"artist_name": "A", "track_name": "B"}, "similar needs at least 2 different recordings; the table has 1"),
    ("energy", 3, {}, "energy needs at least 20 songs; the table has 3"),
])
def test_too_little_data_is_said(songs, name, rows, change, sentence):
    with pytest.raises(DataError, match=re.escape(sentence)):
        models.MODELS[name](songs.head(rows).assign(**change))


def test_clusters(songs, trained):
    pipeline, metrics = trained["clusters"]
    labels = pipeline.predict(songs[list(models.AUDIO)].astype(np.float64))
    assert metrics["sizes"] == np.bincount(labels).tolist() == sorted(metrics["sizes"], reverse=True) and sum(metrics["sizes"]) == 3000
    scaled = (songs[list(models.AUDIO)] - songs[list(models.AUDIO)].mean()) / songs[list(models.AUDIO)].std(ddof=0)
    assert metrics["silhouette"] == pytest.approx(oracle.silhouette_score(scaled, labels))
    assert models.train_clusters(songs.head(3), 3)[1]["sizes"] == [1, 1, 1]


# ---- models: publishing ----------------------------------------------------------------------------------------------
def publish(folder, value, name="energy", force=False, **about):
    """Publish a toy model whose primary metric is the value."""
    about = {"run": "1", "settings": {}, "rows": 10, "table": "songs", "data": {}, "command": f"train.py --models-dir {folder}"} | about
    return models.publish(name, {"toy": value}, {"r2": value, "plot": {}}, about, folder, force)


def current(folder, name="energy"):
    loaded, report = models.load_model(name, folder), models.read_report(name, folder)
    assert loaded["metrics"] == report["metrics"] and loaded["run"] == report["run"]
    assert report["sha256"] == hashlib.sha256((folder / f"{name}.joblib").read_bytes()).hexdigest()
    return loaded["estimator"]["toy"]


def kept(folder):
    return sorted(report["metrics"]["r2"] for _, report in models.list_versions("energy", folder))


@pytest.mark.parametrize("before, after, more, status", [
    (0.5, 0.48, {}, "trained"), (0.5, 0.47, {}, "held_back"), (0.1, 0.091, {}, "trained"), (0.1, 0.089, {}, "held_back"),
    (-0.2, -0.205, {}, "trained"), (-0.2, -0.22, {}, "held_back"), (0.5, None, {}, "held_back"), (None, 0.1, {}, "trained"),
    (0.5, 0.4, {"force": True}, "trained"), (0.5, 0.4, {"settings": {"n_clusters": 3}}, "trained")])
def test_the_gate(tmp_path, before, after, more, status):
    publish(tmp_path, before)
    report = publish(tmp_path, after, **more)
    assert (report["status"], report["previous"]) == (status, before)
    assert current(tmp_path) == (after if status == "trained" else before) and kept(tmp_path) == [before if status == "trained" else after]
    if status == "held_back" and after:
        assert f"held back: r2 fell to {after:.4f}, the current model has {before:.4f}; to publish all the same: " in report["error"]
        assert report["error"].endswith(f"train.py --models-dir {tmp_path} --only energy --force")


def test_rollback_goes_back_version_by_version_and_never_to_a_bad_one(tmp_path):
    for value in (0.3, 0.4, 0.5, 0.1):
        publish(tmp_path, value)
    for value in (0.4, 0.3):
        assert models.rollback("energy", tmp_path)["metrics"]["r2"] == current(tmp_path) == value
    with pytest.raises(models.ModelError, match="there is no earlier version of energy in .* to go back to"):
        models.rollback("energy", tmp_path)
    publish(tmp_path, 0.6)
    assert models.rollback("energy", tmp_path)["metrics"]["r2"] == 0.3, "neither what was held back nor what was rolled back"


def test_five_versions_are_kept_and_bad_nights_do_not_push_good_ones_out(tmp_path):
    for value in range(1, 9):
        publish(tmp_path, float(value))
    for _ in range(8):
        assert publish(tmp_path, 0.1)["status"] == "held_back"
    assert kept(tmp_path) == [0.1, 4, 5, 6, 7] and current(tmp_path) == 8


def test_a_folder_of_the_first_edition_goes_on(tmp_path):
    publish(tmp_path, 0.5)
    shutil.rmtree(tmp_path / "versions")  # there the current model had no twin
    assert current(tmp_path) == 0.5 and publish(tmp_path, 0.1)["status"] == "held_back"
    publish(tmp_path, 0.6)
    assert models.rollback("energy", tmp_path)["metrics"]["r2"] == current(tmp_path) == 0.5


@pytest.mark.parametrize("damage, versions, answer", [
    (lambda folder: (folder / "metrics" / "energy.json").write_text("{"), True, 0.2),
    (lambda folder: (folder / "metrics" / "energy.json").unlink(), True, 0.2),
    (lambda folder: (folder / "metrics" / "energy.json").unlink(), False, "is damaged or was changed: no report has its SHA-256"),
    (lambda folder: (folder / "energy.joblib").write_bytes(b""), True, "is damaged or was changed: .*models.py rollback energy"),
    (lambda folder: (folder / "energy.joblib").write_bytes((folder / "energy.joblib").read_bytes().replace(b"toy", b"boy")), True, "train.py .*--only energy"),
    (lambda folder: (folder / "energy.joblib").unlink(), True, "there is no energy model in .*; train it: .*train.py .*--only energy"),
])
def test_what_is_missing_damaged_or_changed_is_not_unpickled(tmp_path, damage, versions, answer):
    for value in (0.1, 0.2):
        publish(tmp_path, value)
    damage(tmp_path)
    if not versions:
        shutil.rmtree(tmp_path / "versions")
    if isinstance(answer, float):
        assert current(tmp_path) == answer
        return
    with pytest.raises(models.ModelError, match=answer):
        models.load_model("energy", tmp_path)
    if versions:
        models.rollback("energy", tmp_path)
        assert current(tmp_path) in (0.1, 0.2)
    assert publish(tmp_path, 0.05)["status"] == ("held_back" if versions else "trained"), "a damaged model is no yardstick"


def test_another_scikit_learn_is_a_warning(tmp_path, caplog):
    installed = models.library_versions()["scikit-learn"]
    publish(tmp_path, 0.1)
    for path in tmp_path.rglob("*.json"):
        path.write_text(path.read_text().replace(f'"scikit-learn": "{installed}"', '"scikit-learn": "0.1"'))
    models.load_model("energy", tmp_path)
    assert f"energy was trained with scikit-learn 0.1 and is loaded with {installed}" in caplog.text


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3))])
def test_killed_in_the_middle_of_publishing_or_rolling_back(tmp_path, seed):
    rng, value = random.Random(seed), 1.0
    publish(tmp_path, value)
    for _ in range(25):
        child = os.fork()
        while not child:
            value += 1
            publish(tmp_path, value)
            if value % 5 == 0:
                models.rollback("energy", tmp_path)
        time.sleep(rng.uniform(0.01, 0.12))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        value = max(value, current(tmp_path))
        models.clean_up(tmp_path)
        assert current(tmp_path) and not list(tmp_path.rglob(".*"))
        for path in (tmp_path / "versions").glob("*.joblib"):
            assert json.loads(path.with_suffix(".json").read_text())["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert len(list((tmp_path / "versions").iterdir())) <= 2 * (models.KEEP_VERSIONS + 2)


def test_a_model_that_does_not_fit_on_the_disk(tmp_path):
    publish(tmp_path, 0.5)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    child = os.fork()
    if not child:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
        try:
            models.publish("energy", {"toy": np.zeros(10**6)}, {"r2": 0.9}, {"run": "2", "settings": {}}, tmp_path)
        except OSError as error:
            os._exit(not str(error.filename).startswith(str(tmp_path)))
        os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before


def test_history_and_what_is_owed(tmp_path, monkeypatch):
    monkeypatch.setitem(models.MODELS, "tempo", models.train_energy)  # a sixth model is a line in the registry
    line = lambda name, status, run="1": models.append_history(tmp_path, [{"model": name, "status": status, "run": run}])
    assert models.owed(tmp_path) == list(models.MODELS)
    for name in models.MODELS:
        publish(tmp_path, 0.5, name)
        line(name, "trained")
    assert models.owed(tmp_path) == []
    line("genre", "failed", "2"), line("energy", "held_back", "2"), line("similar", "started", "2"), line("tempo", "failed", "2")
    assert models.owed(tmp_path) == ["genre", "energy", "similar", "tempo"]
    with open(tmp_path / "metrics" / "history.jsonl", "a") as file:
        file.write('{"model": "genre", "sta')  # cut short
    line("similar", "started")
    assert models.owed(tmp_path) == ["genre", "energy", "tempo"], "published by that very run, killed before it could write it down"
    (tmp_path / "clusters.joblib").unlink()
    assert models.owed(tmp_path) == ["genre", "clusters", "energy", "tempo"]


def test_a_sixth_model_is_shown_and_rolled_back(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(models.MODELS, "tempo", lambda songs: ({"toy": 1}, {"r2": 0.5}))
    for value in (0.5, 0.6):
        publish(tmp_path, value, "tempo")
    assert models.main(["rollback", "tempo", "--models-dir", str(tmp_path)]) == 0 and current(tmp_path, "tempo") == 0.5
    assert models.main(["show", "--json", "--models-dir", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out.partition("\n")[2])["tempo"]["metrics"] == {"r2": 0.5}


@pytest.mark.parametrize("change, sentence", [
    (lambda s: s.head(1500), "the table has 1,500 songs; at the last training it had 3,000"),
    (lambda s: pd.concat([s] + [s[s.genre == s.genre.iloc[0]]] * 2), "of the songs; it was"),
    (lambda s: s.assign(loudness=s.loudness - 6), "mean loudness is"),
    (lambda s: s.sample(frac=0.95, random_state=1), None),
])
def test_drift_is_said_with_figures(songs, models_dir, change, sentence):
    said = models.drift_since(models.describe(change(songs)), "songs", models_dir)
    assert any(sentence in words for words in said) if sentence else said == []
    assert models.drift_since(models.describe(change(songs)), "another table", models_dir) == []


# ---- models: the command line ----------------------------------------------------------------------------------------
def test_predict_adds_its_columns_to_the_rows(songs, models_dir, tmp_path):
    given = songs.head(50).rename(columns={"genre": "track_genre", "artist_name": "artists"}).assign(note='a,"b"\nc')
    given.to_csv(tmp_path / "in.csv", index=False)
    ask = lambda *options: command("models.py", "predict", tmp_path / "in.csv", *options, "--models-dir", models_dir)
    done = ask("--out", tmp_path / "out.csv")
    assert done.returncode == 0, done.stderr
    out = pd.read_csv(tmp_path / "out.csv")
    assert list(out) == [*given, "genre_predicted", "genre_confidence", "cluster", "energy_predicted", "popularity_predicted"]
    pd.testing.assert_frame_equal(out[list(given)], pd.read_csv(tmp_path / "in.csv"))
    assert (out.genre_predicted == songs.genre.head(50)).mean() > 0.5 and out.genre_confidence.between(0, 1).all()
    assert oracle.r2_score(songs.energy.head(50), out.energy_predicted) > 0.7 and set(out.cluster) <= {0, 1}
    lines = [json.loads(line) for line in ask("--json").stdout.splitlines()]
    assert [line["genre_predicted"] for line in lines] == list(out.genre_predicted) and lines[0]["note"] == 'a,"b"\nc'
    printed = ask().stdout
    assert "50 songs; --out FILE writes them all" in printed and printed.count("demo-") == 20 and out.track_name[19] in printed


@pytest.mark.parametrize("missing", ["genre", "popularity", "energy", "artist_name", "year"])
def test_predict_does_without_a_column_and_a_model(songs, models_dir, tmp_path, missing):
    shutil.copytree(models_dir, tmp_path / "models")
    (tmp_path / "models" / "popularity.joblib").unlink()
    songs.head(30).drop(columns=missing).to_csv(tmp_path / "in.csv", index=False)
    done = command("models.py", "predict", tmp_path / "in.csv", "--out", tmp_path / "out.csv", "--models-dir", tmp_path / "models")
    assert done.returncode == 0 and "popularity skipped: there is no popularity model" in done.stderr, done.stderr
    out = pd.read_csv(tmp_path / "out.csv").drop(columns=songs.columns, errors="ignore")
    assert list(out) == ["genre_predicted", "genre_confidence", "cluster", "energy_predicted"]
    assert out.drop(columns="cluster").notna().all(axis=None) and out.cluster.isna().all() == (missing == "energy")


@pytest.mark.parametrize("same_artist", [False, True])
def test_similar_is_exact(songs, same_artist):
    """Against brute force: every distance, sorted, less the song's own recording, repeated ones, and a fourth by its artist."""
    few = pd.concat([songs.head(400), songs.head(40).assign(track_id=[f"copy{i}" for i in range(40)])], ignore_index=True)
    few.loc[::5, "artist_name"] = "Demo Artist 1"
    index, first = models.SimilarSongs().fit(few), few.artist_name.str.casefold().str.split(";").str[0]
    points, recording = np.asarray(index.tree_.data), (few.artist_name + "\0" + few.track_name).str.casefold()
    for row in range(0, len(few), 3):
        distances, seen, expected, own = np.linalg.norm(points - points[row], axis=1), {recording[row]}, [], 0
        for other in np.argsort(distances, kind="stable"):
            if recording[other] not in seen and (own < 3 or first[other] != first[row] or same_artist):
                expected.append(distances[other])
                own += first[other] == first[row]
            seen.add(recording[other])
        rows, alike = index.neighbours(row, same_artist=same_artist)
        assert np.allclose(distances[rows], expected[:10]) and len(rows) == 10 == len({*recording[rows]} - {recording[row]})
        assert (np.diff(alike) <= 0).all() and 0 <= alike.min() <= alike.max() <= 1


def test_similar_answers_or_says_what_it_does_not_know(songs, models_dir):
    ask = lambda *words: command("models.py", "similar", *words, "--models-dir", models_dir)
    song, twice = songs[~songs.track_name.duplicated(keep=False)].iloc[0], songs[songs.track_name.duplicated()].iloc[0]
    for text in (song.track_name.upper(), song.track_id):
        answer = json.loads(ask(text, "-k", 5, "--json").stdout)
        assert answer["song"]["track_id"] == song.track_id and len(answer["similar"]) == 5
    printed = ask(song.track_id).stdout
    assert f"Like {song.track_name} by {song.artist_name}" in printed and answer["similar"][0]["track_id"] in printed
    assert f"by {twice.artist_name}" in ask(twice.track_name, "--artist", twice.artist_name).stdout
    for words, sentence in (((song.track_name[:-1] + "?",), song.track_name), ((twice.track_name,), "say which, --artist NAME or a track_id")):
        done = ask(*words)
        assert done.returncode == 2 and sentence in done.stderr and "Traceback" not in done.stderr


def test_models_commands_import_nothing_they_do_not_need(models_dir):
    code = ("import sys, models; sys.argv = ['models.py', 'similar', 'x', '--models-dir', sys.argv[1]]; models.main(); "
            "print(sorted({'prefect', 'sklearn', 'pandas', 'matplotlib'} & set(sys.modules)))")
    assert command("-c", code, models_dir).stdout.splitlines()[-1] == "[]"


def test_show_and_rollback(models_dir, tmp_path):
    ask = lambda *words: command("models.py", *words)
    done = ask("show", "--models-dir", models_dir)
    assert done.returncode == 0 and all(name in done.stdout for name in models.MODELS) and "accuracy" in done.stdout
    reports = json.loads(ask("show", "--json", "--models-dir", models_dir).stdout)
    assert reports["genre"]["metrics"] == models.read_report("genre", models_dir)["metrics"]
    done = ask("show", "--models-dir", tmp_path)
    assert done.returncode == 2 and done.stdout.count("not trained") == 5
    for value in (0.1, 0.2):
        publish(tmp_path, value)
    with models.one_run_at_a_time(tmp_path.resolve()):
        done = ask("rollback", "energy", "--models-dir", tmp_path)
    assert done.returncode == 75 and "another run is training into" in done.stderr and current(tmp_path) == 0.2
    assert ask("rollback", "energy", "--models-dir", tmp_path).returncode == 0 and current(tmp_path) == 0.1
    for words in (("genre", tmp_path), ("energy", tmp_path), ("energy", tmp_path / "nowhere")):
        done = ask("rollback", words[0], "--models-dir", words[1])
        assert done.returncode == 2 and "there is no" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "nowhere").exists()
