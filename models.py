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
import re
import shutil
import sys
import time
from collections import Counter
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import lru_cache, partial
from importlib import metadata
from itertools import chain, repeat
from pathlib import Path

import numpy as np

import db
from db import MIN_GENRE_SONGS, MIN_SONGS, DataError, naming, write_atomically

log = logging.getLogger("models")

ROOT = Path(__file__).resolve().parent
MODELS_DIR = ROOT / "models"
SEED = 20  # of every random choice: the same table gives the same models and the same metrics

# What a song sounds like: seven features every table has, and those some have.
AUDIO = (
    "danceability",
    "energy",
    "loudness",
    "speechiness",
    "acousticness",
    "instrumentalness",
    "valence",
)
MORE_AUDIO = (
    "liveness",
    "tempo",
    "key",
    "mode",
    "duration_ms",
    "time_signature",
    "explicit",
    "year",
)

NEW_ARTISTS = 0.10  # share of the artists held out whole
KNOWN_SONGS = 0.12  # share of the other artists' songs held out
FEW_SONGS = 50_000  # of fewer, what is held out of one split leaves much to chance ...
SPLITS = 3  # ... so a model is judged on so many,
AVERAGED = 3  # and a regressor that is saved averages so many fits (each that is judged is one, and a little worse)
SPACE_NEEDED = 100 << 20  # bytes free for a night: five models, their versions and a picture

# The gate: a retrained model may be this much worse than the current one and still take its place.
GATE_RELATIVE = 0.05
GATE_ABSOLUTE = 0.01
KEEP_VERSIONS = 5

# Drift: what moved more than this since the last training is worth a warning.
DRIFT_ROWS = 0.2  # share of the rows gone (or come, in proportion)
DRIFT_SHARE = 0.005  # change of a genre's share of all songs ...
DRIFT_RATIO = 1.5  # ... where the share also changed by this factor
DRIFT_DEVIATIONS = 0.25  # change of a feature's mean, in standard deviations

SILHOUETTE_SAMPLE = 3000  # songs: the silhouette compares each with every other
PREDICTED_AT_ONCE = 10_000  # songs of a table
QUERY_SAMPLE = 1000  # songs whose neighbours are looked at for the metrics of `similar`
PLOT_POINTS = 2000
CONFUSIONS = 25  # pairs of genres kept with the metrics


class ModelError(db.Expected):
    """A model file that is missing, damaged, or does not belong to its metrics; the text names the fix."""


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation: which songs a model is judged by
# ---------------------------------------------------------------------------------------------------------------------


def recordings(songs):
    """Return an integer per song, the same for two songs of the same artist and title (case-folded): one recording."""
    import pandas as pd

    names = songs["artist_name"].astype(object) + "\0" + songs["track_name"].astype(object)
    return pd.factorize(names.str.casefold())[0]


def _first_by_hash(values, share, key):
    """Return True for every row whose value is among the `share` of the distinct values whose hashes come first."""
    import pandas as pd

    hashes = pd.util.hash_array(values.to_numpy(object), hash_key=f"{key:16.16}")
    distinct, rank = np.unique(hashes, return_inverse=True)
    return rank < int(len(distinct) * share)


def holdout(songs, split=0):
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


def _say(name, phase, count):
    log.info("%s: %s on %s songs", name, phase, f"{count:,}", extra={"model": name, "phase": phase})


def _judge_and_fit(name, make, final, songs, answers):
    """Return (known, new): what the songs held out were answered with; fit `final` on all songs.

    `name` is the model and the column it predicts; `make() -> estimator` is fitted for each split, `final` in the end;
    `answers(estimator, learnt, held_out)` returns arrays, the actual values first, one value per held-out song. Those
    of all splits are put end to end; () where nothing was held out.
    """
    found = [], []
    for split in range(SPLITS if len(songs) < FEW_SONGS else 1):
        train, *held_out = holdout(songs, split)
        _say(name, "evaluating", (~train).sum())
        judged = make().fit(songs[train], songs.loc[train, name])
        for part, mask in zip(found, held_out):
            if mask.any():
                part.append(answers(judged, songs[train], songs[mask]))
    _say(name, "fitting", len(songs))
    final.fit(songs, songs[name])
    if final.fitted_on_ < len(songs):
        log.info(
            "%s: fitted on a sample of %s songs; artists are counted over all",
            name,
            f"{final.fitted_on_:,}",
        )
    return [tuple(map(np.concatenate, zip(*part))) for part in found]


def _figure(metric, answers, at=1):
    """Return the metric of the actual values and those in answers[at]; None where fewer than two songs were held out."""
    return float(metric(answers[0], answers[at])) if answers and len(answers[0]) > 1 else None


def _usable(songs, name, at_least):
    """Return the songs that have what the model of that name predicts, without repeated track_ids; DataError if too few."""
    if name in db.REQUIRED:
        if name not in songs:
            raise DataError(f"{name} needs the column {name}, which the table lacks")
        known = songs[name].notna() & (songs[name] != "")
        songs = songs if known.all() else songs[known].reset_index(drop=True)
    if not songs[
        "track_id"
    ].is_unique:  # else no copy: five of a large table are more than the table itself
        songs = songs.drop_duplicates("track_id", keep="last", ignore_index=True)
    if len(songs) < at_least:
        raise DataError(f"{name} needs at least {at_least} songs; the table has {len(songs)}")
    return songs


# ---------------------------------------------------------------------------------------------------------------------
# One idea, applied three times: what a song sounds like, plus what is known of the songs it shares a name with
# ---------------------------------------------------------------------------------------------------------------------

NUMBERS = ("popularity", *AUDIO, *MORE_AUDIO)
WORD = re.compile(
    r"[^\W\u0370-\uffff]+|[^\W\u0000-\u036f]"
)  # a word in Latin letters, or one character of another script
BRACKET = re.compile(r"[(\[\-]")
FEATURED = re.compile(
    r"[(\[\-]\s*(?:feat\.?|ft\.?|featuring|with)\s+([^()\[\]]+)"  # "Title (feat. B & C)"
    r"|[(\[\-]\s*([^()\[\]\-]+?)(?:'s)?\s+(?:[a-z]+\s+)?(?:remix|edit|mix)"
)  # "Title - B Club Remix"


TEXTS_KEPT = (
    1 << 18
)  # two models split the same texts, each twice: for its evaluation and for the model that is saved


@lru_cache(TEXTS_KEPT)
def credits(artist_name):
    """Return the credited artists: "A;B" is A and B."""
    return [name.strip() for name in artist_name.casefold().split(";")]


def featured(track_name):
    """Return the artists a title names: B and C of "Title (feat. B & C)"."""
    if not BRACKET.search(track_name):
        return []
    found = chain.from_iterable(FEATURED.findall(track_name.casefold()))
    return [name.strip() for name in re.split(r",|&| and | x ", ",".join(found)) if name.strip()]


@lru_cache(TEXTS_KEPT)
def words(text):
    """Return the words of a title: "remix" or "christmas" tells something even of an artist never seen."""
    return WORD.findall(text.casefold())


def whole(text):
    return [text.casefold()] if text else []


def column(songs, name):
    """Return the Series of that name, all missing where the table has none."""
    import pandas as pd

    return songs[name] if name in songs else pd.Series(np.nan, index=songs.index, dtype=object)


def genres(songs):
    """Return the Series of genres, missing where there is none."""
    genre = column(songs, "genre")
    return genre.where(genre != "")


def present(songs, names):
    """Return those of the columns that have any values."""
    return [name for name in names if name in songs and songs[name].notna().any()]


def incidence(names, split, levels=None):
    """Return (matrix, levels): a sparse 0/1 matrix, songs x levels, 1 where a key of the name is the level's.

    `names` is a Series of text, NaN allowed; `split(text) -> keys`; `levels` maps each key to its column, and is made
    from the names where it is not given. Keys that have no level are left out.
    """
    import pandas as pd
    from scipy.sparse import csr_array

    codes, uniques = pd.factorize(names)  # -1: no name
    found = [split(name) for name in np.asarray(uniques, dtype=object)] + [()]
    if levels is None:
        levels = {
            key: column for column, key in enumerate(dict.fromkeys(chain.from_iterable(found)))
        }
    columns = np.fromiter(map(levels.get, chain.from_iterable(found), repeat(-1)), np.int32)
    rows = np.repeat(np.arange(len(found)), [*map(len, found)])[columns >= 0]
    columns = columns[columns >= 0]
    table = csr_array(
        (np.ones(len(rows), np.float32), (rows, columns)), shape=(len(found), len(levels))
    )
    table.data[:] = 1  # also of a key that stands twice in a name
    return table[codes], levels


# ---------------------------------------------------------------------------------------------------------------------
# Genre
# ---------------------------------------------------------------------------------------------------------------------


def in_parts(songs, rows, function):
    """Return function(songs) put together from that many songs at a time: what it needs on the way is large."""
    return np.concatenate(
        [function(songs.iloc[i : i + rows]) for i in range(0, max(len(songs), 1), rows)]
    )


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
    EFFECT_WEIGHT = 0.8  # below 1, because the words already tell part of what the artist tells
    BINS = 16
    MIN_NAMES = (
        3  # a word must occur in so many different names: rarer ones are identities, not words
    )
    BASE_SONGS = (
        300_000  # songs the network sees (a seeded sample); artists are counted over all songs
    )
    HIDDEN, EPOCHS, MAX_BATCH, RATE, WORD_RATE, DROPOUT, WORD_DROPOUT = (
        128,
        6,
        512,
        0.004,
        0.05,
        0.2,
        0.5,
    )
    CHUNK = 20_000  # songs predicted at a time

    def fit(self, songs, genre):
        """`songs` is a DataFrame, one row per song; `genre` its genres as text."""
        rng = np.random.default_rng(SEED)
        self.classes_, y = np.unique(
            np.asarray(genre, dtype=object).astype(str), return_inverse=True
        )
        self.prior_ = ((np.bincount(y) + 1) / (len(y) + len(self.classes_))).astype(np.float32)
        self._fit_effect(songs, y)
        if len(y) > self.BASE_SONGS:
            sample = np.sort(rng.choice(len(y), self.BASE_SONGS, replace=False))
            songs, y = songs.iloc[sample], y[sample]
        self.fitted_on_ = len(y)
        self._fit_encoding(songs)
        self._fit_network(*self._encode(songs), y, rng)
        return self

    def predict_proba(self, songs):
        """Return P(genre), float32, songs x classes_."""
        return in_parts(
            songs,
            self.CHUNK,
            lambda part: softmax(self.sound(part) + self.EFFECT_WEIGHT * self.effect(part)),
        )

    def predict(self, songs):
        return self.classes_[self.predict_proba(songs).argmax(axis=1)]

    def _fit_effect(self, songs, y):
        from scipy.sparse import eye_array

        one_hot = eye_array(len(self.classes_), dtype=np.float32, format="csr")[y]
        names = (
            incidence(songs["artist_name"], credits)[1]
            | incidence(songs["track_name"], featured)[1]
        )
        self.artists_ = {name: at for at, name in enumerate(names)}
        self.exact_ = incidence(songs["artist_name"], whole)[1]
        self.counts_ = [(matrix.T @ one_hot).tocsr() for matrix in self._levels(songs)]

    def _levels(self, songs):
        """Return two incidence matrices: songs x artists credited or featured, songs x exact credits."""
        artist, title = column(songs, "artist_name"), column(songs, "track_name")
        named = incidence(artist, credits, self.artists_)[0].maximum(
            incidence(title, featured, self.artists_)[0]
        )
        return named, incidence(artist, whole, self.exact_)[0]

    def effect(self, songs):
        """Return log P(genre | artists) - log P(genre), songs x genres: exactly 0 where no artist was seen in training."""
        p = self.prior_[None, :]
        for matrix, counts, strength in zip(
            self._levels(songs), self.counts_, (self.ARTIST_SONGS, self.CREDIT_SONGS)
        ):
            seen = (matrix @ counts).toarray()
            p = (seen + strength * p) / (seen.sum(axis=1, keepdims=True) + strength)
        return np.log(p) - np.log(self.prior_)

    def _fit_encoding(self, songs):
        self.features_ = present(songs, NUMBERS)
        self.edges_ = {
            name: np.unique(
                np.nanquantile(songs[name].astype(np.float64), np.linspace(0, 1, self.BINS + 1))
            )
            for name in self.features_
        }
        self.words_ = {}
        for name in filter(songs.__contains__, self.TEXTS):
            matrix, levels = incidence(songs[name].drop_duplicates(), self.TEXTS[name])
            common = np.array([*levels], object)[matrix.sum(axis=0) >= self.MIN_NAMES]
            self.words_[name] = {word: at for at, word in enumerate(common)}
        numbers = self._numbers(songs.iloc[:: 1 + len(songs) // 50_000])
        self.mean_ = np.nanmean(numbers, axis=0)
        self.scale_ = np.nanstd(numbers, axis=0) + np.float32(
            0.1
        )  # a bin that hardly varies must not shout

    def _numbers(self, songs):
        """Return per number how far through each bin it is (0 to 1) and if it is the lowest; keys also one by one."""
        widths = [len(edges) + 12 * (name == "key") for name, edges in self.edges_.items()]
        numbers = np.empty(
            (len(songs), sum(widths)), np.float32
        )  # filled in place: it is the largest array of a run
        for (name, edges), width, end in zip(self.edges_.items(), widths, np.cumsum(widths)):
            value = column(songs, name).to_numpy(np.float64, na_value=np.nan)[:, None]
            steps = [np.clip((value - edges[:-1]) / np.diff(edges), 0, 1), value <= edges[0]]
            steps += [value == np.arange(12)] * (name == "key")
            numbers[:, end - width : end] = np.where(np.isnan(value), np.nan, np.hstack(steps))
        return numbers

    def _encode(self, songs):
        """Return the inputs: numbers (dense; missing is average) and words (sparse; length 1 per song and column)."""
        from scipy.sparse import diags_array, hstack

        texts = []
        for name, levels in self.words_.items():
            matrix = incidence(column(songs, name), self.TEXTS[name], levels)[0]
            texts.append(
                diags_array(1 / np.sqrt(np.maximum(matrix.sum(axis=1), 1)), dtype=np.float32)
                @ matrix
            )
        numbers = self._numbers(songs)
        numbers -= self.mean_
        numbers /= self.scale_
        return np.nan_to_num(numbers, copy=False), hstack(texts, format="csr", dtype=np.float32)

    def _fit_network(self, numbers, texts, y, rng):
        """Adam for the dense weights, row-wise Adagrad for the words in the batch, a cosine schedule after a warm-up."""
        (n, inputs), classes = numbers.shape, len(self.classes_)
        batch = int(np.clip(n // 150, 16, self.MAX_BATCH))
        epochs = max(self.EPOCHS, 200 * batch // n)
        net = {
            "in": rng.normal(0, inputs**-0.5, (inputs, self.HIDDEN)),
            "in0": np.zeros(self.HIDDEN),
            "out": rng.normal(0, self.HIDDEN**-0.5 / 2, (self.HIDDEN, classes)),
            "out0": np.log(self.prior_),
            "words": np.zeros((texts.shape[1], self.HIDDEN)),
        }
        self.network_ = net = {name: weights.astype(np.float32) for name, weights in net.items()}
        moments = {
            name: np.zeros((2, *net[name].shape), np.float32)
            for name in ("in", "in0", "out", "out0")
        }
        squares = np.zeros((texts.shape[1], 1), np.float32)
        batches = [
            rows[i : i + batch]
            for rows in (rng.permutation(n) for _ in range(epochs))
            for i in range(0, n, batch)
        ]
        for step, rows in enumerate(batches, 1):
            used, text = self._drop_words(texts[rows], rng)
            drop = (
                rng.random((len(rows), self.HIDDEN), dtype=np.float32) > self.DROPOUT
            ) / np.float32(1 - self.DROPOUT)
            gradients = self._gradients(numbers[rows], text, used, y[rows], drop)
            pace = min(1, step / 20) * (1 + np.cos(np.pi * step / len(batches))) / 2
            for name, (first, second) in moments.items():
                first += 0.1 * (gradients[name] - first)
                second += 0.01 * (gradients[name] ** 2 - second)
                adam = first / (1 - 0.9**step) / (np.sqrt(second / (1 - 0.99**step)) + 1e-8)
                net[name] -= np.float32(self.RATE * pace) * adam
            squares[used] += (gradients["words"] ** 2).mean(axis=1, keepdims=True)
            net["words"][used] -= (
                np.float32(self.WORD_RATE * pace)
                * gradients["words"]
                / (np.sqrt(squares[used]) + 1e-8)
            )

    def _drop_words(self, text, rng):
        """Return the words of a batch and the matrix songs x those words, half of its entries dropped."""
        used, columns = np.unique(text.indices, return_inverse=True)
        kept = (rng.random(text.nnz) > self.WORD_DROPOUT) / np.float32(1 - self.WORD_DROPOUT)
        return used, type(text)(
            (text.data * kept.astype(np.float32), columns, text.indptr), (text.shape[0], len(used))
        )

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
        return {
            "in": numbers.T @ back,
            "in0": back.sum(0),
            "out": hidden.T @ error,
            "out0": error.sum(0),
            "words": text.T @ back,
        }

    def sound(self, songs):
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
KEYS = {
    "artist": ("artist_name", credits),
    "album": ("album_name", whole),
    "album words": ("album_name", words),
    "title words": ("track_name", words),
}


def text_counts(songs):
    """Return songs x 5, float32: ";" in the artist, length of title and of album, if they are the same, if the title has
    a bracket or dash."""
    artist, title, album = (
        column(songs, name).astype("str").str.casefold()
        for name in ("artist_name", "track_name", "album_name")
    )
    return np.column_stack(
        [
            artist.str.count(";"),
            title.str.len(),
            album.str.len(),
            title == album,
            title.str.contains(r" - |\(|\["),
        ]
    ).astype(np.float32)


def summary(totals):
    """Return count, mean and spread from count, sum and sum of squares, songs x 3; NaN where nothing is known."""
    count, total, squares = np.asarray(totals, dtype=float).T
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = total / count
        spread = np.sqrt(np.maximum(squares / count - mean**2, 0))
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

    SONG_FOLDS, ARTIST_FOLDS = (
        5,
        10,
    )  # ten, because a tenth of the artists is what an evaluation holds out
    MAX_FIT_ROWS = (
        400_000  # rows the trees see; artists, albums and words are counted over all songs
    )
    MAX_GENRES = 254  # HistGradientBoosting takes 255 categories; the rarer genres count as missing
    PRIOR_SONGS = (
        10  # a genre's mean is shrunk towards that of all songs as if it had so many more of them
    )
    CURVE_ROWS = 100_000  # rows the quadratic is fitted on, and predicted at a time
    LEARNING_RATE = {"energy": 0.1, "popularity": 0.07}
    TREES = dict(
        max_iter=150,
        max_leaf_nodes=47,
        max_features=0.4,
        min_samples_leaf=40,
        l2_regularization=1.0,
        early_stopping=False,
    )

    def __init__(self, target, fits=1):
        self.target, self.fits = target, fits
        self.words = (
            target == "popularity"
        )  # what words and text_counts tell of energy does not hold for other songs

    def fit(self, songs, y):
        """`songs` is a DataFrame, one row per song; `y` its target, finite. The target's own column is not looked at."""
        from sklearn.ensemble import HistGradientBoostingRegressor

        y, rng = np.asarray(y, dtype=float), np.random.default_rng(SEED)
        self.features_ = [
            name for name in present(songs, AUDIO + MORE_AUDIO) if name != self.target
        ]
        self.genres_ = {
            genre: code
            for code, genre in enumerate(genres(songs).value_counts().index[: self.MAX_GENRES])
        }
        self._fit_start(songs, y, rng)
        residual = y - self._start(songs)
        X, rows = self._training_rows(songs, residual, rng)
        self.fitted_on_ = len(np.unique(rows))
        X[:, np.isnan(X).all(axis=0)] = (
            0  # HistGradientBoosting cannot bin a column without a single value
        )
        self.trees_ = [
            HistGradientBoostingRegressor(
                learning_rate=self.LEARNING_RATE[self.target],
                categorical_features=[len(self.features_)],
                random_state=seed,
                **self.TREES,
            ).fit(X, residual[rows])
            for seed in range(SEED, SEED + self.fits)
        ]
        return self

    def predict(self, songs):
        """Return the target of each song; absent columns, a missing genre and unknown names are missing values."""
        if not len(songs):
            return np.zeros(0)
        known = [self._audio(songs)]
        for key, (levels, totals) in self.known_.items():
            name, split = KEYS[key]
            known.append(summary(incidence(column(songs, name), split, levels)[0] @ totals))
        X = np.hstack(known)
        return np.clip(
            self._start(songs) + np.mean([trees.predict(X) for trees in self.trees_], axis=0),
            *self.range_,
        )

    def _training_rows(self, songs, residual, rng):
        """Learn known_; return (X, rows): what the trees learn from, and which song each row of X is."""
        import pandas as pd

        moments = np.c_[np.ones(len(residual)), residual, residual**2]
        by_song = rng.integers(0, self.SONG_FOLDS, len(residual))
        artists = pd.factorize(songs["artist_name"])[0]
        by_artist = rng.integers(0, self.ARTIST_FOLDS, artists.max() + 1)[artists]
        self.known_, known, new = {}, [], []
        for key, (name, split) in KEYS.items():
            if name in songs and (self.words or "words" not in key):
                matrix, levels = incidence(songs[name], split)
                self.known_[key] = levels, matrix.T @ moments
                known.append(summary_without_own_fold(matrix, moments, by_song))
                new.append(summary_without_own_fold(matrix, moments, by_artist))
        # Songs that share nothing once hidden belong to `new`; among `known` they would pass for typical new artists.
        shared = np.any(
            [part[:, 0] > 0 for key, part in zip(self.known_, known) if "words" not in key], axis=0
        )
        rows = np.r_[np.flatnonzero(shared), np.arange(len(songs))]
        hidden = np.arange(len(rows)) >= shared.sum()  # is the artist hidden whole?
        if len(rows) > self.MAX_FIT_ROWS:
            kept = np.sort(rng.choice(len(rows), self.MAX_FIT_ROWS, replace=False))
            rows, hidden = rows[kept], hidden[kept]
        table = np.hstack(
            [
                np.where(hidden[:, None], *(part[rows] for part in parts))
                for parts in zip(new, known)
            ]
        )
        some, at = np.unique(rows, return_inverse=True)  # most songs stand in X twice
        return np.c_[self._audio(songs.iloc[some])[at], table], rows

    def _fit_start(self, songs, y, rng):
        """Learn where the residuals start from: the genre's shrunken mean; of energy, a quadratic of it and the audio."""
        import pandas as pd

        by_genre = pd.Series(y).groupby(genres(songs).to_numpy()).agg(["sum", "size"])
        self.mean_, self.range_ = y.mean(), (y.min(), y.max())
        self.genre_means_ = (
            (by_genre["sum"] + self.PRIOR_SONGS * self.mean_)
            / (by_genre["size"] + self.PRIOR_SONGS)
        ).to_dict()
        self.curve_ = None
        if (
            self.target == "energy"
        ):  # popularity hangs too little on the audio: a quadratic only adds noise
            some = np.sort(rng.permutation(len(y))[: self.CURVE_ROWS])
            self.curve_ = self._quadratic().fit(self._plane(songs.iloc[some]), y[some])

    def _quadratic(self):
        from sklearn.impute import SimpleImputer
        from sklearn.linear_model import Ridge
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import PolynomialFeatures, StandardScaler

        return make_pipeline(
            SimpleImputer(),
            StandardScaler(),
            PolynomialFeatures(2, include_bias=False),
            StandardScaler(),
            Ridge(10.0),
        )

    def _start(self, songs):
        if self.curve_ is None:
            return self._genre_mean(songs)
        starts = in_parts(
            songs, self.CURVE_ROWS, lambda part: self.curve_.predict(self._plane(part))
        )
        return np.clip(starts, *self.range_)  # a quadratic runs away where songs are rare

    def _plane(self, songs):
        """Return songs x (features_, the genre's mean)."""
        audio = [column(songs, name).astype(float) for name in self.features_]
        return np.column_stack([*audio, self._genre_mean(songs)])

    def _genre_mean(self, songs):
        means = column(songs, "genre").map(self.genre_means_).astype(float)
        return means.fillna(self.mean_).to_numpy()

    def _audio(self, songs):
        """Return songs x (features_, the genre's number, the start, perhaps text_counts), float32."""
        table = [column(songs, name).astype(np.float32) for name in self.features_]
        table.append(column(songs, "genre").map(self.genres_).astype(np.float32))
        table.append(
            self._start(songs).astype(np.float32)
        )  # where on its scale a song starts says how far it strays
        return np.column_stack(table + [text_counts(songs)] * self.words)


# ---------------------------------------------------------------------------------------------------------------------
# The five training functions: songs in; a fitted estimator and its metrics out, the primary metric first
# ---------------------------------------------------------------------------------------------------------------------


def train_genre(songs):
    """Classify the genre. Return (GenreClassifier, metrics).

    Raises DataError where fewer than two genres have five songs each. Shares are of held-out songs: `accuracy`,
    `top3_accuracy` and `f1_macro` on songs of known artists, `accuracy_new_artists` on artists never seen,
    `baseline_accuracy` for always naming the most common genre.
    """
    from sklearn.metrics import accuracy_score, f1_score

    songs = _usable(songs, "genre", MIN_SONGS)
    learnable = int((songs["genre"].value_counts() >= MIN_GENRE_SONGS).sum())
    if learnable < 2:
        raise DataError(
            f"genre needs at least 2 genres with {MIN_GENRE_SONGS} songs each; the table has {learnable}"
        )

    def answers(judged, learnt, held_out):
        actual = held_out["genre"].to_numpy(object).astype(str)
        likely = judged.classes_[np.argsort(-judged.predict_proba(held_out), axis=1)[:, :3]]
        best_of_3 = np.where((likely == actual[:, None]).any(axis=1), actual, likely[:, 0])
        return actual, likely[:, 0], best_of_3, np.full(len(actual), learnt["genre"].mode()[0])

    final = GenreClassifier()
    known, new = _judge_and_fit("genre", GenreClassifier, final, songs, answers)
    return final, {
        "accuracy": _figure(accuracy_score, known),
        "accuracy_new_artists": _figure(accuracy_score, new),
        "top3_accuracy": _figure(accuracy_score, known, 2),
        "f1_macro": _figure(partial(f1_score, average="macro"), known),
        "baseline_accuracy": _figure(accuracy_score, known, 3),
        "classes": len(final.classes_),
        "fitted_on": final.fitted_on_,
        "plot": _plot_genres(*known[:2]) if known else {},
    }


def train_clusters(songs, n_clusters=2):
    """Cluster songs by sound: standardised audio features, k-means. Return (Pipeline, metrics).

    Raises DataError where there are fewer than n_clusters distinct songs. `silhouette` (-1 to 1) is that of a seeded
    sample; `means` are each cluster's mean features, `labels` two words for those in which it differs most. Cluster 0
    is the largest.
    """
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA
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
    _say("clusters", "fitting", len(songs))
    pipeline = make_pipeline(StandardScaler(), KMeans(n_clusters, n_init=4, random_state=SEED)).fit(
        features
    )
    kmeans = pipeline[-1]
    _largest_first(kmeans)
    sample = np.random.default_rng(SEED).permutation(len(songs))[:SILHOUETTE_SAMPLE]
    _say("clusters", "evaluating", len(sample))
    standardised, labels = pipeline[0].transform(features.iloc[sample]), kmeans.labels_[sample]
    separable = 1 < len(np.unique(labels)) < len(sample)
    sizes = np.bincount(kmeans.labels_, minlength=n_clusters).tolist()
    means = features.groupby(kmeans.labels_).mean().round(4)
    words = [
        ", ".join(WORDS[AUDIO[i]][int(center[i] < 0)] for i in np.argsort(-np.abs(center))[:2])
        for center in kmeans.cluster_centers_
    ]
    points = np.c_[
        PCA(2, random_state=SEED).fit_transform(standardised[:PLOT_POINTS]).round(3),
        labels[:PLOT_POINTS],
    ]
    return pipeline, {
        "silhouette": float(silhouette_score(standardised, labels)) if separable else None,
        "sizes": sizes,
        "labels": words,
        "means": means.to_dict("records"),
        "plot": {"points": points.tolist(), "labels": words, "sizes": sizes},
    }


def train_energy(songs):
    """Predict energy (0 to 1) from the other features, the genre and the artist. Return (SongRegressor, metrics)."""
    return _train_regressor("energy", songs)


def train_popularity(songs):
    """Predict popularity (0 to 100) from sound, genre, album and artist. Return (SongRegressor, metrics)."""
    return _train_regressor("popularity", songs)


def _train_regressor(target, songs):
    """Return (SongRegressor, metrics) for the target column.

    Raises DataError where the column is constant. `r2`, `mae`, `rmse` are on held-out songs of known artists (mae and
    rmse in the target's own unit), `…_new_artists` on artists never seen, `baseline_mae` for predicting the mean.
    """
    from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error

    songs = _usable(songs, target, MIN_SONGS)
    if songs[target].nunique() < 2:
        raise DataError(
            f"{target} is {songs[target].iloc[0]:g} for all {len(songs):,} songs; "
            f"there is nothing to learn until the column varies"
        )

    def answers(judged, learnt, held_out):
        mean = np.full(len(held_out), learnt[target].mean())
        return held_out[target].to_numpy(np.float64), judged.predict(held_out), mean

    final = SongRegressor(target, AVERAGED if len(songs) < FEW_SONGS else 1)
    known, new = _judge_and_fit(target, partial(SongRegressor, target), final, songs, answers)
    return final, {
        "r2": _figure(r2_score, known),
        "r2_new_artists": _figure(r2_score, new),
        "mae": _figure(mean_absolute_error, known),
        "mae_new_artists": _figure(mean_absolute_error, new),
        "rmse": _figure(root_mean_squared_error, known),
        "baseline_mae": _figure(mean_absolute_error, known, 2),
        "fitted_on": final.fitted_on_,
        "plot": _plot_regression(*known[:2]) if known else {},
    }


def train_similar(songs):
    """Index songs by sound and company. Return (SimilarSongs, metrics).

    Of a seeded sample of songs, each with its ten neighbours: the share of neighbours of the song's own genre, which
    the query does not know (`same_genre_at_10`), against what drawing songs at random would give
    (`same_genre_by_chance`), the share by the song's own artist, and milliseconds of processor time per query.
    """
    import pandas as pd

    songs = _usable(songs, "similar", 2)
    _say("similar", "fitting", len(songs))
    sample = np.random.default_rng(SEED).permutation(len(songs))[:QUERY_SAMPLE]
    index = SimilarSongs().fit(songs, sample)
    if not index.recording_.any():
        raise DataError("similar needs at least 2 different recordings; the table has 1")
    if not index.settings_["company"]:
        log.warning(
            "similar: the songs have no genres, so the company they keep is left out: it is sound alone that counts"
        )
    _say("similar", "evaluating", len(sample))
    start = (
        time.thread_time()
    )  # of this thread alone: the other models are computing at the same time
    same_artist = [index.artist_[index.neighbours(row)[0]] == index.artist_[row] for row in sample]
    query_ms = (time.thread_time() - start) / len(sample) * 1000
    genre, answers = (
        genres(songs).fillna("").to_numpy(object),
        index.neighbours_of(sample, points=index.asked_),
    )
    same_genre = pd.DataFrame(
        [genre[found] == genre[row] for row, (found, _) in zip(sample, answers) if genre[row]],
        dtype=float,
    )
    at_10 = by_chance = None
    if len(same_genre):
        at_10, by_chance = (
            float(same_genre.stack().mean()),
            float((genres(songs).value_counts(normalize=True) ** 2).sum()),
        )
    return index, {
        "same_genre_at_10": at_10,
        "same_genre_by_chance": by_chance,
        "same_artist_at_10": float(np.mean(np.concatenate(same_artist))),
        "query_ms": query_ms,
        "plot": {"same_genre_at": same_genre.mean().tolist(), "by_chance": by_chance},
    }


# The order is that of every table people see, and of submission: the longest fit first, so that no core waits for it.
MODELS = {
    "genre": train_genre,
    "clusters": train_clusters,
    "energy": train_energy,
    "popularity": train_popularity,
    "similar": train_similar,
}


def _largest_first(kmeans):
    """Renumber the clusters by size: k-means numbers them at random, and people remember numbers."""
    order = np.argsort(-np.bincount(kmeans.labels_, minlength=kmeans.n_clusters), kind="stable")
    kmeans.cluster_centers_ = kmeans.cluster_centers_[order]
    kmeans.labels_ = np.argsort(order)[kmeans.labels_].astype(np.int32)


WORDS = {
    "danceability": ("danceable", "hard to dance to"),
    "energy": ("energetic", "calm"),
    "loudness": ("loud", "quiet"),
    "speechiness": ("spoken", "sung"),
    "acousticness": ("acoustic", "electronic"),
    "instrumentalness": ("instrumental", "vocal"),
    "valence": ("happy", "sad"),
}


def _plot_genres(actual, predicted):
    """Return the worst confusions, for the picture: actual and predicted genre, songs, their share of the actual ones."""
    songs, taken_for = Counter(actual), Counter(zip(actual, predicted))
    wrong = [pair for pair, _ in taken_for.most_common() if pair[0] != pair[1]]
    return {
        "confusions": [
            [*pair, taken_for[pair], taken_for[pair] / songs[pair[0]]]
            for pair in wrong[:CONFUSIONS]
        ]
    }


def _plot_regression(actual, predicted, bins=40):
    """Return a 2-D histogram: rows are bins of the actual value, columns bins of the predicted one."""
    low, high = float(actual.min()), float(actual.max())
    density, _, _ = np.histogram2d(
        actual, predicted.clip(low, high), bins=bins, range=[[low, high]] * 2
    )
    return {"edges": [low, high, bins], "density": density.astype(int).tolist()}


# ---------------------------------------------------------------------------------------------------------------------
# Similar songs
# ---------------------------------------------------------------------------------------------------------------------


class SimilarSongs:
    """Exact neighbours of songs by sound and by the company they keep, in a k-d tree.

    Sound: every feature is made normal by its ranks (they are skewed: half of all songs have an instrumentalness of 0),
    and their principal components are kept. Company: a mixture of genres, the song's own and those of all songs of its
    first artist, under a square root (so that distances are Hellinger's), each genre in a place of its own.
    The tree (scipy.spatial.KDTree; Maneewongvatana and Mount, 1999) answers without a scan, in few dimensions.
    """

    FEATURES = AUDIO + ("liveness", "tempo", "duration_ms", "year")
    DIMENSIONS, COMPANY_DIMENSIONS = 14, 8
    EXTREME = 3  # standard deviations: an outlier shall not outweigh the rest
    OWN_GENRE = 0.4  # its share of the company
    COMPANY_WEIGHT = 1.25  # against sound, whose total variance is 1

    def fit(self, songs, sample=()):
        """`songs` is a DataFrame, one row per song; asked_ are the sample's points as if their genres were not known."""
        from scipy.spatial import KDTree

        # Arrays of objects: joblib hands them to the C pickler whole, lists it walks through in Python.
        self.track_ids_, self.titles_, self.artists_ = (
            songs[name].to_numpy(object) for name in ("track_id", "track_name", "artist_name")
        )
        self.recording_ = recordings(songs).astype(np.int32)
        company, asked = self._company(songs, sample)
        sound = self._sound(songs, self.DIMENSIONS - company.shape[1])
        self.tree_ = KDTree(np.hstack([sound, company]), leafsize=20)
        self.asked_ = np.hstack([sound[sample], asked])
        return self

    def _sound(self, songs, dimensions):
        """Return songs x dimensions at most; a missing feature counts as the median."""
        from scipy.special import ndtri

        self.features_ = present(songs, self.FEATURES)
        normal = np.column_stack(
            [
                ndtri((songs[name].rank() - 0.5) / songs[name].count())
                .clip(-self.EXTREME, self.EXTREME)
                .fillna(0)
                for name in self.features_
            ]
        )
        normal -= normal.mean(axis=0)
        sound = normal @ np.linalg.eigh(normal.T @ normal)[1][:, ::-1][:, :dimensions]
        return sound / np.sqrt(sound.var(axis=0).sum()).clip(1e-12)

    def _company(self, songs, sample):
        """Return (points of all songs, points of the sample with their own genres hidden); no columns without genres."""
        from sklearn.preprocessing import normalize

        own, genres = incidence(column(songs, "genre"), whole)
        artist, _ = incidence(
            songs["artist_name"], lambda name: [name.partition(";")[0].strip().casefold()]
        )
        self.artist_, self.settings_ = artist.indices, {"company": len(genres) > 1}
        if not genres:  # normalize() refuses a matrix of no columns
            return [np.zeros((len(rows), 0)) for rows in (songs, sample)]
        counts = artist.T @ own
        places = np.eye(len(genres))
        if (
            len(genres) > self.COMPANY_DIMENSIONS
        ):  # at random, as in more dimensions than two that is far apart
            places = np.random.default_rng(SEED).normal(size=(len(genres), self.COMPANY_DIMENSIONS))
            places /= np.linalg.norm(places, axis=1, keepdims=True)

        def points(mixture):
            company = mixture.sqrt() @ places
            return (
                self.COMPANY_WEIGHT
                * company
                / np.linalg.norm(company, axis=1, keepdims=True).clip(1e-12)
            )

        others = normalize(counts, "l1")
        return (
            points(self.OWN_GENRE * own + (1 - self.OWN_GENRE) * (artist @ others)),
            points(normalize(artist[sample] @ counts - own[sample], "l1")),
        )

    def neighbours(self, row, k=10, same_artist=False):
        """Return (rows, similarities) of the k songs most like the song in that row, the most similar first.

        Never the song itself nor another copy of its recording, no recording twice, and of ten no more than three by
        its first artist, unless `same_artist`; fewer than k where the table has no more. A similarity is exp(-d²/2),
        1 for a song that is the same in everything.
        """
        return self.neighbours_of(np.array([row]), k, same_artist)[0]

    def neighbours_of(self, rows, k=10, same_artist=False, points=None, workers=1):
        """Return what neighbours() says of each of the rows, asked at `points` in place of their own; `workers` threads."""
        points = self.tree_.data[rows] if points is None else points
        allowed = k if same_artist else max(1, 3 * k // 10)
        answers, left, wanted = [None] * len(rows), np.arange(len(rows)), 2 * k + 2
        while len(left):
            wanted = min(wanted, len(self.track_ids_))
            distances, found = self.tree_.query(
                points[left], np.arange(1, wanted + 1), workers=workers
            )
            recording, asked = self.recording_[found], rows[left, None]
            order = np.argsort(recording, axis=1, kind="stable")
            again = np.diff(np.take_along_axis(recording, order, axis=1), prepend=-1) == 0
            good = recording != self.recording_[asked]
            good[np.arange(len(left))[:, None], order] &= ~again  # of each recording the nearest
            own = good & (self.artist_[found] == self.artist_[asked])
            good &= ~own | (np.cumsum(own, axis=1) <= allowed)
            done = (good.sum(axis=1) >= k) | (wanted == len(self.track_ids_))
            for at in np.flatnonzero(done):
                best = np.flatnonzero(good[at])[:k]
                answers[left[at]] = found[at, best], np.exp(-(distances[at, best] ** 2) / 2)
            left, wanted = left[~done], 3 * wanted
        return answers

    def find(self, text, artist=None):
        """Return one row per recording, by that artist: of that track_id; or of that title; or else of titles "Text - …"
        and "Text (…)"; or that begin with the text; or that contain it. All case-folded."""
        if (same := np.flatnonzero(self.track_ids_ == text)).size:
            return [int(same[0])]
        text, artist, found = text.casefold(), (artist or "").casefold(), ({}, {}, {}, {})
        for row, title in enumerate(map(str.casefold, self.titles_)):
            if text in title and artist in self.artists_[row].casefold():
                looks = (
                    title == text,
                    title.startswith((f"{text} - ", f"{text} (")),
                    title.startswith(text),
                    True,
                )
                found[looks.index(True)].setdefault(self.recording_[row], row)
        return list(next(filter(None, found), {}).values())

    def suggestions(self, text):
        """Return up to five titles spelt like the text."""
        import difflib

        text = text.casefold()
        parts = {text[i : i + 3] for i in range(max(1, len(text) - 2))}
        titles = {name.casefold(): name for name in self.titles_}
        alike = sorted(
            titles, key=lambda title: (-sum(part in title for part in parts), len(title))
        )[:300]
        return [titles[match] for match in difflib.get_close_matches(text, alike, n=5, cutoff=0.5)]


# ---------------------------------------------------------------------------------------------------------------------
# Saving and loading: models/NAME.joblib, models/metrics/NAME.json, models/versions/
# ---------------------------------------------------------------------------------------------------------------------


class Locked(db.Expected):
    """A run holds the models directory."""


@contextmanager
def one_run_at_a_time(folder):
    """Hold MODELS_DIR/.lock; yield its open file: the lock is held as long as a process has it open.

    Raises Locked, saying who holds it since when. The kernel frees it when the last holder dies.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a+")
    except OSError as error:
        raise DataError(
            f"cannot write to the models directory {folder} ({error.strerror}); choose another: "
            f"--models-dir DIR"
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
            file.write(f"process {os.getpid()} since {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC\n")
            file.flush()
        yield file


def check_folder(folder):
    """Return (what, "ok"|"warning"|"problem", sentence) of the models directory and its disk. Raises DataError."""
    import notify

    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        raise DataError(f"cannot write to {there}; choose another: --models-dir DIR")
    free = shutil.disk_usage(there).free
    state = "problem" if free < SPACE_NEEDED else "warning" if free < 10 * SPACE_NEEDED else "ok"
    return [
        (
            "models directory",
            "ok",
            f"{folder} is writable" + "; it will be made" * (there != folder),
        ),
        (
            "space",
            state,
            f"{notify.size(free) or '0 B'} free"
            + f"; make room on the disk of {there}" * (state != "ok"),
        ),
    ]


def write_json(path, content):
    write_atomically(
        path, lambda file: file.write(json.dumps(content, indent=1, allow_nan=False).encode())
    )


def read_json(text):
    """Return the object in a file or a line; None where it is missing or cut short."""
    try:
        return json.loads(text.read_bytes() if isinstance(text, Path) else text)
    except (FileNotFoundError, ValueError):
        return None


def _paths(name, models_dir):
    models_dir = Path(models_dir)
    return models_dir / f"{name}.joblib", models_dir / "metrics" / f"{name}.json"


def _sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _versions(name, models_dir):
    """Return (path of the model, its report) of everything in versions/, the newest first."""
    paths = sorted((Path(models_dir) / "versions").glob(f"{name}-*.json"), reverse=True)
    return [(path.with_suffix(".joblib"), report) for path in paths if (report := read_json(path))]


def _version(report, models_dir):
    """Return where versions/ holds the model of a report; beside it, as .json, the report."""
    moment = datetime.fromisoformat(report["trained_at"])
    return Path(models_dir) / "versions" / f"{report['model']}-{moment:%Y%m%dT%H%M%S.%f}.joblib"


def read_report(name, models_dir=MODELS_DIR, digest=None):
    """Return the report of the current model, None where the model is missing, damaged or not ours.

    It is the one with the file's SHA-256: in metrics/NAME.json, or, where a run was killed between the two files, in
    versions/. `digest` saves reading the file.
    """
    path, metrics_path = _paths(name, models_dir)
    if not path.exists():
        return None
    digest = digest or _sha256(path)
    reports = chain(
        [read_json(metrics_path)], (report for _, report in _versions(name, models_dir))
    )
    return next((report for report in reports if report and report["sha256"] == digest), None)


def list_versions(name, models_dir=MODELS_DIR):
    """Return (model path, report) of the versions kept beside the current model, the newest first."""
    current = read_report(name, models_dir) or {"sha256": None}
    return [
        version
        for version in _versions(name, models_dir)
        if version[1]["sha256"] != current["sha256"]
    ]


def to_train(name, models_dir):
    """Return the command line that trains a model as the last run into that folder did."""
    last = read_json(_paths(name, models_dir)[1]) or {}
    return f"{last.get('command') or db.command('train.py', *in_folder(models_dir))} --only {name}"


def in_folder(models_dir):
    """Return the options that say where the models are."""
    folder = Path(models_dir).resolve()
    return () if folder == MODELS_DIR else ("--models-dir", folder)


def load_model(name, models_dir=MODELS_DIR):
    """Return the saved dict of a model: `estimator`, `metrics` and all that stands in its metrics file.

    The file's SHA-256 is compared with its report's before anything is unpickled. Raises ModelError. Where another
    version of scikit-learn has made it, scikit-learn warns (InconsistentVersionWarning).
    """
    import joblib

    path, metrics_path = _paths(name, models_dir)
    again = f"train it: {to_train(name, models_dir)}"
    if not path.exists():
        raise ModelError(f"there is no {name} model in {models_dir}; {again}")
    report = read_report(name, models_dir)
    if not report:
        raise ModelError(
            f"{path} is damaged or was changed: no report has its SHA-256, neither {metrics_path} nor one in "
            f"versions/; put a version back: {db.command('models.py', 'rollback', name, *in_folder(models_dir))}, "
            f"or {again}"
        )
    return joblib.load(path)


def publish(name, estimator, metrics, about, models_dir=MODELS_DIR, force=False):
    """Save a trained model as a version, put it in the current one's place, return its report.

    `about` says how it was trained: `run`, `settings`, `command` and what else shall stand in the report.

    A model whose primary metric is worse than the current one's by more than 5 % of it, and by more than 0.01, is
    held back: it is in versions/ only. The first model, one trained with other settings and `force` are never held
    back. Killed at any moment, this leaves either the old model or the new one, whole.
    Raises OSError where the disk is full or not writable; the current model is then untouched.
    """
    import joblib

    for folder in ("metrics", "versions"):
        (Path(models_dir) / folder).mkdir(parents=True, exist_ok=True)
    current = read_report(name, models_dir)
    report = {
        "model": name,
        "metrics": {key: metrics[key] for key in metrics if key != "plot"},
        **about,
        "trained_at": datetime.now(UTC).isoformat(),
        "guessing": _guessing(metrics),
        "settings": about["settings"] | getattr(estimator, "settings_", {}),
        "versions": {
            package: metadata.version(package) for package in ("scikit-learn", "pandas", "numpy")
        },
        "plot": metrics.get("plot", {}),
    }
    reason = current and not force and _worse(report, current)
    report |= {
        "status": "held_back" if reason else "trained",
        "error": reason or None,
        "previous": current and current["metrics"].get(next(iter(metrics))),
    }
    version = _version(report, models_dir)
    try:
        write_atomically(version, partial(joblib.dump, {**report, "estimator": estimator}))
        report |= {"sha256": _sha256(version), "bytes": version.stat().st_size}
        write_json(version.with_suffix(".json"), report)
        if not reason:
            _put_in_place(version, report, models_dir)
    except BaseException:
        _remove(version)
        raise
    _prune(name, models_dir)
    return report


def _guessing(metrics):
    """Return whether a model's primary metric is no better than its baseline (0 where that has none of its own)."""
    metric, value = next(iter(metrics.items()))
    baseline = metrics.get(
        {"accuracy": "baseline_accuracy", "same_genre_at_10": "same_genre_by_chance"}.get(metric)
    )
    return value is not None and value <= (baseline or 0)


def _worse(report, current):
    """Return why the gate holds a model back, None where it passes."""
    metric, value = next(iter(report["metrics"].items()))
    before = current["metrics"].get(metric)
    if report["settings"] != current["settings"] or before is None:
        return None
    if value is not None and value >= before - max(GATE_RELATIVE * abs(before), GATE_ABSOLUTE):
        return None
    return (
        f"held back: {metric} {'could not be measured' if value is None else f'fell to {value:.4f}'}, the current "
        f"model has {before:.4f}; to publish all the same: {report['command']} --only {report['model']} --force"
    )


def _put_in_place(version, report, models_dir):
    """Give a version the current model's names: first the report, which may find no space, then the model by a rename."""
    path, metrics_path = _paths(report["model"], models_dir)
    write_json(metrics_path, report)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(version, temporary)
        os.replace(temporary, path)
    except OSError:  # a file system without hard links
        with open(version, "rb") as whole_file:
            write_atomically(path, partial(shutil.copyfileobj, whole_file))


def _remove(version):
    for path in (version, version.with_suffix(".json")):
        path.unlink(missing_ok=True)


def _prune(name, models_dir):
    """Keep five versions, of which at most one that was not good enough: bad nights shall not push out good ones."""
    kept = list_versions(name, models_dir)
    good, bad = (
        [path for path, report in kept if (report["status"] == "trained") == fine]
        for fine in (True, False)
    )
    for path in good[KEEP_VERSIONS - len(bad[:1]) :] + bad[1:]:
        _remove(path)


def rollback(name, models_dir=MODELS_DIR):
    """Put the previous version of a model back, its metrics with it; return its report. Raises ModelError.

    The model taken back stays in versions/ as "rolled_back" and is not gone back to again.
    """
    current = read_report(name, models_dir)
    for version, report in _versions(name, models_dir):
        earlier = not current or report["trained_at"] < current["trained_at"]
        if (
            earlier
            and report["status"] == "trained"
            and version.exists()
            and _sha256(version) == report["sha256"]
        ):
            if current:
                write_json(
                    _version(current, models_dir).with_suffix(".json"),
                    {**current, "status": "rolled_back"},
                )
            _put_in_place(version, report, models_dir)
            return report
    raise ModelError(
        f"there is no earlier version of {name} in {Path(models_dir) / 'versions'} to go back to"
    )


def clean_up(models_dir=MODELS_DIR):
    """Remove what a killed run left half done: temporary files, versions without their other half."""
    models_dir = Path(models_dir)
    for leftover in [*models_dir.glob(".*.tmp"), *models_dir.glob("*/.*.tmp")]:
        leftover.unlink()
    for version in (models_dir / "versions").glob("*"):
        if not version.with_suffix(".json" if version.suffix == ".joblib" else ".joblib").exists():
            version.unlink()


# ---------------------------------------------------------------------------------------------------------------------
# What is written down beside the models: history and data
# ---------------------------------------------------------------------------------------------------------------------


def append_history(models_dir, lines):
    """Append lines to metrics/history.jsonl, one JSON object each."""
    path = Path(models_dir) / "metrics" / "history.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    torn = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
    with naming(path), open(path, "a") as file:
        file.write(
            "\n" * torn + "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
        )


def read_history(models_dir=MODELS_DIR):
    """Return the lines of metrics/history.jsonl, the oldest first, without lines a full disk cut short."""
    path = Path(models_dir) / "metrics" / "history.jsonl"
    return [*filter(None, map(read_json, path.read_bytes().splitlines()))] if path.exists() else []


def owed(models_dir=MODELS_DIR):
    """Return the models whose last run failed, was held back or was killed, and those that have no file."""
    last = {line["model"]: line for line in read_history(models_dir)}

    def done(name):
        report = read_report(name, models_dir)
        return (
            report
            and name in last
            and (last[name]["status"] == "trained" or report["run"] == last[name]["run"])
        )

    return [name for name in MODELS if not done(name)]


def describe(songs):
    """Return what a later run compares its songs with: rows, share of each genre, mean and deviation of each feature."""
    numbers = songs[present(songs, NUMBERS)].astype(np.float64)
    return {
        "rows": len(songs),
        "genres": genres(songs).value_counts(normalize=True).head(500).to_dict(),
        "means": numbers.mean().to_dict(),
        "deviations": numbers.std(ddof=0).to_dict(),
    }


def drift_since(now, table, models_dir=MODELS_DIR):
    """Compare the songs with those of the model trained last on the same table; return a sentence for each that moved.

    What matters most comes first: a feature that left its range, then the number of songs, then the genres.
    """
    reports = [
        report
        for name in MODELS
        if (report := read_report(name, models_dir)) and report.get("table") == table
    ]
    if not reports:
        return []
    before, found = max(reports, key=lambda report: report["trained_at"])["data"], []
    for name in sorted(now["means"].keys() & before["means"]):
        mean, was, deviation = now["means"][name], before["means"][name], before["deviations"][name]
        if abs(mean - was) > DRIFT_DEVIATIONS * max(deviation, 1e-9):
            found.append(
                f"mean {name} is {mean:.4g}; it was {was:.4g} (standard deviation {deviation:.3g})"
            )
    if not 1 - DRIFT_ROWS <= now["rows"] / before["rows"] <= 1 / (1 - DRIFT_ROWS):
        found.append(
            f"the table has {now['rows']:,} songs; at the last training it had {before['rows']:,}"
        )
    moved = []
    for genre in sorted(now["genres"].keys() | before["genres"]):
        share, was = (data["genres"].get(genre, 0) for data in (now, before))
        if abs(share - was) >= DRIFT_SHARE and max(share, was) >= DRIFT_RATIO * min(share, was):
            moved.append(f"genre {genre} makes up {share:.1%} of the songs; it was {was:.1%}")
    if moved:
        found.append(
            "; ".join(moved[:3]) + f"; and so for {len(moved) - 3} more genres" * (len(moved) > 3)
        )
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Predicting
# ---------------------------------------------------------------------------------------------------------------------

PREDICTING = "genre", "clusters", "energy", "popularity"


def load_models(models_dir=MODELS_DIR, names=None):
    """Return {name: what load_model gives} of the models that there are; log why others are left out.

    Raises ModelError where there is none.
    """
    loaded = {}
    for name in names or MODELS:
        try:
            loaded[name] = load_model(name, models_dir)
        except ModelError as error:
            log.warning("%s skipped: %s", name, error)
    if not loaded:
        raise ModelError(
            f"there are no models in {models_dir}; train them: {db.command('train.py', *in_folder(models_dir))}"
        )
    return loaded


def predict(songs, loaded):
    """Return the predictions of the models that load_models has loaded, a row per song of the DataFrame, in its order.

    Columns: genre_predicted, genre_confidence (probability), cluster, energy_predicted, popularity_predicted, as far as
    there are models. A missing feature is treated as missing, a missing genre as the predicted one, a song with a
    missing feature is in no cluster.
    """
    import pandas as pd

    added = pd.DataFrame(index=songs.index)
    for name in filter(loaded.__contains__, PREDICTING):
        model = loaded[name]["estimator"]
        if name == "genre":
            probabilities = model.predict_proba(songs)
            added["genre_predicted"] = model.classes_[probabilities.argmax(axis=1)]
            added["genre_confidence"] = probabilities.max(axis=1).round(4)
            songs = songs.assign(genre=genres(songs).fillna(added["genre_predicted"]))
        elif name == "clusters":
            features = songs[list(AUDIO)].astype(np.float64).dropna()
            clusters = model.predict(features) if len(features) else []
            added["cluster"] = pd.Series(clusters, features.index, "Int64")
        else:
            added[f"{name}_predicted"] = model.predict(songs).round(4)
    return added


def predict_table(url, table, into, models_dir=MODELS_DIR):
    """Put what the current models say of every song of a table in place of what stands in the table `into`.

    Its columns are db.PREDICTIONS; `similar` are ten track_ids, the most similar first. Where a model is missing its
    columns are NULL, and so is `similar` for songs that came after the training. Returns the number of songs. Raises
    ModelError (no models), DataError (no such table, no permission, `into` is another kind of table) or DatabaseUnavailable.
    """
    songs, loaded = db.load_songs(url, table), load_models(models_dir)
    place, index = (
        np.full(len(songs), -1),
        loaded["similar"]["estimator"] if "similar" in loaded else None,
    )
    if index:
        import pandas as pd

        place = pd.Index(index.track_ids_).get_indexer(songs["track_id"])
        songs = songs.iloc[
            (order := np.argsort(np.argsort(index.tree_.indices)[place], kind="stable"))
        ]  # neighbours together
        place = place[order]

    def blocks():
        for start in range(0, len(songs), PREDICTED_AT_ONCE):
            part, rows = (
                songs.iloc[start : start + PREDICTED_AT_ONCE],
                place[start : start + PREDICTED_AT_ONCE],
            )
            said = predict(part, loaded).assign(track_id=part["track_id"])
            said["models_trained_at"] = max(model["trained_at"] for model in loaded.values())
            if index:
                said["similar"] = None
                alike = [
                    index.track_ids_[found]
                    for found, _ in index.neighbours_of(rows[rows >= 0], workers=-1)
                ]
                said.loc[rows >= 0, "similar"] = pd.Series(alike, said.index[rows >= 0])
            yield said

    log.info("predicting %s songs of %s", f"{len(songs):,}", table)
    db.replace_predictions(url, into, blocks())
    log.info("the predictions are in %s", into)
    return len(songs)


# ---------------------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------------------


def show(options):
    """Print the current models; 2 if there is none."""
    import notify

    rows, reports = [], {}
    for name in MODELS:
        report = read_report(name, options.models_dir)
        if not report:
            there = _paths(name, options.models_dir)[0].exists()
            rows.append((name, "damaged" if there else "not trained", *[""] * 5))
            continue
        versions = len(list_versions(name, options.models_dir))
        reports[name] = {key: report[key] for key in report if key not in ("plot", "data")} | {
            "versions_kept": versions
        }
        age = datetime.now(UTC) - datetime.fromisoformat(report["trained_at"])
        rows.append(
            (
                name,
                *notify.metric_and_change(report),
                f"{report['rows']:,}",
                f"{notify.duration(age.total_seconds())} ago",
                notify.size(report["bytes"]),
                versions,
            )
        )
    if options.json:
        print(json.dumps(reports, indent=1))
    else:
        notify.print_table(
            ("model", "metric", "change>", "songs>", "trained", "size>", "older>"),
            rows,
            above=[(f"Models in {options.models_dir}", "bold")],
        )
    return 0 if reports else 2


def similar(options):
    """Print the songs most like one song."""
    import notify

    index = load_model("similar", options.models_dir)["estimator"]
    song = lambda row: {
        "track_id": index.track_ids_[row],
        "track_name": index.titles_[row],
        "artist_name": index.artists_[row],
    }
    rows, asked = (
        index.find(options.song, options.artist),
        f'"{options.song}"' + f" by {options.artist}" * bool(options.artist),
    )
    if not rows:
        near = "".join(f"\n  {title}" for title in index.suggestions(options.song))
        raise ModelError(f"no song is called {asked}" + (f"; did you mean:{near}" if near else ""))
    if len(rows) > 1:
        choices = "".join(
            "\n  {track_id}  {track_name}, by {artist_name}".format(**song(row))
            for row in rows[:20]
        )
        raise ModelError(
            f"{len(rows):,} songs could be meant by {asked}; say which, --artist NAME or a track_id:{choices}"
            + f"\n  and {len(rows) - 20:,} more" * (len(rows) > 20)
        )
    found = zip(*index.neighbours(rows[0], options.k, options.same_artist))
    answers = [song(row) | {"similarity": round(float(alike), 4)} for row, alike in found]
    if options.json:
        print(json.dumps({"song": song(rows[0]), "similar": answers}, indent=1, ensure_ascii=False))
    else:
        lines = [
            (f"{a['similarity']:.3f}", a["track_name"], a["artist_name"], a["track_id"])
            for a in answers
        ]
        notify.print_table(
            ("alike>", "title", "artist", "track_id"),
            lines,
            above=[("Like {track_name} by {artist_name}".format(**song(rows[0])), "bold")],
        )
    return 0


def predict_songs(options):
    """Write the rows of a CSV with the predictions added, or print the first of them; or put those of a table into another."""
    import notify

    if options.into:
        predict_table(db.database_url(), options.table_name, options.into, options.models_dir)
        return 0
    rows, songs = db.read_csv(options.csv)
    missing = [
        name for name in db.REQUIRED if songs[name].isna().all() or (songs[name] == "").all()
    ]
    if len({*missing} & {*AUDIO}) > len(AUDIO) / 2:
        raise DataError(
            f"{options.csv} lacks most of what the models listen to: {', '.join(missing)}; it has {', '.join(rows)}. "
            "Rename its columns"
        )
    if missing:
        log.warning(
            "%s has nothing in the columns %s; that is treated as missing",
            options.csv,
            ", ".join(missing),
        )
    added = predict(songs, load_models(options.models_dir, PREDICTING))
    whole = rows.assign(**added)
    if options.out:
        write_atomically(Path(options.out), partial(whole.to_csv, index=False))
        log.info("%s songs with %s written to %s", f"{len(whole):,}", ", ".join(added), options.out)
    elif options.json:
        print(whole.to_json(orient="records", lines=True, force_ascii=False), end="")
    else:
        shown = added.rename(
            columns=lambda name: name.removesuffix("_predicted").removeprefix("genre_") + ">"
        )
        shown = (
            songs[["track_name", "artist_name"]]
            .set_axis(["title", "artist"], axis=1)
            .join(shown)
            .head(20)
        )
        cells = [
            [f"{cell:.2f}" if isinstance(cell, float) else cell for cell in row]
            for row in shown.to_numpy(object)
        ]
        notify.print_table(
            [*shown], cells, above=[(f"{len(whole):,} songs; --out FILE writes them all", "bold")]
        )
    return 0


def roll_back(options):
    """Put the previous version of a model back."""
    folder = Path(options.models_dir).resolve()
    if not folder.is_dir():
        raise ModelError(f"there is no folder {folder}; say where the models are: --models-dir DIR")
    with one_run_at_a_time(folder):
        report = rollback(options.model, folder)
    metric, value = next(iter(report["metrics"].items()))
    print(f"{options.model} is again the version trained {report['trained_at']} ({metric} {value})")
    return 0


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="models.py", description="Look at the trained models and use them."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    folder, machine = (argparse.ArgumentParser(add_help=False) for _ in range(2))
    folder.add_argument(
        "--models-dir", default=str(MODELS_DIR), help="folder of the models (default: %(default)s)"
    )
    machine.add_argument("--json", action="store_true", help="print JSON instead of a table")

    def command(name, run, text, *parents):
        added = commands.add_parser(name, parents=[folder, *parents], help=text)
        added.set_defaults(run=run)
        return added.add_argument

    command("show", show, "the current models: metrics, age, versions kept", machine)
    add = command("similar", similar, "the songs most like one song", machine)
    add("song", help="its title or track_id")
    add("-k", type=int, default=10, help="how many (default: %(default)s)")
    add("--artist", help="which of several songs of one title")
    add("--same-artist", action="store_true", help="also more than three of ten by the same artist")
    add = command(
        "predict",
        predict_songs,
        "add the predictions to the rows of a CSV, or put those of a table into another",
        machine,
    )
    add("csv", nargs="?", help="songs, with the column names of the table or their aliases")
    add(
        "--table-name",
        default="spotify_songs",
        help="with --into: the table of songs (default: %(default)s)",
    )
    add(
        "--into",
        metavar="TABLE",
        help="put predictions and neighbours of all songs into this table",
    )
    add("--out", help="the CSV to write (default: print the first 20)")
    command("rollback", roll_back, "put the previous version of a model back")(
        "model", choices=list(MODELS)
    )
    options = parser.parse_args(arguments)
    if options.run is predict_songs and bool(options.csv) == bool(options.into):
        parser.error("predict needs a CSV file or --into TABLE")
    if options.run is similar and options.k < 1:
        parser.error(f"-k must be 1 or more; it is {options.k}")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        return options.run(options)
    except (db.Expected, OSError) as error:
        print(db.redact(str(error)), file=sys.stderr)
        return 75 if isinstance(error, Locked) else 2


if __name__ == "__main__":
    sys.exit(main())
