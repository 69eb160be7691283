"""The five models: features, training, evaluation, saving, loading, predicting.

    python models.py show                                   # the current models, their metrics, age and versions
    python models.py similar "Bohemian Rhapsody" -k 10      # by title or track_id
    python models.py predict songs.csv --out predicted.csv  # the rows with the predictions added
    python models.py rollback genre                         # put the previous version back

Training functions are plain: a DataFrame of songs (the columns of db.REQUIRED and whatever there is of db.OPTIONAL)
goes in, a fitted estimator and a dict of metrics come out. They read no file and write none; they say what they are
doing through the logger "models".

scikit-learn and pandas are imported where they are used: they take two seconds, and `similar` needs neither.
"""
import argparse
import fcntl
import hashlib
import json
import logging
import os
import platform
import re
import sys
import time
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from functools import lru_cache
from itertools import chain, repeat
from pathlib import Path

import numpy as np

import db
from db import DataError

log = logging.getLogger("models")

ROOT = Path(__file__).resolve().parent
MODELS_DIR = ROOT / "models"
SEED = 20  # of every random choice: the same table gives the same models and the same metrics

# What a song sounds like: seven features every table has, and those some have.
AUDIO = ("danceability", "energy", "loudness", "speechiness", "acousticness", "instrumentalness", "valence")
MORE_AUDIO = ("liveness", "tempo", "key", "mode", "duration_ms", "time_signature", "explicit", "year")

NEW_ARTISTS = 0.10   # share of the artists held out whole
KNOWN_SONGS = 0.12   # share of the other artists' songs held out
FEW_SONGS = 50_000   # of fewer, what is held out of one split leaves much to chance ...
SPLITS = 3           # ... so a model is judged on so many,
AVERAGED = 3         # and a regressor that is saved averages so many fits (each that is judged is one, and a little worse)
MIN_SONGS = 20       # fewer cannot be split into a part to learn from and a part to be judged by
MIN_GENRE_SONGS = 5  # a genre of fewer songs cannot be learnt; two genres need as many

# The gate: a retrained model may be this much worse than the current one and still take its place.
GATE_RELATIVE = 0.05
GATE_ABSOLUTE = 0.01
KEEP_VERSIONS = 5

# Drift: what moved more than this since the last training is worth a warning.
DRIFT_ROWS = 0.2        # share of the rows gone (or come, in proportion)
DRIFT_SHARE = 0.005     # change of a genre's share of all songs ...
DRIFT_RATIO = 1.5       # ... where the share also changed by this factor
DRIFT_DEVIATIONS = 0.25 # change of a feature's mean, in standard deviations

SILHOUETTE_SAMPLE = 3000  # songs: the silhouette compares each with every other
QUERY_SAMPLE = 2000       # songs whose neighbours are looked at for the metrics of `similar`
PLOT_POINTS = 2000
MATRIX_GENRES = 12        # up to as many genres the picture shows a whole confusion matrix


class ModelError(Exception):
    """A model file that is missing, damaged, or does not belong to its metrics; the text names the fix."""


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation: which songs a model is judged by
# ---------------------------------------------------------------------------------------------------------------------

def recordings(songs) -> np.ndarray:
    """Return an integer per song, the same for two songs of the same artist and title (case-folded): one recording."""
    import pandas as pd
    names = songs["artist_name"].astype(object) + "\0" + songs["track_name"].astype(object)
    return pd.factorize(names.str.casefold())[0]


def _first_by_hash(values, share: float, key: str) -> np.ndarray:
    """Return True for every row whose value is among the `share` of the distinct values whose hashes come first."""
    import pandas as pd
    hashed = pd.util.hash_array(values.to_numpy(object), hash_key=f"{key:16.16}")
    distinct = np.unique(hashed)
    cut = int(len(distinct) * share)
    return hashed < distinct[cut] if cut else np.zeros(len(values), bool)


def holdout(songs, split: int = 0):
    """Split songs into three boolean masks (train, known, new); another number of the split, another split.

    `new` is every song of 10 % of the artists; `known` is 12 % of the other songs, less those of which another copy is
    in `train`. The choice hangs on hashed names, not on row numbers: what is held out tonight is held out tomorrow,
    when the table has grown, and the figures of two nights compare.
    """
    number = str(split or "")
    new = _first_by_hash(songs["artist_name"], NEW_ARTISTS, "artist" + number)
    known = ~new
    known[known] = _first_by_hash(songs["track_id"][~new], KNOWN_SONGS, "song" + number)
    train = ~new & ~known
    recording = recordings(songs)
    known &= ~np.isin(recording, recording[train])
    return train, known, new


def _fitted_on(name, estimator, songs) -> dict:
    """Return {"fitted_on": songs} where the fit saw a sample of the songs only, and say so; {} where it saw all."""
    if estimator.fitted_on_ == len(songs):
        return {}
    log.info("%s: fitted on a sample of %s of the %s songs; artists are counted over all", name,
             f"{estimator.fitted_on_:,}", f"{len(songs):,}")
    return {"fitted_on": estimator.fitted_on_}


def _judge(name, make, songs, answers):
    """Return (known, new): what the songs held out were answered with, one estimator fitted for each split.

    `name` is the model and the column it predicts; `make() -> estimator`; `answers(estimator, learnt, held_out)`
    returns arrays, one value per held-out song. Those of all splits are put end to end; () where nothing was held out.
    """
    found = [], []
    for split in range(SPLITS if len(songs) < FEW_SONGS else 1):
        train, *held_out = holdout(songs, split)
        log.info("%s: evaluating on %s held-out songs", name, f"{(~train).sum():,}",
                 extra={"model": name, "phase": "evaluating"})
        judged = make().fit(songs[train], songs.loc[train, name])
        for part, mask in zip(found, held_out):
            if mask.any():
                part.append(answers(judged, songs[train], songs[mask]))
    log.info("%s: fitting on %s songs", name, f"{len(songs):,}", extra={"model": name, "phase": "fitting"})
    return [tuple(map(np.concatenate, zip(*part))) for part in found]


def _distinct(songs, name: str, at_least: int):
    """Return the songs without repeated track_ids; raise DataError when there are too few of them for the model."""
    if not songs["track_id"].is_unique:  # else no copy: five of a large table are more than the table itself
        songs = songs.drop_duplicates("track_id", keep="last", ignore_index=True)
    if len(songs) < at_least:
        raise DataError(f"{name} needs at least {at_least} songs; the table has {len(songs)}")
    return songs


# ---------------------------------------------------------------------------------------------------------------------
# One idea, applied three times: what a song sounds like, plus what is known of the songs it shares a name with
# ---------------------------------------------------------------------------------------------------------------------

NUMBERS = ("popularity", *AUDIO, *MORE_AUDIO)
WORD = re.compile(r"[^\W\u0370-\uffff]+|[^\W\u0000-\u036f]")  # a word in Latin letters, or one character of another script
BRACKET = re.compile(r"[(\[\-]")
FEATURED = re.compile(r"[(\[\-]\s*(?:feat\.?|ft\.?|featuring|with)\s+([^()\[\]]+)"             # "Title (feat. B & C)"
                      r"|[(\[\-]\s*([^()\[\]\-]+?)(?:'s)?\s+(?:[a-z]+\s+)?(?:remix|edit|mix)")  # "Title - B Club Remix"


TEXTS_KEPT = 1 << 18  # two models split the same texts, each twice: for its evaluation and for the model that is saved


@lru_cache(TEXTS_KEPT)
def credits(artist_name: str) -> list[str]:
    """Return the credited artists: "A;B" is A and B."""
    return [name.strip() for name in artist_name.casefold().split(";")]


@lru_cache(TEXTS_KEPT)
def featured(track_name: str) -> list[str]:
    """Return the artists a title names: B and C of "Title (feat. B & C)"."""
    if not BRACKET.search(track_name):
        return []
    found = ",".join(filter(None, (name for match in FEATURED.findall(track_name.casefold()) for name in match)))
    return [name.strip() for name in re.split(r",|&| and | x ", found) if name.strip()]


@lru_cache(TEXTS_KEPT)
def words(text: str) -> list[str]:
    """Return the words of a title: "remix" or "christmas" tells something even of an artist never seen."""
    return WORD.findall(text.casefold())


def whole(text: str) -> list[str]:
    return [text.casefold()] if text else []


def column(songs, name):
    """Return the Series of that name, all missing where the table has none."""
    import pandas as pd
    return songs[name] if name in songs else pd.Series(np.nan, index=songs.index, dtype=object)


def incidence(names, split, levels: dict | None = None):
    """Return (matrix, levels): a sparse 0/1 matrix, songs x levels, 1 where a key of the name is the level's.

    `names` is a Series of text, NaN allowed; `split(text) -> keys`; `levels` maps each key to its column, and is made
    from the names where it is not given. Keys that have no level are left out.
    """
    import pandas as pd
    from scipy.sparse import csr_array
    codes, uniques = pd.factorize(names)
    found = [split(name) for name in np.asarray(uniques, dtype=object)] + [()]  # the last row: no name
    keys = list(chain.from_iterable(found))
    if levels is None:
        levels = {key: column for column, key in enumerate(dict.fromkeys(keys))}
    columns = np.fromiter(map(levels.get, keys, repeat(-1)), np.int32, len(keys))
    rows = np.repeat(np.arange(len(found)), np.fromiter(map(len, found), int, len(found)))
    rows, columns = rows[columns >= 0], columns[columns >= 0]
    table = csr_array((np.ones(len(rows), np.float32), (rows, columns)), shape=(len(found), len(levels)))
    table.data[:] = 1  # also of a key that stands twice in a name
    return table[np.where(codes < 0, len(uniques), codes)], levels


# ---------------------------------------------------------------------------------------------------------------------
# Genre
# ---------------------------------------------------------------------------------------------------------------------

def softmax(scores):
    scores = np.exp(scores - scores.max(axis=1, keepdims=True))
    return scores / scores.sum(axis=1, keepdims=True)


class GenreClassifier:
    """log P(genre | sound, words) + 0.8 [log P(genre | artists) - log P(genre)].

    The first term is a network of one hidden layer on all numbers, each coded piecewise linearly in quantile bins
    (Gorishniy et al., "On Embeddings for Numerical Features in Tabular Deep Learning", 2022), and on the words of
    title, artist and album. The second are genre counts of the credited and featured artists, shrunk towards the
    prior, then those of the exact credit, shrunk towards these (Dirichlet smoothing; MacKay and Peto, 1995).
    """

    TEXTS = {"track_name": words, "artist_name": words, "album_name": words}
    ARTIST_SONGS, CREDIT_SONGS = 0.5, 1.0  # how many songs the level above counts for
    EFFECT_WEIGHT = 0.8    # below 1, because the words already tell part of what the artist tells
    BINS = 16
    MIN_NAMES = 3          # a word must occur in so many different names: rarer ones are identities, not words
    BASE_SONGS = 300_000   # songs the network sees (a seeded sample); artists are counted over all songs
    HIDDEN, EPOCHS, MAX_BATCH, RATE, WORD_RATE, DROPOUT, WORD_DROPOUT = 128, 6, 512, 0.004, 0.05, 0.2, 0.5
    CHUNK = 20_000         # songs predicted at a time

    def fit(self, songs, genre):
        """`songs` is a DataFrame, one row per song; `genre` its genres as text."""
        rng = np.random.default_rng(SEED)
        self.classes_, y = np.unique(np.asarray(genre, dtype=object).astype(str), return_inverse=True)
        self.prior_ = ((np.bincount(y) + 1) / (len(y) + len(self.classes_))).astype(np.float32)
        self._fit_effect(songs, y)
        if len(y) > self.BASE_SONGS:
            sample = np.sort(rng.choice(len(y), self.BASE_SONGS, replace=False))
            songs, y = songs.iloc[sample], y[sample]
        self.fitted_on_ = len(y)
        self._fit_encoding(songs)
        self._fit_network(*self._encode(songs), y, rng)
        return self

    def predict_proba(self, songs) -> np.ndarray:
        """Return P(genre), float32, songs x classes_."""
        parts = (songs.iloc[i:i + self.CHUNK] for i in range(0, max(len(songs), 1), self.CHUNK))
        return np.vstack([softmax(self.sound(part) + self.EFFECT_WEIGHT * self.effect(part)) for part in parts])

    def predict(self, songs) -> np.ndarray:
        return self.classes_[self.predict_proba(songs).argmax(axis=1)]

    def _fit_effect(self, songs, y):
        from scipy.sparse import csr_array
        one_hot = csr_array((np.ones(len(y), np.float32), (np.arange(len(y)), y)))
        names = incidence(songs["artist_name"], credits)[1] | incidence(songs["track_name"], featured)[1]
        self.artists_ = {name: at for at, name in enumerate(names)}
        self.exact_ = incidence(songs["artist_name"], whole)[1]
        self.counts_ = [(matrix.T @ one_hot).tocsr() for matrix in self._levels(songs)]

    def _levels(self, songs):
        """Return two incidence matrices: songs x artists credited or featured, songs x exact credits."""
        artist, title = column(songs, "artist_name"), column(songs, "track_name")
        named = incidence(artist, credits, self.artists_)[0].maximum(incidence(title, featured, self.artists_)[0])
        return named, incidence(artist, whole, self.exact_)[0]

    def effect(self, songs) -> np.ndarray:
        """Return log P(genre | artists) - log P(genre), songs x genres: exactly 0 where no artist was seen in training."""
        p = self.prior_[None, :]
        for matrix, counts, strength in zip(self._levels(songs), self.counts_, (self.ARTIST_SONGS, self.CREDIT_SONGS)):
            seen = (matrix @ counts).toarray()
            p = (seen + strength * p) / (seen.sum(axis=1, keepdims=True) + strength)
        return np.log(p) - np.log(self.prior_)

    def _fit_encoding(self, songs):
        self.features_ = [name for name in NUMBERS if name in songs and songs[name].notna().any()]
        self.edges_ = {name: np.unique(np.nanquantile(songs[name].astype(np.float64), np.linspace(0, 1, self.BINS + 1)))
                       for name in self.features_}
        self.words_ = {}
        for name, split in self.TEXTS.items():
            if name in songs:
                matrix, levels = incidence(songs[name].drop_duplicates(), split)
                common = matrix.sum(axis=0) >= self.MIN_NAMES
                kept = [word for word, at in levels.items() if common[at]]
                self.words_[name] = {word: at for at, word in enumerate(kept)}
        numbers = self._numbers(songs.iloc[::1 + len(songs) // 50_000])
        self.mean_ = np.nanmean(numbers, axis=0)
        self.scale_ = np.nanstd(numbers, axis=0) + np.float32(0.1)  # a bin that hardly varies must not shout

    def _numbers(self, songs):
        """Return per number how far through each bin it is (0 to 1) and if it is the lowest; keys also one by one."""
        widths = [len(edges) + 12 * (name == "key") for name, edges in self.edges_.items()]
        numbers = np.empty((len(songs), sum(widths)), np.float32)  # filled in place: it is the largest array of a run
        for (name, edges), width, end in zip(self.edges_.items(), widths, np.cumsum(widths)):
            value = column(songs, name).to_numpy(np.float64, na_value=np.nan)[:, None]
            steps = [np.clip((value - edges[:-1]) / np.diff(edges), 0, 1), value <= edges[0]]
            steps += [value == np.arange(12)] * (name == "key")
            numbers[:, end - width:end] = np.where(np.isnan(value), np.nan, np.hstack(steps))
        return numbers

    def _encode(self, songs):
        """Return the inputs: numbers (dense; missing is average) and words (sparse; length 1 per song and column)."""
        from scipy.sparse import diags_array, hstack
        texts = []
        for name, levels in self.words_.items():
            matrix = incidence(column(songs, name), self.TEXTS[name], levels)[0]
            texts.append(diags_array(1 / np.sqrt(np.maximum(matrix.sum(axis=1), 1)), dtype=np.float32) @ matrix)
        numbers = self._numbers(songs)
        numbers -= self.mean_
        numbers /= self.scale_
        return np.nan_to_num(numbers, copy=False), hstack(texts, format="csr", dtype=np.float32)

    def _fit_network(self, numbers, texts, y, rng):
        """Adam for the dense weights, row-wise Adagrad for the words in the batch, a cosine schedule after a warm-up."""
        n = len(y)
        batch = int(np.clip(n // 150, 16, self.MAX_BATCH))
        epochs = max(self.EPOCHS, 200 * batch // n)
        shape = {"in": (numbers.shape[1], self.HIDDEN), "out": (self.HIDDEN, len(self.classes_))}
        net = {"in": rng.normal(0, shape["in"][0] ** -0.5, shape["in"]), "in0": np.zeros(self.HIDDEN),
               "out": rng.normal(0, self.HIDDEN ** -0.5 / 2, shape["out"]), "out0": np.log(self.prior_),
               "words": np.zeros((texts.shape[1], self.HIDDEN))}
        self.network_ = net = {name: weights.astype(np.float32) for name, weights in net.items()}
        moments = {name: (np.zeros_like(net[name]), np.zeros_like(net[name])) for name in ("in", "in0", "out", "out0")}
        squares = np.zeros((texts.shape[1], 1), np.float32)
        batches = [rows[i:i + batch] for rows in (rng.permutation(n) for _ in range(epochs)) for i in range(0, n, batch)]
        for step, rows in enumerate(batches, 1):
            used, text = self._drop_words(texts[rows], rng)
            drop = (rng.random((len(rows), self.HIDDEN), dtype=np.float32) > self.DROPOUT) / np.float32(1 - self.DROPOUT)
            gradients = self._gradients(numbers[rows], text, used, y[rows], drop)
            pace = min(1, step / 20) * (1 + np.cos(np.pi * step / len(batches))) / 2
            for name, (first, second) in moments.items():
                first += 0.1 * (gradients[name] - first)
                second += 0.01 * (gradients[name] ** 2 - second)
                adam = first / (1 - 0.9 ** step) / (np.sqrt(second / (1 - 0.99 ** step)) + 1e-8)
                net[name] -= np.float32(self.RATE * pace) * adam
            squares[used] += (gradients["words"] ** 2).mean(axis=1, keepdims=True)
            net["words"][used] -= np.float32(self.WORD_RATE * pace) * gradients["words"] / (np.sqrt(squares[used]) + 1e-8)

    def _drop_words(self, text, rng):
        """Return the words of a batch and the matrix songs x those words, half of its entries dropped."""
        used, columns = np.unique(text.indices, return_inverse=True)
        kept = (rng.random(text.nnz) > self.WORD_DROPOUT) / np.float32(1 - self.WORD_DROPOUT)
        return used, type(text)((text.data * kept.astype(np.float32), columns, text.indptr), (text.shape[0], len(used)))

    def _gradients(self, numbers, text, used, y, drop):
        """Return the gradient of the batch's mean cross-entropy by every weight; of the words, only the rows used."""
        net = self.network_
        hidden = numbers @ net["in"] + net["in0"] + text @ net["words"][used]
        gate = (hidden > 0) * drop
        hidden *= gate
        error = softmax(hidden @ net["out"] + net["out0"])
        error[np.arange(len(y)), y] -= 1
        error /= len(y)
        back = (error @ net["out"].T) * gate
        return {"in": numbers.T @ back, "in0": back.sum(0), "out": hidden.T @ error, "out0": error.sum(0),
                "words": text.T @ back}

    def sound(self, songs) -> np.ndarray:
        """Return log P(genre | sound, words) up to a constant per song, songs x genres."""
        numbers, texts = self._encode(songs)
        net = self.network_
        hidden = np.maximum(numbers @ net["in"] + net["in0"] + texts @ net["words"], 0)
        return hidden @ net["out"] + net["out0"]


# ---------------------------------------------------------------------------------------------------------------------
# Energy and popularity
# ---------------------------------------------------------------------------------------------------------------------

# What a song shares with other songs: the column, and what splits its text into keys. The album's title alone, without
# the artist: on a compilation, the company a song keeps says more than its artist does.
KEYS = {"artist": ("artist_name", credits), "album": ("album_name", whole),
        "album words": ("album_name", words), "title words": ("track_name", words)}


def text_counts(songs):
    """Return songs x 5, float32: ";" in the artist, length of title and of album, if they are the same, if the title has
    a bracket or dash."""
    artist, title, album = (column(songs, name).astype("str").str for name in ("artist_name", "track_name", "album_name"))
    title, album = title.casefold(), album.casefold()
    return np.column_stack([artist.count(";"), title.str.len(), album.str.len(), title == album,
                            title.str.contains(r" - |\(|\[")]).astype(np.float32)


def summary(totals):
    """Return count, mean and spread from count, sum and sum of squares, songs x 3; NaN where nothing is known."""
    count, total, squares = np.asarray(totals, dtype=float).T
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = total / count
        spread = np.sqrt(np.maximum(squares / count - mean ** 2, 0))
    return np.c_[count, mean, np.where(count > 1, spread, np.nan)].astype(np.float32)


def summary_without_own_fold(matrix, moments, fold):
    """Return summary() of each song's keys over the songs of the other folds: no song helps to describe itself."""
    total, out = matrix.T @ moments, np.empty_like(moments)
    for k in np.unique(fold):
        own = np.flatnonzero(fold == k)
        part = matrix[own]
        out[own] = part @ (total - part.T @ moments[own])
    return summary(out)


class SongRegressor:
    """Gradient boosting on audio, genre, and what the other songs of the artist, of the album and of its words are like.

    "Like" is count, mean and spread of their residuals. The trees learn once with a random fold of songs hidden (an
    artist known) and once with a fold of whole artists hidden (an artist never seen): so they learn how far to trust
    two songs of an artist, or a compilation, and what to do without either. It is cross-fitted target encoding
    (Micci-Barreca, 2001; scikit-learn's TargetEncoder), fitted for both cases at once.
    """

    SONG_FOLDS, ARTIST_FOLDS = 5, 10  # ten, because a tenth of the artists is what an evaluation holds out
    MAX_FIT_ROWS = 400_000  # rows the trees see; artists, albums and words are counted over all songs
    MAX_GENRES = 254        # HistGradientBoosting takes 255 categories; the rarer genres count as missing
    PRIOR_SONGS = 10        # a genre's mean is shrunk towards that of all songs as if it had so many more of them
    CURVE_ROWS = 100_000    # rows the quadratic is fitted on, and predicted at a time
    # Words and counts do not help energy; a quadratic of the audio to start from helps energy and hurts popularity.
    SETTINGS = {
        "popularity": dict(keys=("artist", "album", "album words", "title words"), counts=True, curve=False,
                           trees=dict(max_iter=200, learning_rate=0.05, max_leaf_nodes=31, max_features=0.5)),
        "energy": dict(keys=("artist", "album"), counts=False, curve=True,
                       trees=dict(max_iter=250, learning_rate=0.08, max_leaf_nodes=47, max_features=0.4))}

    def __init__(self, target: str, fits: int = 1):
        self.target, self.fits = target, fits

    def fit(self, songs, y):
        """`songs` is a DataFrame, one row per song; `y` its target, finite. The target's own column is not looked at."""
        from sklearn.ensemble import HistGradientBoostingRegressor
        settings, y, rng = self.SETTINGS[self.target], np.asarray(y, dtype=float), np.random.default_rng(SEED)
        self.features_ = [name for name in AUDIO + MORE_AUDIO
                          if name != self.target and name in songs and songs[name].notna().any()]
        self.genres_ = {genre: code for code, genre in enumerate(songs["genre"].value_counts().index[:self.MAX_GENRES])}
        self._fit_start(songs, y, settings["curve"], rng)
        residual = y - self._start(songs)
        X, rows = self._training_rows(songs, residual, settings["keys"], rng)
        self.fitted_on_ = len(np.unique(rows))
        X[:, np.isnan(X).all(axis=0)] = 0  # HistGradientBoosting cannot bin a column without a single value
        self.trees_ = [HistGradientBoostingRegressor(
            categorical_features=[len(self.features_)], min_samples_leaf=40, l2_regularization=1.0, early_stopping=False,
            random_state=seed, **settings["trees"]).fit(X, residual[rows])
            for seed in range(SEED, SEED + self.fits)]
        return self

    def predict(self, songs) -> np.ndarray:
        """Return the target of each song; absent columns, a missing genre and unknown names are missing values."""
        if not len(songs):
            return np.zeros(0)
        known = [self._audio(songs)]
        for key, levels in self.levels_.items():
            name, split = KEYS[key]
            known.append(summary(incidence(column(songs, name), split, levels)[0] @ self.totals_[key]))
        X = np.hstack(known)
        return np.clip(self._start(songs) + np.mean([trees.predict(X) for trees in self.trees_], axis=0), *self.range_)

    def _training_rows(self, songs, residual, keys, rng):
        """Learn levels_ and totals_; return (X, rows): what the trees learn from, and which song each row of X is."""
        import pandas as pd
        moments = np.c_[np.ones(len(residual)), residual, residual ** 2]
        by_song = rng.integers(0, self.SONG_FOLDS, len(residual))
        artists = pd.factorize(songs["artist_name"])[0]
        by_artist = rng.integers(0, self.ARTIST_FOLDS, artists.max() + 1)[artists]
        self.levels_, self.totals_, known, new = {}, {}, [], []
        for key in keys:
            name, split = KEYS[key]
            if name in songs:
                matrix, self.levels_[key] = incidence(songs[name], split)
                self.totals_[key] = matrix.T @ moments
                known.append(summary_without_own_fold(matrix, moments, by_song))
                new.append(summary_without_own_fold(matrix, moments, by_artist))
        # Songs that share nothing once hidden belong to `new`; among `known` they would pass for typical new artists.
        shared = np.any([part[:, 0] > 0 for key, part in zip(self.levels_, known) if "words" not in key], axis=0)
        rows, kept = np.r_[np.flatnonzero(shared), np.arange(len(songs))], slice(None)
        if len(rows) > self.MAX_FIT_ROWS:
            kept = np.sort(rng.choice(len(rows), self.MAX_FIT_ROWS, replace=False))
        rows, hidden = rows[kept], (np.arange(len(rows)) >= shared.sum())[kept]  # is the artist hidden whole?
        table = np.vstack([np.hstack([part[rows[mask]] for part in parts])
                           for parts, mask in ((known, ~hidden), (new, hidden))])
        some, at = np.unique(rows, return_inverse=True)  # most songs stand in X twice
        return np.c_[self._audio(songs.iloc[some])[at], table], rows

    def _fit_start(self, songs, y, curve, rng):
        """Learn where the residuals start from: the genre's shrunken mean or a quadratic of it and the audio."""
        import pandas as pd
        by_genre = pd.Series(y).groupby(songs["genre"].to_numpy()).agg(["sum", "size"])
        self.mean_, self.range_, self.curve_ = y.mean(), (y.min(), y.max()), None
        self.genre_means_ = ((by_genre["sum"] + self.PRIOR_SONGS * self.mean_) / (by_genre["size"] + self.PRIOR_SONGS)).to_dict()
        if curve:
            from sklearn.impute import SimpleImputer
            from sklearn.linear_model import Ridge
            from sklearn.pipeline import make_pipeline
            from sklearn.preprocessing import PolynomialFeatures, StandardScaler
            some = np.sort(rng.permutation(len(y))[:self.CURVE_ROWS])
            self.curve_ = make_pipeline(SimpleImputer(), StandardScaler(), PolynomialFeatures(2, include_bias=False),
                                        StandardScaler(), Ridge(10.0)).fit(self._plane(songs.iloc[some]), y[some])

    def _start(self, songs):
        if self.curve_ is None:
            return self._genre_mean(songs)
        starts = [self.curve_.predict(self._plane(songs.iloc[i:i + self.CURVE_ROWS]))
                  for i in range(0, len(songs), self.CURVE_ROWS)]
        return np.clip(np.concatenate(starts), *self.range_)  # a quadratic runs away where songs are rare

    def _genre_mean(self, songs):
        return column(songs, "genre").map(self.genre_means_).astype(float).fillna(self.mean_).to_numpy()

    def _plane(self, songs):
        return np.column_stack([column(songs, name).astype(float) for name in self.features_] + [self._genre_mean(songs)])

    def _audio(self, songs):
        """Return songs x (features_, the genre's number and, where set, the quadratic's value, the counts), float32."""
        table = [column(songs, name).astype(np.float32) for name in self.features_]
        table.append(column(songs, "genre").map(self.genres_).astype(np.float32))
        if self.curve_ is not None:
            table.append(self._start(songs).astype(np.float32))  # where on its scale a song starts says how far it strays
        return np.column_stack(table + [text_counts(songs)] * self.SETTINGS[self.target]["counts"])


# ---------------------------------------------------------------------------------------------------------------------
# The five training functions: songs in; a fitted estimator and its metrics out, the primary metric first
# ---------------------------------------------------------------------------------------------------------------------

def train_genre(songs):
    """Classify the genre. Return (GenreClassifier, metrics).

    Raises DataError where fewer than two genres have five songs each. Shares are of held-out songs: `accuracy`,
    `top3_accuracy` and `f1_macro` on songs of known artists, `accuracy_new_artists` on artists never seen,
    `baseline_accuracy` for always naming the most common genre.
    """
    from sklearn.metrics import f1_score
    songs = _distinct(songs, "genre", MIN_SONGS)
    learnable = int((songs["genre"].value_counts() >= MIN_GENRE_SONGS).sum())
    if learnable < 2:
        raise DataError(f"genre needs at least 2 genres with {MIN_GENRE_SONGS} songs each; the table has {learnable}")
    def answers(judged, learnt, held_out):
        actual = held_out["genre"].to_numpy(object)
        likely = judged.classes_[np.argsort(-judged.predict_proba(held_out), axis=1)[:, :3]]
        in_top3 = (likely == actual[:, None]).any(axis=1)
        return actual, likely[:, 0], in_top3, np.full(len(actual), learnt["genre"].mode()[0], object)
    known, new = _judge("genre", GenreClassifier, songs, answers)
    final = GenreClassifier().fit(songs, songs["genre"])
    actual, predicted, in_top3, common = known or [np.zeros(0)] * 4
    metrics = {
        "accuracy": _mean(predicted == actual),
        "accuracy_new_artists": _mean(new[1] == new[0]) if new else None,
        "top3_accuracy": _mean(in_top3),
        "f1_macro": float(f1_score(actual.astype(str), predicted.astype(str), average="macro")) if known else None,
        "baseline_accuracy": _mean(common == actual),
        "classes": len(final.classes_),
        "plot": _plot_genres(actual, predicted),
    }
    return final, metrics | _fitted_on("genre", final, songs)


def train_clusters(songs, n_clusters: int = 2):
    """Cluster songs by sound: standardised audio features, k-means. Return (Pipeline, metrics).

    Raises DataError where there are fewer than n_clusters distinct songs. `silhouette` (-1 to 1) is that of a seeded
    sample; `profiles` are each cluster's mean features. Cluster 0 is the largest.
    """
    from sklearn.cluster import KMeans
    from sklearn.metrics import silhouette_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    if n_clusters < 2:
        raise DataError(f"clusters needs --n-clusters 2 or more; it is {n_clusters}")
    songs = _distinct(songs, "clusters", 1)
    features = songs[list(AUDIO)].astype(np.float64)
    distinct = len(features.drop_duplicates())
    if distinct < n_clusters:
        raise DataError(f"clusters needs at least {n_clusters} distinct songs for {n_clusters} clusters; "
                        f"the table has {distinct}")
    log.info("clusters: fitting on all %s songs", f"{len(songs):,}", extra={"model": "clusters", "phase": "fitting"})
    pipeline = make_pipeline(StandardScaler(), KMeans(n_clusters, n_init=4, random_state=SEED)).fit(features)
    _largest_first(pipeline[-1])
    standardised, labels = pipeline[0].transform(features), pipeline[-1].labels_
    sample = np.random.default_rng(SEED).permutation(len(songs))[:SILHOUETTE_SAMPLE]
    log.info("clusters: evaluating on %s songs", f"{len(sample):,}", extra={"model": "clusters", "phase": "evaluating"})
    separable = 1 < len(np.unique(labels[sample])) < len(sample)
    metrics = {
        "silhouette": float(silhouette_score(standardised[sample], labels[sample])) if separable else None,
        "sizes": np.bincount(labels, minlength=n_clusters).tolist(),
        "profiles": _profiles(features, pipeline[-1].cluster_centers_, labels),
    }
    points = _plane(standardised[sample[:PLOT_POINTS]], labels[sample[:PLOT_POINTS]])
    labels = [profile["label"] for profile in metrics["profiles"]]
    return pipeline, metrics | {"plot": {"points": points, "labels": labels, "sizes": metrics["sizes"]}}


def train_energy(songs):
    """Predict energy (0 to 1) from the other features, the genre and the artist. Return (SongRegressor, metrics)."""
    return _train_regressor("energy", songs)


def train_popularity(songs):
    """Predict popularity (0 to 100) from sound, genre, album and artist. Return (SongRegressor, metrics)."""
    return _train_regressor("popularity", songs)


def _train_regressor(target: str, songs):
    """Return (SongRegressor, metrics) for the target column.

    Raises DataError where the column is constant. `r2`, `mae`, `rmse` are on held-out songs of known artists (mae and
    rmse in the target's own unit), `…_new_artists` on artists never seen, `baseline_mae` for predicting the mean.
    """
    from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error
    songs = _distinct(songs, target, MIN_SONGS)
    if songs[target].nunique() < 2:
        raise DataError(f"{target} is {songs[target].iloc[0]:g} for all {len(songs):,} songs; "
                        f"there is nothing to learn until the column varies")
    def answers(judged, learnt, held_out):
        mean = np.full(len(held_out), learnt[target].mean())
        return held_out[target].to_numpy(np.float64), judged.predict(held_out), mean
    known, new = _judge(target, lambda: SongRegressor(target), songs, answers)
    final = SongRegressor(target, AVERAGED if len(songs) < FEW_SONGS else 1).fit(songs, songs[target])
    figure = lambda metric, pair: float(metric(*pair)) if len(pair) and len(pair[0]) > 1 else None
    metrics = {
        "r2": figure(r2_score, known[:2]), "r2_new_artists": figure(r2_score, new[:2]),
        "mae": figure(mean_absolute_error, known[:2]), "mae_new_artists": figure(mean_absolute_error, new[:2]),
        "rmse": figure(root_mean_squared_error, known[:2]),
        "baseline_mae": figure(mean_absolute_error, known[::2]),
        "plot": _plot_regression(*known[:2]) if known else {},
    }
    return final, metrics | _fitted_on(target, final, songs)


def train_similar(songs):
    """Index songs by sound. Return (SimilarSongs, metrics).

    Of a seeded sample of songs, each with its ten neighbours: the share of neighbours of the song's own genre
    (`same_genre_at_10`) against what drawing songs at random would give (`same_genre_by_chance`), the share by the
    song's own artist, and milliseconds of processor time per query (`query_ms`).
    """
    songs = _distinct(songs, "similar", 2)
    log.info("similar: fitting on all %s songs", f"{len(songs):,}", extra={"model": "similar", "phase": "fitting"})
    index = SimilarSongs().fit(songs)
    if index.distinct_ < 2:
        raise DataError("similar needs at least 2 different recordings; the table has 1")
    sample = np.random.default_rng(SEED).permutation(len(songs))[:QUERY_SAMPLE]
    log.info("similar: evaluating on %s songs", f"{len(sample):,}", extra={"model": "similar", "phase": "evaluating"})
    start = time.thread_time()  # of this thread alone: the other models are computing at the same time
    answers = [index.neighbours(row)[0] for row in sample]
    query_ms = (time.thread_time() - start) / len(sample) * 1000
    genre, artist = songs["genre"].to_numpy(object), songs["artist_name"].to_numpy(object)
    same = lambda column: [column[answer] == column[row] for row, answer in zip(sample, answers)]
    by_chance = float((songs["genre"].value_counts(normalize=True) ** 2).sum())
    metrics = {
        "same_genre_at_10": _mean(np.concatenate(same(genre))), "same_genre_by_chance": by_chance,
        "same_artist_at_10": _mean(np.concatenate(same(artist))), "query_ms": query_ms,
        "plot": {"same_genre_at": [_mean([s[rank] for s in same(genre) if len(s) > rank]) for rank in range(10)],
                 "by_chance": by_chance},
    }
    return index, metrics


# The order is that of every table people see, and of submission: the longest fit first, so that no core waits for it.
MODELS = {"genre": train_genre, "clusters": train_clusters, "energy": train_energy,
          "popularity": train_popularity, "similar": train_similar}


def _mean(values):
    return float(np.mean(values)) if len(values) else None


def _largest_first(kmeans):
    """Renumber the clusters by size: k-means numbers them at random, and people remember numbers."""
    order = np.argsort(-np.bincount(kmeans.labels_, minlength=kmeans.n_clusters), kind="stable")
    kmeans.cluster_centers_ = kmeans.cluster_centers_[order]
    kmeans.labels_ = np.argsort(order)[kmeans.labels_].astype(kmeans.labels_.dtype)


WORDS = {"danceability": ("danceable", "hard to dance to"), "energy": ("energetic", "calm"), "loudness": ("loud", "quiet"),
         "speechiness": ("spoken", "sung"), "acousticness": ("acoustic", "electronic"),
         "instrumentalness": ("instrumental", "vocal"), "valence": ("happy", "sad")}


def _profiles(features, centers, labels):
    """Describe each cluster: its mean features, and the two in which it differs most from the average song."""
    profiles = []
    for cluster, center in enumerate(centers):
        extremes = np.argsort(-np.abs(center))[:2]
        label = ", ".join(WORDS[AUDIO[i]][int(center[i] < 0)] for i in extremes)
        means = features[labels == cluster].mean()
        profiles.append({"label": label, "means": {name: round(float(means[name]), 4) for name in AUDIO}})
    return profiles


def _plot_genres(actual, predicted):
    """Return what the picture shows of the genres: the confusions, the matrix where it is small, accuracy by genre."""
    import pandas as pd
    if not len(actual):
        return {}
    table = pd.crosstab(pd.Series(actual, name="actual"), pd.Series(predicted, name="predicted"))
    songs = table.sum(axis=1)
    pairs = table.stack().sort_values(ascending=False, kind="stable")
    confusions = [[a, p, int(n), float(n / songs[a])] for (a, p), n in pairs.items() if a != p and n][:25]
    labels = sorted(set(actual) | set(predicted))
    square = table.reindex(index=labels, columns=labels, fill_value=0)
    shares = square.div(square.sum(axis=1).clip(lower=1), axis=0).round(4)
    return {"confusions": confusions,
            "matrix": {"labels": labels, "rows": shares.to_numpy().tolist()} if len(labels) <= MATRIX_GENRES else None,
            "by_genre": [[g, int(songs[g]), float(table[g][g] / songs[g]) if g in table else 0.0] for g in songs.index]}


def _plane(standardised, labels):
    """Return songs on their first two principal components, each with its cluster: [[x, y, cluster], ...]."""
    from sklearn.decomposition import PCA
    if len(standardised) < 2:
        return []
    flat = PCA(2, random_state=SEED).fit_transform(standardised)
    return [[round(float(x), 3), round(float(y), 3), int(c)] for (x, y), c in zip(flat, labels)]


def _plot_regression(actual, predicted, bins=40):
    """Return a 2-D histogram: rows are bins of the actual value, columns bins of the predicted one."""
    low, high = float(actual.min()), float(actual.max())
    density, _, _ = np.histogram2d(actual, predicted.clip(low, high), bins=bins, range=[[low, high]] * 2)
    return {"edges": [low, high, bins], "density": density.astype(int).tolist()}


# ---------------------------------------------------------------------------------------------------------------------
# Similar songs
# ---------------------------------------------------------------------------------------------------------------------

class SimilarSongs:
    """Exact cosine neighbours of songs by sound.

    Every feature is made normal by its quantiles (they are skewed: half of all songs have an instrumentalness of 0)
    and every song a unit vector; on unit vectors the nearest by Euclid are the nearest by cosine, so a k-d tree
    (scipy.spatial.KDTree; Maneewongvatana and Mount, 1999) answers without a scan.
    """

    FEATURES = AUDIO + ("liveness", "tempo")
    LANDMARKS = 501
    EXTREME = 0.00135  # quantiles beyond three standard deviations are cut: an outlier shall not outweigh the rest

    def fit(self, songs):
        from scipy.spatial import KDTree
        self.features_ = [name for name in self.FEATURES if name in songs and songs[name].notna().any()]
        self.quantiles_ = np.nanquantile(songs[self.features_].to_numpy(np.float64), np.linspace(0, 1, self.LANDMARKS), axis=0)
        self.tree_ = KDTree(self.transform(songs))
        self.recording_ = recordings(songs).astype(np.int32)
        self.distinct_ = int(self.recording_.max()) + 1
        # Arrays of objects: joblib hands them to the C pickler whole, lists it walks through in Python.
        self.track_ids_, self.titles_, self.artists_ = (
            songs[name].to_numpy(object) for name in ("track_id", "track_name", "artist_name"))
        return self

    def transform(self, songs) -> np.ndarray:
        """Return unit vectors, one row per song; a missing feature counts as the median."""
        vectors = np.nan_to_num(self.normal(songs))
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(1e-12)

    def normal(self, songs) -> np.ndarray:
        """Return the features as standard normal quantiles, one row per song; missing is NaN."""
        from scipy.special import ndtri
        normal = ndtri(np.linspace(0, 1, self.LANDMARKS).clip(self.EXTREME, 1 - self.EXTREME))
        vectors = np.empty((len(songs), len(self.features_)))
        for column, (name, landmarks) in enumerate(zip(self.features_, self.quantiles_.T)):
            values = songs[name].to_numpy(np.float64)
            # From both sides, as scikit-learn's QuantileTransformer does: among ties the middle of their quantiles.
            vectors[:, column] = (np.interp(values, landmarks, normal)
                                  - np.interp(-values, -landmarks[::-1], -normal[::-1])) / 2
        return vectors

    def neighbours(self, row: int, k: int = 10):
        """Return (rows, cosines) of the k songs most like the song in that row, the most similar first.

        Never the song itself nor another copy of its recording, and no recording twice; fewer than k where the table
        has no more.
        """
        songs, wanted = len(self.track_ids_), 2 * k + 2
        while True:
            distances, rows = self.tree_.query(self.tree_.data[row], k=min(wanted, songs))
            _, first = np.unique(self.recording_[rows], return_index=True)
            first = np.sort(first)
            first = first[self.recording_[rows[first]] != self.recording_[row]][:k]
            if len(first) == k or wanted >= songs:
                return rows[first], 1 - distances[first] ** 2 / 2
            wanted *= 4

    def find(self, text: str, artist: str | None = None) -> list[int]:
        """Return one row per recording with that track_id, or else with that title (case-folded), by that artist."""
        if (same := np.flatnonzero(self.track_ids_ == text)).size:
            return [int(same[0])]
        title, artist = text.casefold(), artist and artist.casefold()
        rows = [row for row, name in enumerate(self.titles_) if name.casefold() == title
                and (not artist or artist in self.artists_[row].casefold())]
        return list({self.recording_[row]: row for row in reversed(rows)}.values())[::-1]

    def suggestions(self, text: str) -> list[str]:
        """Return up to five titles spelt like the text."""
        import difflib
        text = text.casefold()
        parts = {text[i:i + 3] for i in range(max(1, len(text) - 2))}
        titles = {name.casefold(): name for name in self.titles_}
        alike = sorted(titles, key=lambda title: (-sum(part in title for part in parts), len(title)))[:300]
        return [titles[match] for match in difflib.get_close_matches(text, alike, n=5, cutoff=0.5)]


# ---------------------------------------------------------------------------------------------------------------------
# Saving and loading: models/NAME.joblib, models/metrics/NAME.json, models/versions/
# ---------------------------------------------------------------------------------------------------------------------

class Locked(Exception):
    """A run holds the models directory."""


_locks = set()  # models directories this process holds: the command line takes the lock long before the flow asks for it


@contextmanager
def one_run_at_a_time(folder: Path):
    """Hold MODELS_DIR/.lock. Raises Locked, saying who holds it since when. The kernel frees it when the holder dies."""
    if folder in _locks:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a+")
    except OSError as error:
        raise DataError(f"cannot write to the models directory {folder} ({error.strerror}); choose another: "
                        f"--models-dir DIR") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.1)  # whoever took it a moment ago is about to write who he is
            file.seek(0)
            raise Locked(f"another run is training into {folder} ({file.read().strip()}); nothing was done") from None
        with suppress(OSError):  # a full disk: the lock holds all the same
            file.truncate(0)
            file.write(f"process {os.getpid()} since {datetime.now(timezone.utc):%Y-%m-%d %H:%M:%S} UTC\n")
            file.flush()
        _locks.add(folder)
        try:
            yield
        finally:
            _locks.remove(folder)


def write_atomically(path: Path, write) -> None:
    """Call write(file) on a temporary file beside path and put it in path's place once it is safely on the disk."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with naming(path), open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def naming(path: Path):
    """Let an OSError say which file it is about: a full disk does not."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def _write_json(path: Path, content) -> None:
    write_atomically(path, lambda file: file.write(json.dumps(content, indent=1, allow_nan=False).encode()))


def _paths(name, models_dir):
    models_dir = Path(models_dir)
    return models_dir / f"{name}.joblib", models_dir / "metrics" / f"{name}.json"


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_report(name: str, models_dir=MODELS_DIR, digest: str | None = None) -> dict | None:
    """Return what stands in metrics/NAME.json, or None.

    A run killed between the two renames of `publish` leaves the new model with the old metrics, and the new metrics
    beside them under the name .NAME.json.next: with the model's digest given, the one that belongs to it is returned.
    """
    path = _paths(name, models_dir)[1]
    reports = []
    for candidate in (path.with_name(f".{path.name}.next"), path):
        try:
            reports.append(json.loads(candidate.read_text()))
        except (FileNotFoundError, json.JSONDecodeError):
            continue
        if reports[-1].get("sha256") == digest:
            return reports[-1]
    return reports[-1] if reports and path.exists() else None


def load_model(name: str, models_dir=MODELS_DIR) -> dict:
    """Return the saved dict of a model: `estimator`, `metrics` and all that stands in its metrics file.

    The file's SHA-256 is compared with the metrics file before anything is unpickled. Raises ModelError.
    """
    import joblib
    path, metrics_path = _paths(name, models_dir)
    again = f"train it: python train.py --only {name}"
    if not path.exists():
        raise ModelError(f"there is no {name} model in {models_dir}; {again}")
    digest = _sha256(path)
    report = read_report(name, models_dir, digest)
    if not report:
        raise ModelError(f"{metrics_path} is missing or damaged, so {path} cannot be trusted; {again}")
    if report.get("sha256") != digest:
        raise ModelError(f"{path} is damaged or was changed: its SHA-256 is not the one in {metrics_path}; put the "
                         f"previous version back: python models.py rollback {name}, or {again}")
    for package, version in library_versions("scikit-learn").items():
        if report["versions"].get(package) != version:
            log.warning("%s was trained with %s %s and is loaded with %s; if it misbehaves, %s",
                        name, package, report["versions"].get(package), version, again)
    return joblib.load(path)


def library_versions(*packages) -> dict:
    """Return the installed version of each package, None where it is not installed."""
    from importlib.metadata import PackageNotFoundError, version
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def publish(name: str, estimator, metrics: dict, about: dict, models_dir=MODELS_DIR, force: bool = False) -> dict:
    """Save a trained model and its metrics in place of the current ones, which become a version; return the report.

    `about` says how it was trained: `run`, `settings` and what else shall stand in the metrics file.

    A model whose primary metric is worse than the current one's by more than 5 % of it, and by more than 0.01, is
    held back: it is kept in versions/ and the current one stays. The first model, one trained with other settings and
    `force` are never held back. Killed at any moment, this leaves either the old model or the new one, whole.
    Raises OSError where the disk is full or not writable; the current model is then untouched.
    """
    import joblib
    path, metrics_path = _paths(name, models_dir)
    versions = Path(models_dir) / "versions"
    for folder in (metrics_path.parent, versions):
        folder.mkdir(parents=True, exist_ok=True)
    current = read_report(name, models_dir, _sha256(path)) if path.exists() else None
    intact = bool(current) and current["sha256"] == _sha256(path)
    report = {"model": name, "metrics": {key: value for key, value in metrics.items() if key != "plot"}, **about,
              "trained_at": datetime.now(timezone.utc).isoformat(), "seed": SEED, "features": feature_names(estimator),
              "versions": {"python": platform.python_version(), **library_versions("scikit-learn", "pandas", "numpy", "prefect")},
              "plot": metrics.get("plot", {})}
    reason = _worse(report, current) if intact and not force else None
    metric = next(iter(report["metrics"]))
    report |= {"status": "held_back" if reason else "trained", "error": reason,
               "previous": current["metrics"].get(metric) if intact else None}
    try:
        staged = path.with_name(f".{path.name}.staged")
        write_atomically(staged, lambda file: joblib.dump({**report, "estimator": estimator}, file))
        report |= {"sha256": _sha256(staged), "bytes": staged.stat().st_size}
        if reason:
            _keep_version(name, staged, report, versions)
            staged.unlink()
        else:
            if intact:
                _keep_version(name, path, current, versions)
            _swap_in(staged, report, path, metrics_path)
    finally:
        staged.unlink(missing_ok=True)
    _prune(name, versions)
    return report


def feature_names(estimator) -> list[str]:
    """Return the names of the columns an estimator uses."""
    return [str(name) for name in getattr(estimator, "features_", getattr(estimator, "feature_names_in_", ()))]


def _swap_in(model: Path, report: dict, path: Path, metrics_path: Path) -> None:
    """Move a model file to path and write its metrics, so that whoever dies in between leaves the two in step."""
    following = metrics_path.with_name(f".{metrics_path.name}.next")
    _write_json(following, report)
    os.replace(model, path)
    os.replace(following, metrics_path)


def _worse(report: dict, current: dict) -> str | None:
    """Return why the gate holds a model back, None where it passes."""
    metric, value = next(iter(report["metrics"].items()))
    before = current["metrics"].get(metric)
    if report["settings"] != current["settings"] or before is None:
        return None
    if value is not None and value >= before - max(GATE_RELATIVE * abs(before), GATE_ABSOLUTE):
        return None
    return (f"held back: {metric} {'could not be measured' if value is None else f'fell to {value:.4f}'}, the current "
            f"model has {before:.4f}; to publish all the same: python train.py --only {report['model']} --force")


def _stamp(report: dict) -> str:
    return datetime.fromisoformat(report["trained_at"]).strftime("%Y%m%dT%H%M%S.%f")


def _keep_version(name: str, model: Path, report: dict, versions: Path) -> None:
    """Give a model file a second name in versions/, with its metrics beside it."""
    target = versions / f"{name}-{_stamp(report)}.joblib"
    if not target.exists():
        os.link(model, target)
    _write_json(target.with_suffix(".json"), report)


def list_versions(name: str, models_dir=MODELS_DIR) -> list[tuple[Path, dict]]:
    """Return (model path, report) of the versions kept of a model, the newest first."""
    versions = sorted((Path(models_dir) / "versions").glob(f"{name}-*.json"), reverse=True)
    return [(path.with_suffix(".joblib"), json.loads(path.read_text())) for path in versions]


def _prune(name: str, versions: Path) -> None:
    """Keep five versions, of which at most one that was not good enough: bad nights shall not push out good ones."""
    good, bad = [], []
    for path, report in list_versions(name, versions.parent):
        (good if report["status"] == "trained" else bad).append(path)
    for path in good[KEEP_VERSIONS - len(bad[:1]):] + bad[1:]:
        path.unlink(missing_ok=True)
        path.with_suffix(".json").unlink(missing_ok=True)


def rollback(name: str, models_dir=MODELS_DIR) -> dict:
    """Put the previous version of a model back, its metrics with it; return its report. Raises ModelError.

    The model taken back stays in versions/ as "rolled_back" and is not gone back to again.
    """
    path, metrics_path = _paths(name, models_dir)
    digest = _sha256(path) if path.exists() else None
    current = read_report(name, models_dir, digest)
    earlier = [(model, report) for model, report in list_versions(name, models_dir) if report["status"] == "trained"
               and model.exists() and (not current or _stamp(report) < _stamp(current))]
    if not earlier:
        raise ModelError(f"there is no earlier version of {name} in {Path(models_dir) / 'versions'} to go back to")
    model, report = earlier[0]
    if current and current["sha256"] == digest:
        _keep_version(name, path, {**current, "status": "rolled_back"}, model.parent)
    _swap_in(model, report, path, metrics_path)
    model.with_suffix(".json").unlink()
    return report


def recover(models_dir=MODELS_DIR) -> None:
    """Finish what a killed run had begun: bring model and metrics into step, remove its temporary files."""
    models_dir = Path(models_dir)
    for name in MODELS:
        path, metrics_path = _paths(name, models_dir)
        following = metrics_path.with_name(f".{metrics_path.name}.next")
        if following.exists():
            report = read_report(name, models_dir, _sha256(path) if path.exists() else None)
            if report and path.exists() and report["sha256"] == _sha256(path):
                _write_json(metrics_path, report)
            following.unlink()
    for leftover in [*models_dir.glob(".*.tmp"), *models_dir.glob(".*.staged"), *models_dir.glob("*/.*.tmp")]:
        leftover.unlink()
    for version in (models_dir / "versions").glob("*"):
        if not version.with_suffix(".json" if version.suffix == ".joblib" else ".joblib").exists():
            version.unlink()


# ---------------------------------------------------------------------------------------------------------------------
# What is written down beside the models: history and data
# ---------------------------------------------------------------------------------------------------------------------

def append_history(models_dir, lines: list[dict]) -> None:
    """Append lines to metrics/history.jsonl, one JSON object each."""
    path = Path(models_dir) / "metrics" / "history.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    torn = path.exists() and path.stat().st_size and path.read_bytes()[-1:] != b"\n"
    with naming(path), open(path, "ab") as file:
        file.write(b"\n" * bool(torn) + "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines).encode())


def read_history(models_dir=MODELS_DIR) -> list[dict]:
    """Return the lines of metrics/history.jsonl, the oldest first, without lines a full disk cut short."""
    path, lines = Path(models_dir) / "metrics" / "history.jsonl", []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


def owed(models_dir=MODELS_DIR) -> list[str]:
    """Return the models whose last run failed, was held back or was killed, and those that have no file."""
    last = {}
    for line in read_history(models_dir):
        last[line["model"]] = line
    done = lambda name: name in last and (
        last[name]["status"] == "trained" or (read_report(name, models_dir) or {}).get("run") == last[name]["run"])
    return [name for name in MODELS if not (done(name) and _paths(name, models_dir)[0].exists())]


def describe(songs) -> dict:
    """Return what a later run compares its songs with: rows, share of each genre, mean and deviation of each feature."""
    import pandas as pd
    known = [name for name in (*AUDIO, "popularity", *MORE_AUDIO) if name in songs and songs[name].notna().any()]
    hashes = pd.util.hash_pandas_object(songs, index=False).to_numpy()
    return {"rows": len(songs), "fingerprint": hashlib.sha256(hashes.tobytes()).hexdigest(),
            "genres": {g: float(share) for g, share in songs["genre"].value_counts(normalize=True).head(500).items()},
            "means": {name: float(songs[name].astype(np.float64).mean()) for name in known},
            "deviations": {name: float(songs[name].astype(np.float64).std(ddof=0)) for name in known}}


def drift(now: dict, before: dict) -> list[str]:
    """Compare two descriptions of the songs; return a sentence for everything that moved a lot."""
    found = []
    if not 1 - DRIFT_ROWS <= now["rows"] / before["rows"] <= 1 / (1 - DRIFT_ROWS):
        found.append(f"the table has {now['rows']:,} songs; at the last training it had {before['rows']:,}")
    for genre in sorted(now["genres"].keys() | before["genres"].keys()):
        share, was = now["genres"].get(genre, 0.0), before["genres"].get(genre, 0.0)
        if abs(share - was) >= DRIFT_SHARE and max(share, was) >= DRIFT_RATIO * min(share, was):
            found.append(f"genre {genre} makes up {share:.1%} of the songs; it was {was:.1%}")
    for name in sorted(now["means"].keys() & before["means"].keys()):
        mean, was, deviation = now["means"][name], before["means"][name], before["deviations"][name]
        if abs(mean - was) > DRIFT_DEVIATIONS * max(deviation, 1e-9):
            found.append(f"mean {name} is {mean:.4g}; it was {was:.4g} (standard deviation {deviation:.3g})")
    return found


def drift_since(now: dict, table: str, models_dir=MODELS_DIR) -> list[str]:
    """Compare the songs with those of the model trained last on the same table."""
    reports = [report for name in MODELS if (report := read_report(name, models_dir)) and report.get("table") == table]
    return drift(now, max(reports, key=_stamp)["data"]) if reports else []


# ---------------------------------------------------------------------------------------------------------------------
# Predicting
# ---------------------------------------------------------------------------------------------------------------------

def read_text(path):
    """Return a CSV as text, every cell as it stands there. Raises DataError."""
    import pandas as pd
    try:
        return pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}") from None


def song_columns(rows) -> dict:
    """Return our name -> the table's own name for every song column it has, by name or by alias."""
    named = {db.ALIASES.get(column.strip().lower()): column for column in rows.columns[::-1]}
    named |= {column.strip().lower(): column for column in rows.columns[::-1]}
    return {name: named[name] for name in (*db.REQUIRED, *db.OPTIONAL) if name in named}


def songs_from_text(rows):
    """Return the song columns of a table of text: names by db.ALIASES, numbers as float32; what is no number is NaN."""
    import pandas as pd
    songs = pd.DataFrame(index=rows.index)
    columns = song_columns(rows)
    for name in (*db.REQUIRED, *db.OPTIONAL):
        if name not in columns:
            songs[name] = "" if name in db.TEXT else np.float32(np.nan)
        elif name in db.TEXT:
            songs[name] = rows[columns[name]]
        else:
            text = rows[columns[name]].str.strip().str.lower()
            text = text.replace({"true": "1", "t": "1", "false": "0", "f": "0"}) if name == "explicit" else text
            text = text.str[:4] if name == "year" else text
            songs[name] = pd.to_numeric(text, errors="coerce").astype(np.float32)
    return songs.replace([np.inf, -np.inf], np.nan)


def predict(songs, models_dir=MODELS_DIR):
    """Return (predictions, notes) for raw songs, as songs_from_text gives them; one row per song, in their order.

    Columns: genre_predicted, genre_confidence (probability), cluster, energy_predicted, popularity_predicted; those of
    a model that cannot be loaded are left out and the notes say why. A missing feature is treated as missing, a
    missing genre as the predicted one, a song with a missing feature is in no cluster.
    """
    import pandas as pd
    added, notes, loaded = pd.DataFrame(index=songs.index), [], {}
    for name in ("genre", "clusters", "energy", "popularity"):
        try:
            loaded[name] = load_model(name, models_dir)["estimator"]
        except ModelError as error:
            notes.append(f"{name} skipped: {error}")
    if "genre" in loaded:
        probabilities = loaded["genre"].predict_proba(songs)
        added["genre_predicted"] = loaded["genre"].classes_[probabilities.argmax(axis=1)]
        added["genre_confidence"] = probabilities.max(axis=1).round(4)
        songs = songs.assign(genre=songs["genre"].where(songs["genre"] != "", added["genre_predicted"]))
    if "clusters" in loaded:
        features = songs[list(AUDIO)].astype(np.float64)
        whole = features.notna().all(axis=1)
        added["cluster"] = pd.array([pd.NA] * len(songs), dtype="Int64")
        if whole.any():
            added.loc[whole, "cluster"] = loaded["clusters"].predict(features[whole])
    for name in ("energy", "popularity"):
        if name in loaded:
            added[f"{name}_predicted"] = loaded[name].predict(songs).round(4)
    return added, notes


# ---------------------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------------------

def _age(when: str) -> str:
    seconds = (datetime.now(timezone.utc) - datetime.fromisoformat(when)).total_seconds()
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= length:
            count = int(seconds // length)
            return f"{count} {unit}{'s' * (count > 1)} ago"
    return "just now"


def show(options) -> int:
    """Print the current models; 0 if every one of them can be loaded, 2 if none is there."""
    import notify
    rows, reports, trouble = [], {}, []
    for name in MODELS:
        path, _ = _paths(name, options.models_dir)
        report = read_report(name, options.models_dir, _sha256(path) if path.exists() else None)
        if not path.exists() or not report or report["sha256"] != _sha256(path):
            trouble.append(name)
            rows.append((name, "not trained" if not path.exists() else "damaged", "", "", "", "", ""))
            continue
        versions = len(list_versions(name, options.models_dir))
        reports[name] = {key: value for key, value in report.items() if key not in ("plot", "data")} | {"versions_kept": versions}
        rows.append((name, *notify.metric_and_change(report), f"{report['rows']:,}", _age(report["trained_at"]),
                     notify.size(report["bytes"]), versions))
    if options.json:
        print(json.dumps(reports, indent=1))
    else:
        notify.print_table(("model", "metric", "change>", "songs>", "trained", "size>", "older>"), rows,
                           above=[(f"Models in {options.models_dir}", "bold")])
    return 2 if len(trouble) == len(MODELS) else 0


def similar(options) -> int:
    """Print the songs most like one song."""
    import notify
    index = load_model("similar", options.models_dir)["estimator"]
    rows = index.find(options.song, options.artist)
    song = lambda row: {"track_id": index.track_ids_[row], "track_name": index.titles_[row], "artist_name": index.artists_[row]}
    if not rows:
        near = "".join(f"\n  {title}" for title in index.suggestions(options.song))
        by = f" by {options.artist}" if options.artist else ""
        raise ModelError(f'no song is called "{options.song}"{by}' + (f"; did you mean:{near}" if near else ""))
    if len(rows) > 1:
        choices = "".join(f"\n  {index.track_ids_[row]}  {index.artists_[row]}" for row in rows[:20])
        choices += f"\n  and {len(rows) - 20} more" * (len(rows) > 20)
        raise ModelError(f'{len(rows)} songs are called "{options.song}"; say which, --artist NAME or a track_id:{choices}')
    found, cosines = index.neighbours(rows[0], options.k)
    answers = [song(row) | {"similarity": round(float(cosine), 4)} for row, cosine in zip(found, cosines)]
    if options.json:
        print(json.dumps({"song": song(rows[0]), "similar": answers}, indent=1, ensure_ascii=False))
    else:
        notify.print_table(
            ("alike>", "title", "artist", "track_id"),
            [(f"{a['similarity']:.3f}", a["track_name"], a["artist_name"], a["track_id"]) for a in answers],
            above=[(f"Like {index.titles_[rows[0]]} by {index.artists_[rows[0]]}", "bold")])
    return 0


def predict_csv(options) -> int:
    """Write the rows of a CSV with the predictions added, or print the first of them."""
    import notify
    rows = read_text(options.csv)
    songs = songs_from_text(rows)
    for name in db.REQUIRED:
        if name not in song_columns(rows):
            log.warning("%s has no column %s; it is treated as missing", options.csv, name)
    added, notes = predict(songs, options.models_dir)
    for note in notes:
        log.warning("%s", note)
    if added.empty and not len(added.columns):
        raise ModelError(f"none of the models in {options.models_dir} can predict; train them: python train.py")
    whole = rows.assign(**{name: added[name] for name in added})
    if options.out:
        write_atomically(Path(options.out), lambda file: whole.to_csv(file, index=False))
        log.info("%s songs with %s written to %s", f"{len(whole):,}", ", ".join(added), options.out)
    elif options.json:
        print(whole.to_json(orient="records", lines=True, force_ascii=False), end="")
    else:
        shown = songs[["track_name", "artist_name"]].join(added).head(20)
        names = {"track_name": "title", "artist_name": "artist", "genre_predicted": "genre", "genre_confidence": "sure>"}
        columns = [names.get(name, name.removesuffix("_predicted") + ">") for name in shown]
        rows = [[f"{cell:.2f}" if isinstance(cell, float) else cell for cell in row]
                for row in shown.itertuples(index=False)]
        notify.print_table(columns, rows, above=[(f"{len(whole):,} songs; --out FILE writes them all", "bold")])
    return 0


def roll_back(options) -> int:
    """Put the previous version of a model back."""
    folder = Path(options.models_dir).resolve()
    if not folder.is_dir():
        raise ModelError(f"there is no folder {folder}; say where the models are: --models-dir DIR")
    with one_run_at_a_time(folder):
        report = rollback(options.model, folder)
    metric, value = next(iter(report["metrics"].items()))
    print(f"{options.model} is again the version trained {report['trained_at']} ({metric} {value})")
    return 0


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(prog="models.py", description="Look at the trained models and use them.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--models-dir", default=str(MODELS_DIR), help="folder of the models (default: %(default)s)")
    machine = argparse.ArgumentParser(add_help=False)
    machine.add_argument("--json", action="store_true", help="print JSON instead of a table")
    command = commands.add_parser("show", parents=[common, machine], help="the current models: metrics, age, versions kept")
    command.set_defaults(run=show)
    command = commands.add_parser("similar", parents=[common, machine], help="the songs most like one song")
    command.add_argument("song", help="its title or track_id")
    command.add_argument("-k", type=int, default=10, help="how many (default: %(default)s)")
    command.add_argument("--artist", help="which of several songs of one title")
    command.set_defaults(run=similar)
    command = commands.add_parser("predict", parents=[common, machine], help="add the predictions to the rows of a CSV")
    command.add_argument("csv", help="songs, with the column names of the table or their aliases")
    command.add_argument("--out", help="the CSV to write (default: print the first 20)")
    command.set_defaults(run=predict_csv)
    command = commands.add_parser("rollback", parents=[common], help="put the previous version of a model back")
    command.add_argument("model", choices=list(MODELS))
    command.set_defaults(run=roll_back)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        return options.run(options)
    except (DataError, ModelError, Locked, OSError) as error:
        print(db.redact(str(error)), file=sys.stderr)
        return 75 if isinstance(error, Locked) else 2


if __name__ == "__main__":
    sys.exit(main())
