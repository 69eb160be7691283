"""The models: training, estimators, evaluation, files, predicting.

    python models.py show                                   # the current models, metrics, age
    python models.py similar "Bohemian Rhapsody" -k 10      # by title or track_id
    python models.py titles bohemian                        # titles that contain a text
    python models.py predict songs.csv --out predicted.csv  # the rows with the predictions added
    python models.py rollback genre                         # put the previous version back

A training function is plain: a DataFrame of songs (the columns of db.REQUIRED and what there is of
db.COLUMNS) goes in, a fitted estimator and a dict of metrics come out. It reads no file and
writes none; it says what it is doing through the logger "models".

scikit-learn and pandas are imported where they are used: they take two seconds, and `similar` needs
neither.
"""

from __future__ import annotations

import ctypes
import fcntl
import gc
import hashlib
import json
import logging
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import lru_cache, partial
from itertools import chain, repeat
from logging.handlers import QueueHandler
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import recv_handle, send_handle
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np

import db
import notify
from db import (
    AUDIO,
    MIN_GENRE_SONGS,
    MIN_SONGS,
    MORE_AUDIO,
    DataError,
    write_atomically,
    write_json,
)

if TYPE_CHECKING:
    import pandas as pd
    from numpy import ndarray
    from numpy.random import Generator
    from scipy.sparse import csr_array

log = logging.getLogger("models")

Metrics = dict[str, Any]  # the primary metric first
Report = dict[str, Any]  # of a model, as in its metrics file
Folder = Path | str

MODELS_DIR = db.ROOT / "models"
SEED = 20  # of every random choice: the same table gives the same models and the same metrics

NUMBERS = ("popularity", *AUDIO, *MORE_AUDIO)

# How a model is judged.
NEW_ARTISTS = 0.10  # share of the artists held out whole
KNOWN_SONGS = 0.12  # share of the other artists' songs held out
FEW_SONGS = 50_000  # of fewer, what is held out of one split leaves much to chance ...
SPLITS = 3  # ... so a model is judged on so many, ...
AVERAGED = 3  # ... and a regressor that is saved averages so many fits; one that is judged is one
SMALL_TABLE = 5_000  # songs: so few are learnt with other steps, and by a second model
LARGE_TABLE = 20_000  # so many are not; between the two it fades
FORK_SONGS = 2_000  # of fewer, a fit takes less than a fork of its own costs

# The gate: how much worse than the current model a new one may be and still take its place.
GATE_RELATIVE = 0.05
GATE_ABSOLUTE = 0.01
KEEP_VERSIONS = 5

# Drift: what moved more than this since the last training is worth a warning.
DRIFT_ROWS = 0.2  # share of the rows gone (or come, in proportion)
DRIFT_SHARE = 0.005  # change of a genre's share of all songs ...
DRIFT_RATIO = 1.5  # ... where the share also changed by this factor
DRIFT_DEVIATIONS = 0.25  # change of a feature's mean, in standard deviations


def seeded() -> Generator:
    """Return a new generator of random numbers, the same ones each time."""
    return np.random.default_rng(SEED)


# ---- The training functions: songs in; a fitted estimator and its metrics out --------------------


def train_genre(songs: pd.DataFrame) -> tuple[GenreClassifier, Metrics]:
    """Classify the genre. Return (GenreClassifier, metrics), the primary metric first.

    Figures are shares of held-out songs: `accuracy`, `top3_accuracy` and `f1_macro` on songs of
    known artists, `accuracy_new_artists` on artists never seen, `baseline_accuracy` for always
    naming the most common genre. `leans_on` is {column: fall of the accuracy}.
    Raises DataError where fewer than two genres have five songs each.
    """
    from sklearn.metrics import accuracy_score, f1_score

    songs = _usable(songs, "genre", MIN_SONGS)
    learnable = (songs["genre"].value_counts() >= MIN_GENRE_SONGS).sum()
    if learnable < 2:
        raise DataError(
            f"genre needs at least 2 genres with {MIN_GENRE_SONGS} songs each; "
            f"the table has {learnable}"
        )
    final, known, new, leans = _fit_and_judge(
        "genre", GenreClassifier(), GenreClassifier, songs, _genre_answers, accuracy_score
    )
    return final, {
        "accuracy": _figure(accuracy_score, known),
        "accuracy_new_artists": _figure(accuracy_score, new),
        "top3_accuracy": _figure(accuracy_score, known, "best_of_3"),
        "f1_macro": _figure(partial(f1_score, average="macro"), known),
        "baseline_accuracy": _figure(accuracy_score, known, "baseline"),
        "leans_on": leans,
        "classes": len(final.classes_),
        "fitted_on": final.fitted_on_,
        "plot": _plot_genres(known) if len(known) else {},
    }


def train_clusters(songs: pd.DataFrame, n_clusters: int = 2) -> tuple[Any, Metrics]:
    """Cluster songs by sound: standardised audio features, k-means. Return (Pipeline, metrics).

    `silhouette` (-1 to 1) is that of a seeded sample; `sizes` are songs, `means` each
    cluster's mean features, `labels` two words for those in which it differs most. Cluster 0 is the
    largest.
    Raises DataError where there are fewer than n_clusters distinct songs.
    """
    from sklearn.cluster import KMeans
    from sklearn.metrics import silhouette_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    songs = _usable(songs, "clusters", 1)
    features = songs[list(AUDIO)].astype(np.float64)
    distinct = len(features.drop_duplicates())
    if distinct < n_clusters:
        raise DataError(
            f"clusters needs at least {n_clusters} distinct songs for {n_clusters} clusters; "
            f"the table has {distinct}"
        )
    _progress("clusters", ["fitting"])(0, 0)
    kmeans = KMeans(n_clusters, n_init=4, random_state=SEED)
    pipeline = make_pipeline(StandardScaler(), kmeans).fit(features)
    sizes = _largest_first(kmeans)
    sample = seeded().permutation(len(songs))[:SILHOUETTE_SAMPLE]
    standardised = pipeline[0].transform(features.iloc[sample])
    labels = [_in_two_words(center) for center in kmeans.cluster_centers_]
    clusters = kmeans.labels_[sample]
    silhouette = None
    with suppress(ValueError):  # of a single cluster, or of as many clusters as songs
        silhouette = float(silhouette_score(standardised, clusters))
    return pipeline, {
        "silhouette": silhouette,
        "sizes": sizes,
        "labels": labels,
        "means": features.groupby(kmeans.labels_).mean().round(4).to_dict("records"),
        "plot": {"points": _plot_points(standardised, clusters), "labels": labels, "sizes": sizes},
    }


def train_energy(songs: pd.DataFrame) -> tuple[SongRegressor, Metrics]:
    """Predict energy (0 to 1) from the other features, genre, album and artist.

    Return (SongRegressor, metrics): those of train_popularity.
    """
    return _train_regressor("energy", songs)


def train_popularity(songs: pd.DataFrame) -> tuple[SongRegressor, Metrics]:
    """Predict popularity (0 to 100) from sound, genre, titles, album and artist.

    Return (SongRegressor, metrics), the primary metric first. `r2`, `mae`, `rmse` are on held-out
    songs of known artists (mae and rmse in the target's own unit), `…_new_artists` on artists never
    seen, `baseline_mae` for predicting the mean. `leans_on` is {column: fall of r2}.
    Raises DataError where the column is constant.
    """
    return _train_regressor("popularity", songs)


def train_similar(songs: pd.DataFrame) -> tuple[SimilarSongs, Metrics]:
    """Index songs by sound and company. Return (SimilarSongs, metrics).

    Of a seeded sample of songs, each with its ten neighbours: the share of neighbours of the song's
    own genre, which the query does not know (`same_genre_at_10`), against what drawing songs at
    random would give (`same_genre_by_chance`), the share by the song's own artist, and milliseconds
    of processor time per query. Raises DataError where there is but one recording.
    """
    songs = _usable(songs, "similar", 2)
    _progress("similar", ["fitting"])(0, 0)
    index = SimilarSongs().fit(songs)
    if not index.recording_.any():
        raise DataError("similar needs at least 2 different recordings; the table has 1")
    if not index.settings_["company"]:
        log.warning(
            "similar: the songs have fewer than two genres, so the company they keep is left out: "
            "it is sound alone that counts"
        )
    start = time.thread_time()  # of this thread alone: other models may be computing beside it
    artist = index.artist_
    same_artist = [artist[index.neighbours(row)[0]] == artist[row] for row in index.sample_]
    query_ms = (time.thread_time() - start) / len(same_artist) * 1000
    same_genre = _neighbours_of_own_genre(index, genres(songs))
    at_10 = by_chance = None
    if len(same_genre):
        at_10 = float(same_genre.stack().mean())
        by_chance = float((genres(songs).value_counts(normalize=True) ** 2).sum())
    return index, {
        "same_genre_at_10": at_10,
        "same_genre_by_chance": by_chance,
        "same_artist_at_10": float(np.mean(np.concatenate(same_artist))),
        "query_ms": query_ms,
        "plot": {
            "same_genre_at": same_genre.mean().tolist(),
            "by_chance": by_chance,
            "example": _example(songs),
        },
    }


# The order is that of every table people see, and of submission: the longest fit first, so that no
# core waits for it. A model has the name of the column of songs that it predicts, if it does.
MODELS: dict[str, Callable] = {
    "genre": train_genre,
    "clusters": train_clusters,
    "energy": train_energy,
    "popularity": train_popularity,
    "similar": train_similar,
}


def chosen(only: list[str] | str | None) -> list[str]:
    """Return the models asked for, in their usual order.

    `only` is None for all, a name, or names with or without commas. Raises DataError for another.
    """
    text = ",".join(only) if isinstance(only, list) else only
    names = [name.strip() for name in (text or ",".join(MODELS)).split(",")]
    for name in filter(None, names):
        if name not in MODELS:
            raise DataError(f"there is no model {name!r}; the models are {', '.join(MODELS)}")
    return [name for name in MODELS if name in names]


def _usable(songs: pd.DataFrame, name: str, at_least: int) -> pd.DataFrame:
    """Return the songs that have what the model of that name predicts, each track_id once.

    Raises DataError where there are fewer than `at_least`, or no such column.
    """
    if name in db.COLUMNS:
        if name not in songs:
            raise DataError(f"{name} needs the column {name}, which the table lacks")
        known = songs[name].notna() & (songs[name] != "")
        if not known.all():
            songs = songs[known].reset_index(drop=True)
    # No needless copy, of the table or of what a fork shares until it looks at it.
    if songs.attrs.get("unique") != len(songs) and not songs["track_id"].is_unique:
        songs = songs.drop_duplicates("track_id", keep="last", ignore_index=True)
    if len(songs) < at_least:
        raise DataError(f"{name} needs at least {at_least} songs; the table has {len(songs)}")
    return songs


def _genre_answers(judged: GenreClassifier, learnt: pd.DataFrame, held_out: pd.DataFrame) -> dict:
    actual = held_out["genre"].to_numpy(object).astype(str)
    likely = judged.classes_[np.argsort(-judged.predict_proba(held_out), axis=1)[:, :3]]
    among_3 = (likely == actual[:, None]).any(axis=1)
    return {
        "actual": actual,
        "predicted": likely[:, 0],
        "best_of_3": np.where(among_3, actual, likely[:, 0]),
        "baseline": learnt["genre"].mode()[0],
    }


def _train_regressor(target: str, songs: pd.DataFrame) -> tuple[SongRegressor, Metrics]:
    """Return (SongRegressor, metrics) for the target column."""
    from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error

    songs = _usable(songs, target, MIN_SONGS)
    if songs[target].nunique() < 2:
        raise DataError(
            f"{target} is {songs[target].iloc[0]:g} for all {len(songs):,} songs; "
            f"there is nothing to learn until the column varies"
        )

    def answers(judged, learnt, held_out) -> dict:
        return {
            "actual": held_out[target].to_numpy(np.float64),
            "predicted": judged.predict(held_out),
            "baseline": learnt[target].mean(),
        }

    make = partial(SongRegressor, target)
    final = make(AVERAGED if len(songs) < FEW_SONGS else 1)
    final, known, new, leans = _fit_and_judge(target, final, make, songs, answers, r2_score)
    return final, {
        "r2": _figure(r2_score, known),
        "r2_new_artists": _figure(r2_score, new),
        "mae": _figure(mean_absolute_error, known),
        "mae_new_artists": _figure(mean_absolute_error, new),
        "rmse": _figure(root_mean_squared_error, known),
        "baseline_mae": _figure(mean_absolute_error, known, "baseline"),
        "leans_on": leans,
        "fitted_on": final.fitted_on_,
        "plot": _plot_regression(known) if len(known) else {},
    }


# What train_clusters says of its clusters.
SILHOUETTE_SAMPLE = 3000  # songs: the silhouette compares each with every other
PLOT_POINTS = 2000
HIGH_AND_LOW = {
    "danceability": ("danceable", "hard to dance to"),
    "energy": ("energetic", "calm"),
    "loudness": ("loud", "quiet"),
    "speechiness": ("spoken", "sung"),
    "acousticness": ("acoustic", "electronic"),
    "instrumentalness": ("instrumental", "vocal"),
    "valence": ("happy", "sad"),
}


def _largest_first(kmeans: Any) -> list[int]:
    """Renumber the clusters by size, which is returned: people remember numbers."""
    sizes = np.bincount(kmeans.labels_, minlength=kmeans.n_clusters)
    order = np.argsort(-sizes, kind="stable")
    kmeans.cluster_centers_ = kmeans.cluster_centers_[order]
    kmeans.labels_ = np.argsort(order)[kmeans.labels_].astype(np.int32)
    return sizes[order].tolist()


def _in_two_words(center: ndarray) -> str:
    """Return words for the two features in which a cluster's centre differs most from the mean."""
    said = []
    for feature in np.argsort(-np.abs(center))[:2]:
        high, low = HIGH_AND_LOW[AUDIO[feature]]
        said.append(low if center[feature] < 0 else high)
    return ", ".join(said)


def _plot_points(points: ndarray, clusters: ndarray) -> list[list[float]]:
    """Return the two principal components and the cluster of each song, for the picture."""
    from sklearn.decomposition import PCA

    plane = PCA(2, random_state=SEED).fit_transform(points[:PLOT_POINTS]).round(3)
    return np.column_stack([plane, clusters[:PLOT_POINTS]]).tolist()


QUERY_SAMPLE = 1000  # songs whose neighbours are looked at for the metrics of `similar`


def _neighbours_of_own_genre(index: SimilarSongs, genre: pd.Series) -> pd.DataFrame:
    """Return songs of the sample x ten neighbours: 1 where the neighbour has the song's genre.

    Songs without a genre are left out. Where fewer than ten neighbours were found, NaN.
    """
    import pandas as pd

    names = genre.fillna("").to_numpy(object)
    answers = index.neighbours_of(index.sample_, points=index.asked_)
    same = [
        names[neighbours] == names[row]
        for row, (neighbours, _) in zip(index.sample_, answers)
        if names[row]
    ]
    return pd.DataFrame(same, dtype=float)


def _example(songs: pd.DataFrame) -> str:
    """Return what one can ask of `similar`: a title of plain words that one song alone has.

    The track_id of a song where there is none.
    """
    titles = songs["track_name"]
    once = titles[~titles.str.casefold().duplicated(keep=False)]
    plain_words = re.compile(r"[^\W\d_]\w*( \w+)*")
    return next(filter(plain_words.fullmatch, once), songs["track_id"].iloc[0])


# ---- What a song shares its name with: artists, titles, tokens -----------------------------------

# A token is a word in Latin letters, or one character of another script.
TOKEN = re.compile(r"[^\W\u0370-\uffff]+|[^\W\u0000-\u036f]")
BRACKET = re.compile(r"[(\[\-]")
FEATURED = re.compile(
    r"[(\[\-]\s*(?:feat\.?|ft\.?|featuring|with)\s+([^()\[\]]+)"  # "Title (feat. B & C)"
    r"|[(\[\-]\s*([^()\[\]\-]+?)(?:'s)?\s+(?:[a-z]+\s+)?(?:remix|edit|mix)"  # "Title - B Remix"
)


def credits(artist_name: str) -> list[str]:
    """Return the credited artists: "A;B" is A and B."""
    return [name.strip() for name in artist_name.casefold().split(";")]


def featured(track_name: str) -> list[str]:
    """Return the artists a title names: B and C of "Title (feat. B & C)"."""
    if not BRACKET.search(track_name):
        return []
    groups = chain.from_iterable(FEATURED.findall(track_name.casefold()))
    names = re.split(r",|&| and | x ", ",".join(groups))
    return [name.strip() for name in names if name.strip()]


def tokens(text: str) -> list[str]:
    """Return the tokens of a title: "remix" tells something even of an artist never seen."""
    return TOKEN.findall(text.casefold())


def whole(text: str) -> list[str]:
    """Return the text itself, case-folded; nothing where it is empty."""
    return [text.casefold()] if text else []


def column(songs: pd.DataFrame, name: str) -> pd.Series:
    """Return the Series of that name, all missing where the table has none."""
    import pandas as pd

    if name in songs:
        return songs[name]
    return pd.Series(np.nan, songs.index, object)


def genres(songs: pd.DataFrame) -> pd.Series:
    """Return the Series of genres, missing where there is none."""
    genre = column(songs, "genre")
    return genre.where(genre != "")


def present(songs: pd.DataFrame, names: Sequence[str]) -> list[str]:
    """Return those of the columns that have any values."""
    return [name for name in names if name in songs and songs[name].notna().any()]


def recordings(songs: pd.DataFrame) -> ndarray:
    """Return an integer per song, the same for two of one artist and title (case-folded)."""
    names = songs["artist_name"].astype(object) + "\0" + songs["track_name"].astype(object)
    return names.str.casefold().factorize()[0]


Levels = dict[str, int]


def numbered(keys: Iterable[str]) -> Levels:
    """Return {key: its place} of keys that differ."""
    return {key: place for place, key in enumerate(keys)}


def incidence(
    names: pd.Series, split: Callable, levels: Levels | None = None
) -> tuple[csr_array, Levels]:
    """Return (matrix, levels): sparse 0/1, songs x levels, 1 where the name has the level's key.

    `names` is a Series of text, NaN allowed; `split(text)` gives its keys; `levels` maps each key
    to its column, and is made from the names where it is not given. Keys without a level are left
    out.
    """
    from scipy.sparse import csr_array

    codes, uniques = names.factorize()
    keys = [split(name) for name in uniques.to_numpy(object)]
    keys.append([])  # the last row, where code -1 (no name) leads
    if levels is None:
        levels = numbered(dict.fromkeys(chain.from_iterable(keys)))
    columns = np.fromiter(map(levels.get, chain.from_iterable(keys), repeat(-1)), np.int32)
    rows = np.repeat(np.arange(len(keys)), [len(some) for some in keys])
    rows = rows[columns >= 0]
    columns = columns[columns >= 0]
    ones = np.ones_like(rows, np.float32)
    matrix = csr_array((ones, (rows, columns)), shape=(len(keys), len(levels)))
    matrix.data[:] = 1  # also of a key that stands twice in a name: their sum would be 2
    return matrix[codes], levels


def in_parts(songs: pd.DataFrame, rows: int, function: Callable) -> ndarray:
    """Return function(songs) put together from `rows` songs at a time: it needs much on the way."""
    starts = range(0, max(len(songs), 1), rows)
    return np.concatenate([function(songs.iloc[start : start + rows]) for start in starts])


def fewness(songs: int, none: int = LARGE_TABLE) -> float:
    """Return how small a table of so many songs is: 1 to SMALL_TABLE songs, 0 from `none` on.

    In between it falls with their logarithm. What hangs on the size of a table hangs on this.
    """
    return float(np.interp(np.log(songs), np.log([SMALL_TABLE, none]), [1, 0]))


# ---- Saying how far it is ------------------------------------------------------------------------

# Records have extra={"model", "phase", "share"}, the share from 0 to 1.
PROGRESS_STEP = 0.05  # of a part, at least: the shares that are told shall cost nothing
PROGRESS_SECONDS = 10  # what takes longer says each quarter where only INFO is seen

Progress = Callable[[float], None]


def _say_nothing(share: float) -> None:
    """Take the place of a progress where nobody asked for one."""


def _take_part(work: Callable, tell: Progress) -> Any:
    """Do the work; tell its share from 0 to 1, PROGRESS_STEP by PROGRESS_STEP."""
    told = 0.0

    def progress(share) -> None:
        nonlocal told
        if share - told >= PROGRESS_STEP or share == 1:
            told = share
            tell(share)

    tell(told)
    return work(progress)


def _progress(name: str, phases: Sequence[str]) -> Callable:
    """Return a function(number of a part, its share) that logs the share of the whole.

    `phases`: of each part what it does. The level is DEBUG; INFO where a part begins, and each
    quarter of what takes long.
    """
    shares = [0.0] * len(phases)
    said = set()
    began = time.monotonic()

    def progress(part, share) -> None:
        quarter = int(4 * np.mean(shares))
        shares[part] = share
        done = np.mean(shares)
        takes_long = time.monotonic() - began > PROGRESS_SECONDS
        another_quarter = takes_long and quarter < int(4 * done) < 4
        line = f"{name}: {phases[part]}, {100 * done:.0f} %"
        worth_it = line not in said and (share == 0 or another_quarter)
        if worth_it:
            said.add(line)
        extra = {"model": name, "phase": phases[part], "share": round(done, 4)}
        log.log(logging.INFO if worth_it else logging.DEBUG, line, extra=extra)

    return progress


# ---- Genre ---------------------------------------------------------------------------------------

Weights = dict[str, np.ndarray]  # of the network, or as much for each: gradients


class GenreClassifier:
    """log P(genre | sound, tokens) + 0.8 [log P(genre | artists) - log P(genre)].

    The first term is a network of one hidden layer on all numbers, each coded piecewise linearly in
    quantile bins (Gorishniy et al., "On Embeddings for Numerical Features in Tabular Deep
    Learning", 2022), and on the tokens of title, artist and album. The second are genre counts of
    the credited and featured artists, shrunk towards the prior, then those of the exact credit,
    shrunk towards these (Dirichlet smoothing; MacKay and Peto, 1995).
    """

    TEXTS = ("track_name", "artist_name", "album_name")
    # How many songs the level above counts for.
    ARTIST_SONGS = 0.5
    CREDIT_SONGS = 1.0
    EFFECT_WEIGHT = 0.8  # below 1: the tokens already tell part of what the artist tells
    BINS = 16
    MIN_NAMES = 3  # a token must be in so many different names: rarer ones are identities
    MAX_SONGS = 300_000  # the network sees (a seeded sample); artists are counted over all songs
    HIDDEN = 128
    EPOCHS = 6
    MAX_BATCH = 512
    RATE = 0.004  # of Adam
    TOKEN_RATE = 0.05  # of Adagrad
    DROPOUT = 0.2
    TOKEN_DROPOUT = 0.5
    CHUNK = 20_000  # songs predicted at a time
    CODED = 2_000  # songs whose numbers are coded at a time: it takes ten times their memory

    def fit(
        self,
        songs: pd.DataFrame,
        genre: pd.Series,
        progress: Progress = _say_nothing,
        table_songs: int = 0,
    ) -> GenreClassifier:
        """Learn from `songs`, one row per song, and their genres as text; `progress(share)`.

        `table_songs` is the number of songs of the table, where `songs` are a part of it.
        """
        rng = seeded()
        self.size_ = table_songs or len(songs)
        # The texts have no name: of a million they would hold 80 MB.
        self.classes_, y = np.unique(genre.to_numpy(object).astype(str), return_inverse=True)
        self.prior_ = ((np.bincount(y) + 1) / (len(y) + len(self.classes_))).astype(np.float32)
        self._fit_effect(songs, y)
        if len(y) > self.MAX_SONGS:
            sample = np.sort(rng.choice(len(y), self.MAX_SONGS, replace=False))
            songs = songs.iloc[sample]
            y = y[sample]
        self.fitted_on_ = len(y)
        self._fit_encoding(songs)
        numbers, texts = self._encode(songs)
        trim_memory()
        self._fit_network(numbers, texts, y, rng, progress)
        return self

    def predict_proba(self, songs: pd.DataFrame) -> ndarray:
        """Return P(genre), float32, songs x classes_; DataError where songs lack most of AUDIO."""
        from scipy.special import softmax

        db.demand_sound(songs)

        def probabilities(part: pd.DataFrame) -> ndarray:
            return softmax(self.sound(part) + self.EFFECT_WEIGHT * self.effect(part), axis=1)

        return in_parts(songs, self.CHUNK, probabilities)

    def predict(self, songs: pd.DataFrame) -> ndarray:
        """Return the most probable genre of each song."""
        return self.classes_[self.predict_proba(songs).argmax(axis=1)]

    def looks_at(self) -> list[str]:
        """Return the columns of songs on which a prediction hangs."""
        return [*self.features_, *self.tokens_]

    def sound(self, songs: pd.DataFrame) -> ndarray:
        """Return log P(genre | sound, tokens) up to a constant per song, songs x genres."""
        numbers, texts = self._encode(songs)
        net = self.network_
        hidden = np.maximum(numbers @ net["in"] + net["in0"] + texts @ net["tokens"], 0)
        return hidden @ net["out"] + net["out0"]

    def effect(self, songs: pd.DataFrame) -> ndarray:
        """Return log P(genre | artists) - log P(genre), songs x genres: 0 for unknown artists."""
        artist, credit = self._levels(songs)
        by_artist = _shrunk(artist @ self.counts_[0], self.prior_, self.ARTIST_SONGS)
        by_credit = _shrunk(credit @ self.counts_[1], by_artist, self.CREDIT_SONGS)
        return np.log(by_credit) - np.log(self.prior_)

    def _fit_effect(self, songs: pd.DataFrame, y: ndarray) -> None:
        """Count the songs of each artist, and of each exact credit, by genre."""
        from scipy.sparse import eye_array

        one_hot = eye_array(len(self.classes_), dtype=np.float32, format="csr")[y]
        credited = incidence(songs["artist_name"], credits)[1]
        others = incidence(songs["track_name"], featured)[1]
        self.artists_ = numbered(credited | others)
        self.exact_ = incidence(songs["artist_name"], whole)[1]
        self.counts_ = [(matrix.T @ one_hot).tocsr() for matrix in self._levels(songs)]

    def _levels(self, songs: pd.DataFrame) -> tuple[csr_array, csr_array]:
        """Return songs x artists credited or featured, and songs x exact credits."""
        artist = column(songs, "artist_name")
        credited, _ = incidence(artist, credits, self.artists_)
        others, _ = incidence(column(songs, "track_name"), featured, self.artists_)
        exact, _ = incidence(artist, whole, self.exact_)
        return credited.maximum(others), exact

    def _fit_encoding(self, songs: pd.DataFrame) -> None:
        """Learn the quantile bins of the numbers, their scales, and which tokens there are."""
        self.features_ = present(songs, NUMBERS)
        shares = np.linspace(0, 1, self.BINS + 1)
        self.edges_ = {
            name: np.unique(np.nanquantile(songs[name].astype(np.float64), shares))
            for name in self.features_
        }
        self.tokens_ = {}
        for name in self.TEXTS:
            if name in songs:
                matrix, levels = incidence(songs[name].drop_duplicates(), tokens)
                common = np.array([*levels], object)[matrix.sum(axis=0) >= self.MIN_NAMES]
                self.tokens_[name] = numbered(common)
        bins = [*self._bins(songs.iloc[:: 1 + len(songs) // 50_000])]
        self.mean_ = np.concatenate([np.nanmean(steps, axis=0) for steps in bins])
        # 0.1 more, because a bin that hardly varies must not shout.
        self.scale_ = np.concatenate([np.nanstd(steps, axis=0) for steps in bins]) + np.float32(0.1)

    def _bins(self, songs: pd.DataFrame) -> Iterator[ndarray]:
        """Yield of each feature how far through each bin it is (0 to 1), and if it is the lowest.

        Keys also stand one by one, as C is no less than H. float32, songs x bins.
        """
        for name, edges in self.edges_.items():
            value = column(songs, name).to_numpy(np.float64)[:, None]
            steps = [np.clip((value - edges[:-1]) / np.diff(edges), 0, 1), value <= edges[0]]
            if name == "key":
                steps.append(value == np.arange(12))
            yield np.where(np.isnan(value), np.nan, np.hstack(steps)).astype(np.float32)

    def _encode(self, songs: pd.DataFrame) -> tuple[ndarray, csr_array]:
        """Return numbers (dense; missing is average) and tokens (length 1 per song and column)."""
        from scipy.sparse import diags_array, hstack

        texts = []
        for name, levels in self.tokens_.items():
            matrix, _ = incidence(column(songs, name), tokens, levels)
            length = np.sqrt(np.maximum(matrix.sum(axis=1), 1))
            texts.append(diags_array(1 / length) @ matrix)
        numbers = np.empty((len(songs), len(self.mean_)), np.float32)  # the largest array of a run
        for start in range(0, len(songs), self.CODED):
            part = slice(start, start + self.CODED)
            bins = np.hstack([*self._bins(songs.iloc[part])])
            numbers[part] = np.nan_to_num((bins - self.mean_) / self.scale_)
        return numbers, hstack(texts, format="csr")

    def _fit_network(
        self,
        numbers: ndarray,
        texts: csr_array,
        y: ndarray,
        rng: Generator,
        progress: Progress,
    ) -> None:
        """Learn by gradient steps over seeded batches; a cosine schedule after a warm-up."""
        n = len(y)
        batch = int(np.clip(n // 150, 16, self.MAX_BATCH))
        epochs = max(self.EPOCHS, 200 * batch // n)
        self.network_ = self._first_weights(numbers.shape[1], texts.shape[1], rng)
        # Few songs are learnt better with smaller steps of the dense weights and larger ones of the
        # tokens, each of which comes up but seldom.
        few = fewness(self.size_)
        rate = self.RATE * 0.5**few
        token_rate = self.TOKEN_RATE * 2**few
        update = _Update(self.network_)
        batches = []
        for _ in range(epochs):
            batches += np.split(rng.permutation(n), range(batch, n, batch))
        for step, rows in enumerate(batches, 1):
            used, text = self._drop_tokens(texts[rows], rng)
            kept = rng.random((len(rows), self.HIDDEN), dtype=np.float32) > self.DROPOUT
            drop = kept / np.float32(1 - self.DROPOUT)
            gradients = self._gradients(numbers[rows], text, used, y[rows], drop)
            pace = min(1, step / 20) * (1 + np.cos(np.pi * step / len(batches))) / 2
            update.take_step(step, gradients, rate * pace, used, token_rate * pace)
            progress(step / len(batches))

    def _first_weights(self, inputs: int, tokens: int, rng: Generator) -> Weights:
        classes = len(self.classes_)
        weights = {
            "in": rng.normal(0, inputs**-0.5, (inputs, self.HIDDEN)),
            "in0": np.zeros(self.HIDDEN),
            "out": rng.normal(0, self.HIDDEN**-0.5 / 2, (self.HIDDEN, classes)),
            "out0": np.log(self.prior_),
            "tokens": np.zeros((tokens, self.HIDDEN)),
        }
        return {name: values.astype(np.float32) for name, values in weights.items()}

    def _drop_tokens(self, text: csr_array, rng: Generator) -> tuple[ndarray, csr_array]:
        """Return a batch's tokens and the matrix songs x those tokens, half its entries dropped."""
        used, columns = np.unique(text.indices, return_inverse=True)
        kept = (rng.random(text.nnz) > self.TOKEN_DROPOUT) / np.float32(1 - self.TOKEN_DROPOUT)
        data = text.data * kept
        return used, type(text)((data, columns, text.indptr), (text.shape[0], len(used)))

    def _gradients(
        self,
        numbers: ndarray,
        text: csr_array,
        used: ndarray,
        y: ndarray,
        drop: ndarray,
    ) -> Weights:
        """Return the gradient of the batch's mean cross-entropy by every weight.

        Of the tokens, only the rows `used`. `drop` scales the hidden units, songs x HIDDEN.
        """
        from scipy.special import softmax

        net = self.network_
        hidden = numbers @ net["in"] + net["in0"] + text @ net["tokens"][used]
        gate = (hidden > 0) * drop
        hidden *= gate
        error = softmax(hidden @ net["out"] + net["out0"], axis=1)
        error[np.arange(len(y)), y] -= 1
        error /= len(y)
        back = (error @ net["out"].T) * gate
        return {
            "in": numbers.T @ back,
            "in0": back.sum(0),
            "out": hidden.T @ error,
            "out0": error.sum(0),
            "tokens": text.T @ back,
        }


def _shrunk(counts: csr_array, towards: ndarray, strength: float) -> ndarray:
    seen = counts.toarray()
    return (seen + strength * towards) / (seen.sum(axis=1, keepdims=True) + strength)


class _Update:
    """Change a network's weights in place: the dense ones by Adam, tokens by row-wise Adagrad.

    Adam: Kingma and Ba, 2015; Adagrad: Duchi, Hazan and Singer, 2011.
    """

    def __init__(self, network: Weights) -> None:
        self.network = network
        self.moments = {
            name: np.zeros((2, *weights.shape), np.float32)
            for name, weights in network.items()
            if name != "tokens"
        }
        self.squares = np.zeros((len(network["tokens"]), 1), np.float32)

    def take_step(
        self, step: int, gradients: Weights, rate: float, used: ndarray, token_rate: float
    ) -> None:
        """Take step number `step`; the tokens' gradient is that of the rows `used`."""
        for name, (first, second) in self.moments.items():
            first += 0.1 * (gradients[name] - first)
            second += 0.01 * (gradients[name] ** 2 - second)
            adam = first / (1 - 0.9**step) / (np.sqrt(second / (1 - 0.99**step)) + 1e-8)
            self.network[name] -= np.float32(rate) * adam
        gradient = gradients["tokens"]
        self.squares[used] += (gradient**2).mean(axis=1, keepdims=True)
        adagrad = np.float32(token_rate) * gradient / (np.sqrt(self.squares[used]) + 1e-8)
        self.network["tokens"][used] -= adagrad


# ---- Energy and popularity -----------------------------------------------------------------------

# What a song shares with other songs: the column, and what splits its text into keys. The album's
# title alone, without the artist: on a compilation, the company a song keeps says more than its
# artist does.
KEYS = {
    "artist": ("artist_name", credits),
    "album": ("album_name", whole),
    "album words": ("album_name", tokens),
    "title words": ("track_name", tokens),
}
TOKEN_KEYS = ("album words", "title words")


def text_counts(songs: pd.DataFrame) -> ndarray:
    """Return songs x 5, float32, of what the names look like.

    ";" in the artist, length of the title and of the album, if these are the same, if the title has
    a bracket or a dash.
    """

    def text(name) -> pd.Series:
        return column(songs, name).astype("str").str.casefold()

    title = text("track_name")
    album = text("album_name")
    counts = [
        text("artist_name").str.count(";"),
        title.str.len(),
        album.str.len(),
        title == album,
        title.str.contains(r" - |\(|\["),
    ]
    return np.column_stack(counts).astype(np.float32)


def summary(totals: ndarray) -> ndarray:
    """Return count, mean and spread from count, sum and sum of squares, songs x 3, float32.

    Mean and spread are NaN where nothing is known, the spread also of a single song.
    """
    count, total, squares = totals.T
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = total / count
        spread = np.sqrt(np.maximum(squares / count - mean**2, 0))
    spread = np.where(count > 1, spread, np.nan)
    return np.column_stack([count, mean, spread]).astype(np.float32)


def summary_without_own_fold(matrix: csr_array, moments: ndarray, fold: ndarray) -> ndarray:
    """Return summary() of each song's keys over the other folds: no song describes itself."""
    total = matrix.T @ moments
    others = np.empty_like(moments)
    for k in np.unique(fold):
        own = np.flatnonzero(fold == k)
        part = matrix[own]
        others[own] = part @ (total - part.T @ moments[own])
    return summary(others)


class Settings(NamedTuple):
    """How a column of numbers is learnt. These are popularity's, and do for any."""

    rate: float = 0.07  # of the boosting
    tokens: bool = True  # does it look at tokens and text_counts?
    quadratic: bool = False  # does it start from a quadratic of the audio, or the genre's mean?


SETTINGS = {
    # It hangs on the audio; what tokens tell of it does not hold for other songs.
    "energy": Settings(rate=0.1, tokens=False, quadratic=True),
}


class SongRegressor:
    """Gradient boosting on audio, genre, and what is known of the artist's and the album's songs.

    Of small tables the mean with extremely randomised trees on the same rows (Geurts, Ernst and
    Wehenkel, 2006), which overfit in another way.

    "Known" is count, mean and spread of their residuals, for popularity also those of the songs
    with the same tokens. The trees learn once with a random fold of songs hidden (an artist known)
    and once with a fold of whole artists hidden (an artist never seen): so they learn how far to
    trust two songs of an artist, or a compilation, and what to do without either. It is
    cross-fitted target encoding (Micci-Barreca, 2001; scikit-learn's TargetEncoder), fitted for
    both cases at once.
    """

    SONG_FOLDS = 5
    ARTIST_FOLDS = 10  # because a tenth of the artists is what an evaluation holds out
    MAX_ROWS = 400_000  # the trees see; artists, albums and tokens are counted over all songs
    MAX_GENRES = 254  # HistGradientBoosting takes 255 categories; rarer genres count as missing
    PRIOR_SONGS = 10  # a genre's mean is shrunk towards that of all songs as if it had more of them
    CURVE_ROWS = 100_000  # rows the quadratic is fitted on, and predicted at a time
    RATE_OF_FEW = 0.65  # times the learning rate: few songs are learnt with smaller steps
    RIDGE_OF_FEW = 40  # times the ridge: or the quadratic learns few songs by heart
    TREES = {
        "max_iter": 150,
        "max_leaf_nodes": 47,
        "max_features": 0.4,
        "min_samples_leaf": 40,
        "l2_regularization": 1.0,
        "early_stopping": False,
    }
    EXTRA_WEIGHT = 0.35  # of the extra trees, where songs are few
    EXTRA_NONE = 10_000  # songs: to tables of so many they add nothing
    EXTRA_TREES = {"n_estimators": 40, "min_samples_leaf": 5, "max_leaf_nodes": 400}

    weights_: list[float] | None = None  # of trees_; None where they count alike

    def __init__(self, target: str, fits: int = 1) -> None:
        """`target` is a column of numbers; `fits` that differ in their seeds are averaged."""
        self.target = target
        self.fits = fits

    @property
    def settings(self) -> Settings:
        """How the target is learnt: looked up, as files of other editions hold none."""
        return SETTINGS.get(self.target, Settings())

    def fit(
        self,
        songs: pd.DataFrame,
        y: pd.Series,
        progress: Progress = _say_nothing,
        table_songs: int = 0,
    ) -> SongRegressor:
        """Learn from `songs`, one row per song, and their target, finite; `progress(share)`.

        The target's own column is not looked at. `table_songs` is the number of songs of the
        table, where `songs` are a part of it.
        """
        from sklearn.ensemble import ExtraTreesRegressor, HistGradientBoostingRegressor

        self.size_ = table_songs or len(songs)
        actual = y.to_numpy(float)
        rng = seeded()
        audio = present(songs, AUDIO + MORE_AUDIO)
        self.features_ = [name for name in audio if name != self.target]
        self.genres_ = numbered(genres(songs).value_counts().index[: self.MAX_GENRES])
        self._fit_start(songs, actual, rng)
        residual = actual - self._start(songs)
        X, rows = self._training_rows(songs, residual, rng)
        # HistGradientBoosting cannot bin a column without a single value.
        X[:, np.isnan(X).all(axis=0)] = 0
        trim_memory()
        extra_weight = self.EXTRA_WEIGHT * fewness(self.size_, self.EXTRA_NONE)
        self.trees_ = []
        for fit in range(self.fits):
            trees = HistGradientBoostingRegressor(
                learning_rate=self.settings.rate * self.RATE_OF_FEW ** fewness(self.size_),
                categorical_features=[len(self.features_)],
                random_state=SEED + fit,
                **self.TREES,
            )
            self.trees_.append(trees.fit(X, residual[rows]))
            progress((fit + 1) / self.fits)
        self.weights_ = [1 - extra_weight for _ in self.trees_]
        if extra_weight:
            extra = ExtraTreesRegressor(random_state=SEED, **self.EXTRA_TREES)
            self.trees_.append(extra.fit(X, residual[rows]))
            self.weights_.append(self.fits * extra_weight)
        return self

    def predict(self, songs: pd.DataFrame) -> ndarray:
        """Return the target of each song; what is absent or unknown is a missing value.

        Raises DataError where most of AUDIO is absent.
        """
        db.demand_sound(songs)
        if not len(songs):
            return np.zeros(0)
        known = [self._audio(songs)]
        for key, (levels, totals) in self.known_.items():
            name, split = KEYS[key]
            matrix, _ = incidence(column(songs, name), split, levels)
            known.append(summary(matrix @ totals))
        X = np.hstack(known)
        answers = [trees.predict(X) for trees in self.trees_]
        residual = np.average(answers, axis=0, weights=self.weights_)
        return np.clip(self._start(songs) + residual, *self.range_)

    def looks_at(self) -> list[str]:
        """Return the columns of songs on which a prediction hangs."""
        names = [KEYS[key][0] for key in self.known_]
        return [*self.features_, "genre", *dict.fromkeys(names)]

    def _training_rows(
        self, songs: pd.DataFrame, residual: ndarray, rng: Generator
    ) -> tuple[ndarray, ndarray]:
        """Learn known_; return (X, rows): what the trees learn from, and the song of each row.

        fitted_on_ is how many songs these are.
        """
        known, new = self._fit_known(songs, residual, rng)
        # Songs that share nothing once hidden belong to `new`; among `known` they would pass for
        # typical new artists.
        shares = [part[:, 0] > 0 for key, part in known.items() if key not in TOKEN_KEYS]
        shared = np.any(shares, axis=0)
        rows = np.concatenate([np.flatnonzero(shared), np.arange(len(songs))])
        hidden = np.arange(len(rows)) >= shared.sum()  # is the artist hidden whole?
        if len(rows) > self.MAX_ROWS:
            kept = np.sort(rng.choice(len(rows), self.MAX_ROWS, replace=False))
            rows = rows[kept]
            hidden = hidden[kept]
        some, at = np.unique(rows, return_inverse=True)  # most songs stand in X twice
        self.fitted_on_ = len(some)
        table = [self._audio(songs.iloc[some])[at]]
        table += [np.where(hidden[:, None], new[key][rows], known[key][rows]) for key in known]
        return np.hstack(table), rows

    def _fit_known(
        self, songs: pd.DataFrame, residual: ndarray, rng: Generator
    ) -> tuple[dict, dict]:
        """Learn known_: of each key count, sum and sum of squares of its songs' residuals.

        Return the summary of each song's keys with a fold of songs hidden, and with a fold of
        artists hidden.
        """
        moments = np.column_stack([np.ones_like(residual), residual, residual**2])
        song_fold = rng.integers(0, self.SONG_FOLDS, len(residual))
        artists = songs["artist_name"].factorize()[0]
        artist_fold = rng.integers(0, self.ARTIST_FOLDS, artists.max() + 1)[artists]
        self.known_ = {}
        known = {}
        new = {}
        for key, (name, split) in KEYS.items():
            if name in songs and (self.settings.tokens or key not in TOKEN_KEYS):
                matrix, levels = incidence(songs[name], split)
                self.known_[key] = levels, matrix.T @ moments
                known[key] = summary_without_own_fold(matrix, moments, song_fold)
                new[key] = summary_without_own_fold(matrix, moments, artist_fold)
        return known, new

    def _fit_start(self, songs: pd.DataFrame, y: ndarray, rng: Generator) -> None:
        """Learn where the residuals start from.

        That is the genre's shrunken mean; or, of energy, a quadratic of that and of the audio.
        """
        import pandas as pd
        from sklearn.impute import SimpleImputer
        from sklearn.linear_model import Ridge
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import PolynomialFeatures, StandardScaler

        by_genre = pd.Series(y).groupby(genres(songs).to_numpy()).agg(["sum", "size"])
        self.mean_ = y.mean()
        self.range_ = y.min(), y.max()
        totals = by_genre["sum"] + self.PRIOR_SONGS * self.mean_
        self.genre_means_ = (totals / (by_genre["size"] + self.PRIOR_SONGS)).to_dict()
        # Drawn for both: the folds drawn next are then those of earlier editions.
        some = np.sort(rng.permutation(len(y))[: self.CURVE_ROWS])
        if self.settings.quadratic:
            quadratic = make_pipeline(
                SimpleImputer(),
                StandardScaler(),
                PolynomialFeatures(2, include_bias=False),
                StandardScaler(),
                Ridge(10.0 * self.RIDGE_OF_FEW ** fewness(self.size_)),
            )
            self.curve_ = quadratic.fit(self._plane(songs.iloc[some]), y[some])

    def _start(self, songs: pd.DataFrame) -> ndarray:
        if not self.settings.quadratic:
            return self._genre_mean(songs)
        starts = in_parts(
            songs, self.CURVE_ROWS, lambda part: self.curve_.predict(self._plane(part))
        )
        return np.clip(starts, *self.range_)  # a quadratic runs away where songs are rare

    def _genre_mean(self, songs: pd.DataFrame) -> ndarray:
        means = column(songs, "genre").map(self.genre_means_).astype(float)
        return means.fillna(self.mean_).to_numpy()

    def _plane(self, songs: pd.DataFrame) -> ndarray:
        """Return songs x (features_, the genre's mean)."""
        audio = [column(songs, name).astype(float) for name in self.features_]
        return np.column_stack([*audio, self._genre_mean(songs)])

    def _audio(self, songs: pd.DataFrame) -> ndarray:
        """Return songs x (features_, genre's number, the start, perhaps text_counts), float32."""
        table = [column(songs, name).astype(np.float32) for name in self.features_]
        table.append(column(songs, "genre").map(self.genres_).astype(np.float32))
        # Where on its scale a song starts says how far it strays.
        table.append(self._start(songs).astype(np.float32))
        if self.settings.tokens:
            table.append(text_counts(songs))
        return np.column_stack(table)


# ---- Similar songs -------------------------------------------------------------------------------

Neighbours = tuple[np.ndarray, np.ndarray]  # rows, similarities


class SimilarSongs:
    """Exact neighbours of songs by sound and by the company they keep, in a k-d tree.

    Sound: every feature is made normal by its ranks (they are skewed: half of all songs have an
    instrumentalness of 0), and their principal components are kept. Company: a mixture of genres,
    the song's own and those of all songs of its first artist, under a square root (so that
    distances are Hellinger's), each genre in a place of its own. The tree (scipy.spatial.KDTree;
    Maneewongvatana and Mount, 1999) answers without a scan, in few dimensions.
    """

    FEATURES = (*AUDIO, "liveness", "tempo", "duration_ms", "year")
    DIMENSIONS = 14
    COMPANY_DIMENSIONS = 8  # of these
    EXTREME = 3  # standard deviations: an outlier shall not outweigh the rest
    OWN_GENRE = 0.4  # its share of the company
    COMPANY_WEIGHT = 1.25  # against sound, whose total variance is 1

    def fit(self, songs: pd.DataFrame) -> SimilarSongs:
        """Index `songs`, one row per song.

        sample_ are the rows of a seeded sample, asked_ the points of its songs as if their genres
        were not known.
        """
        from scipy.spatial import KDTree

        # Arrays of objects: joblib hands them to the C pickler whole, lists it walks in Python.
        self.track_ids_ = songs["track_id"].to_numpy(object)
        self.titles_ = songs["track_name"].to_numpy(object)
        self.artists_ = songs["artist_name"].to_numpy(object)
        self.recording_ = recordings(songs).astype(np.int32)
        self.sample_ = seeded().permutation(len(songs))[:QUERY_SAMPLE]
        company, asked = self._company(songs)
        sound = self._sound(songs, self.DIMENSIONS - company.shape[1])
        self.tree_ = KDTree(np.hstack([sound, company]), leafsize=20)
        self.asked_ = np.hstack([sound[self.sample_], asked])
        return self

    def neighbours(self, row: int, k: int = 10, same_artist: bool = False) -> Neighbours:
        """Return (rows, similarities) of the k songs most like that one, the most similar first.

        Never the song itself nor another copy of its recording, no recording twice, and of ten no
        more than three by its first artist, unless `same_artist`; fewer than k where the table has
        no more. A similarity is exp(-d²/2), 1 for a song that is the same in everything.
        """
        return self.neighbours_of(np.array([row]), k, same_artist)[0]

    def neighbours_of(
        self,
        rows: ndarray,
        k: int = 10,
        same_artist: bool = False,
        points: ndarray | None = None,
        workers: int = 1,
    ) -> list[Neighbours]:
        """Return what neighbours() says of each row, found by that many threads.

        They are looked for around `points`, rows x dimensions, where these are given, instead of
        around the songs' own.
        """
        if points is None:
            points = self.tree_.data[rows]
        songs = len(self.track_ids_)
        answers = {}
        waiting = list(range(len(rows)))
        candidates = 2 * k + 2
        while waiting:
            candidates = min(candidates, songs)
            distances, found = self.tree_.query(points[waiting], candidates, workers=workers)
            for at, distance, others in zip(waiting, distances, found):
                chosen = self._choose(rows[at], others, k, same_artist)
                if len(chosen) == k or candidates == songs:
                    answers[at] = others[chosen], np.exp(-(distance[chosen] ** 2) / 2)
            waiting = [at for at in waiting if at not in answers]
            candidates *= 3
        return [answers[at] for at in sorted(answers)]

    def _choose(self, row: int, others: ndarray, k: int, same_artist: bool) -> list[int]:
        """Return which of the others, the nearest first, are neighbours of the row: k at most."""
        allowed = k if same_artist else max(1, 3 * k // 10)
        own_artist = (self.artist_[others] == self.artist_[row]).tolist()
        seen = {self.recording_[row]}
        own = 0
        chosen = []
        for at, recording in enumerate(self.recording_[others].tolist()):
            if recording in seen:
                continue
            seen.add(recording)
            if own_artist[at]:
                own += 1
                if own > allowed:
                    continue
            chosen.append(at)
            if len(chosen) == k:
                break
        return chosen

    def find(self, text: str, artist: str | None = None) -> list[int]:
        """Return one row per recording that the text may mean, by an artist of that name.

        The song of that track_id; or those of that title; or else of titles "Text - …" and
        "Text (…)"; or that begin with the text; or that contain it. All case-folded.
        """
        same_id = np.flatnonzero(self.track_ids_ == text).tolist()
        if same_id:
            return same_id
        text = text.casefold()
        artist = (artist or "").casefold()
        ranks: list[dict[int, int]] = [{}, {}, {}, {}]  # of each the first row of a recording
        for row, title in enumerate(map(str.casefold, self.titles_)):
            if text in title and artist in self.artists_[row].casefold():
                ranks[_rank_of_title(title, text)].setdefault(self.recording_[row], row)
        return list(next(filter(None, ranks), {}).values())

    def suggestions(self, text: str) -> list[str]:
        """Return up to five titles spelt like the text."""
        import difflib

        text = text.casefold()
        parts = {text[i : i + 3] for i in range(max(1, len(text) - 2))}
        titles = {name.casefold(): name for name in self.titles_}

        def unlike(title) -> tuple:
            return -sum(part in title for part in parts), len(title)

        alike = sorted(titles, key=unlike)[:300]  # difflib is slow
        return [titles[match] for match in difflib.get_close_matches(text, alike, n=5, cutoff=0.5)]

    def _sound(self, songs: pd.DataFrame, dimensions: int) -> ndarray:
        """Return songs x dimensions at most; a missing feature counts as the median."""
        from scipy.special import ndtri

        numbers = songs[present(songs, self.FEATURES)]
        quantiles = (numbers.rank() - 0.5) / numbers.count()
        normal = ndtri(quantiles).clip(-self.EXTREME, self.EXTREME).fillna(0)
        normal = (normal - normal.mean()).to_numpy()
        _, components = np.linalg.eigh(normal.T @ normal)  # the smallest first
        sound = normal @ components[:, ::-1][:, :dimensions]
        return sound / np.sqrt(sound.var(axis=0).sum()).clip(1e-12)

    def _company(self, songs: pd.DataFrame) -> tuple[ndarray, ndarray]:
        """Return points of all songs, and of the sample with their own genres hidden.

        Without genres they have no columns.
        """
        from sklearn.preprocessing import normalize

        own, levels = incidence(column(songs, "genre"), whole)
        artist, _ = incidence(songs["artist_name"], lambda name: credits(name)[:1])
        self.artist_ = artist.indices
        self.settings_ = {"company": len(levels) > 1}
        if not levels:  # normalize() refuses a matrix of no columns
            return np.zeros((len(songs), 0)), np.zeros((len(self.sample_), 0))
        counts = artist.T @ own
        places = np.eye(len(levels))  # a point of length 1 for each genre, far from the others
        if len(levels) > self.COMPANY_DIMENSIONS:  # at random: in more than two that is far apart
            places = normalize(seeded().normal(size=(len(levels), self.COMPANY_DIMENSIONS)))

        def points(mixture) -> ndarray:
            return self.COMPANY_WEIGHT * normalize(mixture.sqrt() @ places)

        others = artist @ normalize(counts, "l1")
        everything = points(self.OWN_GENRE * own + (1 - self.OWN_GENRE) * others)
        others = artist[self.sample_] @ counts - own[self.sample_]
        return everything, points(normalize(others, "l1"))


def _rank_of_title(title: str, text: str) -> int:
    """Return how well a title that contains the text fits it, 0 for the same."""
    if title == text:
        return 0
    if title.startswith((f"{text} - ", f"{text} (")):
        return 1
    return 2 if title.startswith(text) else 3


# ---- Evaluation: which songs a model is judged by, and on what it leans --------------------------

LEAN_SONGS = 1000  # held-out songs whose columns are shuffled
CONFUSIONS = 25  # pairs of genres kept with the metrics
BINS = 40  # of the actual values, and of the predicted ones


def holdout(songs: pd.DataFrame, split: int = 0) -> tuple[ndarray, ndarray, ndarray]:
    """Split songs into three boolean masks (train, known, new); `split` numbers other splits.

    `new` is every song of 10 % of the artists; `known` is 12 % of the other songs, less those of
    which another copy is in `train`. The choice hangs on hashed names, not on row numbers: what is
    held out tonight is held out tomorrow, when the table has grown, and the figures compare.
    """
    new = _first_by_hash(songs["artist_name"], NEW_ARTISTS, f"artist{split or ''}")
    known = ~new
    known[known] = _first_by_hash(songs["track_id"][~new], KNOWN_SONGS, f"song{split or ''}")
    train = ~new & ~known
    recording = recordings(songs)
    known &= ~np.isin(recording, recording[train])
    return train, known, new


def _first_by_hash(values: pd.Series, share: float, key: str) -> ndarray:
    """Return True for rows whose value is in that share of the distinct values, by their hashes."""
    import pandas as pd

    hashes = pd.util.hash_array(values.to_numpy(object), hash_key=f"{key:16.16}")
    distinct, rank = np.unique(hashes, return_inverse=True)
    return rank < int(len(distinct) * share)


def _fit_and_judge(
    name: str,
    final: Any,
    make: Callable,
    songs: pd.DataFrame,
    answers: Callable,
    metric: Callable,
) -> tuple:
    """Fit the estimator that is saved; judge others, each on the songs a split hides from it.

    `name` is the model and the column it predicts; `make()` gives an estimator to judge;
    `answers(estimator, learnt, held_out)` is what is judged, as columns. Return the fitted
    estimator, the answers of known artists' songs and of new artists', those of all splits end to
    end, and what the first split's estimator leans on, by the metric.
    """
    import pandas as pd

    # A fork copies what it takes rows of, and nobody learns from ids.
    without_ids = songs.drop(columns="track_id")

    def judge(split, progress) -> tuple:
        train, known, new = holdout(songs, split)
        learnt = without_ids[train]
        judged = make().fit(learnt, learnt[name], progress, len(songs))
        said = [pd.DataFrame(answers(judged, learnt, songs[some])) for some in (known, new)]
        leans = leans_on(judged, songs[known], name, metric) if split == 0 else {}
        return *said, leans

    works = [partial(final.fit, without_ids, songs[name])]  # the longest
    splits = SPLITS if len(songs) < FEW_SONGS else 1
    works += [partial(judge, split) for split in range(splits)]
    final, *judged = _take_parts(name, works, len(songs) >= FORK_SONGS)
    if final.fitted_on_ < len(songs):
        log.info(
            "%s: fitted on a sample of %s songs; artists are counted over all",
            name,
            f"{final.fitted_on_:,}",
        )
    known, new, leans = zip(*judged)
    return final, pd.concat(known), pd.concat(new), leans[0]


def leans_on(estimator: Any, songs: pd.DataFrame, target: str, metric: Callable) -> Metrics:
    """Return {column: fall}: how far the metric falls when a column is shuffled, largest first.

    Permutation importance (Breiman, "Random Forests", 2001) of each column that the estimator looks
    at, on a seeded sample of the songs, which it has not learnt from; {} of fewer than two. All
    shuffled copies are predicted in one go: one by one takes several times as long.
    """
    import pandas as pd

    if len(songs) < 2:
        return {}
    rng = seeded()
    some = songs.iloc[np.sort(rng.permutation(len(songs))[:LEAN_SONGS])]
    columns = [name for name in estimator.looks_at() if name in some]
    copies = [some]
    for name in columns:
        shuffled = some[name].array[rng.permutation(len(some))]
        copies.append(some.assign(**{name: shuffled}))
    predicted = estimator.predict(pd.concat(copies, ignore_index=True))
    before, *after = [metric(some[target], part) for part in np.split(predicted, len(copies))]
    falls = before - pd.Series(after, columns).sort_values(kind="stable")
    return falls.round(4).rename(notify.COLUMNS).to_dict()


def _figure(metric: Callable, answers: pd.DataFrame, key: str = "predicted") -> float | None:
    """Return the metric of the actual values and answers[key]; None of fewer than two songs."""
    if len(answers) < 2:
        return None
    return float(metric(answers["actual"], answers[key]))


def _plot_genres(answers: pd.DataFrame) -> Metrics:
    """Return the worst confusions, for the picture.

    Each is actual genre, predicted genre, songs, their share of the actual genre's songs.
    """
    songs = Counter(answers["actual"])
    wrong = answers[answers["actual"] != answers["predicted"]]
    pairs = Counter(zip(wrong["actual"], wrong["predicted"]))
    confusions = [
        [genre, other, count, count / songs[genre]]
        for (genre, other), count in pairs.most_common(CONFUSIONS)
    ]
    return {"confusions": confusions}


def _plot_regression(answers: pd.DataFrame) -> Metrics:
    """Return a 2-D histogram: rows are bins of the actual value, columns of the predicted one."""
    actual = answers["actual"]
    low = actual.min()
    high = actual.max()
    edges = np.linspace(low, high, BINS + 1)
    density, _, _ = np.histogram2d(actual, answers["predicted"].clip(low, high), edges)
    return {"edges": [low, high, BINS], "density": density.astype(int).tolist()}


# ---- Files: models/NAME.joblib, models/metrics/NAME.json, models/versions/ -----------------------

SPACE_NEEDED = 100 << 20  # bytes free for a night: models, their versions and a picture

# The keys that a line of the history and a report have at least.
LINE = {"model", "run", "status"}
REPORT = LINE | {"trained_at", "sha256", "metrics", "settings", "table", "rows", "bytes"}


class ModelError(db.Expected):
    """A model file that is missing, damaged, or not its report's; the text names the fix."""


class Locked(db.Expected):
    """A run holds the models directory."""


@contextmanager
def one_run_at_a_time(folder: Path) -> Iterator[IO[str]]:
    """Hold MODELS_DIR/.lock; yield its open file: the lock holds as long as a process has it open.

    Raises Locked, saying who holds it since when. The kernel frees it when the last holder dies.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a+")  # noqa: SIM115 (closed below, once it is locked)
    except OSError as error:
        raise DataError(
            f"cannot write to the models directory {folder} ({error.strerror}); make it writable "
            f"for this user, or choose another: --models-dir DIR"
        ) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.1)  # whoever took it a moment ago is about to write who he is
            file.seek(0)
            raise Locked(
                f"another run is training into {folder} ({file.read().strip()}); nothing was done"
            ) from None
        with suppress(OSError):  # a full disk: the lock holds all the same
            file.truncate(0)
            # unbuffered, so that nothing is left to be written at the end
            holder = f"process {os.getpid()} since {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC\n"
            os.write(file.fileno(), holder.encode())
        yield file


def check_folder(
    folder: Path, fix: str = "make it writable for this user, or choose another: --models-dir DIR"
) -> list[tuple[str, str, str]]:
    """Return (what, "ok"|"warning"|"problem", sentence) of the models directory and its disk.

    Raises DataError, with that fix, where `folder` is not writable, whatever it is for.
    """
    there = next(parent for parent in (folder, *folder.parents) if os.path.exists(parent))
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        raise DataError(f"cannot write to {there}; {fix}")
    writable = f"{folder} is writable"
    if there != folder:
        writable += "; it will be made"
    free = shutil.disk_usage(there).free
    space = f"{notify.size(free) or '0 B'} free"
    state = "ok"
    if free < 10 * SPACE_NEEDED:
        state = "problem" if free < SPACE_NEEDED else "warning"
        space += f"; make room on the disk of {there}"
    return [("models directory", "ok", writable), ("space", state, space)]


def read_objects(path: Path, keys: set[str], by_line: bool = False) -> list[Report]:
    """Return the JSON objects in a file, one or one a line, that have these keys."""
    texts = []
    with tolerant_of(path):
        content = path.read_bytes()
        texts = content.splitlines() if by_line else [content]
    objects = []
    for text in texts:
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            found = None
        if isinstance(found, dict) and keys <= found.keys():
            objects.append(found)
        else:
            _pass_over(f"a line of {path}" if by_line else path, "it is damaged")
    return objects


@contextmanager
def tolerant_of(path: Path) -> Iterator[None]:
    """Have what cannot be done with a file beside the models cost a line of the log, no more."""
    try:
        yield
    except FileNotFoundError:
        pass
    except OSError as error:
        _pass_over(path, error.strerror)


@lru_cache  # once a process
def _pass_over(what: Path | str, why: str | None) -> None:
    log.warning("%s is passed over: %s", what, why)


def read_report(name: str, models_dir: Folder = MODELS_DIR) -> Report | None:
    """Return the report of the current model, None where the model is missing or not ours.

    It is the one with the file's SHA-256: in metrics/NAME.json, or, where a run was killed between
    the two files, in versions/.
    """
    path, metrics_path = _paths(name, models_dir)
    digest = _sha256(path)
    reports = read_objects(metrics_path, REPORT)
    reports += [report for _, report in _versions(name, models_dir)]
    return next((report for report in reports if report["sha256"] == digest), None)


def list_versions(name: str, models_dir: Folder) -> list[tuple[Path, Report]]:
    """Return (model path, report) of the versions beside the current model, the newest first."""
    digest = _sha256(_paths(name, models_dir)[0])
    return [
        (path, report) for path, report in _versions(name, models_dir) if report["sha256"] != digest
    ]


def to_train(name: str, models_dir: Folder) -> str:
    """Return the command line that trains a model as the last run into that folder did."""
    command = db.command("train.py", *in_folder(models_dir))
    for last in read_objects(_paths(name, models_dir)[1], {"command"}):
        command = last["command"]
    return f"{command} --only {name}"


def folder_for(models_dir: str | None, demo: int | None) -> Path:
    """Return where the models go."""
    default = MODELS_DIR if demo is None else db.ROOT / "demo" / "models"
    return Path(models_dir or default).resolve()


def in_folder(models_dir: Folder) -> tuple:
    """Return the options that say where the models are."""
    folder = Path(models_dir).resolve()
    return () if folder == MODELS_DIR else ("--models-dir", folder)


def load_model(name: str, models_dir: Folder = MODELS_DIR) -> Report:
    """Return the saved dict of a model: `estimator`, `metrics` and all that is in its report.

    The file's SHA-256 is compared with its report's before anything is unpickled. Raises
    ModelError. Where another version of scikit-learn has made it, scikit-learn warns
    (InconsistentVersionWarning).
    """
    import joblib

    path, metrics_path = _paths(name, models_dir)
    again = f"train it: {to_train(name, models_dir)}"
    if not path.exists():
        raise ModelError(f"there is no {name} model in {models_dir}; {again}")
    if not read_report(name, models_dir):
        back = db.command("models.py", "rollback", name, *in_folder(models_dir))
        raise ModelError(
            f"{path} is damaged or was changed: no report has its SHA-256, neither {metrics_path} "
            f"nor one in versions/; put a version back: {back}, or {again}"
        )
    return joblib.load(path)


def publish(
    name: str,
    estimator: Any,
    metrics: Metrics,
    about: Report,
    models_dir: Folder,
    force: bool = False,
) -> Report:
    """Save a trained model as a version, put it in the current one's place, return its report.

    `about` says how it was trained: `run`, `settings`, `command` and what else shall stand in the
    report. A model whose primary metric is worse than the current one's by more than 5 % of it, and
    by more than 0.01, is held back: it is in versions/ only. The first model of a table, one
    trained with other settings and `force` are never held back. Killed at any moment, and whatever
    call fails, this leaves either the old model or the new one, whole.
    Raises OSError where the disk is full or not writable; the current model is then untouched.
    """
    report = _report(name, estimator, metrics, about)
    current = read_report(name, models_dir)
    if current and current["table"] == report["table"]:  # of others, the figures do not compare
        report["previous"] = current["metrics"].get(next(iter(metrics)))
        if current["settings"] == report["settings"] and not force:
            report["error"] = _worse(report)
    if report["error"]:
        report["status"] = "held_back"
    version = _version(report, models_dir)
    os.makedirs(version.parent, exist_ok=True)
    try:
        _write_version(version, report, estimator)
        if report["status"] == "trained":
            _put_in_place(version, report, models_dir)
    except BaseException:
        # A rename may fail and be done all the same.
        if _sha256(_paths(name, models_dir)[0]) != report.get("sha256"):
            _remove(version, version.with_suffix(".json"))
        raise
    _prune(name, models_dir)
    return report


def _write_version(version: Path, report: Report, estimator: Any) -> None:
    """Write a model into versions/, its size and SHA-256 into its report, and that beside it."""
    import joblib

    write_atomically(version, partial(joblib.dump, {**report, "estimator": estimator}))
    report["sha256"] = _sha256(version)
    if not report["sha256"]:
        raise OSError(f"{version} cannot be read again")
    report["bytes"] = version.stat().st_size
    write_json(version.with_suffix(".json"), report)


def rollback(name: str, models_dir: Folder) -> Report:
    """Put the previous version of a model back, its metrics with it; return its report.

    The model taken back stays in versions/ as "rolled_back" and is not gone back to again. Raises
    ModelError where there is no earlier version.
    """
    current = read_report(name, models_dir)
    for version, report in _versions(name, models_dir):
        if current and report["trained_at"] >= current["trained_at"]:
            continue
        if report["status"] != "trained" or _sha256(version) != report["sha256"]:
            continue
        if current:
            taken_back = _version(current, models_dir).with_suffix(".json")
            write_json(taken_back, {**current, "status": "rolled_back"})
        _put_in_place(version, report, models_dir)
        return report
    raise ModelError(
        f"there is no earlier version of {name} in {models_dir}/versions to go back to"
    )


def clean_up(models_dir: Folder) -> None:
    """Remove what a killed run left half done: temporary files, versions without a half.

    These are known by their exact names: a folder may hold other things as well.
    """
    models_dir = Path(models_dir)
    names = "|".join(map(re.escape, MODELS))
    version = rf"({names})-{MOMENT}\.(joblib|json)"
    ours = rf"{version}|({names}|run)\.(joblib|json)|report\.png"
    for folder in (".", "metrics", "versions"):
        _remove(*_find(models_dir / folder, rf"\.({ours})(\.\d+)?\.tmp"))
    versions = _find(models_dir / "versions", version)
    halves = Counter(path.stem for path in versions)
    _remove(*[path for path in versions if halves[path.stem] == 1])


BASELINES = {"accuracy": "baseline_accuracy", "same_genre_at_10": "same_genre_by_chance"}


def _report(name: str, estimator: Any, metrics: Metrics, about: Report) -> Report:
    """Return what is written down of a model that has just been trained.

    It is guessing where its primary metric is no better than its baseline, or than 0.
    """
    metric, value = next(iter(metrics.items()))
    baseline = metrics.get(BASELINES.get(metric, "")) or 0
    return {
        "model": name,
        "metrics": {key: value for key, value in metrics.items() if key != "plot"},
        **about,
        "trained_at": datetime.now(UTC).isoformat(),
        "guessing": value is not None and value <= baseline,
        "settings": about["settings"] | getattr(estimator, "settings_", {}),
        "plot": metrics.get("plot", {}),
        "status": "trained",
        "error": None,
        "previous": None,
    }


def _worse(report: Report) -> str | None:
    """Return why the gate holds a model back, None where it passes."""
    value = next(iter(report["metrics"].values()))
    before = report["previous"]
    if before is None:
        return None
    if value is not None and value >= before - max(GATE_RELATIVE * abs(before), GATE_ABSOLUTE):
        return None
    primary = notify.figures(report["metrics"])[0]
    return (
        f"held back: {primary}, the current model has {notify.number(before)}; to publish all the "
        f"same: {report['command']} --only {report['model']} --force"
    )


def _put_in_place(version: Path, report: Report, models_dir: Folder) -> None:
    """Make a copy of a version the current model, then its report that model's.

    Where the report cannot be written, the one in versions/ is the model's.
    """
    path, metrics_path = _paths(report["model"], models_dir)
    with open(version, "rb") as whole_file:
        write_atomically(path, partial(shutil.copyfileobj, whole_file))
    with tolerant_of(metrics_path):
        write_json(metrics_path, report)


def _prune(name: str, models_dir: Folder) -> None:
    """Keep five versions, of which at most one that was not good enough.

    So bad nights do not push out good ones.
    """
    kept = list_versions(name, models_dir)
    good = [path for path, report in kept if report["status"] == "trained"]
    bad = [path for path, _ in kept if path not in good]
    room = KEEP_VERSIONS - len(bad[:1])
    for path in good[room:] + bad[1:]:
        _remove(path, path.with_suffix(".json"))


def _remove(*paths: Path) -> None:
    for path in paths:
        with tolerant_of(path):
            path.unlink()


def _find(folder: Path, pattern: str) -> list[Path]:
    """Return what is in a folder under a name of that pattern, sorted."""
    with tolerant_of(folder):
        return sorted(path for path in folder.iterdir() if re.fullmatch(pattern, path.name))
    return []


def _paths(name: str, models_dir: Folder) -> tuple[Path, Path]:
    """Return where the current model is, and its report."""
    models_dir = Path(models_dir)
    return models_dir / f"{name}.joblib", models_dir / "metrics" / f"{name}.json"


MOMENT = r"\d{8}T\d{6}\.\d{6}"  # in the name of a version, as _version writes it


def _version(report: Report, models_dir: Folder) -> Path:
    """Return where versions/ holds the model of a report; beside it, as .json, the report."""
    moment = datetime.fromisoformat(report["trained_at"])
    return Path(models_dir) / "versions" / f"{report['model']}-{moment:%Y%m%dT%H%M%S.%f}.joblib"


def _versions(name: str, models_dir: Folder) -> list[tuple[Path, Report]]:
    """Return (path of the model, its report) of everything in versions/, the newest first."""
    versions = []
    for path in reversed(
        _find(Path(models_dir) / "versions", rf"{re.escape(name)}-{MOMENT}\.json")
    ):
        for report in read_objects(path, REPORT):
            versions.append((path.with_suffix(".joblib"), report))
    return versions


def _sha256(path: Path) -> str | None:
    with tolerant_of(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
    return None


# ---- Written down beside the models: the history and the data ------------------------------------


def append_history(models_dir: Folder, lines: list[dict]) -> None:
    """Append lines to metrics/history.jsonl, one JSON object each."""
    path = Path(models_dir) / "metrics" / "history.jsonl"
    text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
    with tolerant_of(path):
        os.makedirs(path.parent, exist_ok=True)
        # Torn by a full disk? What it holds must not spoil the next line.
        if path.exists() and path.read_bytes()[-1:] not in (b"", b"\n"):
            text = "\n" + text
        with open(path, "a") as file:
            file.write(text)


def read_history(models_dir: Folder) -> list[dict]:
    """Return the lines of metrics/history.jsonl, the oldest first, without lines cut short."""
    return read_objects(Path(models_dir) / "metrics" / "history.jsonl", LINE, by_line=True)


def owed(models_dir: Folder) -> list[str]:
    """Return the models whose last run failed, was held back or killed, and those with no file."""
    last = {line["model"]: line for line in read_history(models_dir)}
    missing = []
    for name in MODELS:
        report = read_report(name, models_dir)
        line = last.get(name)
        # Published by that very run, killed before it could write it down, is done as well.
        done = report and line and (line["status"] == "trained" or line["run"] == report["run"])
        if not done:
            missing.append(name)
    return missing


def describe(songs: pd.DataFrame) -> dict:
    """Return what a later run compares its songs with.

    `rows`, the share of each genre, mean and standard deviation of each feature.
    """
    numbers = songs[present(songs, NUMBERS)].astype(np.float64)
    return {
        "rows": len(songs),
        "genres": genres(songs).value_counts(normalize=True).head(500).to_dict(),
        "means": numbers.mean().to_dict(),
        "deviations": numbers.std(ddof=0).to_dict(),
    }


def drift_since(now: dict, table: str, models_dir: Folder) -> list[str]:
    """Return a sentence for each thing that moved since a model was trained last on that table.

    `now` is what describe() says of tonight's songs. What matters most comes first: a feature that
    left its range, then the number of songs, then the genres. Where all models are of another
    table, that is the sentence.
    """
    reports = [read_report(name, models_dir) for name in MODELS]
    earlier = [report for report in reports if report and report["table"] == table]
    if not earlier:
        others = sorted({report["table"] for report in reports if report})
        return [
            f"the models so far are of {other}; those of {table} take their place and are not "
            "compared with them; to keep both, give each table its own --models-dir"
            for other in others
        ]
    before = max(earlier, key=lambda report: report["trained_at"])["data"]
    sentences = []
    for name in sorted(now["means"].keys() & before["means"]):
        mean = now["means"][name]
        was = before["means"][name]
        deviation = before["deviations"][name]
        if abs(mean - was) > DRIFT_DEVIATIONS * max(deviation, 1e-9):
            sentences.append(
                f"mean {name} is {notify.number(mean)}; it was {notify.number(was)} "
                f"(standard deviation {notify.number(deviation)})"
            )
    if not 1 - DRIFT_ROWS <= now["rows"] / before["rows"] <= 1 / (1 - DRIFT_ROWS):
        sentences.append(
            f"the table has {now['rows']:,} songs; at the last training it had {before['rows']:,}"
        )
    return sentences + _drift_of_genres(now["genres"], before["genres"])


def _drift_of_genres(now: dict[str, float], before: dict[str, float]) -> list[str]:
    """Return one sentence on the genres whose share moved, or none."""
    moved = []
    for genre in sorted(now.keys() | before):
        share = now.get(genre, 0)
        was = before.get(genre, 0)
        if abs(share - was) >= DRIFT_SHARE and max(share, was) >= DRIFT_RATIO * min(share, was):
            moved.append(f"genre {genre} makes up {share:.1%} of the songs; it was {was:.1%}")
    if len(moved) > 3:
        moved = [*moved[:3], f"and so for {len(moved) - 3} more genres"]
    return ["; ".join(moved)] if moved else []


# ---- Predicting ----------------------------------------------------------------------------------

PREDICTED_AT_ONCE = 10_000  # songs of a table


def load_models(models_dir: Folder, names: Iterable[str] = MODELS) -> dict[str, Report]:
    """Return {name: what load_model gives} of the models that there are.

    Logs why others are left out. Raises ModelError where there is none.
    """
    loaded = {}
    for name in names:
        try:
            loaded[name] = load_model(name, models_dir)
        except ModelError as error:
            log.warning("%s skipped: %s", name, error)
    _demand_models(loaded, models_dir)
    return loaded


def _demand_models(found: dict, models_dir: Folder) -> None:
    if not found:
        raise ModelError(
            f"there are no models in {models_dir}; "
            f"train them: {db.command('train.py', *in_folder(models_dir))}"
        )


class Adds(NamedTuple):
    """What a model adds to the predictions."""

    columns: dict[str, str]  # {name: its type in SQL}
    values: Callable  # of an estimator and songs: an iterable of columns


def _genre_and_confidence(model: GenreClassifier, songs: pd.DataFrame) -> Iterable:
    probabilities = model.predict_proba(songs)
    return model.classes_[probabilities.argmax(axis=1)], probabilities.max(axis=1)


def _cluster(model: Any, songs: pd.DataFrame) -> Iterable:
    """Return the cluster of each song, missing where one of its features is."""
    import pandas as pd

    features = songs[list(AUDIO)].astype(np.float64).dropna()
    clusters = model.predict(features) if len(features) else []
    return [pd.Series(clusters, features.index, "Int64")]


ADDS = {
    "genre": Adds({"genre_predicted": "text", "genre_confidence": "real"}, _genre_and_confidence),
    "clusters": Adds({"cluster": "integer"}, _cluster),
}


def adds(name: str) -> Adds | None:
    """Return what the model of that name adds to the predictions, None for nothing.

    A model of a column of songs adds NAME_predicted, a number, unless ADDS has it otherwise.
    """
    if name in db.COLUMNS and name not in ADDS:
        return Adds({f"{name}_predicted": "real"}, lambda model, songs: [model.predict(songs)])
    return ADDS.get(name)


def predict(rows: Any, models_dir: Folder = MODELS_DIR, loaded: dict | None = None) -> pd.DataFrame:
    """Return what the models say of rows, a row each, under the rows' own index.

    `rows` is a DataFrame as pandas reads it or a list of dicts, with the names and values that a
    CSV may have; `loaded` is what load_models gave, which saves reading the files of `models_dir`.
    Columns: genre_predicted, genre_confidence (probability), cluster, energy_predicted,
    popularity_predicted, as far as there are models. A missing feature is treated as missing, a
    missing genre as the predicted one, a song with a missing feature is in no cluster. Raises
    DataError where rows lack most of the sound, or ModelError where there is no model.
    """
    import pandas as pd

    rows = pd.DataFrame(rows)
    songs = db.read_rows(rows)
    said = _added(songs, loaded or load_models(models_dir, filter(adds, MODELS)))
    return said.set_axis(rows.index)


def _added(songs: pd.DataFrame, loaded: dict[str, Report]) -> pd.DataFrame:
    """Return the columns that the models add to songs that are read."""
    import pandas as pd

    added = pd.DataFrame(index=songs.index)
    for name, model in loaded.items():
        its = adds(name)
        if its:
            for column, said in zip(its.columns, its.values(model["estimator"], songs)):
                added[column] = said
        if name == "genre":
            songs = songs.assign(genre=genres(songs).fillna(added["genre_predicted"]))
    return added.round(4)


def predict_table(url: str, table: str, into: str, models_dir: Folder) -> dict:
    """Put what the models say of every song of a table in place of the rows of the table `into`.

    Its columns are track_id, those that the models add, `similar_tracks` (ten track_ids, the most
    similar first) and `models_trained_at`. Where a model is missing its columns are NULL, and so is
    `similar_tracks` for songs that came after the training. Return dict(rows, into, seconds).
    Raises ModelError (no models), DataError (no such table, no permission, `into` is another kind
    of table) or DatabaseUnavailable.
    """
    start = time.monotonic()
    songs = db.load_songs(url, table)
    loaded = load_models(models_dir)
    log.info("predicting %s songs of %s", f"{len(songs):,}", table)
    columns = {"track_id": "text"}
    for its in filter(None, map(adds, MODELS)):
        columns |= its.columns
    columns |= {"similar_tracks": "text[]", "models_trained_at": "timestamptz"}
    db.replace_predictions(url, into, columns, _predictions(songs, loaded))
    log.debug("predictions: written", extra={"model": "predictions", "phase": "done", "share": 1.0})
    return {"rows": len(songs), "into": into, "seconds": time.monotonic() - start}


def _predictions(songs: pd.DataFrame, loaded: dict[str, Report]) -> Iterator[pd.DataFrame]:
    """Yield the rows of the table of predictions, PREDICTED_AT_ONCE at a time."""
    import pandas as pd

    index = None
    if "similar" in loaded:
        index = loaded["similar"]["estimator"]
        rows = pd.Index(index.track_ids_).get_indexer(songs["track_id"])  # -1: it has not seen it
        # In the order of the tree's leaves: what neighbours need is then in the cache.
        order = np.argsort(np.argsort(index.tree_.indices)[rows], kind="stable")
        songs = songs.iloc[order]
        rows = rows[order]
    trained_at = max(model["trained_at"] for model in loaded.values())
    progress = _progress("predictions", ["predicting"])
    for start in range(0, len(songs), PREDICTED_AT_ONCE):
        end = start + PREDICTED_AT_ONCE
        some = songs.iloc[start:end]
        frame = _added(some, loaded)
        frame["track_id"] = some["track_id"]
        frame["models_trained_at"] = trained_at
        if index:
            at = rows[start:end]
            seen = at >= 0
            similar = [
                db.postgres_array(index.track_ids_[found])
                for found, _ in index.neighbours_of(at[seen], workers=-1)
            ]
            frame["similar_tracks"] = pd.Series(similar, frame.index[seen], dtype=object)
        yield frame
        progress(0, min(1, end / len(songs)))


# ---- The fork server: a process for each step of a run -------------------------------------------
#
# A run asks for steps with take(). One process, the fork server, has imported everything and holds
# the songs; it takes each step in a fork of itself. So a step that crashes or is killed costs that
# step alone, and the process that asked holds nothing heavy. The parts of a training are forks of
# its step. As many forks work at once as there are cores; more would only hold memory. A step whose
# parts have answered waits for no core: little is left to do, and it holds what is to be saved.

CORE_SECONDS = 0.005  # between two looks for a free core

_songs: dict[tuple, tuple] = {}  # that this process holds: (url, table) -> (songs, describe(songs))


def take(step: Callable, *arguments: Any) -> Any:
    """Have this process's fork server take a step; return what the step returns.

    `step`: a function of a module. What it logs is logged here, in the thread that asked. Raises
    its error, or Killed. Where this process has no fork server, as on a worker, there is one for
    this step alone.
    """
    if _fork_server is None:
        with fork_server():
            return take(step, *arguments)
    return _fork_server.take(step, arguments)


class Killed(db.Expected):
    """A signal that nobody sent has ended a step's process: short memory, a library's crash."""


class NotPublished(db.Expected):
    """A model is trained, but could not be written; training it again would not help."""


class StepFailed(db.Expected):
    """An error that nobody expected, as a sentence; its traceback was logged where it happened."""


class SameInputFails(StepFailed, ValueError):
    """The same, where the same input would bring the same error."""


def read_songs(url: str | None, table: str, models_dir: str) -> dict:
    """Read the songs of a table and hold them for the steps to come.

    Return {"rows": their number, "warnings": those of db.load_songs, and a sentence for each thing
    that drifted}. `url` None: the DATABASE_URL of this machine. Raises what db.load_songs raises.
    """
    songs, data = _hold_songs(url, table)
    drifted = notify.attempt(drift_since, data, table, models_dir)[0] or []
    for moved in drifted:
        log.warning("the songs are not those of the last training: %s", moved)
    return {"rows": len(songs), "warnings": songs.attrs["warnings"] + drifted}


def _hold_songs(url: str | None, table: str) -> tuple:
    if (url, table) not in _songs:
        songs = db.load_songs(url or db.database_url(), table)
        _songs[url, table] = songs, describe(songs)
        trim_memory()
    return _songs[url, table]


def train(name: str, url: str | None, about: dict, models_dir: str, force: bool) -> dict:
    """Train a model on the songs of about["table"] and publish it; return its report.

    `about` is what else shall stand in the report; its "settings" are keywords of the training
    function. Raises what that raises, or NotPublished.
    """
    songs, data = _hold_songs(url, about["table"])
    start = time.monotonic()
    estimator, metrics = MODELS[name](songs, **about["settings"])
    about = about | {"seconds": time.monotonic() - start, "rows": len(songs), "data": data}
    try:
        return publish(name, estimator, metrics, about, models_dir, force)
    except OSError as error:
        raise NotPublished(notify.explain(error)) from error


def draw(run: Any, path: Path) -> None:
    """Draw the picture of a run; see notify.draw_report."""
    notify.draw_report(run, read_history(run.models_dir), path)


@contextmanager
def fork_server(*inherited: IO) -> Iterator[None]:
    """Have this process's fork server run while the block does; then it and its forks are gone.

    It keeps the `inherited` files open, such as that of a lock.
    """
    global _fork_server
    _fork_server = ForkServerProcess([file.fileno() for file in inherited])
    try:
        yield
    finally:
        _fork_server.kill()
        _fork_server = None


def end_steps() -> None:
    """End the fork server and the steps it is taking, which nothing can interrupt, at once."""
    if _fork_server:
        _fork_server.kill()


class ForkServerProcess:
    """The fork server, as those see it who ask for steps; where it was killed, another starts."""

    def __init__(self, inherited: list[int]) -> None:
        self.inherited = inherited
        self.starting = threading.RLock()
        self.ended = False
        self._start()

    def _start(self) -> None:
        self.asking, asked = multiprocessing.Pipe()
        # faulthandler: what crashes a step leaves its traceback in the log
        with asked, signals_held():
            self.process = subprocess.Popen(
                [sys.executable, "-X", "faulthandler", __file__, "forkserver", str(os.getpid())],
                stdin=asked.fileno(),
                pass_fds=self.inherited,
                start_new_session=True,  # Ctrl-C is for the process that started this one
            )

    def take(self, step: Callable, arguments: tuple) -> Any:
        with self.starting:
            if self.process.poll() is not None and not self.ended:
                self._start()
            ours, theirs = multiprocessing.Pipe()
            with theirs, suppress(BrokenPipeError):  # it was killed just now: `ours` has an end
                self.asking.send((step, arguments))
                send_handle(self.asking, theirs.fileno(), self.process.pid)
        with ours:
            return _answers([ours])[0]

    def kill(self) -> None:
        with self.starting:
            self.ended = True
            self.process.kill()
            self.process.wait()


_fork_server: ForkServerProcess | None = None


def memory_mb() -> float:
    """Return the memory of this process, its fork server and the forks, in MB; 0 where unknown.

    Pages that they share are counted once (Linux).
    """
    processes = ["self"]
    if _fork_server:
        processes += _with_forks(str(_fork_server.process.pid))
    return sum(map(_memory_mb, processes))


def _with_forks(pid: str) -> list[str]:
    """Return a process, its forks, and theirs."""
    try:
        forks = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        forks = []
    return [pid, *chain.from_iterable(map(_with_forks, forks))]


def _memory_mb(process: str) -> float:
    try:
        rollup = Path(f"/proc/{process}/smaps_rollup").read_text()
    except OSError:
        return 0
    return sum(map(int, re.findall(r"^Pss:\s+(\d+)", rollup, re.M))) / 1000  # kilobytes


def _answers(forks: list, progress: Any = None) -> list:
    """Return what the forks at the other ends of the connections answer; log what they log.

    `progress(number of a fork, share)` is told. Raises the first error of one, or Killed.
    """
    answers = {}
    waiting = list(forks)
    while waiting:
        ready: list = wait(waiting)
        for fork in ready:
            try:
                message = fork.recv()
            except (EOFError, ConnectionError):
                raise Killed("it was killed (was memory short?)") from None
            if isinstance(message, logging.LogRecord):
                logging.getLogger(message.name).handle(message)
            elif isinstance(message, float):
                progress(forks.index(fork), message)
            elif isinstance(message, Exception):
                raise message
            else:
                answers[fork] = message
                waiting.remove(fork)
    return [answers[fork] for fork in forks]


# The cores that forks share: how many (0: this process is none), and a file with a byte for each.
_cores = 0
_cores_file = -1


def _fork(asker: Connection, step: Callable, *arguments: Any) -> Any:
    """Take a step in a fork of this process, which answers whoever asked; return its Process."""
    parent = os.getpid()

    def be_fork() -> None:
        die_with(parent)
        with suppress(OSError):  # where memory is short the kernel shall end this, no database
            Path("/proc/self/oom_score_adj").write_text("500")
        logging.root.handlers.clear()  # the parent's
        _wait_for_core()
        _answer(asker, step, arguments)

    gc.freeze()  # what is there now is the garbage collector's no more: it would copy it all
    process = multiprocessing.get_context("fork").Process(target=be_fork)
    process.start()
    asker.close()  # so a fork that is killed is an end of file for whoever waits
    return process


def _wait_for_core() -> None:
    """Take one of the cores: a lock on its byte, which the kernel frees when its holder ends."""
    fcntl.lockf(_cores_file, fcntl.LOCK_EX, 1)  # the first byte: whose turn it is to look
    while True:
        for core in range(1, _cores + 1):
            with suppress(OSError):
                fcntl.lockf(_cores_file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, core)
                fcntl.lockf(_cores_file, fcntl.LOCK_UN, 1)
                return
        time.sleep(CORE_SECONDS)


def _answer(asker: Connection, step: Callable, arguments: tuple) -> None:
    """Take a step; send what it logs, then its result or its error."""
    asking = threading.get_ident()
    handler = _Sender(asker)  # type: ignore[arg-type]
    handler.addFilter(lambda record: record.thread == asking)
    logging.root.addHandler(handler)
    answer = _attempt(step, arguments)
    logging.root.removeHandler(handler)
    if _cores:  # is let go of before the answer is read, for which there may be no core
        fcntl.lockf(_cores_file, fcntl.LOCK_UN)
    with asker, suppress(BrokenPipeError):  # it is gone, and this process soon will be
        asker.send(answer)


def _take_parts(name: str, works: Sequence[Callable], in_forks: bool) -> list:
    """Return what the parts of a model's training return, of which none needs another.

    A part is a function(progress): the first fits the model, the others evaluate it.
    In a fork, where there are cores, each is a fork of it, if `in_forks`; elsewhere, as in a
    notebook, they are taken one after the other. Raises what a part raises, or Killed.
    """
    progress = _progress(name, ["fitting", *repeat("evaluating", len(works) - 1)])
    if _cores < 2 or not in_forks:
        return [_take_part(work, partial(progress, part)) for part, work in enumerate(works)]
    forks = {}
    fcntl.lockf(_cores_file, fcntl.LOCK_UN)
    try:
        for work in works:
            ours, theirs = multiprocessing.Pipe()
            forks[ours] = _fork(theirs, _take_part, work, theirs.send)
        return _answers([*forks], progress)
    finally:
        for fork in forks.values():
            fork.kill()
        trim_memory()


class _Sender(QueueHandler):
    """Sends what is logged to whoever asked for the step."""

    queue: Any

    def enqueue(self, record: logging.LogRecord) -> None:
        with suppress(BrokenPipeError):
            self.queue.send(record)


def _attempt(step: Callable, arguments: tuple) -> Any:
    """Return what the step returns or its error, which can be sent: no secrets."""
    result, error = notify.attempt(step, *arguments)
    if error is None:
        return result
    if not isinstance(error, notify.SAY_IT_ALL):
        kind = StepFailed if notify.heals(error) else SameInputFails
        return kind(notify.explain(error))
    error.args = tuple(db.redact(part) if isinstance(part, str) else part for part in error.args)
    return error


def serve_forks(parent: int) -> int:
    """Be the fork server of that process until it ends.

    Steps are asked for on connections that come through standard input. This process has a single
    thread, as a fork copies no other.
    """
    global _cores, _cores_file
    die_with(parent)  # before the imports, which take two seconds
    gc.disable()  # which is a tenth of that
    import joblib
    import matplotlib.figure  # noqa: F401 (once, not in each fork)
    import sklearn.ensemble
    import sklearn.pipeline  # noqa: F401

    gc.enable()
    notify.quiet_logs(keep_shares=True)
    logging.root.handlers.clear()  # what is logged goes to whoever asks for a step
    threads = ThreadPoolExecutor(joblib.cpu_count())
    if sys.platform == "linux":
        _cores = joblib.cpu_count()
        _cores_file = os.memfd_create("cores")
    asked = Connection(0)
    while True:
        try:
            step, arguments = asked.recv()
            asker = Connection(recv_handle(asked))
        except EOFError:  # whoever asks is gone
            return 0
        if step is read_songs:  # in this process, so that the forks share them
            _answer(asker, step, arguments)
        elif _cores:
            _, error = notify.attempt(_fork, asker, step, *arguments)
            if error:  # no memory, no process left: that step fails, the server goes on
                with asker, suppress(BrokenPipeError):
                    asker.send(error)
        else:  # libraries expect a fork on Linux; on macOS it is not safe
            threads.submit(_answer, asker, step, arguments)


@contextmanager
def signals_held() -> Iterator[None]:
    """Have the processes that are started in the block take no SIGTERM and no Ctrl-C.

    Who stops all processes at once, as systemd does, stops the one that started them; that one
    tells people, and ends these when it is done.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def trim_memory() -> None:
    """Give the kernel what was freed here, so that other processes can have it (glibc)."""
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent ends, however that ends (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it has ended before
        sys.exit()


# ---- The command line ----------------------------------------------------------------------------


def show(options: Namespace) -> int:
    """Print the current models. Raises ModelError where there is none."""
    rows: list[list] = []
    reports = {}
    for name in MODELS:
        report = read_report(name, options.models_dir)
        if not report:
            there = _paths(name, options.models_dir)[0].exists()
            rows.append([name, "damaged" if there else "not trained", *[""] * 6])
            continue
        versions = len(list_versions(name, options.models_dir))
        told = {key: value for key, value in report.items() if key not in ("plot", "data")}
        reports[name] = {**told, "versions_kept": versions}
        age = datetime.now(UTC) - datetime.fromisoformat(report["trained_at"])
        rows.append(
            [
                name,
                *notify.metric_and_change(notify.outcome_of(report, options.models_dir)),
                f"{report['rows']:,}",
                report["table"],
                f"{notify.duration(age.total_seconds())} ago",
                notify.size(report["bytes"]),
                versions,
            ]
        )
    if options.json:
        print(json.dumps(reports, indent=1))
    else:
        notify.print_lines([(f"Models in {options.models_dir}", "bold")])
        columns = ("model", "metric", "change>", "songs>", "table", "trained", "size>", "older>")
        notify.print_table(columns, rows)
    _demand_models(reports, options.models_dir)
    return 0


def similar(options: Namespace) -> int:
    """Print the songs most like one song."""
    if options.k < 1:
        raise DataError(f"-k must be 1 or more; it is {options.k}")
    index = load_model("similar", options.models_dir)["estimator"]
    row = _row_meant(index, options.song, options.artist)
    song = _song(index, row)
    answers = [
        {**_song(index, other), "similarity": round(float(alike), 4)}
        for other, alike in zip(*index.neighbours(row, options.k, options.same_artist))
    ]
    if options.json:
        print(json.dumps({"song": song, "similar": answers}, indent=1, ensure_ascii=False))
    else:
        lines = [
            (f"{one['similarity']:.3f}", one["track_name"], one["artist_name"], one["track_id"])
            for one in answers
        ]
        notify.print_lines([(f"Like {song['track_name']} by {song['artist_name']}", "bold")])
        notify.print_table(("alike>", "title", "artist", "track_id"), lines)
    if len(answers) < options.k:
        why = (
            "the other songs are by the same artist, of whom three in ten are shown; "
            "to see them all: --same-artist"
        )
        if options.same_artist:
            why = "the table has no more recordings"
        log.warning("%d of %d: %s", len(answers), options.k, why)
    return 0


def titles(options: Namespace) -> int:
    """Print the songs whose titles contain the text, the first 20 of them."""
    index = load_model("similar", options.models_dir)["estimator"]
    text = options.text.casefold()
    rows = [row for row, title in enumerate(index.titles_) if text in title.casefold()]
    notify.print_lines([*_listed(index, rows), f"songs: {len(rows):,}"])
    return 0


def _song(index: SimilarSongs, row: int) -> dict[str, str]:
    return {
        "track_id": index.track_ids_[row],
        "track_name": index.titles_[row],
        "artist_name": index.artists_[row],
    }


def _row_meant(index: SimilarSongs, text: str, artist: str | None) -> int:
    """Return the one row that the text means; ModelError, with what it may mean, otherwise."""
    rows = index.find(text, artist)
    if len(rows) == 1:
        return rows[0]
    asked = f'"{text}" by {artist}' if artist else f'"{text}"'
    if rows:
        listed = _listed(index, rows)
        which = "say which, --artist NAME or a track_id:"
        said = f"{len(rows):,} songs could be meant by {asked}; {which}"
    else:
        listed = index.suggestions(text)
        why = "did you mean:" if listed else "models.py titles lists what there is"
        said = f"no song is called {asked}; {why}"
    raise ModelError("\n  ".join([said, *listed]))


def _listed(index: SimilarSongs, rows: list[int]) -> list[str]:
    """Return lines that name the songs in those rows, the first 20 of them."""
    line = "{track_id}  {track_name}, by {artist_name}"
    return [line.format(**_song(index, row)) for row in rows[:20]]


def predict_songs(options: Namespace) -> int:
    """Print the rows of a CSV with the predictions added, or write them with --out.

    Or, with --into, put the predictions of a table into another.
    """
    start = time.monotonic()
    if bool(options.csv) == bool(options.into):
        raise DataError("predict needs a CSV file or --into TABLE")
    out = Path(options.out or ".").resolve()
    if options.out and (out.is_dir() or not os.access(out.parent, os.W_OK)):
        raise DataError(f"cannot write {out}; give --out a file in a folder that can be written to")
    if options.into:
        done = predict_table(
            db.database_url(), options.table_name, options.into, options.models_dir
        )
    else:
        rows, songs = db.read_csv(options.csv)
        loaded = load_models(options.models_dir, filter(adds, MODELS))
        complete = rows.assign(**_added(songs, loaded))
        as_csv = partial(complete.to_csv, index=False)
        if not options.out:
            as_json = partial(complete.to_json, orient="records", lines=True, force_ascii=False)
            print(as_json() if options.json else as_csv(), end="")
            return 0
        write_atomically(out, as_csv)
        done = {"rows": len(rows), "into": str(out), "seconds": time.monotonic() - start}
    print(json.dumps(done) if options.json else notify.in_words(done))
    return 0


def roll_back(options: Namespace) -> int:
    """Put the previous version of a model back."""
    folder = Path(options.models_dir).resolve()
    if not folder.is_dir():
        raise ModelError(f"there is no folder {folder}; say where the models are: --models-dir DIR")
    with one_run_at_a_time(folder):
        report = rollback(options.model, folder)
    metric = notify.figures(report["metrics"])[0]
    print(
        f"{options.model} is again the version trained {report['trained_at']} "
        f"on {report['table']} ({metric})"
    )
    return 0


def _parser() -> ArgumentParser:
    parser = ArgumentParser(description="Look at the trained models and use them.")
    commands = parser.add_subparsers(required=True)

    def command(name: str, run: Callable, text: str, with_json: bool = True) -> Any:
        added = commands.add_parser(name, help=text)
        added.set_defaults(run=run)
        add = added.add_argument
        add("--models-dir", default=MODELS_DIR, help="folder of the models (default: %(default)s)")
        if with_json:
            add("--json", action="store_true", help="print JSON instead of a table")
        return add

    command("show", show, "the current models: metrics, age, versions kept")
    add = command("similar", similar, "the songs most like one song")
    add("song", help="its title or track_id")
    add("-k", type=int, default=10, help="how many (default: %(default)s)")
    add("--artist", help="which of several songs of one title")
    add("--same-artist", action="store_true", help="also more than three of ten by the same artist")
    add = command("titles", titles, "the songs whose titles contain a text, to find one", False)
    add("text", nargs="?", default="", help="part of a title (default: any title)")
    text = "add the predictions to the rows of a CSV, or put those of a table into another"
    add = command("predict", predict_songs, text)
    add("csv", nargs="?", help="songs, with the column names of the table or their aliases")
    add(
        "--table-name",
        default="spotify_songs",
        help="with --into: the table of songs (default: %(default)s)",
    )
    add("--into", metavar="TABLE", help="put what is said of all songs into this table")
    add("--out", help="the CSV to write (default: it is printed)")
    add = command("rollback", roll_back, "put the previous version of a model back", False)
    add("model", choices=MODELS)
    return parser


def main(arguments: list[str]) -> int:
    """Run a command; return its exit status."""
    if arguments[:1] == ["forkserver"]:
        return serve_forks(int(arguments[1]))
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        status = options.run(options)
        print(end="", flush=True)  # here, where an error of writing is seen
        return status
    except (BrokenPipeError, SystemExit):  # rich's of it; whoever reads has enough, as head does
        return 0
    except (db.Expected, OSError) as error:
        print(db.redact(error), file=sys.stderr)
        return 75 if isinstance(error, Locked) else 2


if __name__ == "__main__":
    # What is pickled must name the module: of __main__ no other program could load it.
    import models

    status = models.main(sys.argv[1:])
    notify.never_break_off()  # what could not be written is tried once more at the exit
    sys.exit(status)
